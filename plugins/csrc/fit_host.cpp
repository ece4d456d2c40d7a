// Fitting images into a network's input on the CPU: across the columns, once for every row that is used, then down the rows.
//
// A part of the host library, and by itself what vision/images.py resizes with: with C's memory, so that it runs where there is
// no C++ library, or an older one.

#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "fit.h"
#include "half.h"

namespace darktrt {
namespace {

template <typename Pixel> struct Units {
    float operator()(Pixel level) const { return unit(static_cast<float>(level)); }
};
template <> struct Units<uint8_t> {
    float of[256];

    Units()
    {
        for (int32_t level = 0; level < 256; ++level) of[level] = unit(static_cast<float>(level));
    }
    float operator()(uint8_t level) const { return of[level]; }
};

template <int32_t Channels, typename Pixel> struct Reader {
    Units<Pixel> units;

    float operator()(const Pixel* rgb, int32_t channel) const
    {
        if (Channels == 3) return units(rgb[channel]);
        const auto level = [&](int32_t i) { return static_cast<uint32_t>(static_cast<float>(rgb[i])); };
        return units(static_cast<Pixel>(static_cast<float>(luma(level(0), level(1), level(2)))));
    }
};

struct Free {
    void operator()(void* memory) const { free(memory); }
};
template <typename T> using Array = std::unique_ptr<T[], Free>;

// Null where there is no memory.
template <typename T> Array<T> array_of(int64_t count)
{
    return Array<T>(static_cast<T*>(malloc(count * sizeof(T))));
}

Array<Taps> taps_of(const Axis& axis)
{
    Array<Taps> taps = array_of<Taps>(axis.new_size);
    for (int32_t i = 0; taps && i < axis.new_size; ++i) taps[i] = taps_at(axis, i);
    return taps;
}

// Where an element of a row lies: planes for the floats of (channels, height, width), else pixels of (height, width, channels).
struct Steps {
    int64_t channel, column;
};

template <int32_t Channels, typename Pixel>
void mix_across(const Reader<Channels, Pixel>& read, const Pixel* row, const Taps* across, int32_t columns, Steps steps,
                float* y)
{
    for (int32_t i = 0; i < columns; ++i) {
        const Taps& taps = across[i];
        const Pixel *first = row + int64_t{3} * taps.first, *second = row + int64_t{3} * taps.second;
        for (int32_t channel = 0; channel < Channels; ++channel) {
            y[channel * steps.channel] = mix(read(first, channel), read(second, channel), taps.fraction);
        }
        y += steps.column;
    }
}

template <typename T> T stored(float value) { return static_cast<T>(value); }
template <> uint8_t stored<uint8_t>(float value) { return level_of(value); }

template <typename Out> void mix_down(const float* first, const float* second, float fraction, int64_t count, Out* y)
{
    for (int64_t i = 0; i < count; ++i) y[i] = stored<Out>(mix(first[i], second[i], fraction));
}

template <int32_t Channels, typename Pixel, typename Out>
int fit_image(const DarktrtFit& fit, const DarktrtImage& image, Out* y)
{
    constexpr bool planes = !std::is_same_v<Out, uint8_t>;
    const Place place = place_of(fit, image);
    const int32_t columns = place.across.new_size, rows = place.down.new_size;
    const int64_t area = int64_t{fit.height} * fit.width, row_size = int64_t{Channels} * columns;
    const Array<Taps> across = taps_of(place.across);
    const Steps steps = planes ? Steps{columns, 1} : Steps{1, Channels};
    const Reader<Channels, Pixel> read;
    // taps are rows next to each other, so of the rows that were mixed across only the latest odd and even one can be needed
    const Array<float> mixed[2] = {array_of<float>(row_size), array_of<float>(row_size)};
    if (!across || !mixed[0] || !mixed[1]) return DARKTRT_UNSUPPORTED;
    if (columns < fit.width || rows < fit.height) std::fill_n(y, Channels * area, stored<Out>(letterbox_fill));
    int32_t mixed_rows[2] = {-1, -1};
    const auto row_at = [&](int32_t row) {
        float* const y_row = mixed[row % 2].get();
        if (mixed_rows[row % 2] != row) {
            const auto pixels = static_cast<const Pixel*>(image.pixels) + int64_t{3} * row * image.width;
            mix_across(read, pixels, across.get(), columns, steps, y_row);
            mixed_rows[row % 2] = row;
        }
        return y_row;
    };
    for (int32_t i = 0; i < rows; ++i) {
        const Taps down = taps_at(place.down, i);
        const float *first = row_at(down.first), *second = row_at(down.second);
        const int64_t start = int64_t{place.y + i} * fit.width + place.x;
        if (planes) {
            for (int32_t channel = 0; channel < Channels; ++channel) {
                const int64_t part = int64_t{channel} * columns;
                mix_down(first + part, second + part, down.fraction, columns, y + channel * area + start);
            }
        } else {
            mix_down(first, second, down.fraction, row_size, y + Channels * start);
        }
    }
    return 0;
}

template <typename Pixel, typename Out>
int fit_images(const DarktrtFit& fit, int32_t count, const DarktrtImage* images, void* y)
{
    const int64_t size = int64_t{fit.channels} * fit.height * fit.width;
    const auto function = fit.channels == 3 ? fit_image<3, Pixel, Out> : fit_image<1, Pixel, Out>;
    for (int32_t i = 0; i < count; ++i) {
        if (const int error = function(fit, images[i], static_cast<Out*>(y) + i * size); error) return error;
    }
    return 0;
}

template <typename Pixel> auto function_of(int32_t y_type)
{
    return y_type == DARKTRT_FLOAT  ? fit_images<Pixel, float>
           : y_type == DARKTRT_HALF ? fit_images<Pixel, Half>
                                    : fit_images<Pixel, uint8_t>;
}

}  // namespace
}  // namespace darktrt

using namespace darktrt;

extern "C" {

int darktrt_host_fit(DarktrtFit fit, int32_t count, const DarktrtImage* images, int32_t pixel_type, void* y, int32_t y_type)
{
    if (!is_supported(fit, count, images) || !is_level_type(pixel_type) || !is_level_type(y_type)) return DARKTRT_UNSUPPORTED;
    const auto function = pixel_type == DARKTRT_UINT8  ? function_of<uint8_t>(y_type)
                          : pixel_type == DARKTRT_HALF ? function_of<Half>(y_type)
                                                       : function_of<float>(y_type);
    return function(fit, count, images, y);
}

int darktrt_host_preprocess(DarktrtFit fit, int32_t count, DarktrtImage image, int32_t pixel_type, void* y, int32_t y_type,
                            float* image_size, float* placement)
{
    const bool is_good = count >= 0 && is_supported(fit, std::min(count, 1), &image);
    if (!is_good || !is_level_type(pixel_type) || !is_level_type(y_type)) return DARKTRT_UNSUPPORTED;
    if (count == 0) return 0;
    const Place place = place_of(fit, image);
    for (int32_t i = 0; i < count; ++i) {
        const char* const pixels = static_cast<const char*>(image.pixels) + i * bytes_of(image, pixel_type);
        const DarktrtImage one{pixels, image.width, image.height};
        char* const to = static_cast<char*>(y) + i * bytes_of(fit, y_type);
        if (const int error = darktrt_host_fit(fit, 1, &one, pixel_type, to, y_type); error) return error;
        write_size(place, image_size + 2 * i);
    }
    write_placement(fit, place, placement);
    return 0;
}

int darktrt_host_place_boxes(int64_t count, const float* boxes, const float* placement, float* y)
{
    if (count < 0) return DARKTRT_UNSUPPORTED;
    for (int64_t i = 0; i < 4 * count; ++i) y[i] = placed(boxes[i], placement, static_cast<int32_t>(i % 4));
    return 0;
}

}
