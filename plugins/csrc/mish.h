// Mish and its INT8 form, and the memory layouts of tensors: the math of mish.cu and host.cpp.
#pragma once

#include "hd.h"
#include "kernels.h"

namespace darktrt {

struct Exact {
    HOST_DEVICE static float exponential(float x) { return exponential_of_bounded(fmaxf(x, -104.f)); }
    HOST_DEVICE static float quotient(float a, float b) { return a / b; }
};

// x tanh(softplus(x)) = x n / (n + 2) with n = e (e + 2), e = exp(x): one exponential, no cancellation. Above 20 the quotient
// is 1, so x may stop growing there.
template <typename Math = Exact> HOST_DEVICE float mish(float x)
{
    const float e = Math::exponential(fminf(x, 20.f));
    const float n = e * (e + 2.f);
    return x * Math::quotient(n, n + 2.f);
}

// The INT8 level nearest to `quotient` (value / scale), ties to even, within -128..127: ONNX's and TensorRT's QuantizeLinear.
HOST_DEVICE int8_t nearest_level(float quotient)
{
    return static_cast<int8_t>(rintf(fminf(fmaxf(quotient, -128.f), 127.f)));
}

HOST_DEVICE int8_t mish_level(int8_t x, float x_scale, float y_scale)
{
    return nearest_level(mish(static_cast<float>(x) * x_scale) / y_scale);
}

// The memory layout of the channels of one tensor.
struct Layout {
    int32_t channels, vector_width;
    int64_t span;  // elements after which the next `vector_width` channels begin
    int64_t rows;  // in each, every channel occurs: images, or pixels of images where channels are last

    Layout(DarktrtShape shape, DarktrtFormat format, int32_t channels)
        : channels(channels), vector_width(format.vector_width),
          span((format.channels_last ? 1 : shape.pixels) * format.vector_width),
          rows(format.channels_last ? shape.batch * shape.pixels : shape.batch)
    {
    }

    int64_t groups() const { return (int64_t{channels} + vector_width - 1) / vector_width; }
    int64_t row_size() const { return groups() * span; }
    bool padded() const { return channels % vector_width != 0; }
};

inline bool is_scale(float scale) { return scale >= 0x1p-40f && scale <= 0x1p40f; }

inline bool is_format(DarktrtFormat format)
{
    const bool known = format.type >= DARKTRT_FLOAT && format.type <= DARKTRT_INT8 && format.vector_width > 0;
    return known && (format.type != DARKTRT_INT8 || is_scale(format.scale));
}

inline bool same_layout(DarktrtFormat a, DarktrtFormat b)
{
    return a.vector_width == b.vector_width && !a.channels_last == !b.channels_last;
}

// Whether there is a kernel for these formats of x, of a residual or second input, and of y.
inline bool is_supported(DarktrtShape shape, DarktrtFormat x, DarktrtFormat other, DarktrtFormat y)
{
    const bool types = x.type == other.type && (x.type == y.type || (x.type == DARKTRT_HALF && y.type == DARKTRT_INT8));
    return types && is_format(x) && is_format(other) && is_format(y) && same_layout(x, other) && same_layout(x, y) &&
           shape.batch >= 0 && shape.channels >= 0 && shape.pixels >= 0;
}

}  // namespace darktrt
