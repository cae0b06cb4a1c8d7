/*
 * kernels_table.h: the rows of every set's table, included inside its initialiser. The same names stand in every set.
 */
#define PLAIN(name) name
#define BOTH(name) name##_both
#define ROW(form, sum, min, max, product) {form(sum), form(min), form(max), form(product)}
/* in the order of cl_reduction: sum, min, max, product */
#define REDUCTIONS(form) { \
        [CL_UINT8] = ROW(form, sum_8, min_uint8, max_uint8, product_8), \
        [CL_INT8] = ROW(form, sum_8, min_int8, max_int8, product_8), \
        [CL_INT16] = ROW(form, sum_16, min_int16, max_int16, product_16), \
        [CL_INT32] = ROW(form, sum_32, min_int32, max_int32, product_32), \
        [CL_INT64] = ROW(form, sum_64, min_int64, max_int64, product_64), \
        [CL_FLOAT16] = ROW(form, sum_float16, min_float16, max_float16, product_float16), \
        [CL_BFLOAT16] = ROW(form, sum_bfloat16, min_bfloat16, max_bfloat16, product_bfloat16), \
        [CL_FLOAT32] = ROW(form, sum_float32, min_float32, max_float32, product_float32), \
        [CL_FLOAT64] = ROW(form, sum_float64, min_float64, max_float64, product_float64), \
        [CL_BOOL] = ROW(form, or_bool, and_bool, or_bool, and_bool), \
    }
    .reduce = REDUCTIONS(PLAIN),
    .reduce_both = REDUCTIONS(BOTH),
    .scale = {
        [CL_UINT8] = scale_uint8, [CL_INT8] = scale_int8, [CL_INT16] = scale_int16, [CL_INT32] = scale_int32,
        [CL_INT64] = scale_int64, [CL_FLOAT16] = scale_float16, [CL_BFLOAT16] = scale_bfloat16,
        [CL_FLOAT32] = scale_float32, [CL_FLOAT64] = scale_float64, [CL_BOOL] = scale_bool,
    },
