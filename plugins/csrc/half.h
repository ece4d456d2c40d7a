// A half for host code: conversions from float, to nearest even, and back.
#pragma once

#include "hd.h"

namespace darktrt {

struct Half {
    uint16_t bits;

    explicit Half(float value)
    {
        const uint32_t all = bits_of(value), sign = all & 0x80000000u, magnitude = all ^ sign;
        uint32_t rounded;
        if (magnitude >= 0x47800000) {  // 2^16 and more: infinity or NaN
            rounded = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
        } else if (magnitude < 0x38800000) {  // denormals are multiples of 2^-24, as the floats around 0.5 are
            rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        } else {  // to nearest, ties to even, and from exponent bias 127 to 15
            rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
        }
        bits = static_cast<uint16_t>(sign >> 16 | rounded);
    }

    explicit operator float() const
    {
        const uint32_t magnitude = bits & 0x7fffu, sign = static_cast<uint32_t>(bits ^ magnitude) << 16;
        const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0;  // infinity or NaN
        return float_of(bits_of(float_of(magnitude << 13) * 0x1p112f) | special | sign);
    }
};

}  // namespace darktrt
