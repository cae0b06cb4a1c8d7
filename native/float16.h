/*
 * float16.h: 16-bit floats to fp32 and back in portable scalar C, to nearest even. Written apart from kernels_vector.h on purpose.
 */
#ifndef CL_FLOAT16_H
#define CL_FLOAT16_H

#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of_float32(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float32_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float float32_of_bfloat16(uint16_t bits)
{
    return float32_of_bits((uint32_t)bits << 16);
}

static inline uint16_t bfloat16_of_float32(float x)
{
    if (x != x)
        return 0x7fc0;
    const uint32_t bits = bits_of_float32(x);
    /* Nearest even; the carry may reach infinity, rightly. */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float float32_of_float16(uint16_t bits)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00)
        return float32_of_bits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) /* denormal */
        return float32_of_bits(sign | bits_of_float32((float)magnitude * 0x1p-24f));
    return float32_of_bits(sign | ((magnitude << 13) + (112u << 23))); /* exponent bias 15 to 127 */
}

static inline uint16_t float16_of_float32(float x)
{
    if (x != x)
        return 0x7e00;
    const uint32_t bits = bits_of_float32(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude >= 0x477ff000u) /* from 65520 on, nearest even is infinity */
        return sign | 0x7c00;
    if (magnitude < 0x38800000u) { /* below 2^-14: adding 0.5 leaves multiples of 2^-24, rounded by the hardware */
        const float shifted = float32_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (bits_of_float32(shifted) - bits_of_float32(0.5f)));
    }
    return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

#endif
