// darknet's resize_image and letterbox_image: an RGB image of bytes fitted into the input of a network.
//
// Bilinear between aligned corners, without antialiasing. vision/images.py states the same in NumPy; both compute the same bits
// where the compiler makes no fused multiply-adds (--fmad=false, -ffp-contract=off).
#pragma once

#include "hd.h"
#include "kernels.h"

namespace darktrt {

constexpr float letterbox_fill = 0.5f;

// The two old pixels that a new one lies between, and how far from the first to the second.
struct Taps {
    int32_t first, second;
    float fraction;
};

// The last pixel is the old image's last: (size - 1) / (new_size - 1) * (new_size - 1) can fall short of size - 1 in float.
HOST_DEVICE Taps taps_at(int32_t i, int32_t size, int32_t new_size)
{
    if (i == new_size - 1) return {size - 1, size - 1, 0.f};
    const float scale = static_cast<float>(size - 1) / static_cast<float>(new_size - 1);
    const float position = static_cast<float>(i) * scale;
    const auto first = static_cast<int32_t>(position);
    return {first, first + 1 < size ? first + 1 : size - 1, position - static_cast<float>(first)};
}

HOST_DEVICE float unit(float level) { return level / 255.f; }

HOST_DEVICE float mix(float first, float second, float fraction) { return (1.f - fraction) * first + fraction * second; }

// 0..1 to the nearest level, halves to even: adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
HOST_DEVICE uint8_t level_of(float value) { return static_cast<uint8_t>(bits_of(value * 255.f + 12582912.f)); }

// stb_image's luma, by which darknet reads an image for a network of one channel.
HOST_DEVICE uint32_t luma(uint32_t red, uint32_t green, uint32_t blue) { return (77 * red + 150 * green + 29 * blue) >> 8; }

// Where the resized image lies in the network's input, in pixels of the input.
struct Inner {
    int32_t x, y, width, height;
};

HOST_DEVICE Inner inner_of(const DarktrtFit& fit, int32_t width, int32_t height)
{
    Inner inner{0, 0, fit.width, fit.height};
    if (fit.letterbox) {
        const int64_t wide = fit.width, high = fit.height;
        if (static_cast<float>(fit.width) / static_cast<float>(width) <
            static_cast<float>(fit.height) / static_cast<float>(height)) {
            const auto rows = static_cast<int32_t>(height * wide / width);
            inner.height = rows > 1 ? rows : 1;
        } else {
            const auto columns = static_cast<int32_t>(width * high / height);
            inner.width = columns > 1 ? columns : 1;
        }
        inner.x = (fit.width - inner.width) / 2;
        inner.y = (fit.height - inner.height) / 2;
    }
    return inner;
}

// Where the image lies, for who places boxes: the rows offset (x y x y), scale (x y x y) and edges (w h w h) of image = (input -
// offset) * scale. The offset is the exact half, while the pixels are at the half rounded down, as in darknet.
HOST_DEVICE void write_placement(const DarktrtFit& fit, const Inner& inner, int32_t width, int32_t height, float* placement)
{
    for (int32_t i = 0; i < 4; i += 2) {
        placement[i] = static_cast<float>(fit.width - inner.width) * 0.5f;
        placement[i + 1] = static_cast<float>(fit.height - inner.height) * 0.5f;
        placement[4 + i] = static_cast<float>(width) / static_cast<float>(inner.width);
        placement[5 + i] = static_cast<float>(height) / static_cast<float>(inner.height);
        placement[8 + i] = static_cast<float>(width);
        placement[9 + i] = static_cast<float>(height);
    }
}

// The coordinate of a box, number `i` of x1 y1 x2 y2, in pixels of the image and inside it.
HOST_DEVICE float placed(float value, const float* placement, int32_t i)
{
    const float free = (value - placement[i]) * placement[4 + i];
    return free < 0.f ? 0.f : free > placement[8 + i] ? placement[8 + i] : free;
}

// Types of pixels and of a network's input.
inline bool is_level_type(int32_t type) { return type == DARKTRT_UINT8 || type == DARKTRT_HALF || type == DARKTRT_FLOAT; }

inline int64_t bytes_of(int32_t type) { return type == DARKTRT_UINT8 ? 1 : type == DARKTRT_HALF ? 2 : 4; }
inline int64_t bytes_of(const DarktrtImage& image, int32_t type) { return bytes_of(type) * 3 * image.width * image.height; }
inline int64_t bytes_of(const DarktrtFit& fit, int32_t type) { return bytes_of(type) * fit.channels * fit.height * fit.width; }

constexpr int32_t side_limit = 1 << 24;  // floats count to there

inline bool is_supported(const DarktrtFit& fit, int32_t count, const DarktrtImage* images)
{
    const auto is_side = [](int32_t side) { return side > 0 && side <= side_limit; };
    bool supported = count >= 0 && is_side(fit.width) && is_side(fit.height) && (fit.channels == 1 || fit.channels == 3) &&
                     (fit.letterbox == 0 || fit.letterbox == 1);
    for (int32_t i = 0; i < count && supported; ++i) {
        supported = images[i].pixels && is_side(images[i].width) && is_side(images[i].height);
    }
    return supported;
}

}  // namespace darktrt
