// Images fitted into a network's input, and boxes placed back in the image.
//
// A thread makes one pixel of the input, all channels, from the four pixels of the image that it lies between. A warp makes 32
// neighbours of a row, so that it writes whole sectors of each plane and reads a few of each row of the image.

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "fit.h"
#include "launch.h"

namespace darktrt {
namespace {

constexpr int fit_threads = 256, place_threads = 256, tile_columns = 32, tile_rows = fit_threads / tile_columns;
constexpr int max_grid_y = 65535, images_of_launch = 64;

struct Fitted {
    const void* pixels;
    Place place;
};

// The images of a launch: each by itself, or one behind the other.
struct Listed {
    Fitted images[images_of_launch];

    __device__ const Fitted& operator[](uint32_t i) const { return images[i]; }
};
struct Stacked {
    Fitted first;
    int64_t bytes;

    __device__ Fitted operator[](uint32_t i) const
    {
        return {static_cast<const char*>(first.pixels) + i * bytes, first.place};
    }
};

// unit() of headers in three instructions: a step with its exact remainder makes the quotient what IEEE 754 rounds it to
// (Markstein), for all levels that are 0 or normal floats.
__device__ __forceinline__ float fast_unit(float level)
{
    const float inverse = 1.f / 255.f, near = level * inverse;
    return fmaf(fmaf(-near, 255.f, level), inverse, near);
}

__device__ __forceinline__ float value_of(float level) { return level; }
__device__ __forceinline__ float value_of(__half level) { return __half2float(level); }
__device__ __forceinline__ float value_of(uint8_t level) { return static_cast<float>(level); }

template <int32_t Channels, typename Pixel> __device__ __forceinline__ void read(const Pixel* rgb, float (&value)[Channels])
{
    const float red = value_of(rgb[0]), green = value_of(rgb[1]), blue = value_of(rgb[2]);
    if constexpr (Channels == 1) {
        const auto level = [](float whole) { return static_cast<uint32_t>(whole); };
        value[0] = fast_unit(static_cast<float>(luma(level(red), level(green), level(blue))));
    } else {
        value[0] = fast_unit(red);
        value[1] = fast_unit(green);
        value[2] = fast_unit(blue);
    }
}

template <int32_t Channels, typename Pixel>
__device__ __forceinline__ void read_across(const Pixel* row, const Taps& across, float (&value)[Channels])
{
    float second[Channels];
    read(row + 3 * across.first, value);
    read(row + 3 * across.second, second);
    for (int32_t i = 0; i < Channels; ++i) value[i] = mix(value[i], second[i], across.fraction);
}

// The pixel at a column and a row of the resized image.
template <int32_t Channels, typename Pixel>
__device__ __forceinline__ void pixel_at(const Fitted& image, int32_t column, int32_t row, float (&value)[Channels])
{
    const Taps across = taps_at(image.place.across, column), down = taps_at(image.place.down, row);
    const Pixel* const __restrict__ pixels = static_cast<const Pixel*>(image.pixels);
    const int64_t row_size = int64_t{3} * image.place.across.size;
    float second[Channels];
    read_across(pixels + down.first * row_size, across, value);
    read_across(pixels + down.second * row_size, across, second);
    for (int32_t i = 0; i < Channels; ++i) value[i] = mix(value[i], second[i], down.fraction);
}

__device__ __forceinline__ void store(float value, float* y) { *y = value; }
__device__ __forceinline__ void store(float value, __half* y) { *y = __float2half_rn(value); }
__device__ __forceinline__ void store(float value, uint8_t* y) { *y = level_of(value); }

// The outputs of Preprocess besides the pixels; null for darktrt_fit, which makes only these.
struct Outputs {
    float *image_size, *placement;
};

__device__ void write_place(const DarktrtFit& fit, const Place& place, uint32_t index, const Outputs& others)
{
    if (!others.image_size) return;
    write_size(place, others.image_size + 2 * index);
    if (index == 0) write_placement(fit, place, others.placement);
}

template <int32_t Channels, typename Pixel, typename Out, typename Images>
__global__ void __launch_bounds__(fit_threads)
    fit_images(const DarktrtFit fit, const __grid_constant__ Images images, uint32_t count, Out* y, const Outputs others)
{
    constexpr bool planes = !std::is_same_v<Out, uint8_t>;
    const auto x = static_cast<int32_t>(blockIdx.x * tile_columns + threadIdx.x % tile_columns);
    const int64_t area = int64_t{fit.height} * fit.width;
    for (uint32_t index = blockIdx.z; index < count; index += gridDim.z) {
        const Fitted image = images[index];
        const Place& place = image.place;
        if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) write_place(fit, place, index, others);
        for (int64_t first = int64_t{blockIdx.y} * tile_rows; first < fit.height; first += gridDim.y * tile_rows) {
            const auto row = static_cast<int32_t>(first + threadIdx.x / tile_columns);
            if (x >= fit.width || row >= fit.height) continue;
            float value[Channels];
            const int32_t image_x = x - place.x, image_row = row - place.y;
            if (image_x >= 0 && image_x < place.across.new_size && image_row >= 0 && image_row < place.down.new_size) {
                pixel_at<Channels, Pixel>(image, image_x, image_row, value);
            } else {
                for (int32_t i = 0; i < Channels; ++i) value[i] = letterbox_fill;
            }
            const int64_t offset = int64_t{row} * fit.width + x;
            Out* const to = y + index * Channels * area + (planes ? offset : offset * Channels);
            for (int32_t i = 0; i < Channels; ++i) store(value[i], to + (planes ? i * area : i));
        }
    }
}

template <int32_t Channels, typename Pixel, typename Out, typename Images>
int launch_fit(const DarktrtFit& fit, const Images& images, uint32_t count, void* y, const Outputs& others, void* stream)
{
    const auto tiles = [](int32_t size, int tile) { return static_cast<unsigned>((int64_t{size} + tile - 1) / tile); };
    const dim3 grid(tiles(fit.width, tile_columns), std::min<unsigned>(tiles(fit.height, tile_rows), max_grid_y),
                    std::min<unsigned>(count, max_grid_y));
    const auto kernel = fit_images<Channels, Pixel, Out, Images>;
    return launch(kernel, grid, fit_threads, stream, fit, images, count, static_cast<Out*>(y), others);
}

// launch_fit for the number of channels and the two types.
template <typename Images>
int run(const DarktrtFit& fit, const Images& images, uint32_t count, int32_t pixel_type, void* y, int32_t y_type,
        const Outputs& others, void* stream)
{
    const auto of_types = [&](auto pixel, auto out) {
        using Pixel = decltype(pixel);
        using Out = decltype(out);
        const auto function = fit.channels == 3 ? launch_fit<3, Pixel, Out, Images> : launch_fit<1, Pixel, Out, Images>;
        return function(fit, images, count, y, others, stream);
    };
    const auto of_pixel = [&](auto pixel) {
        return y_type == DARKTRT_FLOAT  ? of_types(pixel, float{})
               : y_type == DARKTRT_HALF ? of_types(pixel, __half{})
                                        : of_types(pixel, uint8_t{});
    };
    return pixel_type == DARKTRT_UINT8  ? of_pixel(uint8_t{})
           : pixel_type == DARKTRT_HALF ? of_pixel(__half{})
                                        : of_pixel(float{});
}

__global__ void __launch_bounds__(place_threads)
    place_boxes(int64_t count, const float* boxes, const float* placement, float* y)
{
    const int64_t i = int64_t{blockIdx.x} * place_threads + threadIdx.x;
    if (i < 4 * count) y[i] = placed(boxes[i], placement, static_cast<int32_t>(i % 4));
}

}  // namespace
}  // namespace darktrt

using namespace darktrt;

int darktrt_fit(DarktrtFit fit, int32_t count, const DarktrtImage* images, int32_t pixel_type, void* y, int32_t y_type,
                void* stream)
{
    if (!is_supported(fit, count, images) || !is_level_type(pixel_type) || !is_level_type(y_type)) return DARKTRT_UNSUPPORTED;
    for (int32_t first = 0; first < count; first += images_of_launch) {
        Listed listed{};
        const int32_t part = std::min(count - first, images_of_launch);
        std::transform(images + first, images + first + part, listed.images,
                       [&](const DarktrtImage& image) { return Fitted{image.pixels, place_of(fit, image)}; });
        void* const to = static_cast<char*>(y) + first * bytes_of(fit, y_type);
        if (const int error = run(fit, listed, part, pixel_type, to, y_type, {}, stream); error) return error;
    }
    return cudaSuccess;
}

int darktrt_preprocess(DarktrtFit fit, int32_t count, DarktrtImage image, int32_t pixel_type, void* y, int32_t y_type,
                       float* image_size, float* placement, void* stream)
{
    const bool is_good = count >= 0 && is_supported(fit, std::min(count, 1), &image);
    if (!is_good || !is_level_type(pixel_type) || !is_level_type(y_type)) return DARKTRT_UNSUPPORTED;
    if (count == 0) return cudaSuccess;
    const Stacked images{{image.pixels, place_of(fit, image)}, bytes_of(image, pixel_type)};
    return run(fit, images, count, pixel_type, y, y_type, {image_size, placement}, stream);
}

int darktrt_place_boxes(int64_t count, const float* boxes, const float* placement, float* y, void* stream)
{
    const int64_t blocks = (4 * count + place_threads - 1) / place_threads;
    if (count < 0 || blocks > INT32_MAX) return DARKTRT_UNSUPPORTED;
    if (count == 0) return cudaSuccess;
    return launch(place_boxes, dim3(static_cast<unsigned>(blocks)), place_threads, stream, count, boxes, placement, y);
}
