// The kernels' math in plain loops over host memory. The tests compare it with the ONNX bodies and with the kernels.

#include <algorithm>
#include <array>
#include <functional>
#include <vector>

#include "half.h"
#include "mish.h"
#include "nms.h"
#include "yolo.h"

namespace darktrt {
namespace {

// Calls function(offset in a tensor of this layout, offset in y, whether it is a channel and not padding) for every element.
template <typename Function> void for_each_offset(const Layout& layout, int64_t y_row, int64_t y_first, Function function)
{
    const int64_t size = layout.row_size();
    for (int64_t row = 0; row < layout.rows; ++row) {
        for (int64_t i = 0; i < size; ++i) {
            const int64_t channel = i / layout.span * layout.vector_width + i % layout.vector_width;
            function(row * size + i, row * y_row + y_first + i, channel < layout.channels);
        }
    }
}

template <typename T> T stored(float value, float) { return static_cast<T>(value); }
template <> int8_t stored<int8_t>(float value, float scale) { return nearest_level(value / scale); }

template <typename T> float loaded(T value, float) { return static_cast<float>(value); }
template <> float loaded<int8_t>(int8_t value, float scale) { return static_cast<float>(value) * scale; }

struct Operand {
    const void* data;
    DarktrtFormat format;
};

template <typename In, typename Out>
void apply(const Layout& layout, Operand x, const Operand* residual, void* y, DarktrtFormat format, int64_t y_row,
           int64_t y_first)
{
    for_each_offset(layout, y_row, y_first, [&](int64_t from, int64_t to, bool is_channel) {
        float value = 0.f;
        if (is_channel) {
            value = mish(loaded(static_cast<const In*>(x.data)[from], x.format.scale));
            if (residual) value += loaded(static_cast<const In*>(residual->data)[from], residual->format.scale);
        }
        static_cast<Out*>(y)[to] = stored<Out>(value, format.scale);
    });
}

void apply(const Layout& layout, Operand x, const Operand* residual, void* y, DarktrtFormat format, int64_t y_row,
           int64_t y_first)
{
    const auto function = x.format.type == DARKTRT_FLOAT   ? apply<float, float>
                          : x.format.type == DARKTRT_INT8  ? apply<int8_t, int8_t>
                          : format.type == DARKTRT_HALF    ? apply<Half, Half>
                                                           : apply<Half, int8_t>;
    function(layout, x, residual, y, format, y_row, y_first);
}

template <typename T> void decode(const DarktrtYolo& yolo, const Heads& heads, float* boxes, float* scores)
{
    const auto count = static_cast<uint32_t>(anchor_count(yolo));
    for (int32_t image = 0; image < yolo.batch; ++image) {
        for (uint32_t anchor = 0; anchor < count; ++anchor) {
            const Location location = locate<Kinds::any>(yolo, anchor);
            const Raw<T> raw = raw_at<T>(yolo, heads, image, location);
            const Box box = decode_box(yolo, location, raw);
            for (const float edge : {box.x1, box.y1, box.x2, box.y2}) *boxes++ = edge;
            const DarktrtHead& head = yolo.head[location.head];
            const float objectness = value_of(raw[objectness_channel(head.kind)], head.new_coords);
            const Scoring scoring = scoring_of(yolo, location, raw, objectness);
            const Raw<T> classes = raw.from(class_channel(head.kind));
            const int32_t form = class_form<Kinds::any>(head);
            for (int32_t i = 0; i < yolo.classes; ++i) {
                *scores++ = class_value<Kinds::any>(classes[i], form, scoring.largest) * scoring.factor;
            }
        }
    }
}

// The best candidates of an image as keys, the best first.
template <typename T>
std::vector<uint64_t> best_candidates(const DarktrtYolo& yolo, const DarktrtNms& nms, const Heads& heads, float threshold,
                                      int32_t image)
{
    std::vector<uint64_t> keys;
    const auto count = static_cast<uint32_t>(anchor_count(yolo));
    for (uint32_t anchor = 0; anchor < count; ++anchor) {
        const Location location = locate<Kinds::any>(yolo, anchor);
        const Raw<T> raw = raw_at<T>(yolo, heads, image, location);
        const DarktrtHead& head = yolo.head[location.head];
        const float objectness = value_of(raw[objectness_channel(head.kind)], head.new_coords);
        if (!may_pass(objectness, threshold, head.new_coords) || !is_finite(decode_box(yolo, location, raw))) continue;
        const Scoring scoring = scoring_of(yolo, location, raw, objectness);
        const Raw<T> classes = raw.from(class_channel(head.kind));
        const int32_t form = class_form<Kinds::any>(head);
        for (int32_t i = 0; i < yolo.classes; ++i) {
            const float score = class_value<Kinds::any>(classes[i], form, scoring.largest) * scoring.factor;
            if (score > threshold) keys.push_back(key_of(score, anchor * yolo.classes + i));
        }
    }
    const auto kept = keys.begin() + std::min<int64_t>(keys.size(), nms.max_candidates);
    std::partial_sort(keys.begin(), kept, keys.end(), std::greater<>());
    keys.erase(kept, keys.end());
    return keys;
}

struct Detections {
    int32_t* count;
    float *boxes, *scores;
    int32_t* classes;
};

template <typename T>
void detect(const DarktrtYolo& yolo, const DarktrtNms& nms, const Heads& heads, float score_threshold, float iou_threshold,
            const float* image_size, const Detections& out)
{
    const int64_t room = nms.max_detections;
    std::fill_n(out.boxes, yolo.batch * room * 4, 0.f);
    std::fill_n(out.scores, yolo.batch * room, 0.f);
    std::fill_n(out.classes, yolo.batch * room, 0);
    for (int32_t image = 0; image < yolo.batch; ++image) {
        const Suppression rule = suppression_of(yolo, nms, iou_threshold, image_size, image);
        const std::vector<uint64_t> keys = best_candidates<T>(yolo, nms, heads, score_threshold, image);
        int32_t count = 0;
        for (size_t i = 0; i < keys.size() && count < room; ++i) {
            const Location location = locate<Kinds::any>(yolo, index_of(keys[i]) / yolo.classes);
            const Box box = decode_box(yolo, location, raw_at<T>(yolo, heads, image, location));
            const auto kind = static_cast<int32_t>(index_of(keys[i]) % yolo.classes);
            bool kept = true;
            for (int32_t j = 0; j < count && kept; ++j) {
                const float* edges = out.boxes + (image * room + j) * 4;
                const Box other{edges[0], edges[1], edges[2], edges[3]};
                kept = out.classes[image * room + j] != kind || !suppresses(rule, other, box);
            }
            if (!kept) continue;
            const int64_t slot = image * room + count++;
            std::copy_n(std::array{box.x1, box.y1, box.x2, box.y2}.data(), 4, out.boxes + slot * 4);
            out.scores[slot] = score_of(keys[i]);
            out.classes[slot] = kind;
        }
        out.count[image] = count;
    }
}

Heads heads_of(const DarktrtYolo& yolo, const void* const* pointers)
{
    Heads heads{};
    std::copy_n(pointers, yolo.heads, heads.raw);
    return heads;
}

}  // namespace
}  // namespace darktrt

using namespace darktrt;

extern "C" {

int darktrt_host_mish(DarktrtShape shape, const void* x, DarktrtFormat x_format, void* y, DarktrtFormat y_format)
{
    if (!is_supported(shape, x_format, x_format, y_format)) return DARKTRT_UNSUPPORTED;
    const Layout layout(shape, x_format, shape.channels);
    apply(layout, {x, x_format}, nullptr, y, y_format, layout.row_size(), 0);
    return 0;
}

int darktrt_host_mish_add(DarktrtShape shape, const void* x, DarktrtFormat x_format, const void* residual,
                          DarktrtFormat residual_format, void* y, DarktrtFormat y_format)
{
    if (!is_supported(shape, x_format, residual_format, y_format)) return DARKTRT_UNSUPPORTED;
    const Layout layout(shape, x_format, shape.channels);
    const Operand added{residual, residual_format};
    apply(layout, {x, x_format}, &added, y, y_format, layout.row_size(), 0);
    return 0;
}

int darktrt_host_mish_concat(DarktrtShape shape, const void* x, DarktrtFormat x_format, const void* second,
                             DarktrtFormat second_format, int32_t second_channels, void* y, DarktrtFormat y_format)
{
    if (!is_supported(shape, x_format, second_format, y_format) || second_channels < 0) return DARKTRT_UNSUPPORTED;
    const Layout one(shape, x_format, shape.channels), two(shape, second_format, second_channels);
    if (one.padded()) return DARKTRT_UNSUPPORTED;
    const int64_t row = one.row_size() + two.row_size();
    apply(one, {x, x_format}, nullptr, y, y_format, row, 0);
    apply(two, {second, second_format}, nullptr, y, y_format, row, one.row_size());
    return 0;
}

int darktrt_host_decode(const DarktrtYolo* yolo, int32_t type, const void* const* heads, float* boxes, float* scores)
{
    if (!is_supported(*yolo) || (type != DARKTRT_FLOAT && type != DARKTRT_HALF)) return DARKTRT_UNSUPPORTED;
    (type == DARKTRT_FLOAT ? decode<float> : decode<Half>)(*yolo, heads_of(*yolo, heads), boxes, scores);
    return 0;
}

int darktrt_host_detect(const DarktrtYolo* yolo, const DarktrtNms* nms, int32_t type, const void* const* heads,
                        const float* score_threshold, const float* iou_threshold, const float* image_size, int32_t* count,
                        float* boxes, float* scores, int32_t* classes)
{
    const bool known = type == DARKTRT_FLOAT || type == DARKTRT_HALF;
    if (!is_supported(*yolo) || !is_supported(*nms) || !known) return DARKTRT_UNSUPPORTED;
    const auto function = type == DARKTRT_FLOAT ? detect<float> : detect<Half>;
    const Detections out{count, boxes, scores, classes};
    function(*yolo, *nms, heads_of(*yolo, heads), *score_threshold, *iou_threshold, image_size, out);
    return 0;
}

}
