// Decoding the raw tensor of a head: the math of YoloDecode in plugins/ops.py, operation for operation.
#pragma once

#include "hd.h"
#include "kernels.h"

namespace darktrt {

struct alignas(16) Box {
    float x1, y1, x2, y2;
};

struct Heads {
    const void* raw[DARKTRT_MAX_HEADS];
};

HOST_DEVICE float logistic(float x) { return 1.f / (1.f + exponential(-x)); }

HOST_DEVICE bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }

HOST_DEVICE bool is_finite(const Box& box)
{
    return is_finite(box.x1) && is_finite(box.y1) && is_finite(box.x2) && is_finite(box.y2);
}

// Which kinds of heads a detector has. Code for [yolo] alone lacks what the others need.
enum class Kinds { yolo, any };

template <Kinds kinds> HOST_DEVICE int32_t kind_of(const DarktrtHead& head)
{
    return kinds == Kinds::yolo ? DARKTRT_YOLO : head.kind;
}

inline bool has_only_yolo(const DarktrtYolo& yolo)
{
    bool only = true;
    for (int32_t i = 0; i < yolo.heads; ++i) only = only && yolo.head[i].kind == DARKTRT_YOLO;
    return only;
}

// An anchor of a head in a cell of its grid.
struct Location {
    int32_t head, kind, anchor, cell, cells;
};

// The location of an anchor by its index, which counts over the heads, in a head over its anchors, then rows, then columns.
template <Kinds kinds> HOST_DEVICE Location locate(const DarktrtYolo& yolo, uint32_t anchor)
{
    int32_t head = 0;
    uint32_t cells = 0;
    for (;; ++head) {
        cells = static_cast<uint32_t>(yolo.head[head].rows * yolo.head[head].columns);
        const uint32_t size = cells * static_cast<uint32_t>(yolo.head[head].anchors);
        if (anchor < size) break;
        anchor -= size;
    }
    return {head, kind_of<kinds>(yolo.head[head]), static_cast<int32_t>(anchor / cells), static_cast<int32_t>(anchor % cells),
            static_cast<int32_t>(cells)};
}

// The channels of an anchor: x, y, width and height, every step-th one, then objectness and the classes.
HOST_DEVICE int32_t box_step(int32_t kind) { return kind == DARKTRT_GAUSSIAN_YOLO ? 2 : 1; }
HOST_DEVICE int32_t objectness_channel(int32_t kind) { return 4 * box_step(kind); }
HOST_DEVICE int32_t class_channel(int32_t kind) { return objectness_channel(kind) + 1; }

// The channels at a location in one image.
template <typename T> struct Raw {
    const T* first;
    int64_t stride;

    HOST_DEVICE Raw from(int32_t channel) const { return {first + channel * stride, stride}; }
    HOST_DEVICE float operator[](int32_t channel) const { return static_cast<float>(first[channel * stride]); }
};

template <typename T>
HOST_DEVICE Raw<T> raw_at(const DarktrtYolo& yolo, const Heads& heads, int32_t image, const Location& location)
{
    const int64_t anchor = int64_t{image} * yolo.head[location.head].anchors + location.anchor;
    const int64_t first = anchor * (class_channel(location.kind) + yolo.classes) * location.cells + location.cell;
    return {static_cast<const T*>(heads.raw[location.head]) + first, location.cells};
}

HOST_DEVICE float value_of(float raw, int32_t new_coords) { return new_coords ? raw : logistic(raw); }

// Centre minus and plus half the extent, along one axis of `cells` cells over `size` pixels.
HOST_DEVICE void decode_axis(float centre_raw, float extent_raw, int32_t cell, int32_t cells, int32_t size, float anchor,
                             const DarktrtHead& head, float* low, float* high)
{
    const float stride = static_cast<float>(size) / static_cast<float>(cells);
    const float offset = (head.scale_x_y - 1.f) * 0.5f;
    const float scaled = value_of(centre_raw, head.new_coords) * head.scale_x_y;
    const float centre = (scaled + (static_cast<float>(cell) - offset)) * stride;
    const float doubled = extent_raw * 2.f;
    const float factor = head.new_coords ? doubled * doubled : exponential(extent_raw);
    const float reach = factor * anchor * 0.5f;
    *low = centre - reach;
    *high = centre + reach;
}

template <typename T> HOST_DEVICE Box decode_box(const DarktrtYolo& yolo, const Location& location, const Raw<T>& raw)
{
    const DarktrtHead& head = yolo.head[location.head];
    const float* anchor = head.anchor_sizes + 2 * location.anchor;
    const int32_t step = box_step(location.kind);
    Box box;
    const int32_t column = location.cell % head.columns, row = location.cell / head.columns;
    decode_axis(raw[0], raw[2 * step], column, head.columns, yolo.width, anchor[0], head, &box.x1, &box.x2);
    decode_axis(raw[step], raw[3 * step], row, head.rows, yolo.height, anchor[1], head, &box.y1, &box.y2);
    return box;
}

// The score of a class is class_value * factor; `largest` is the largest raw number of the classes, for a softmax.
struct Scoring {
    float factor, largest;
};

template <typename T>
HOST_DEVICE Scoring scoring_of(const DarktrtYolo& yolo, const Location& location, const Raw<T>& raw, float objectness)
{
    if (location.kind == DARKTRT_YOLO) return {objectness, 0.f};
    if (location.kind == DARKTRT_GAUSSIAN_YOLO) {
        const float sum = logistic(raw[1]) + logistic(raw[3]) + logistic(raw[5]) + logistic(raw[7]);
        return {objectness * (1.f - sum * 0.25f), 0.f};
    }
    const Raw<T> classes = raw.from(class_channel(location.kind));
    float largest = classes[0], sum = 0.f;
    for (int32_t i = 1; i < yolo.classes; ++i) largest = fmaxf(largest, classes[i]);
    for (int32_t i = 0; i < yolo.classes; ++i) sum += exponential(classes[i] - largest);
    return {objectness / sum, largest};
}

// How the classes of a head are read: the value of new_coords, or class_softmax.
constexpr int32_t class_softmax = 2;

template <Kinds kinds> HOST_DEVICE int32_t class_form(const DarktrtHead& head)
{
    return kind_of<kinds>(head) == DARKTRT_REGION ? class_softmax : head.new_coords;
}

template <Kinds kinds> HOST_DEVICE float class_value(float raw, int32_t form, float largest)
{
    return kinds == Kinds::any && form == class_softmax ? exponential(raw - largest) : value_of(raw, form);
}

// Whether any class can pass the threshold: a class probability is at most 1, but that of new_coords is unbounded.
HOST_DEVICE bool may_pass(float objectness, float threshold, int32_t new_coords)
{
    return new_coords || objectness > threshold;
}

inline int64_t anchor_count(const DarktrtYolo& yolo)
{
    int64_t count = 0;
    for (int32_t i = 0; i < yolo.heads; ++i) {
        count += int64_t{yolo.head[i].anchors} * yolo.head[i].rows * yolo.head[i].columns;
    }
    return count;
}

// The limits keep anchor * classes + class and the cells of a head within 32 bits.
inline bool is_supported(const DarktrtYolo& yolo)
{
    bool good = yolo.batch >= 0 && yolo.heads > 0 && yolo.heads <= DARKTRT_MAX_HEADS && yolo.classes > 0 &&
                yolo.classes <= (1 << 20) && yolo.width > 0 && yolo.height > 0;
    for (int32_t i = 0; good && i < yolo.heads; ++i) {
        const DarktrtHead& head = yolo.head[i];
        const bool other = head.kind == DARKTRT_REGION || head.kind == DARKTRT_GAUSSIAN_YOLO;
        const bool known = head.kind == DARKTRT_YOLO || (other && head.new_coords == 0);
        good = known && head.anchors > 0 && head.anchors <= DARKTRT_MAX_ANCHORS && head.rows >= 0 && head.rows <= (1 << 13) &&
               head.columns >= 0 && head.columns <= (1 << 13);
    }
    return good && anchor_count(yolo) < (int64_t{1} << 31) && anchor_count(yolo) * yolo.classes < (int64_t{1} << 32) - 1;
}

}  // namespace darktrt
