/*
 * adasum.c: the arithmetic of Adasum on two pieces of memory: their inner products, and their sum with two coefficients.
 *
 * Block by block: 16-bit floats are widened into a block of fp32 first. Eight sums run side by side, so that the compiler may
 * use registers of any length without changing a bit.
 */
#include "commlib.h"
#include "float16.h"

enum { BLOCK = 512, LANES = 8 };

typedef struct {
    double aa[LANES], ab[LANES], bb[LANES];
} lanes;

#define DOTS(type)                                                                              \
    static void dots_##type(const type *a, const type *b, size_t count, lanes *sums)            \
    {                                                                                           \
        size_t whole = count - count % LANES;                                                   \
        for (size_t i = 0; i < whole; i += LANES)                                               \
            for (size_t k = 0; k < LANES; k++) {                                                \
                double x = a[i + k], y = b[i + k];                                              \
                sums->aa[k] += x * x;                                                           \
                sums->ab[k] += x * y;                                                           \
                sums->bb[k] += y * y;                                                           \
            }                                                                                   \
        for (size_t i = whole; i < count; i++) {                                                \
            sums->aa[0] += (double)a[i] * a[i];                                                 \
            sums->ab[0] += (double)a[i] * b[i];                                                 \
            sums->bb[0] += (double)b[i] * b[i];                                                 \
        }                                                                                       \
    }                                                                                           \
    static void mix_##type(type *out, const type *a, const type *b, size_t count, type ca, type cb) \
    {                                                                                           \
        for (size_t i = 0; i < count; i++)                                                      \
            out[i] = ca * a[i] + cb * b[i];                                                     \
    }

DOTS(float)
DOTS(double)

static void widen(int32_t dtype, float *out, const uint16_t *in, size_t count)
{
    for (size_t i = 0; dtype == CL_FLOAT16 && i < count; i++)
        out[i] = float32_of_float16(in[i]);
    for (size_t i = 0; dtype == CL_BFLOAT16 && i < count; i++)
        out[i] = float32_of_bfloat16(in[i]);
}

static void narrow(int32_t dtype, uint16_t *out, const float *in, size_t count)
{
    for (size_t i = 0; dtype == CL_FLOAT16 && i < count; i++)
        out[i] = float16_of_float32(in[i]);
    for (size_t i = 0; dtype == CL_BFLOAT16 && i < count; i++)
        out[i] = bfloat16_of_float32(in[i]);
}

static size_t block_at(size_t first, size_t count)
{
    return count - first < BLOCK ? count - first : BLOCK;
}

static void dots_narrow(int32_t dtype, const uint16_t *a, const uint16_t *b, size_t count, lanes *sums)
{
    float x[BLOCK], y[BLOCK];
    for (size_t i = 0; i < count; i += BLOCK) {
        widen(dtype, x, a + i, block_at(i, count));
        widen(dtype, y, b + i, block_at(i, count));
        dots_float(x, y, block_at(i, count), sums);
    }
}

static void mix_narrow(int32_t dtype, uint16_t *out, const uint16_t *a, const uint16_t *b, size_t count, float ca, float cb)
{
    float x[BLOCK], y[BLOCK];
    for (size_t i = 0; i < count; i += BLOCK) {
        widen(dtype, x, a + i, block_at(i, count));
        widen(dtype, y, b + i, block_at(i, count));
        mix_float(x, x, y, block_at(i, count), ca, cb);
        narrow(dtype, out + i, x, block_at(i, count));
    }
}

static double total(const double *sums)
{
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

int cl_adasum_dots(int32_t dtype, const void *a, const void *b, size_t count, double *sums)
{
    lanes all = {{0}, {0}, {0}};
    if (dtype == CL_FLOAT32)
        dots_float(a, b, count, &all);
    else if (dtype == CL_FLOAT64)
        dots_double(a, b, count, &all);
    else if (dtype == CL_FLOAT16 || dtype == CL_BFLOAT16)
        dots_narrow(dtype, a, b, count, &all);
    else
        return CL_INVALID;
    sums[0] = total(all.aa);
    sums[1] = total(all.ab);
    sums[2] = total(all.bb);
    return CL_OK;
}

int cl_adasum_mix(int32_t dtype, void *out, const void *a, const void *b, size_t count, double ca, double cb)
{
    if (dtype == CL_FLOAT32)
        mix_float(out, a, b, count, (float)ca, (float)cb);
    else if (dtype == CL_FLOAT64)
        mix_double(out, a, b, count, ca, cb);
    else if (dtype == CL_FLOAT16 || dtype == CL_BFLOAT16)
        mix_narrow(dtype, out, a, b, count, (float)ca, (float)cb);
    else
        return CL_INVALID;
    return CL_OK;
}
