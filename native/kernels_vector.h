/*
 * kernels_vector.h: the kernels as loops over vectors, written once for every vector width.
 *
 * A set includes this file after it has defined
 *   VECTOR_NBYTES                       the width of its registers;
 *   KERNEL_TARGET                       the function attribute that turns its instructions on;
 *   half_to_float32 and float32_to_half its float16 conversions, to nearest even, between
 *   HALF_REGISTER and FLOAT32_REGISTER  its own types for 16 and 32 bits in each lane.
 * The types are vector extensions of GCC and clang: an operator works on all lanes, a comparison gives all ones or all
 * zeros in each. The rules for NaN, signed zero and overflow are in reduce.h.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels_integer_scale.h"

/* ---- loops ---- */

/*
 * acc = result(x, y), a vector at a time; the end of the array travels in a padded one: no second form. Every reduction is
 * there twice: name_both writes what it has into `in` as well, which costs a store and saves a pass over memory.
 */
#define REDUCE_TO(name, constness, vector, result, also)                                            \
    KERNEL_TARGET static void name(void *acc, constness void *in, size_t count) {                   \
        unsigned char *to = acc;                                                                    \
        constness unsigned char *from = in;                                                         \
        const size_t nbytes = count * sizeof((vector){0}[0]);                                       \
        size_t i = 0;                                                                               \
        vector x, y;                                                                                \
        for (; nbytes - i >= sizeof(vector); i += sizeof(vector)) {                                 \
            memcpy(&x, to + i, sizeof x);                                                           \
            memcpy(&y, from + i, sizeof y);                                                         \
            x = (vector)(result);                                                                   \
            memcpy(to + i, &x, sizeof x);                                                           \
            also(memcpy(from + i, &x, sizeof x);)                                                   \
        }                                                                                           \
        if (i == nbytes) return;                                                                    \
        x = y = (vector){0};                                                                        \
        memcpy(&x, to + i, nbytes - i);                                                             \
        memcpy(&y, from + i, nbytes - i);                                                           \
        x = (vector)(result);                                                                       \
        memcpy(to + i, &x, nbytes - i);                                                             \
        also(memcpy(from + i, &x, nbytes - i);)                                                     \
    }
#define DO(statement) statement
#define LEAVE(statement)
#define MUTABLE
#define REDUCE(name, vector, result)                                                                \
    REDUCE_TO(name, const, vector, result, LEAVE)                                                   \
    REDUCE_TO(name##_both, MUTABLE, vector, result, DO)

#define FLOAT_SCALE(name, vector, scalar, result)                                                   \
    KERNEL_TARGET static void name(void *out, const void *in, size_t count, double factor) {        \
        unsigned char *to = out;                                                                    \
        const unsigned char *from = in;                                                             \
        const size_t nbytes = count * sizeof((vector){0}[0]);                                       \
        const scalar multiplier = (scalar)factor;                                                   \
        size_t i = 0;                                                                               \
        vector x;                                                                                   \
        if (factor == 1.0) {                                                                        \
            if (to != from && count) memcpy(to, from, nbytes);                                      \
            return;                                                                                 \
        }                                                                                           \
        for (; nbytes - i >= sizeof(vector); i += sizeof(vector)) {                                 \
            memcpy(&x, from + i, sizeof x);                                                         \
            x = (vector)(result);                                                                   \
            memcpy(to + i, &x, sizeof x);                                                           \
        }                                                                                           \
        if (i == nbytes) return;                                                                    \
        x = (vector){0};                                                                            \
        memcpy(&x, from + i, nbytes - i);                                                           \
        x = (vector)(result);                                                                       \
        memcpy(to + i, &x, nbytes - i);                                                             \
    }

/* ---- types: full registers, and a half one for the float16 forms of one register of fp32 ---- */

#define VECTOR(name, type, nbytes) typedef type name __attribute__((vector_size(nbytes)))
VECTOR(vector_uint8, uint8_t, VECTOR_NBYTES);
VECTOR(vector_uint16, uint16_t, VECTOR_NBYTES);
VECTOR(vector_uint32, uint32_t, VECTOR_NBYTES);
VECTOR(vector_uint64, uint64_t, VECTOR_NBYTES);
VECTOR(vector_int8, int8_t, VECTOR_NBYTES);
VECTOR(vector_int16, int16_t, VECTOR_NBYTES);
VECTOR(vector_int32, int32_t, VECTOR_NBYTES);
VECTOR(vector_int64, int64_t, VECTOR_NBYTES);
VECTOR(vector_float32, float, VECTOR_NBYTES);
VECTOR(vector_float64, double, VECTOR_NBYTES);
VECTOR(half_vector_uint16, uint16_t, VECTOR_NBYTES / 2);

/* Vectors are cast bit by bit; `mask` is the result of a comparison. */
#define SELECT(type, mask, yes, no) ((type)(((type)(mask) & (type)(yes)) | (~(type)(mask) & (type)(no))))

/* ---- integers and bool: sums and products wrap, so they are unsigned whatever the dtype's sign ---- */

REDUCE(sum_8, vector_uint8, x + y)
REDUCE(sum_16, vector_uint16, x + y)
REDUCE(sum_32, vector_uint32, x + y)
REDUCE(sum_64, vector_uint64, x + y)
REDUCE(product_8, vector_uint8, x * y)
REDUCE(product_16, vector_uint16, x * y)
REDUCE(product_32, vector_uint32, x * y)
REDUCE(product_64, vector_uint64, x * y)
REDUCE(min_uint8, vector_uint8, SELECT(vector_uint8, y < x, y, x))
REDUCE(max_uint8, vector_uint8, SELECT(vector_uint8, y > x, y, x))
REDUCE(min_int8, vector_int8, SELECT(vector_int8, y < x, y, x))
REDUCE(max_int8, vector_int8, SELECT(vector_int8, y > x, y, x))
REDUCE(min_int16, vector_int16, SELECT(vector_int16, y < x, y, x))
REDUCE(max_int16, vector_int16, SELECT(vector_int16, y > x, y, x))
REDUCE(min_int32, vector_int32, SELECT(vector_int32, y < x, y, x))
REDUCE(max_int32, vector_int32, SELECT(vector_int32, y > x, y, x))
REDUCE(min_int64, vector_int64, SELECT(vector_int64, y < x, y, x))
REDUCE(max_int64, vector_int64, SELECT(vector_int64, y > x, y, x))
REDUCE(or_bool, vector_uint8, (vector_uint8)((x | y) != 0) & 1)
REDUCE(and_bool, vector_uint8, (vector_uint8)((x != 0) & (y != 0)) & 1)

/* ---- Min and Max of floats, on their bits: as sign-and-magnitude integers they are ordered, -0 below +0 ---- */

#define FLOAT_ORDER(suffix, vector, magnitude_mask, infinity, quiet_nan)                            \
    KERNEL_TARGET static inline vector order_of_##suffix(vector x) {                                           \
        return x ^ ((x < 0) & (magnitude_mask));                                                    \
    }                                                                                               \
    KERNEL_TARGET static inline vector is_nan_##suffix(vector x) {                                             \
        return (vector)((x & (magnitude_mask)) > (infinity));                                       \
    }                                                                                               \
    KERNEL_TARGET static inline vector ordered_##suffix(vector x, vector y, vector take_y) {                   \
        const vector nan = (vector){0} + (quiet_nan);                                               \
        return SELECT(vector, is_nan_##suffix(x) | is_nan_##suffix(y), nan, SELECT(vector, take_y, y, x)); \
    }                                                                                               \
    REDUCE(min_##suffix, vector, ordered_##suffix(x, y, order_of_##suffix(y) < order_of_##suffix(x))) \
    REDUCE(max_##suffix, vector, ordered_##suffix(x, y, order_of_##suffix(y) > order_of_##suffix(x)))

FLOAT_ORDER(float16, vector_int16, 0x7fff, 0x7c00, 0x7e00)
FLOAT_ORDER(bfloat16, vector_int16, 0x7fff, 0x7f80, 0x7fc0)
FLOAT_ORDER(float32, vector_int32, 0x7fffffff, 0x7f800000, 0x7fc00000)
FLOAT_ORDER(float64, vector_int64, 0x7fffffffffffffff, 0x7ff0000000000000, 0x7ff8000000000000)

/* ---- sums and products of floats ---- */

KERNEL_TARGET static inline vector_float32 canonical_float32(vector_float32 x)
{
    const vector_uint32 nan = (vector_uint32){0} + 0x7fc00000u;
    return (vector_float32)SELECT(vector_uint32, x != x, nan, x);
}

KERNEL_TARGET static inline vector_float64 canonical_float64(vector_float64 x)
{
    const vector_uint64 nan = (vector_uint64){0} + 0x7ff8000000000000u;
    return (vector_float64)SELECT(vector_uint64, x != x, nan, x);
}

KERNEL_TARGET static inline vector_float32 from_float16(half_vector_uint16 x)
{
    return (vector_float32)half_to_float32((HALF_REGISTER)x);
}

KERNEL_TARGET static inline half_vector_uint16 to_float16(vector_float32 x)
{
    return (half_vector_uint16)float32_to_half((FLOAT32_REGISTER)canonical_float32(x));
}

/*
 * bfloat16 is the upper half of fp32, so the two in a 32-bit lane are taken apart by a mask and a shift: no lane is
 * shuffled, which is twice as fast as widening and narrowing. Rounded to nearest even in integers, in the upper half;
 * a carry may reach infinity, rightly, and the canonical NaN stays what it is.
 */
#define UPPER(x) ((vector_float32)((vector_uint32)(x) & 0xffff0000u))
#define LOWER(x) ((vector_float32)((vector_uint32)(x) << 16))

KERNEL_TARGET static inline vector_uint32 rounded_bfloat16(vector_float32 x)
{
    const vector_uint32 bits = (vector_uint32)canonical_float32(x);
    return bits + 0x7fff + (bits >> 16 & 1);
}

KERNEL_TARGET static inline vector_uint16 to_bfloat16(vector_float32 upper, vector_float32 lower)
{
    return (vector_uint16)((rounded_bfloat16(upper) & 0xffff0000u) | (rounded_bfloat16(lower) >> 16));
}

REDUCE(sum_float16, half_vector_uint16, to_float16(from_float16(x) + from_float16(y)))
REDUCE(sum_bfloat16, vector_uint16, to_bfloat16(UPPER(x) + UPPER(y), LOWER(x) + LOWER(y)))
REDUCE(sum_float32, vector_float32, canonical_float32(x + y))
REDUCE(sum_float64, vector_float64, canonical_float64(x + y))
REDUCE(product_float16, half_vector_uint16, to_float16(from_float16(x) * from_float16(y)))
REDUCE(product_bfloat16, vector_uint16, to_bfloat16(UPPER(x) * UPPER(y), LOWER(x) * LOWER(y)))
REDUCE(product_float32, vector_float32, canonical_float32(x * y))
REDUCE(product_float64, vector_float64, canonical_float64(x * y))

FLOAT_SCALE(scale_float16, half_vector_uint16, float, to_float16(from_float16(x) * multiplier))
FLOAT_SCALE(scale_bfloat16, vector_uint16, float, to_bfloat16(UPPER(x) * multiplier, LOWER(x) * multiplier))
FLOAT_SCALE(scale_float32, vector_float32, float, canonical_float32(x * multiplier))
FLOAT_SCALE(scale_float64, vector_float64, double, canonical_float64(x * multiplier))
