// darknet's resize_image and letterbox_image: an RGB image of bytes fitted into the input of a network.
//
// Bilinear between aligned corners, without antialiasing. vision/images.py states the same in NumPy; both compute the same bits
// where the compiler makes no fused multiply-adds (--fmad=false, -ffp-contract=off).
#pragma once

#include "hd.h"
#include "kernels.h"

namespace darktrt {

constexpr float letterbox_fill = 0.5f;

// The columns or the rows of an image, resized.
struct Axis {
    int32_t size, new_size;
    float scale;  // an old position is a new one times it
};

inline Axis axis_of(int32_t size, int32_t new_size)
{
    return {size, new_size, static_cast<float>(size - 1) / static_cast<float>(new_size > 1 ? new_size - 1 : 1)};
}

// The two old pixels that a new one lies between, and how far from the first to the second.
struct Taps {
    int32_t first, second;
    float fraction;
};

// The last pixel is the old image's last: scale * (new_size - 1) can fall short of size - 1 in float.
HOST_DEVICE Taps taps_at(const Axis& axis, int32_t i)
{
    const int32_t last = axis.size - 1;
    if (i == axis.new_size - 1) return {last, last, 0.f};
    const float position = static_cast<float>(i) * axis.scale;
    const auto first = static_cast<int32_t>(position);
    return {first, first < last ? first + 1 : last, position - static_cast<float>(first)};
}

HOST_DEVICE float unit(float level) { return level / 255.f; }

HOST_DEVICE float mix(float first, float second, float fraction) { return (1.f - fraction) * first + fraction * second; }

// 0..1 to the nearest level, halves to even: adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
HOST_DEVICE uint8_t level_of(float value) { return static_cast<uint8_t>(bits_of(value * 255.f + 12582912.f)); }

// stb_image's luma, by which darknet reads an image for a network of one channel.
HOST_DEVICE uint32_t luma(uint32_t red, uint32_t green, uint32_t blue) { return (77 * red + 150 * green + 29 * blue) >> 8; }

// Where an image lies in the network's input: its columns and rows there, and the input's pixel at which they begin.
struct Place {
    Axis across, down;
    int32_t x, y;
};

inline Place place_of(const DarktrtFit& fit, const DarktrtImage& image)
{
    int32_t columns = fit.width, rows = fit.height;
    if (fit.letterbox) {
        const auto ratio = [](int32_t size, int32_t of) { return static_cast<float>(size) / static_cast<float>(of); };
        const auto part = [](int64_t size, int64_t other, int64_t of) {
            const auto whole = static_cast<int32_t>(size * other / of);
            return whole > 1 ? whole : 1;
        };
        if (ratio(fit.width, image.width) < ratio(fit.height, image.height)) {
            rows = part(image.height, fit.width, image.width);
        } else {
            columns = part(image.width, fit.height, image.height);
        }
    }
    return {axis_of(image.width, columns), axis_of(image.height, rows), (fit.width - columns) / 2, (fit.height - rows) / 2};
}

HOST_DEVICE void write_size(const Place& place, float* image_size)
{
    image_size[0] = static_cast<float>(place.across.new_size);
    image_size[1] = static_cast<float>(place.down.new_size);
}

// The place, for who places boxes: the rows offset (x y x y), scale (x y x y) and edges (w h w h) of image = (input - offset) *
// scale. The offset is the exact half, while the pixels begin at the half rounded down, as in darknet.
HOST_DEVICE void write_placement(const DarktrtFit& fit, const Place& place, float* placement)
{
    for (int32_t i = 0; i < 4; ++i) {
        const Axis& axis = i % 2 == 0 ? place.across : place.down;
        placement[i] = static_cast<float>((i % 2 == 0 ? fit.width : fit.height) - axis.new_size) * 0.5f;
        placement[4 + i] = static_cast<float>(axis.size) / static_cast<float>(axis.new_size);
        placement[8 + i] = static_cast<float>(axis.size);
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
