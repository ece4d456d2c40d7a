// The order of candidates, and suppression: the math of YoloDetect in plugins/ops.py, operation for operation.
#pragma once

#include "hd.h"
#include "kernels.h"
#include "yolo.h"

namespace darktrt {

constexpr int32_t max_candidates_limit = 3840;

// The order of candidates as a number, greater for the better one: by score, then by the lower index, which is
// anchor * classes + class. No key is 0. (Adding zero makes -0 and 0 equal.)
HOST_DEVICE uint64_t key_of(float score, uint32_t index)
{
    const uint32_t bits = bits_of(score + 0.f);
    const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(rising) << 32 | static_cast<uint32_t>(~index);
}

HOST_DEVICE float score_of(uint64_t key)
{
    const uint32_t rising = static_cast<uint32_t>(key >> 32);
    return float_of(rising >> 31 ? rising & 0x7fffffffu : ~rising);
}

HOST_DEVICE uint32_t index_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

struct Suppression {
    int32_t kind;
    float exponent, threshold;
    float width, height;  // of the image, for the distance term
};

// Makes the divisor positive where there is no area; it changes no other divisor.
HOST_DEVICE float divisor(float area) { return fmaxf(area, 1e-37f); }

HOST_DEVICE float area(const Box& box) { return divisor((box.x2 - box.x1) * (box.y2 - box.y1)); }

HOST_DEVICE float intersection_over_union(const Box& a, const Box& b)
{
    const float width = fmaxf(fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1), 0.f);
    const float height = fmaxf(fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1), 0.f);
    const float intersection = width * height;
    return intersection / (area(a) + area(b) - intersection);
}

// (squared distance of the centres / squared diagonal of the box around both) ^ exponent, of boxes relative to the image.
HOST_DEVICE float distance_term(const Suppression& rule, const Box& a, const Box& b)
{
    const Box p{a.x1 / rule.width, a.y1 / rule.height, a.x2 / rule.width, a.y2 / rule.height};
    const Box q{b.x1 / rule.width, b.y1 / rule.height, b.x2 / rule.width, b.y2 / rule.height};
    const float width = fmaxf(p.x2, q.x2) - fminf(p.x1, q.x1);
    const float height = fmaxf(p.y2, q.y2) - fminf(p.y1, q.y1);
    const float dx = (p.x1 + p.x2) * 0.5f - (q.x1 + q.x2) * 0.5f;
    const float dy = (p.y1 + p.y2) * 0.5f - (q.y1 + q.y2) * 0.5f;
    const float ratio = (dx * dx + dy * dy) / divisor(width * width + height * height);
    // in double, so that the float is correctly rounded and the same everywhere, as that of exp is
    return static_cast<float>(pow(static_cast<double>(ratio), static_cast<double>(rule.exponent)));
}

// Whether the better of two candidates of one class suppresses the other. The distance term is never negative, so most pairs
// are decided without it.
HOST_DEVICE bool suppresses(const Suppression& rule, const Box& a, const Box& b)
{
    const float iou = intersection_over_union(a, b);
    if (!(iou > rule.threshold)) return false;
    return rule.kind == DARKTRT_PLAIN || iou - distance_term(rule, a, b) > rule.threshold;
}

HOST_DEVICE Suppression suppression_of(const DarktrtYolo& yolo, const DarktrtNms& nms, float threshold, const float* image_size,
                                       int32_t image)
{
    const float width = image_size ? image_size[2 * image] : static_cast<float>(yolo.width);
    const float height = image_size ? image_size[2 * image + 1] : static_cast<float>(yolo.height);
    return {nms.kind, nms.exponent, threshold, width, height};
}

inline bool is_supported(const DarktrtNms& nms)
{
    return (nms.kind == DARKTRT_PLAIN || (nms.kind == DARKTRT_DISTANCE && nms.exponent > 0.f)) && nms.max_candidates > 0 &&
           nms.max_candidates <= max_candidates_limit && nms.max_detections > 0 && nms.max_detections <= nms.max_candidates;
}

}  // namespace darktrt
