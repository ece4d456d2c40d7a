// The base of the math headers: functions for host and device, and an exponential with the same bits everywhere.
//
// The exponentials of C libraries differ in the last bit, on which a decision may depend (which candidate is better, which
// INT8 level is nearer). This one has only sums, products and fused multiply-adds of IEEE floats, so that all machines agree.
// Compile without contraction (--fmad=false, -ffp-contract=off).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace darktrt {

HOST_DEVICE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

HOST_DEVICE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// exp(x) within 1 ulp for x from -104 to 89; beyond that the result is 0 or infinity. NaN stays NaN.
HOST_DEVICE float exponential_of_bounded(float x)
{
    // x = k ln 2 + r: adding 1.5 * 2^23 rounds to an integer, which is then in the low bits
    const float shifter = 12582912.f;
    const float shifted = fmaf(x, 1.44269504f, shifter);
    const float k = shifted - shifter;
    const float r = fmaf(k, -1.42860677e-6f, fmaf(k, -6.93145752e-1f, x));
    float p = 1.37805939e-3f;  // (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2
    p = fmaf(p, r, 8.37312452e-3f);
    p = fmaf(p, r, 4.16695364e-2f);
    p = fmaf(p, r, 1.66664720e-1f);
    p = fmaf(p, r, 4.99999851e-1f);
    p = fmaf(p, r, 1.f);
    p = fmaf(p, r, 1.f);
    // times 2^k in two steps, each a normal number, so that a denormal result is rounded once
    const int32_t power = static_cast<int32_t>(bits_of(shifted) - bits_of(shifter));
    const int32_t half = power >> 1;
    const uint32_t one = 0x3f800000, first = static_cast<uint32_t>(half) << 23;
    const uint32_t second = static_cast<uint32_t>(power - half) << 23;
    return p * float_of(one + first) * float_of(one + second);
}

HOST_DEVICE float exponential(float x)
{
    return exponential_of_bounded(x < -104.f ? -104.f : x > 89.f ? 89.f : x);
}

}  // namespace darktrt
