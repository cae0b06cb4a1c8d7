/*
 * request.c: an operation's memory: made from a request, laid out once its sizes are known, freed with the last reference.
 *
 * It knows sizes, chunks and segments, and nothing of steps, peers or frames.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

/* Chunk borders fall on multiples of this many elements, so that kernels start aligned (64 bytes of the narrowest type). */
enum { CHUNK_ALIGNMENT = 64 };

static const bool needs_plan[CL_KIND_END] = {
    [CL_ALLREDUCE] = true, [CL_BROADCAST] = true, [CL_ALLGATHER] = true,
    [CL_REDUCESCATTER] = true, [CL_ALLTOALL] = true, [CL_BARRIER] = true,
};
static const bool makes_result[CL_KIND_END] = {
    [CL_ALLGATHER] = true, [CL_REDUCESCATTER] = true, [CL_ALLTOALL] = true,
};

/* More elements, chunks or segments than any machine has memory for; products of one of each stay within 64 bits. */
#define MOST_ELEMENTS (UINT64_C(1) << 40)
#define MOST_PIECES (UINT64_C(1) << 23)

static bool sizes_are_sane(const cl_request *r)
{
    return r->count <= MOST_ELEMENTS && (r->plan == NULL || (uint64_t)r->plan->nchunks <= MOST_PIECES) &&
           (r->segment_count == 0 || r->count / r->segment_count < MOST_PIECES);
}

static bool is_other_rank(const cl_engine *engine, int32_t rank)
{
    return rank < engine->size && rank != engine->rank;
}

static bool ranks_exist(const cl_engine *engine, const cl_request *r)
{
    for (uint32_t p = 0; r->plan != NULL && p < r->plan->npeers; p++)
        if (!is_other_rank(engine, r->plan->peers[p].rank))
            return false;
    for (int32_t m = 0; m < r->nmembers; m++)
        if (r->members[m] < 0 || (r->members[m] != engine->rank) != is_other_rank(engine, r->members[m]))
            return false;
    for (int32_t l = 0; l < r->nlisteners; l++)
        if (r->listeners[l] < 0 || r->listeners[l] >= engine->size)
            return false;
    return r->nmembers == 0 || r->members[r->my_part] == engine->rank;
}

/* What is read and written lies inside `count` elements. */
static bool sizes_fit(const cl_request *r)
{
    uint64_t sum = 0;
    for (int32_t i = 0; i < r->nsplits; i++) {
        if (r->kind != CL_TICKET && r->splits[i] > r->count)
            return false;
        sum += r->splits[i];
    }
    if (r->kind == CL_ALLGATHER || r->kind == CL_ALLTOALL)
        return r->kind == CL_ALLGATHER ? sum == r->count : sum <= r->count;
    for (int32_t c = 0; r->kind == CL_REDUCESCATTER && c < r->plan->nchunks; c++)
        if (r->parts[c] > r->parts[c + 1])
            return false;
    return r->kind != CL_REDUCESCATTER || r->parts[r->plan->nchunks] <= r->count;
}

/* Only the simulation moves nothing, and only where no value is looked at. */
static bool memory_is_given(const cl_engine *engine, const cl_request *r)
{
    bool writes = r->kind == CL_ALLREDUCE || r->kind == CL_BROADCAST;
    bool reads = r->kind != CL_BROADCAST && r->kind != CL_BARRIER && r->kind != CL_TICKET;
    if (r->count == 0 || (engine->driver != NULL && r->kind != CL_EXCHANGE))
        return true;
    return (!writes || r->output != NULL) && (!reads || r->input != NULL);
}

static bool request_is_sound(const cl_request *r)
{
    if (r->kind < 0 || r->kind >= CL_KIND_END || r->dtype < 0 || r->dtype >= CL_DTYPE_END || r->reduction < 0 ||
        r->reduction >= CL_REDUCTION_END || r->text == NULL || needs_plan[r->kind] != (r->plan != NULL))
        return false;
    if (r->nmembers < 0 || (r->nmembers > 0) != (r->members != NULL) || r->nsplits < 0 ||
        (r->nsplits > 0 && r->splits == NULL) || r->nlisteners < 0 || (r->nlisteners > 0) != (r->listeners != NULL))
        return false;
    bool exchanges = r->kind == CL_ALLGATHER || r->kind == CL_ALLTOALL || r->kind == CL_EXCHANGE || r->kind == CL_TICKET;
    if (exchanges && (r->members == NULL || r->gated || (r->parts != NULL && r->plan == NULL)))
        return false;
    if (r->kind == CL_ALLGATHER && (r->nsplits != 1 || r->plan->nchunks != r->nmembers))
        return false;
    if (r->kind == CL_ALLTOALL && (r->nsplits != r->nmembers || r->plan->nchunks != 2 * r->nmembers))
        return false;
    if (r->kind == CL_REDUCESCATTER && (r->parts == NULL || r->my_part < 0 || r->my_part >= r->plan->nchunks))
        return false;
    return r->members == NULL || (r->my_part >= 0 && r->my_part < r->nmembers);
}

static uint32_t hash_scales(const cl_request *r)
{
    double scales[2] = {r->prescale, r->postscale};
    uint8_t bytes[sizeof scales];
    memcpy(bytes, scales, sizeof bytes);
    uint32_t hash = UINT32_C(2166136261) ^ r->settings_hash; /* FNV-1a */
    for (size_t i = 0; i < sizeof bytes; i++)
        hash = (hash ^ bytes[i]) * UINT32_C(16777619);
    return hash;
}

static void *copy_of(const void *data, size_t nbytes)
{
    void *copy = malloc(nbytes == 0 ? 1 : nbytes);
    if (copy != NULL && nbytes > 0)
        memcpy(copy, data, nbytes);
    return copy;
}

/* Sizes differ between members where they are exchanged; then they are no part of what must be equal. */
static cl_meta meta_of(const cl_request *r)
{
    bool uneven = r->kind == CL_ALLGATHER || r->kind == CL_ALLTOALL || r->kind == CL_EXCHANGE;
    return (cl_meta){
        .count = uneven ? 0 : r->count,
        .shape_hash = r->shape_hash,
        .scale_hash = hash_scales(r),
        .root = r->root,
        .dtype = (uint8_t)r->dtype,
        .reduction = (uint8_t)r->reduction,
        .kind = (uint8_t)r->kind,
    };
}

/* The number of segments is known at once where no exchange comes first; gates may open from then on. */
static uint32_t count_segments(const cl_request *r, bool uneven, uint64_t total)
{
    bool divisible = !uneven || r->plan->single_chunks;
    if (r->segment_count == 0 || total <= r->segment_count || !divisible)
        return 1;
    return (uint32_t)((total + r->segment_count - 1) / r->segment_count);
}

/* ---- one block of memory for all that is known at once: an operation costs one allocation, and few cache lines --- */

typedef struct {
    uint32_t nsegments;
    size_t segments, posted, single, verified, gates, text; /* offsets */
    size_t zeroed, end;
} places;

static size_t take(places *at, size_t nbytes)
{
    size_t first = at->end;
    at->end += (nbytes + sizeof(uint64_t) - 1) & ~(sizeof(uint64_t) - 1);
    return first;
}

size_t cl_segment_nbytes(const cl_plan *plan)
{
    return 2 * ((size_t)plan->nsteps + plan->npeers) * sizeof(uint32_t) + plan->nsteps;
}

static places places_of(const cl_request *r)
{
    bool later = makes_result[r->kind] && r->kind != CL_REDUCESCATTER;
    size_t npeers = r->plan == NULL ? 0 : r->plan->npeers;
    places at = {.nsegments = later ? 0 : count_segments(r, r->kind == CL_REDUCESCATTER, r->count), .end = sizeof(cl_operation)};
    at.segments = take(&at, at.nsegments * sizeof(cl_segment));
    at.posted = take(&at, npeers * sizeof(uint64_t));
    at.verified = take(&at, 3 * npeers);
    at.gates = take(&at, at.nsegments * sizeof(atomic_uchar));
    at.text = take(&at, strnlen(r->text, CL_TEXT_NBYTES - 1) + 1);
    at.zeroed = at.end;
    at.single = take(&at, at.nsegments == 1 && r->plan != NULL ? cl_segment_nbytes(r->plan) : 0);
    return at;
}

static cl_operation *allocate(const cl_request *r)
{
    places at = places_of(r);
    uint8_t *block = malloc(at.end);
    if (block == NULL)
        return NULL;
    memset(block, 0, at.zeroed);
    cl_operation *operation = (cl_operation *)(void *)block;
    size_t npeers = r->plan == NULL ? 0 : r->plan->npeers;
    operation->nsegments = at.nsegments;
    operation->laid_out_later = at.nsegments == 0;
    operation->segments = (cl_segment *)(void *)(block + at.segments);
    operation->posted = (uint64_t *)(void *)(block + at.posted);
    operation->verified = block + at.verified;
    operation->wants = operation->verified + npeers;
    operation->starved = operation->wants + npeers;
    operation->gates = (atomic_uchar *)(void *)(block + at.gates);
    operation->single = at.nsegments == 1 && r->plan != NULL ? (uint32_t *)(void *)(block + at.single) : NULL;
    operation->request = *r;
    operation->request.text = memcpy(block + at.text, r->text, strnlen(r->text, CL_TEXT_NBYTES - 1)); /* the rest is zero */
    if (operation->laid_out_later)
        operation->segments = NULL, operation->gates = NULL;
    return operation;
}

/*
 * Something must travel, or ranks that share no link never hear of each other: of nothing, an element for each chunk does, in
 * memory of our own. So no rank is done before all have submitted, and a disagreement reaches every rank.
 */
static void make_travel(cl_operation *operation)
{
    cl_request *own = &operation->request;
    bool is_empty = own->count == 0 && (own->kind == CL_ALLREDUCE || own->kind == CL_REDUCESCATTER);
    operation->travels_for_nothing = is_empty || own->kind == CL_BARRIER;
    if (!operation->travels_for_nothing)
        return;
    own->input = own->output = NULL;
    own->count = own->kind == CL_REDUCESCATTER ? (uint64_t)own->plan->nchunks : 1;
    for (int32_t c = 0; own->kind == CL_REDUCESCATTER && own->parts != NULL && c <= own->plan->nchunks; c++)
        ((uint64_t *)(uintptr_t)own->parts)[c] = (uint64_t)c;
}

static int copy_lists(cl_operation *operation, const cl_request *r)
{
    cl_request *own = &operation->request;
    own->parts = NULL;
    own->members = NULL;
    own->splits = NULL;
    own->listeners = NULL;
    if (r->plan != NULL)
        cl_plan_hold(r->plan);
    operation->plan = r->plan;
    if (r->parts != NULL)
        own->parts = copy_of(r->parts, ((size_t)r->plan->nchunks + 1) * sizeof(uint64_t));
    if (r->members != NULL)
        own->members = copy_of(r->members, (size_t)r->nmembers * sizeof(int32_t));
    if (r->nsplits > 0)
        own->splits = copy_of(r->splits, (size_t)r->nsplits * sizeof(uint64_t));
    if (r->listeners != NULL)
        own->listeners = copy_of(r->listeners, (size_t)r->nlisteners * sizeof(int32_t));
    make_travel(operation);
    bool failed = (r->parts != NULL && own->parts == NULL) || (r->members != NULL && own->members == NULL) ||
                  (r->nsplits > 0 && own->splits == NULL) || (r->listeners != NULL && own->listeners == NULL);
    return failed ? CL_NO_MEMORY : CL_OK;
}

static int allocate_segments(cl_operation *operation, uint64_t total)
{
    uint64_t size = operation->request.segment_count;
    if (size > 0 && total / size >= MOST_PIECES)
        return CL_NO_MEMORY;
    operation->nsegments = count_segments(&operation->request, true, total);
    operation->segments = calloc(operation->nsegments, sizeof(cl_segment));
    operation->gates = calloc(operation->nsegments, sizeof *operation->gates);
    return operation->segments == NULL || operation->gates == NULL ? CL_NO_MEMORY : CL_OK;
}

static int set_parts(cl_operation *operation)
{
    const cl_request *r = &operation->request;
    size_t nchunks = (size_t)r->plan->nchunks;
    operation->chunk_first = calloc(2 * nchunks + 1, sizeof(uint64_t));
    if (operation->chunk_first == NULL)
        return CL_NO_MEMORY;
    operation->chunk_end = operation->chunk_first + nchunks;
    for (size_t c = 0; r->parts != NULL && c < nchunks; c++) {
        operation->chunk_first[c] = r->parts[c];
        operation->chunk_end[c] = r->parts[c + 1];
    }
    return CL_OK;
}

static void begin_life(cl_operation *operation)
{
    operation->references = 1;
    operation->done = 0;
    operation->blamed = -1;
    operation->started_s = operation->done_s = -1;
    operation->unverified = operation->plan == NULL ? 0 : operation->plan->npeers;
    operation->submitted_s = cl_engine_now(operation->engine);
}

int cl_operation_new(cl_engine *engine, const cl_request *request, cl_operation **out)
{
    bool sound = request_is_sound(request) && sizes_are_sane(request) && ranks_exist(engine, request) &&
                 sizes_fit(request) && memory_is_given(engine, request);
    if (!sound)
        return CL_INVALID;
    cl_operation *operation = allocate(request);
    if (operation == NULL)
        return CL_NO_MEMORY;
    operation->engine = engine;
    operation->meta = meta_of(request);
    int status = copy_lists(operation, request);
    if (status == CL_OK && makes_result[request->kind])
        status = set_parts(operation);
    begin_life(operation);
    if (status != CL_OK) {
        cl_operation_release(operation);
        return status;
    }
    *out = operation;
    return CL_OK;
}

int cl_operation_renew(cl_operation *operation, uint64_t key)
{
    uint32_t npeers = operation->plan == NULL ? 0 : operation->plan->npeers;
    bool is_alone = atomic_load_explicit(&operation->references, memory_order_acquire) == 1;
    if (!is_alone || operation->request.kind != CL_ALLREDUCE || operation->request.gated || operation->status != CL_OK)
        return CL_AGAIN;
    free(operation->stall);
    free(operation->memory);
    memset(&operation->started, 0, sizeof *operation - offsetof(cl_operation, started));
    memset(operation->segments, 0, operation->nsegments * sizeof(cl_segment));
    memset(operation->posted, 0, npeers * sizeof(uint64_t));
    memset(operation->verified, 0, 3 * (size_t)npeers);
    operation->request.key = key;
    begin_life(operation);
    return CL_OK;
}

void cl_operation_hold(cl_operation *operation)
{
    atomic_fetch_add_explicit(&operation->references, 1, memory_order_relaxed);
}

void cl_operation_release(cl_operation *operation)
{
    if (operation == NULL || atomic_fetch_sub_explicit(&operation->references, 1, memory_order_acq_rel) != 1)
        return;
    cl_exchange_free(operation);
    free(operation->stall);
    for (uint32_t s = 0; operation->single == NULL && operation->segments != NULL && s < operation->nsegments; s++)
        free(operation->segments[s].waiting);
    if (operation->laid_out_later) {
        free(operation->gates);
        free(operation->segments);
    }
    free(operation->error);
    free(operation->chunk_first);
    free(operation->member_counts);
    free(operation->memory);
    free((void *)(uintptr_t)operation->request.listeners);
    free((void *)(uintptr_t)operation->request.splits);
    free((void *)(uintptr_t)operation->request.members);
    free((void *)(uintptr_t)operation->request.parts);
    cl_plan_free(operation->plan);
    free(operation);
}

/* ---- what its caller may ask, from any thread ------------------------------------------------------------------ */

int cl_operation_done(cl_operation *operation)
{
    return atomic_load_explicit(&operation->done, memory_order_acquire);
}

int cl_operation_status(cl_operation *operation, const char **text, int32_t *peer)
{
    bool done = atomic_load_explicit(&operation->done, memory_order_acquire);
    *text = done && operation->error != NULL ? operation->error : "";
    *peer = done ? operation->blamed : -1;
    return done ? operation->status : CL_AGAIN;
}

int cl_operation_result(cl_operation *operation, void **address, uint64_t *count, const uint64_t **member_counts)
{
    if (!atomic_load_explicit(&operation->done, memory_order_acquire))
        return CL_AGAIN;
    *address = operation->result;
    *count = operation->result_count;
    *member_counts = operation->member_counts;
    return operation->status;
}

void cl_operation_times(cl_operation *operation, double *submitted, double *started, double *done, uint32_t *segments)
{
    bool finished = atomic_load_explicit(&operation->done, memory_order_acquire);
    *submitted = operation->submitted_s;
    *started = finished ? operation->started_s : -1;
    *done = finished ? operation->done_s : -1;
    *segments = finished ? operation->segments_done : 0;
}

/* ---- layout: after the exchange, if there is one ------------------------------------------------------------ */

static int allocate_result(cl_operation *operation, uint64_t count)
{
    if (count > MOST_ELEMENTS)
        return CL_NO_MEMORY;
    size_t nbytes = (size_t)count * cl_dtype_nbytes(operation->request.dtype);
    operation->memory = malloc(nbytes == 0 ? 1 : nbytes);
    operation->result = operation->memory;
    operation->result_count = count;
    return operation->memory == NULL ? CL_NO_MEMORY : CL_OK;
}

static int lay_out_allgather(cl_operation *operation)
{
    const cl_request *r = &operation->request;
    size_t width = cl_dtype_nbytes(r->dtype);
    operation->member_counts = calloc((size_t)r->nmembers, sizeof(uint64_t));
    if (operation->member_counts == NULL)
        return CL_NO_MEMORY;
    uint64_t total = 0;
    for (int32_t m = 0; m < r->nmembers; m++) {
        memcpy(&operation->member_counts[m], operation->exchange->entries[m].data, sizeof(uint64_t));
        operation->chunk_first[m] = total;
        operation->chunk_end[m] = total += operation->member_counts[m];
    }
    CL_TRY(allocate_result(operation, total));
    operation->output = operation->memory;
    if (r->input != NULL && r->count > 0)
        memcpy(operation->memory + operation->chunk_first[r->my_part] * width, r->input, r->count * width);
    return allocate_segments(operation, total);
}

static uint64_t split_of(const cl_operation *operation, int32_t from, int32_t to)
{
    uint64_t split;
    memcpy(&split, operation->exchange->entries[from].data + (size_t)to * sizeof split, sizeof split);
    return split;
}

static int lay_out_alltoall(cl_operation *operation)
{
    const cl_request *r = &operation->request;
    size_t width = cl_dtype_nbytes(r->dtype);
    int32_t n = r->nmembers, me = r->my_part;
    operation->member_counts = calloc((size_t)n, sizeof(uint64_t));
    if (operation->member_counts == NULL)
        return CL_NO_MEMORY;
    uint64_t out = 0, in = 0, all = 0;
    for (int32_t m = 0; m < n; m++) {
        operation->chunk_first[m] = out;
        operation->chunk_end[m] = out += split_of(operation, me, m);
        operation->chunk_first[n + m] = in;
        operation->chunk_end[n + m] = in += operation->member_counts[m] = split_of(operation, m, me);
        for (int32_t to = 0; to < n; to++)
            all += split_of(operation, m, to);
    }
    CL_TRY(allocate_result(operation, in));
    operation->input = (uint8_t *)(uintptr_t)r->input;
    operation->output = operation->memory;
    uint64_t own = operation->member_counts[me];
    if (r->input != NULL && own > 0)
        memcpy(operation->memory + operation->chunk_first[n + me] * width,
               operation->input + operation->chunk_first[me] * width, own * width);
    return allocate_segments(operation, all / (uint64_t)n); /* the same number of segments on every rank */
}

static int lay_out_reducescatter(cl_operation *operation)
{
    const cl_request *r = &operation->request;
    CL_TRY(allocate_result(operation, r->count));
    operation->output = operation->memory;
    operation->result = operation->memory + operation->chunk_first[r->my_part] * cl_dtype_nbytes(r->dtype);
    operation->result_count = operation->chunk_end[r->my_part] - operation->chunk_first[r->my_part];
    if (operation->travels_for_nothing) {
        memset(operation->memory, 0, (size_t)r->count * cl_dtype_nbytes(r->dtype));
        operation->result_count = 0;
    }
    return CL_OK;
}

/* Everybody's bytes in one block; the entries stay with the exchange until then. */
static int lay_out_exchange(cl_operation *operation)
{
    const cl_request *r = &operation->request;
    operation->member_counts = calloc((size_t)r->nmembers, sizeof(uint64_t));
    if (operation->member_counts == NULL)
        return CL_NO_MEMORY;
    uint64_t total = 0;
    for (int32_t m = 0; m < r->nmembers; m++)
        total += operation->member_counts[m] = operation->exchange->entries[m].nbytes;
    CL_TRY(allocate_result(operation, total));
    uint8_t *to = operation->memory;
    for (int32_t m = 0; m < r->nmembers; m++) {
        memcpy(to, operation->exchange->entries[m].data, operation->member_counts[m]);
        to += operation->member_counts[m];
    }
    return CL_OK;
}

static int lay_out_nothing(cl_operation *operation)
{
    operation->memory = calloc(1, cl_dtype_nbytes(operation->request.dtype));
    operation->output = operation->memory;
    return operation->memory == NULL ? CL_NO_MEMORY : CL_OK;
}

static int lay_out_in_place(cl_operation *operation)
{
    if (operation->travels_for_nothing)
        return lay_out_nothing(operation);
    operation->output = operation->request.output;
    return CL_OK;
}

int cl_operation_layout(cl_operation *operation)
{
    static int (*const layouts[CL_KIND_END])(cl_operation *) = {
        [CL_ALLREDUCE] = lay_out_in_place, [CL_BROADCAST] = lay_out_in_place,
        [CL_BARRIER] = lay_out_nothing, [CL_ALLGATHER] = lay_out_allgather,
        [CL_REDUCESCATTER] = lay_out_reducescatter, [CL_ALLTOALL] = lay_out_alltoall,
        [CL_EXCHANGE] = lay_out_exchange, [CL_TICKET] = lay_out_exchange,
    };
    return layouts[operation->request.kind](operation);
}

/* ---- chunks -------------------------------------------------------------------------------------------------- */

static uint64_t border(uint64_t count, uint64_t part, uint64_t parts)
{
    if (part == 0)
        return 0;
    return part == parts ? count : (count * part / parts) & ~(uint64_t)(CHUNK_ALIGNMENT - 1);
}

static void equal_chunks(const cl_operation *operation, uint32_t segment, const cl_step *step, uint64_t *first,
                         uint64_t *count)
{
    uint64_t size = operation->nsegments == 1 ? operation->request.count : operation->request.segment_count;
    uint64_t start = segment * size;
    uint64_t length = segment + 1 == operation->nsegments ? operation->request.count - start : size;
    uint64_t nchunks = (uint64_t)operation->plan->nchunks;
    uint64_t from = border(length, (uint64_t)step->first_chunk, nchunks);
    *first = start + from;
    *count = border(length, (uint64_t)step->end_chunk, nchunks) - from;
}

/* Segment s of an uneven operation is the s-th slice of every chunk. */
static void uneven_chunks(const cl_operation *operation, uint32_t segment, const cl_step *step, uint64_t *first,
                          uint64_t *count)
{
    uint64_t start = operation->chunk_first[step->first_chunk];
    uint64_t length = operation->chunk_end[step->end_chunk - 1] - start;
    uint64_t from = border(length, segment, operation->nsegments);
    *first = start + from;
    *count = border(length, (uint64_t)segment + 1, operation->nsegments) - from;
}

void cl_chunks_of(const cl_operation *operation, uint32_t segment, const cl_step *step, uint64_t *first, uint64_t *count)
{
    (operation->chunk_first == NULL ? equal_chunks : uneven_chunks)(operation, segment, step, first, count);
}
