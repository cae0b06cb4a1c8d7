/* plain_reduce.h: reductions of every type, as plain as they can be: what tasks.c compares the engine's kernels with. */
#ifndef PLAIN_REDUCE_H
#define PLAIN_REDUCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../../native/commlib.h"

/* `sum` is a type in which sums and products may wrap. */
#define REDUCES(name, type, sum)                                                     \
    static void reduce_##name(int32_t reduction, type *to, const type *in, size_t n) \
    {                                                                                \
        for (size_t i = 0; i < n; i++)                                               \
            to[i] = reduction == CL_SUM       ? (type)((sum)to[i] + (sum)in[i])      \
                    : reduction == CL_PRODUCT ? (type)((sum)to[i] * (sum)in[i])      \
                    : reduction == CL_MIN     ? (in[i] < to[i] ? in[i] : to[i])      \
                                              : (in[i] > to[i] ? in[i] : to[i]);     \
    }
REDUCES(uint8, uint8_t, uint8_t)
REDUCES(int8, int8_t, int8_t)
REDUCES(int16, int16_t, int16_t)
REDUCES(int32, int32_t, uint32_t)
REDUCES(int64, int64_t, uint64_t)
REDUCES(float32, float, float)
REDUCES(float64, double, double)

/* The upper half of a float, rounded to nearest, even at ties. */
static float from_bfloat16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef __FLT16_MANT_DIG__ /* the compiler's own; where it has none, the other 16-bit type is tested twice */
static float from_float16(uint16_t half)
{
    _Float16 value;
    memcpy(&value, &half, sizeof value);
    return (float)value;
}

static uint16_t to_float16(float value)
{
    _Float16 rounded = (_Float16)value;
    uint16_t half;
    memcpy(&half, &rounded, sizeof half);
    return half;
}
enum { FLOAT16 = CL_FLOAT16 };
#else
enum { FLOAT16 = CL_BFLOAT16 };
#define from_float16 from_bfloat16
#define to_float16 to_bfloat16
#endif

/* In fp32, rounded once. */
#define REDUCES_HALF(name)                                                                   \
    static void reduce_##name(int32_t reduction, uint16_t *to, const uint16_t *in, size_t n) \
    {                                                                                        \
        for (size_t i = 0; i < n; i++) {                                                     \
            float sum = from_##name(to[i]);                                                  \
            reduce_float32(reduction, &sum, (const float[]){from_##name(in[i])}, 1);         \
            to[i] = to_##name(sum);                                                          \
        }                                                                                    \
    }
REDUCES_HALF(bfloat16)
REDUCES_HALF(float16)

/* "Or", or "and". */
static void reduce_bool(int32_t reduction, uint8_t *to, const uint8_t *in, size_t n)
{
    bool any = reduction == CL_SUM || reduction == CL_MAX;
    for (size_t i = 0; i < n; i++)
        to[i] = any ? to[i] | in[i] : to[i] & in[i];
}

#endif
