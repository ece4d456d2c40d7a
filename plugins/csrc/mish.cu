// Mish, Mish + residual, and Mish of two tensors into their concatenation: one memory-bound loop with exchangeable operations.
//
// The bandwidth of a large GPU leaves time for some 20 instructions per element. So only FP32 uses the exponential and the
// division of the headers; half uses the fast ones (2^-20 relative, far below the rounding to half), and INT8 a lookup table.

#include <cuda_fp16.h>

#include <type_traits>

#include "launch.h"
#include "mish.h"

namespace darktrt {
namespace {

struct Fast {
    static __device__ __forceinline__ float exponential(float x)
    {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
        return y;
    }
    static __device__ __forceinline__ float quotient(float a, float b)
    {
        float inverse;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
        return a * inverse;
    }
};

// Four elements, the unit of all operations.
template <typename T> struct Quad;
template <> struct Quad<float> {
    float value[4];
};
template <> struct Quad<__half> {
    uint32_t pair[2];
};
template <> struct Quad<int8_t> {
    uint32_t word;
};

__device__ __forceinline__ void unpack(const Quad<float>& quad, float (&value)[4])
{
    for (int i = 0; i < 4; ++i) value[i] = quad.value[i];
}

__device__ __forceinline__ void unpack(const Quad<__half>& quad, float (&value)[4])
{
    for (int i = 0; i < 2; ++i) {
        __half2 pair;
        memcpy(&pair, &quad.pair[i], sizeof pair);
        const float2 both = __half22float2(pair);
        value[2 * i] = both.x;
        value[2 * i + 1] = both.y;
    }
}

__device__ __forceinline__ void pack(const float (&value)[4], Quad<float>& quad)
{
    for (int i = 0; i < 4; ++i) quad.value[i] = value[i];
}

__device__ __forceinline__ void pack(const float (&value)[4], Quad<__half>& quad)
{
    for (int i = 0; i < 2; ++i) {
        const __half2 pair = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
        memcpy(&quad.pair[i], &pair, sizeof pair);
    }
}

// nearest_level of each: adding 1.5 * 2^23 rounds to an integer, whose low byte is the level.
__device__ __forceinline__ void pack(const float (&quotient)[4], Quad<int8_t>& quad)
{
    uint32_t bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = bits_of(fminf(fmaxf(quotient[i], -128.f), 127.f) + 12582912.f);
    quad.word = __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

struct Scales {
    float x, residual, y;
};

// Maps four elements of x, and with kAdd of the residual, to four of y.
template <typename In, typename Out, bool kAdd> struct Operation {
    static constexpr int threads = 256;
    float inverse_scale;

    __device__ explicit Operation(const Scales& scales) : inverse_scale(1.f / scales.y) {}

    __device__ __forceinline__ Quad<Out> operator()(const Quad<In>& x, const Quad<In>& residual) const
    {
        using Math = std::conditional_t<std::is_same_v<In, float>, Exact, Fast>;
        float value[4], added[4];
        unpack(x, value);
        unpack(residual, added);
        for (int i = 0; i < 4; ++i) {
            value[i] = mish<Math>(value[i]);
            if constexpr (kAdd) value[i] += added[i];
            if constexpr (std::is_same_v<Out, int8_t>) value[i] *= inverse_scale;
        }
        Quad<Out> y;
        pack(value, y);
        return y;
    }
};

// Copies word 32 i of a table in shared memory to the 31 words after it, so that each lane of a warp reads its own bank.
__device__ __forceinline__ void replicate(uint32_t* table, int entries)
{
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * entries; i += blockDim.x) {
        if (i % 32 != 0) table[i] = table[i - i % 32];
    }
    __syncthreads();
}

// INT8 Mish is a table of 256 bytes, four of them a word.
template <> struct Operation<int8_t, int8_t, false> {
    static constexpr int threads = 256;
    const unsigned char* table;

    __device__ explicit Operation(const Scales& scales)
    {
        __shared__ uint32_t words[64 * 32];
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            reinterpret_cast<int8_t*>(words + i / 4 * 32)[i % 4] = mish_level(static_cast<int8_t>(i), scales.x, scales.y);
        }
        replicate(words, 64);
        table = reinterpret_cast<const unsigned char*>(words + threadIdx.x % 32);
    }

    __device__ __forceinline__ Quad<int8_t> operator()(const Quad<int8_t>& x, const Quad<int8_t>&) const
    {
        uint32_t level[4];
        for (int i = 0; i < 4; ++i) {
            const uint32_t row = (i == 0 ? x.word << 5 : x.word >> (8 * i - 5)) & (63 << 7);
            level[i] = table[row + ((x.word >> (8 * i)) & 3)];
        }
        return {__byte_perm(__byte_perm(level[0], level[1], 0x0040), __byte_perm(level[2], level[3], 0x0040), 0x5410)};
    }
};

// a / b as IEEE 754 rounds it, for one b and many a, in four instructions: 1 / b in twice the precision yields a quotient
// within one ulp, and a step with its exact remainder then rounds correctly (Markstein). is_scale excludes overflow and underflow.
struct Divisor {
    float b, inverse, inverse_rest;

    __device__ explicit Divisor(float b) : b(b), inverse(1.f / b), inverse_rest(fmaf(-b, inverse, 1.f) * inverse) {}

    __device__ __forceinline__ float quotient(float a) const
    {
        const float near = fmaf(a, inverse, a * inverse_rest);
        return fmaf(fmaf(-near, b, a), inverse, near);
    }
};

// With a residual the table contains Mish as a float.
template <> struct Operation<int8_t, int8_t, true> {
    static constexpr int threads = 512;  // one table for so many leaves room for all threads of an SM
    const unsigned char* table;
    float residual_scale;
    Divisor y_scale;

    __device__ explicit Operation(const Scales& scales) : residual_scale(scales.residual), y_scale(scales.y)
    {
        __shared__ uint32_t words[256 * 32];
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            words[32 * i] = bits_of(mish(static_cast<float>(static_cast<int8_t>(i)) * scales.x));
        }
        replicate(words, 256);
        table = reinterpret_cast<const unsigned char*>(words + threadIdx.x % 32);
    }

    __device__ __forceinline__ Quad<int8_t> operator()(const Quad<int8_t>& x, const Quad<int8_t>& residual) const
    {
        const uint32_t above_minus_128 = residual.word ^ 0x80808080;
        float quotient[4];
        for (int i = 0; i < 4; ++i) {
            const uint32_t row = (i == 0 ? x.word << 7 : x.word >> (8 * i - 7)) & (255 << 7);
            const float mish_x = *reinterpret_cast<const float*>(table + row);
            // the byte as the low one of 2^23 + byte: cheaper than a conversion
            const float level = float_of(__byte_perm(above_minus_128, 0x4b000000, 0x7440 + i)) - (8388608.f + 128.f);
            quotient[i] = y_scale.quotient(mish_x + level * residual_scale);
        }
        Quad<int8_t> y;
        pack(quotient, y);
        return y;
    }
};

// A contiguous input, and its rows in y. Sizes are in elements.
struct Segment {
    const void* x;
    const void* residual;
    void* y;
    int64_t size, row, gap;  // of x; of its rows; from the end of a row of y to the next
    int64_t span;
    int32_t vector_width, channels;
    Scales scales;
};

struct Segments {
    Segment part[2];
    int count;
};

// The elements of one 16-byte access to x, and the same elements of y.
template <typename T, int kQuads> struct alignas(sizeof(Quad<T>) * kQuads) Vector {
    Quad<T> quad[kQuads];
};

template <typename In> constexpr int quads_in_16_bytes = 16 / sizeof(Quad<In>);

template <typename In, typename Out, bool kAdd>
__global__ void __launch_bounds__(Operation<In, Out, kAdd>::threads) wide(const Segments segments)
{
    constexpr int quads = quads_in_16_bytes<In>, unroll = kAdd ? 2 : 4;
    const Segment& segment = segments.part[blockIdx.y];
    const Operation<In, Out, kAdd> operation(segment.scales);
    const auto* x = static_cast<const Vector<In, quads>*>(segment.x);
    const auto* residual = static_cast<const Vector<In, quads>*>(segment.residual);
    auto* y = static_cast<Vector<Out, quads>*>(segment.y);
    const int64_t size = segment.size / (4 * quads), row = segment.row / (4 * quads), gap = segment.gap / (4 * quads);
    const int64_t step = int64_t{gridDim.x} * blockDim.x;

    int64_t offset = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    int64_t column = offset, shift = 0, step_column = step, step_shift = 0;
    if (gap != 0) {
        const int64_t first_row = offset / row, step_rows = step / row;
        column -= first_row * row;
        shift = first_row * gap;
        step_column -= step_rows * row;
        step_shift = step_rows * gap;
    }
    while (offset < size) {
        Vector<In, quads> from[unroll], added[unroll];
        int64_t to[unroll];
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
            to[i] = -1;
            if (offset < size) {
                from[i] = x[offset];
                if constexpr (kAdd) added[i] = residual[offset];
                to[i] = offset + shift;
            }
            offset += step;
            column += step_column;
            shift += step_shift;
            if (gap != 0 && column >= row) {
                column -= row;
                shift += gap;
            }
        }
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
            if (to[i] < 0) break;
            Vector<Out, quads> result;
#pragma unroll
            for (int j = 0; j < quads; ++j) {
                result.quad[j] = operation(from[i].quad[j], kAdd ? added[i].quad[j] : from[i].quad[j]);
            }
            y[to[i]] = result;
        }
    }
}

template <typename T> __device__ __forceinline__ Quad<T> quad_of(T value)
{
    Quad<T> quad{};
    memcpy(&quad, &value, sizeof value);
    return quad;
}

// Any alignment, and channels that are no multiple of the vector width: the padding channels of y become zeros.
template <typename In, typename Out, bool kAdd>
__global__ void __launch_bounds__(Operation<In, Out, kAdd>::threads) narrow(const Segments segments)
{
    const Segment& segment = segments.part[blockIdx.y];
    const Operation<In, Out, kAdd> operation(segment.scales);
    const auto* x = static_cast<const In*>(segment.x);
    const auto* residual = static_cast<const In*>(segment.residual);
    auto* y = static_cast<Out*>(segment.y);
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    for (int64_t offset = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; offset < segment.size; offset += step) {
        const int64_t row = offset / segment.row, column = offset - row * segment.row;
        Quad<Out> result{};
        if (column / segment.span * segment.vector_width + column % segment.vector_width < segment.channels) {
            const Quad<In> from = quad_of(x[offset]);
            result = operation(from, kAdd ? quad_of(residual[offset]) : from);
        }
        Out first;
        memcpy(&first, &result, sizeof first);
        y[offset + row * segment.gap] = first;
    }
}

template <typename In, typename Out> bool allows_wide(const Segment& segment)
{
    constexpr int64_t elements = 4 * quads_in_16_bytes<In>;
    const auto aligned = [](const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
    return aligned(segment.x, 16) && aligned(segment.residual, 16) && aligned(segment.y, elements * sizeof(Out)) &&
           segment.row % elements == 0 && segment.gap % elements == 0 && segment.channels % segment.vector_width == 0;
}

template <typename In, typename Out, bool kAdd> int run(const Segments& segments, void* stream)
{
    static Known known[2];
    constexpr int threads = Operation<In, Out, kAdd>::threads;
    bool is_wide = true;
    int64_t size = 0;
    for (int i = 0; i < segments.count; ++i) {
        is_wide = is_wide && allows_wide<In, Out>(segments.part[i]);
        size = std::max(size, segments.part[i].size);
    }
    if (size == 0) return cudaSuccess;
    const auto kernel = is_wide ? wide<In, Out, kAdd> : narrow<In, Out, kAdd>;
    const int64_t a_block = threads * (is_wide ? 4 * quads_in_16_bytes<In> : 1);
    int64_t resident = 0;
    if (const cudaError_t error = resident_blocks(kernel, threads, known[is_wide], &resident)) return error;
    const int64_t blocks = std::min((size + a_block - 1) / a_block, std::max<int64_t>(1, resident / segments.count));
    return launch(kernel, dim3(static_cast<unsigned>(blocks), segments.count), threads, stream, segments);
}

template <bool kAdd> int run(const Segments& segments, int32_t in, int32_t out, void* stream)
{
    if (in == DARKTRT_FLOAT) return run<float, float, kAdd>(segments, stream);
    if (in == DARKTRT_INT8) return run<int8_t, int8_t, kAdd>(segments, stream);
    return out == DARKTRT_HALF ? run<__half, __half, kAdd>(segments, stream) : run<__half, int8_t, kAdd>(segments, stream);
}

Segment make_segment(const Layout& layout, const void* x, const void* residual, void* y, int64_t gap, Scales scales)
{
    const int64_t row = layout.row_size(), size = layout.rows * row;
    if (gap == 0 && !layout.padded()) return {x, residual, y, size, size, 0, size, 1, 1, scales};
    return {x, residual, y, size, row, gap, layout.span, layout.vector_width, layout.channels, scales};
}

}  // namespace
}  // namespace darktrt

using namespace darktrt;

int darktrt_mish(DarktrtShape shape, const void* x, DarktrtFormat x_format, void* y, DarktrtFormat y_format, void* stream)
{
    if (!is_supported(shape, x_format, x_format, y_format)) return DARKTRT_UNSUPPORTED;
    const Layout layout(shape, x_format, shape.channels);
    const Segments segments{{make_segment(layout, x, nullptr, y, 0, {x_format.scale, 1.f, y_format.scale})}, 1};
    return run<false>(segments, x_format.type, y_format.type, stream);
}

int darktrt_mish_add(DarktrtShape shape, const void* x, DarktrtFormat x_format, const void* residual,
                     DarktrtFormat residual_format, void* y, DarktrtFormat y_format, void* stream)
{
    if (!is_supported(shape, x_format, residual_format, y_format)) return DARKTRT_UNSUPPORTED;
    const Layout layout(shape, x_format, shape.channels);
    const Scales scales{x_format.scale, residual_format.scale, y_format.scale};
    return run<true>({{make_segment(layout, x, residual, y, 0, scales)}, 1}, x_format.type, y_format.type, stream);
}

int darktrt_mish_concat(DarktrtShape shape, const void* x, DarktrtFormat x_format, const void* second,
                        DarktrtFormat second_format, int32_t second_channels, void* y, DarktrtFormat y_format, void* stream)
{
    if (!is_supported(shape, x_format, second_format, y_format) || second_channels < 0) return DARKTRT_UNSUPPORTED;
    const Layout one(shape, x_format, shape.channels), two(shape, second_format, second_channels);
    if (one.padded()) return DARKTRT_UNSUPPORTED;
    const int64_t one_row = one.row_size(), two_row = two.row_size();
    constexpr int sizes[] = {sizeof(float), sizeof(__half), sizeof(int8_t)};
    void* two_y = static_cast<char*>(y) + one_row * sizes[y_format.type];
    const Segments segments{{make_segment(one, x, nullptr, y, two_row, {x_format.scale, 1.f, y_format.scale}),
                             make_segment(two, second, nullptr, two_y, one_row, {second_format.scale, 1.f, y_format.scale})},
                            2};
    return run<false>(segments, x_format.type, y_format.type, stream);
}
