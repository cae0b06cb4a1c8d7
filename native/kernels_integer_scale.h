/*
 * kernels_integer_scale.h: out = in * factor for integers and bool, one scalar loop per dtype; every set includes it.
 *
 * Shared because it is not worth vector code: only Average on integers comes here.
 * KERNEL_TARGET is set by the includer.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* `end` is the first double above the type's range: 2^n is exact, INT64_MAX is not. */
KERNEL_TARGET static int64_t saturated(double x, int64_t low, int64_t high, double end)
{
    if (x != x)
        return 0;
    if (x >= end)
        return high;
    return x <= (double)low ? low : (int64_t)x;
}

#define INTEGER_SCALE(name, type, result)                                                           \
    KERNEL_TARGET static void name(void *out, const void *in, size_t count, double factor) {        \
        if (factor == 1.0) {                                                                        \
            if (out != in && count) memcpy(out, in, count * sizeof(type));                          \
            return;                                                                                 \
        }                                                                                           \
        for (size_t i = 0; i < count; i++) {                                                        \
            type value;                                                                             \
            memcpy(&value, (const unsigned char *)in + i * sizeof value, sizeof value);             \
            value = (type)(result);                                                                 \
            memcpy((unsigned char *)out + i * sizeof value, &value, sizeof value);                  \
        }                                                                                           \
    }

#define SATURATED(low, high, end) saturated((double)value * factor, low, high, end)

INTEGER_SCALE(scale_uint8, uint8_t, SATURATED(0, UINT8_MAX, 0x1p8))
INTEGER_SCALE(scale_int8, int8_t, SATURATED(INT8_MIN, INT8_MAX, 0x1p7))
INTEGER_SCALE(scale_int16, int16_t, SATURATED(INT16_MIN, INT16_MAX, 0x1p15))
INTEGER_SCALE(scale_int32, int32_t, SATURATED(INT32_MIN, INT32_MAX, 0x1p31))
INTEGER_SCALE(scale_int64, int64_t, SATURATED(INT64_MIN, INT64_MAX, 0x1p63))
INTEGER_SCALE(scale_bool, uint8_t, value != 0 && factor != 0.0)
