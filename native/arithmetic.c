/*
 * arithmetic.c: what an operation adds, scales and copies, and where to.
 *
 * It knows requests, chunks and kernels; it decides nothing about order, and knows no links. A result is scaled by the
 * step that completes it, block by block while it is in the nearest cache: the last step that writes a chunk, if that adds
 * something. Where the last step only receives, the sender has scaled already: `commlib.verify` holds plans to that.
 */
#include <string.h>

#include "engine.h"

enum { BLOCK_NBYTES = 8 * 1024 }; /* two of them in half of the smallest L1 there is */

static bool reduces(const cl_request *r)
{
    return r->kind == CL_ALLREDUCE || r->kind == CL_REDUCESCATTER;
}

void cl_operation_contribute(cl_operation *operation, uint32_t s)
{
    const cl_request *r = &operation->request;
    if (!reduces(r) || r->input == NULL || operation->output == NULL)
        return;
    size_t width = cl_dtype_nbytes(r->dtype);
    int32_t nchunks = operation->chunk_first == NULL ? 1 : operation->plan->nchunks;
    for (int32_t c = 0; c < nchunks; c++) {
        cl_step part = {CL_RECV, 0, c, operation->chunk_first == NULL ? operation->plan->nchunks : c + 1};
        uint64_t first, count;
        cl_chunks_of(operation, s, &part, &first, &count);
        uint8_t *to = operation->output + first * width;
        const uint8_t *from = (const uint8_t *)r->input + first * width;
        if (count > 0 && (to != from || r->prescale != 1.0))
            operation->engine->kernels->scale[r->dtype](to, from, count, r->prescale);
    }
}

/* ---- scaling what is complete -------------------------------------------------------------------------------- */

/* A reduce-scatter's other chunks travel on unscaled, and are nobody's result here. */
static bool is_result(const cl_operation *operation, int32_t chunk)
{
    return operation->request.kind == CL_ALLREDUCE || chunk == operation->request.my_part;
}

static bool scales(const cl_operation *operation)
{
    return operation->request.postscale != 1.0 && reduces(&operation->request) && operation->output != NULL;
}

/* What it writes is then the sum of all. */
static bool completes(const cl_operation *operation, uint32_t step, int32_t chunk)
{
    return operation->plan->last_writer[chunk] == step + 1 && is_result(operation, chunk);
}

static void scale_chunk(cl_operation *operation, uint32_t s, int32_t chunk, uint64_t from, uint64_t end)
{
    const cl_request *r = &operation->request;
    cl_step part = {CL_RECV, 0, chunk, chunk + 1};
    uint64_t first, count;
    cl_chunks_of(operation, s, &part, &first, &count);
    uint64_t low = first > from ? first : from, high = first + count < end ? first + count : end;
    if (low >= high)
        return;
    uint8_t *data = operation->output + low * cl_dtype_nbytes(r->dtype);
    operation->engine->kernels->scale[r->dtype](data, data, high - low, r->postscale);
}

/* Of elements [from, end) of the output, just written by this step, scales those of chunks that it completes. */
static void scale_completed(cl_operation *operation, uint32_t s, uint32_t step, uint64_t from, uint64_t end)
{
    const cl_step *range = &operation->plan->steps[step];
    for (int32_t c = range->first_chunk; c < range->end_chunk; c++)
        if (completes(operation, step, c))
            scale_chunk(operation, s, c, from, end);
}

static bool scales_in(const cl_operation *operation, uint32_t step)
{
    const cl_step *range = &operation->plan->steps[step];
    for (int32_t c = range->first_chunk; scales(operation) && c < range->end_chunk; c++)
        if (completes(operation, step, c))
            return true;
    return false;
}

void cl_operation_scale_rest(cl_operation *operation, uint32_t s)
{
    for (int32_t c = 0; scales(operation) && c < operation->plan->nchunks; c++)
        if (operation->plan->last_writer[c] == 0 && is_result(operation, c))
            scale_chunk(operation, s, c, 0, UINT64_MAX);
}

/* ---- what came ----------------------------------------------------------------------------------------------- */

/* Adds, scales and, where `back` is given, writes there too: in blocks, so that each is read and written in the L1. */
static void reduce_and_scale(cl_operation *operation, uint32_t s, uint32_t step, uint8_t *place, const uint8_t *data,
                             uint8_t *back, size_t nbytes)
{
    const cl_request *r = &operation->request;
    size_t width = cl_dtype_nbytes(r->dtype);
    for (size_t done = 0; done < nbytes; done += BLOCK_NBYTES) {
        size_t block = nbytes - done < BLOCK_NBYTES ? nbytes - done : BLOCK_NBYTES;
        uint64_t first = (uint64_t)(place + done - operation->output) / width;
        operation->engine->kernels->reduce[r->dtype][r->reduction](place + done, data + done, block / width);
        scale_completed(operation, s, step, first, first + block / width);
        if (back != NULL)
            memcpy(back + done, place + done, block);
    }
}

void cl_operation_apply(cl_operation *operation, uint32_t s, uint32_t step, size_t offset, const void *data, size_t nbytes)
{
    const cl_request *r = &operation->request;
    uint8_t *place = cl_operation_place(operation, s, step);
    if (place == NULL || data == NULL)
        return;
    if (operation->plan->steps[step].kind != CL_RECV_REDUCE) {
        if (place + offset != data)
            memcpy(place + offset, data, nbytes);
    } else if (scales_in(operation, step)) {
        reduce_and_scale(operation, s, step, place + offset, data, NULL, nbytes);
    } else {
        operation->engine->kernels->reduce[r->dtype][r->reduction](place + offset, data, nbytes / cl_dtype_nbytes(r->dtype));
    }
}

bool cl_operation_apply_there(cl_operation *operation, uint32_t s, uint32_t step, void *data, size_t nbytes)
{
    const cl_request *r = &operation->request;
    cl_segment *segment = &operation->segments[s];
    uint8_t *place = cl_operation_place(operation, s, step);
    bool answers = operation->plan->steps[step].kind == CL_RECV_REDUCE && operation->plan->answer[step] != 0;
    if (!answers || place == NULL || segment->kept != NULL)
        return false;
    if (scales_in(operation, step))
        reduce_and_scale(operation, s, step, place, data, data, nbytes);
    else
        operation->engine->kernels->reduce_both[r->dtype][r->reduction](place, data, nbytes / cl_dtype_nbytes(r->dtype));
    segment->kept = data;
    segment->kept_for = operation->plan->answer[step] - 1;
    return true;
}
