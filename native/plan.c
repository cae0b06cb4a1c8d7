/*
 * plan.c: packs one rank's steps and infers what depends on what.
 *
 * A step depends on an earlier step of the same rank if their chunks overlap and at least one of the two writes. It is
 * enough to remember, for each chunk, its last writer and the readers since: older ones are reached through those.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

typedef struct {
    uint32_t *before, *after; /* edge k: step after[k] waits for step before[k] */
    size_t count, capacity;
} edges;

static int add_edge(edges *list, uint32_t before, uint32_t after)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity == 0 ? 64 : 2 * list->capacity;
        uint32_t *grown_before = realloc(list->before, capacity * sizeof(uint32_t));
        if (grown_before == NULL)
            return CL_NO_MEMORY;
        list->before = grown_before;
        uint32_t *grown_after = realloc(list->after, capacity * sizeof(uint32_t));
        if (grown_after == NULL)
            return CL_NO_MEMORY;
        list->after = grown_after;
        list->capacity = capacity;
    }
    list->before[list->count] = before;
    list->after[list->count++] = after;
    return CL_OK;
}

/* Of one chunk: the last writer (step + 1, 0: none) and the head of the list of readers since (ditto). */
typedef struct {
    uint32_t writer, readers;
} chunk_state;

typedef struct {
    chunk_state *chunks;
    uint32_t *reader_step, *reader_next;
    size_t count, capacity;
} readers;

static int add_reader(readers *list, chunk_state *chunk, uint32_t step)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity == 0 ? 64 : 2 * list->capacity;
        uint32_t *steps = realloc(list->reader_step, capacity * sizeof(uint32_t));
        if (steps == NULL)
            return CL_NO_MEMORY;
        list->reader_step = steps;
        uint32_t *next = realloc(list->reader_next, capacity * sizeof(uint32_t));
        if (next == NULL)
            return CL_NO_MEMORY;
        list->reader_next = next;
        list->capacity = capacity;
    }
    list->reader_step[list->count] = step;
    list->reader_next[list->count] = chunk->readers;
    chunk->readers = (uint32_t)++list->count;
    return CL_OK;
}

static int infer_chunk(readers *list, chunk_state *chunk, uint32_t step, bool writes, edges *found)
{
    if (!writes) {
        if (chunk->writer != 0)
            CL_TRY(add_edge(found, chunk->writer - 1, step));
        return add_reader(list, chunk, step);
    }
    if (chunk->readers == 0 && chunk->writer != 0)
        CL_TRY(add_edge(found, chunk->writer - 1, step));
    for (uint32_t r = chunk->readers; r != 0; r = list->reader_next[r - 1])
        CL_TRY(add_edge(found, list->reader_step[r - 1], step));
    *chunk = (chunk_state){step + 1, 0};
    return CL_OK;
}

static int infer(const cl_plan *plan, readers *list, edges *found)
{
    for (uint32_t i = 0; i < plan->nsteps; i++) {
        const cl_step *step = &plan->steps[i];
        for (int32_t c = step->first_chunk; c < step->end_chunk; c++)
            CL_TRY(infer_chunk(list, &list->chunks[c], i, step->kind != CL_SEND, found));
    }
    return CL_OK;
}

/* Edges are found in order of `after`; the same edge may be found once per chunk: only the last found is compared. */
static int pack_edges(cl_plan *plan, const edges *found)
{
    plan->needs = calloc(plan->nsteps + 1, sizeof(uint32_t));
    plan->dependents_end = calloc(plan->nsteps + 1, sizeof(uint32_t));
    plan->dependents = calloc(found->count + 1, sizeof(uint32_t));
    uint32_t *last = calloc(plan->nsteps + 1, sizeof(uint32_t)); /* per step: the last step found to wait for it, + 1 */
    int status = CL_NO_MEMORY;
    if (plan->needs == NULL || plan->dependents_end == NULL || plan->dependents == NULL || last == NULL)
        goto out;
    for (size_t k = 0; k < found->count; k++)
        if (last[found->before[k]] != found->after[k] + 1) {
            last[found->before[k]] = found->after[k] + 1;
            plan->dependents_end[found->before[k]]++;
        }
    for (uint32_t i = 1; i < plan->nsteps; i++)
        plan->dependents_end[i] += plan->dependents_end[i - 1];
    memset(last, 0, plan->nsteps * sizeof(uint32_t));
    for (size_t k = found->count; k-- > 0;) /* backwards: each step's list ends where counting said, and ascends */
        if (last[found->before[k]] != found->after[k] + 1) {
            last[found->before[k]] = found->after[k] + 1;
            plan->needs[found->after[k]]++;
            plan->dependents[--plan->dependents_end[found->before[k]]] = found->after[k];
        }
    /* The ends have become starts: shift by one step, the total closes the list. */
    uint32_t total = 0;
    for (uint32_t i = 0; i < plan->nsteps; i++)
        total += plan->needs[i];
    for (uint32_t i = 0; i + 1 < plan->nsteps; i++)
        plan->dependents_end[i] = plan->dependents_end[i + 1];
    if (plan->nsteps > 0)
        plan->dependents_end[plan->nsteps - 1] = total;
    status = CL_OK;
out:
    free(last);
    return status;
}

static int infer_dependencies(cl_plan *plan)
{
    readers list = {calloc((size_t)plan->nchunks + 1, sizeof(chunk_state)), NULL, NULL, 0, 0};
    edges found = {0};
    int status = list.chunks == NULL ? CL_NO_MEMORY : infer(plan, &list, &found);
    if (status == CL_OK)
        status = pack_edges(plan, &found);
    free(found.after);
    free(found.before);
    free(list.reader_next);
    free(list.reader_step);
    free(list.chunks);
    return status;
}

static uint32_t peer_index(cl_plan *plan, int32_t rank, bool sends)
{
    for (uint32_t p = plan->npeers; p-- > 0;)
        if (plan->peers[p].rank == rank)
            return p;
    plan->peers[plan->npeers] = (cl_plan_peer){.rank = rank, .sends_first = sends};
    return plan->npeers++;
}

static int find_peers(cl_plan *plan)
{
    plan->peers = calloc(plan->nsteps + 1, sizeof(cl_plan_peer));
    plan->peer_of = calloc(plan->nsteps + 1, sizeof(uint32_t));
    plan->pair_index = calloc(plan->nsteps + 1, sizeof(uint32_t));
    if (plan->peers == NULL || plan->peer_of == NULL || plan->pair_index == NULL)
        return CL_NO_MEMORY;
    for (uint32_t i = 0; i < plan->nsteps; i++) {
        bool sends = plan->steps[i].kind == CL_SEND;
        plan->peer_of[i] = peer_index(plan, plan->steps[i].peer, sends);
        cl_plan_peer *peer = &plan->peers[plan->peer_of[i]];
        plan->pair_index[i] = sends ? peer->nsends++ : peer->nrecvs++;
    }
    for (uint32_t p = 0; p < plan->npeers; p++) {
        plan->peers[p].sends = calloc(plan->peers[p].nsends + 1, sizeof(uint32_t));
        plan->peers[p].recvs = calloc(plan->peers[p].nrecvs + 1, sizeof(uint32_t));
        if (plan->peers[p].sends == NULL || plan->peers[p].recvs == NULL)
            return CL_NO_MEMORY;
    }
    for (uint32_t i = 0; i < plan->nsteps; i++) {
        cl_plan_peer *peer = &plan->peers[plan->peer_of[i]];
        (plan->steps[i].kind == CL_SEND ? peer->sends : peer->recvs)[plan->pair_index[i]] = i;
    }
    return CL_OK;
}

/* What is granted at the start: see cl_segment.blocked. */
static int find_initial_grants(cl_plan *plan)
{
    uint32_t *blocked = calloc(plan->nsteps + 1, sizeof(uint32_t));
    if (blocked == NULL)
        return CL_NO_MEMORY;
    memcpy(blocked, plan->needs, plan->nsteps * sizeof(uint32_t));
    for (uint32_t i = 0; i < plan->nsteps; i++)
        for (uint32_t d = i == 0 ? 0 : plan->dependents_end[i - 1]; d < plan->dependents_end[i]; d++)
            blocked[plan->dependents[d]] -= plan->needs[i] == 0 && plan->steps[i].kind == CL_SEND;
    for (uint32_t p = 0; p < plan->npeers; p++) {
        cl_plan_peer *peer = &plan->peers[p];
        while (peer->initial_grant < peer->nrecvs && blocked[peer->recvs[peer->initial_grant]] == 0)
            peer->initial_grant++;
    }
    free(blocked);
    return CL_OK;
}

static bool answers(const cl_plan *plan, uint32_t first, uint32_t second)
{
    const cl_step *a = &plan->steps[first], *b = &plan->steps[second];
    bool pairs = (a->kind == CL_SEND && b->kind == CL_RECV) || (a->kind == CL_RECV_REDUCE && b->kind == CL_SEND);
    return pairs && a->peer == b->peer && a->first_chunk == b->first_chunk && a->end_chunk == b->end_chunk &&
           plan->needs[second] == 1;
}

/*
 * Between two ranks alone: of several, only the last to contribute could be answered so, and the others' payloads would
 * compete for places that do nothing for them.
 */
static int find_answers(cl_plan *plan)
{
    plan->answer = calloc(plan->nsteps + 1, sizeof(uint32_t));
    plan->last_writer = calloc((size_t)plan->nchunks, sizeof(uint32_t));
    if (plan->answer == NULL || plan->last_writer == NULL)
        return CL_NO_MEMORY;
    for (uint32_t i = 0; i < plan->nsteps; i++) {
        for (uint32_t d = i == 0 ? 0 : plan->dependents_end[i - 1]; d < plan->dependents_end[i]; d++)
            if (plan->npeers == 1 && answers(plan, i, plan->dependents[d]))
                plan->answer[i] = plan->dependents[d] + 1;
        for (int32_t c = plan->steps[i].first_chunk; plan->steps[i].kind != CL_SEND && c < plan->steps[i].end_chunk; c++)
            plan->last_writer[c] = i + 1;
    }
    return CL_OK;
}

static bool valid(const cl_step *step, int32_t nchunks, int32_t inputs)
{
    bool reads_only = step->kind == CL_SEND;
    return step->kind >= 0 && step->kind < CL_STEP_KIND_END && step->peer >= 0 && step->first_chunk >= 0 &&
           step->first_chunk < step->end_chunk && step->end_chunk <= nchunks &&
           (reads_only ? inputs == 0 || step->end_chunk <= inputs || step->first_chunk >= inputs
                       : step->first_chunk >= inputs);
}

int cl_plan_new(const cl_step *steps, size_t nsteps, int32_t nchunks, int32_t inputs, cl_plan **out)
{
    if (nsteps > UINT32_MAX - 2 || nchunks < 1 || inputs < 0 || inputs > nchunks)
        return CL_INVALID;
    for (size_t i = 0; i < nsteps; i++)
        if (!valid(&steps[i], nchunks, inputs))
            return CL_INVALID;
    cl_plan *plan = calloc(1, sizeof(cl_plan));
    if (plan == NULL)
        return CL_NO_MEMORY;
    *plan = (cl_plan){.references = 1, .nchunks = nchunks, .inputs = inputs, .nsteps = (uint32_t)nsteps};
    plan->single_chunks = true;
    plan->steps = calloc(nsteps + 1, sizeof(cl_step));
    int status = plan->steps == NULL ? CL_NO_MEMORY : CL_OK;
    if (status == CL_OK && nsteps > 0)
        memcpy(plan->steps, steps, nsteps * sizeof(cl_step));
    for (size_t i = 0; i < nsteps; i++)
        plan->single_chunks &= steps[i].end_chunk == steps[i].first_chunk + 1;
    if (status == CL_OK)
        status = find_peers(plan);
    if (status == CL_OK)
        status = infer_dependencies(plan);
    if (status == CL_OK)
        status = find_initial_grants(plan);
    if (status == CL_OK)
        status = find_answers(plan);
    if (status != CL_OK) {
        cl_plan_free(plan);
        return status;
    }
    *out = plan;
    return CL_OK;
}

void cl_plan_hold(cl_plan *plan)
{
    atomic_fetch_add_explicit(&plan->references, 1, memory_order_relaxed);
}

void cl_plan_free(cl_plan *plan)
{
    if (plan == NULL || atomic_fetch_sub_explicit(&plan->references, 1, memory_order_acq_rel) != 1)
        return;
    for (uint32_t p = 0; plan->peers != NULL && p < plan->npeers; p++) {
        free(plan->peers[p].sends);
        free(plan->peers[p].recvs);
    }
    free(plan->peers);
    free(plan->last_writer);
    free(plan->answer);
    free(plan->dependents);
    free(plan->dependents_end);
    free(plan->needs);
    free(plan->pair_index);
    free(plan->peer_of);
    free(plan->steps);
    free(plan);
}
