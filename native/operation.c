/*
 * operation.c: the data path of one operation: which steps may go, and what a finished step sets free.
 *
 * It knows plans, segments and grants. It does not know links: sends that may go are pushed on the peer's ready heap,
 * frames of the engine's own are told to the engine, and what arrives is handed in by frames.c.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

static cl_plan_peer *plan_peer(const cl_operation *operation, uint32_t p)
{
    return &operation->plan->peers[p];
}

static int find_peer(const cl_operation *operation, int32_t rank, uint32_t *index)
{
    if (operation->plan == NULL)
        return CL_INVALID;
    for (uint32_t p = 0; p < operation->plan->npeers; p++)
        if (operation->plan->peers[p].rank == rank) {
            *index = p;
            return CL_OK;
        }
    return CL_INVALID;
}

static uint64_t step_count(const cl_operation *operation, uint32_t segment, uint32_t step)
{
    uint64_t first, count;
    cl_chunks_of(operation, segment, &operation->plan->steps[step], &first, &count);
    return count;
}

static uint32_t step_nbytes(const cl_operation *operation, uint32_t segment, uint32_t step)
{
    return (uint32_t)(step_count(operation, segment, step) * cl_dtype_nbytes(operation->request.dtype));
}

uint8_t *cl_operation_place(const cl_operation *operation, uint32_t segment, uint32_t step)
{
    const cl_step *s = &operation->plan->steps[step];
    uint8_t *base = s->end_chunk <= operation->plan->inputs ? operation->input : operation->output;
    if (base == NULL)
        return NULL;
    uint64_t first, count;
    cl_chunks_of(operation, segment, s, &first, &count);
    return base + first * cl_dtype_nbytes(operation->request.dtype);
}

static cl_frame frame_of(const cl_operation *operation, uint8_t type, uint32_t segment)
{
    return (cl_frame){.key = operation->request.key, .type = type, .segment = segment, .meta = operation->meta};
}

/* Done, well or not: its memory is the caller's again. A cascade may find this out at any of its steps. */
static bool is_over(const cl_operation *operation)
{
    return atomic_load_explicit(&operation->done, memory_order_relaxed);
}

static uint32_t first_dependent(const cl_plan *plan, uint32_t step)
{
    return step == 0 ? 0 : plan->dependents_end[step - 1];
}

/* ---- steps --------------------------------------------------------------------------------------------------- */

static void step_done(cl_operation *operation, uint32_t s, uint32_t step);

static void push_ready(cl_operation *operation, uint32_t s, uint32_t step, cl_step_state how)
{
    cl_engine *engine = operation->engine;
    if (is_over(operation))
        return;
    int32_t rank = operation->plan->steps[step].peer;
    cl_ready entry = {operation->request.priority, operation->sequence, s, step, operation};
    if (cl_heap_push(&engine->peers[rank].ready, entry) != CL_OK) {
        if (how == CL_STEP_POSTED_EAGER)
            engine->peers[rank].eager_used -= step_nbytes(operation, s, step);
        cl_control_fail_everywhere(operation, CL_NO_MEMORY, engine->rank, "out of memory for the queue of sends");
        return;
    }
    operation->segments[s].state[step] = (uint8_t)how;
    cl_engine_touch(engine, rank);
}

/* Takes from the eager budget; without budget this operation falls back to grants with this peer, and says so once. */
static bool take_eager_budget(cl_operation *operation, uint32_t p, uint32_t nbytes)
{
    cl_engine *engine = operation->engine;
    cl_peer *peer = &engine->peers[plan_peer(operation, p)->rank];
    if (!operation->eager || operation->starved[p])
        return false;
    if (peer->eager_used + nbytes <= engine->settings.eager_budget_nbytes) {
        peer->eager_used += nbytes;
        return true;
    }
    operation->starved[p] = 1;
    engine->stats.eager_starved++;
    cl_frame frame = frame_of(operation, CL_FRAME_POST, 0);
    frame.flags = CL_FLAG_WANT;
    cl_engine_tell(engine, plan_peer(operation, p)->rank, &frame, NULL);
    return false;
}

static void open_send(cl_operation *operation, uint32_t s, uint32_t step)
{
    cl_segment *segment = &operation->segments[s];
    uint32_t p = operation->plan->peer_of[step];
    bool granted = operation->plan->pair_index[step] < segment->granted_out[p];
    if (granted)
        push_ready(operation, s, step, CL_STEP_POSTED);
    else if (take_eager_budget(operation, p, step_nbytes(operation, s, step)))
        push_ready(operation, s, step, CL_STEP_POSTED_EAGER);
}

/*
 * Grants every leading receive from a peer that could be taken now. Grants are cumulative: the last one says it all. One
 * that sets nothing free that travels is not told: its peer might have finished without it, and would keep it for ever.
 */
static void grant(cl_operation *operation, uint32_t s, uint32_t p)
{
    cl_segment *segment = &operation->segments[s];
    const cl_plan_peer *peer = plan_peer(operation, p);
    bool travels = false;
    while (segment->granted_in[p] < peer->nrecvs && segment->blocked[peer->recvs[segment->granted_in[p]]] == 0)
        travels |= step_count(operation, s, peer->recvs[segment->granted_in[p]++]) > 0;
    if (!travels || (operation->eager && !operation->wants[p]))
        return;
    cl_frame frame = frame_of(operation, CL_FRAME_GRANT, s);
    frame.arg = segment->granted_in[p];
    cl_engine_tell(operation->engine, peer->rank, &frame, NULL);
}

static bool feeds(const cl_kept *kept, const cl_plan *plan, uint32_t s, uint32_t step)
{
    return plan->steps[step].kind != CL_SEND && kept->peer == plan->steps[step].peer && kept->frame.segment == s &&
           kept->frame.step == plan->pair_index[step];
}

static cl_kept *take_kept(cl_operation *operation, uint32_t s, uint32_t step)
{
    for (cl_kept **at = &operation->kept; *at != NULL; at = &(*at)->next) {
        cl_kept *kept = *at;
        if (feeds(kept, operation->plan, s, step)) {
            *at = kept->next;
            return kept;
        }
    }
    return NULL;
}

static void use_kept(cl_operation *operation, uint32_t s, uint32_t step, cl_kept *kept)
{
    cl_operation_apply(operation, s, step, 0, kept->data, kept->frame.nbytes);
    cl_engine_return_credit(operation->engine, kept->peer, &kept->frame);
    cl_kept_free(kept);
    step_done(operation, s, step);
}

/* The dependents of a step are no longer blocked by it: a send that has opened, or a receive that is done. */
static void unblock_dependents(cl_operation *operation, uint32_t s, uint32_t step)
{
    const cl_plan *plan = operation->plan;
    cl_segment *segment = &operation->segments[s];
    for (uint32_t d = first_dependent(plan, step); d < plan->dependents_end[step]; d++) {
        uint32_t dependent = plan->dependents[d];
        if (--segment->blocked[dependent] == 0 && plan->steps[dependent].kind != CL_SEND)
            grant(operation, s, plan->peer_of[dependent]);
    }
}

static void open_step(cl_operation *operation, uint32_t s, uint32_t step)
{
    cl_segment *segment = &operation->segments[s];
    bool receives = operation->plan->steps[step].kind != CL_SEND;
    if (is_over(operation))
        return;
    segment->state[step] = CL_STEP_OPEN;
    if (!receives)
        unblock_dependents(operation, s, step);
    if (step_count(operation, s, step) == 0) {
        step_done(operation, s, step); /* both sides know that nothing travels */
        return;
    }
    if (!receives) {
        open_send(operation, s, step);
        return;
    }
    cl_kept *kept = take_kept(operation, s, step);
    if (kept != NULL)
        use_kept(operation, s, step, kept);
}

static void finish_segment(cl_operation *operation, uint32_t s)
{
    cl_segment *segment = &operation->segments[s];
    if (segment->waiting != operation->single)
        free(segment->waiting);
    segment->waiting = NULL;
    cl_operation_scale_rest(operation, s);
    operation->segments_done++;
}

static void complete_if_done(cl_operation *operation)
{
    bool finished = operation->started && operation->segments_done == operation->nsegments && operation->unverified == 0;
    if (finished && !is_over(operation))
        cl_operation_complete(operation, CL_OK);
}

static void step_done(cl_operation *operation, uint32_t s, uint32_t step)
{
    const cl_plan *plan = operation->plan;
    cl_segment *segment = &operation->segments[s];
    segment->state[step] = CL_STEP_DONE;
    segment->remaining--;
    if (plan->steps[step].kind != CL_SEND)
        unblock_dependents(operation, s, step);
    for (uint32_t d = first_dependent(plan, step); d < plan->dependents_end[step]; d++) {
        uint32_t dependent = plan->dependents[d];
        if (--segment->waiting[dependent] == 0)
            open_step(operation, s, dependent);
        if (segment->waiting == NULL)
            return; /* the dependents' own dependents finished the segment */
    }
    if (segment->remaining == 0 && segment->waiting != NULL && !is_over(operation))
        finish_segment(operation, s);
}

void cl_operation_step_done(cl_operation *operation, uint32_t segment, uint32_t step)
{
    step_done(operation, segment, step);
    complete_if_done(operation);
}

/* ---- starting ------------------------------------------------------------------------------------------------ */

static int allocate_segment(const cl_operation *operation, cl_segment *segment)
{
    const cl_plan *plan = operation->plan;
    size_t nbytes = cl_segment_nbytes(plan);
    uint32_t *block = operation->single != NULL ? operation->single : malloc(nbytes);
    if (block == NULL)
        return CL_NO_MEMORY;
    memset(block, 0, nbytes);
    segment->waiting = block;
    segment->blocked = block + plan->nsteps;
    segment->granted_out = segment->blocked + plan->nsteps;
    segment->granted_in = segment->granted_out + plan->npeers;
    segment->state = (uint8_t *)(segment->granted_in + plan->npeers);
    segment->remaining = plan->nsteps;
    memcpy(segment->waiting, plan->needs, plan->nsteps * sizeof(uint32_t));
    memcpy(segment->blocked, plan->needs, plan->nsteps * sizeof(uint32_t));
    return CL_OK;
}

static void activate(cl_operation *operation, uint32_t s)
{
    cl_segment *segment = &operation->segments[s];
    const cl_plan *plan = operation->plan;
    if (is_over(operation))
        return;
    segment->active = true;
    if (operation->started_s < 0)
        operation->started_s = operation->engine->clock(operation->engine->clock_argument);
    cl_operation_contribute(operation, s);
    for (uint32_t p = 0; p < plan->npeers; p++) /* told by announce() for all open segments at once */
        if (!operation->started)
            segment->granted_in[p] = plan->peers[p].initial_grant;
    for (uint32_t i = 0; i < plan->nsteps && segment->waiting != NULL; i++) {
        if (plan->needs[i] != 0)
            continue;
        if (plan->steps[i].kind != CL_SEND)
            grant(operation, s, plan->peer_of[i]);
        open_step(operation, s, i);
    }
    if (plan->nsteps == 0)
        finish_segment(operation, s);
}

/* Tells every peer of the plan my metadata and first grants, unless an eager message is on its way that carries them. */
static void announce(cl_operation *operation)
{
    const cl_plan *plan = operation->plan;
    for (uint32_t p = 0; p < plan->npeers; p++) {
        const cl_plan_peer *peer = &plan->peers[p];
        bool travels = operation->eager && peer->sends_first && step_count(operation, 0, peer->sends[0]) > 0;
        if (travels && !operation->request.gated)
            continue;
        cl_frame frame = frame_of(operation, CL_FRAME_POST, operation->request.gated ? 0 : operation->nsegments);
        frame.arg = operation->eager ? 0 : peer->initial_grant;
        cl_engine_tell(operation->engine, peer->rank, &frame, NULL);
    }
}

/* A frame counts its bytes in 32 bits. The last segment is the longest, but for rounding to aligned borders. */
static bool steps_fit(const cl_operation *operation)
{
    const uint64_t most = (UINT32_MAX - 4096) / cl_dtype_nbytes(operation->request.dtype);
    uint64_t first, count;
    if (operation->chunk_first == NULL && operation->request.count <= most)
        return true;
    for (uint32_t s = 0; s < operation->nsegments; s += operation->nsegments > 1 ? operation->nsegments - 1 : 1)
        for (uint32_t i = 0; i < operation->plan->nsteps; i++) {
            cl_chunks_of(operation, s, &operation->plan->steps[i], &first, &count);
            if (count > most)
                return false;
        }
    return true;
}

static int start(cl_operation *operation)
{
    CL_TRY(cl_operation_layout(operation));
    const cl_request *r = &operation->request;
    if (r->kind == CL_EXCHANGE) {
        cl_operation_complete(operation, CL_OK);
        return CL_OK;
    }
    if (r->kind == CL_TICKET)
        return cl_tickets_start(operation);
    if (!steps_fit(operation))
        return CL_INVALID;
    uint64_t nbytes = r->count * cl_dtype_nbytes(r->dtype);
    bool uneven = r->kind == CL_ALLGATHER || r->kind == CL_ALLTOALL;
    /* Of equal metadata alone, so that all ranks come to the same: they do not have to agree in what is gated. */
    operation->eager = !uneven && operation->nsegments == 1 && nbytes <= operation->engine->settings.eager_nbytes;
    for (uint32_t s = 0; s < operation->nsegments; s++)
        CL_TRY(allocate_segment(operation, &operation->segments[s]));
    announce(operation);
    for (uint32_t s = 0; !r->gated && s < operation->nsegments; s++)
        activate(operation, s);
    if (is_over(operation))
        return CL_OK;
    operation->started = true;
    cl_operation_open_gates(operation);
    complete_if_done(operation);
    return CL_OK;
}

void cl_operation_start(cl_operation *operation)
{
    int status = start(operation);
    if (status != CL_OK)
        cl_control_fail_everywhere(operation, status, operation->engine->rank,
                                   status == CL_INVALID ? "one of its steps moves 4 GiB or more: give it shorter segments"
                                                        : "out of memory");
}

void cl_operation_open_gates(cl_operation *operation)
{
    if (operation->request.kind == CL_TICKET) {
        cl_tickets_collect(operation);
        return;
    }
    if (!operation->request.gated || !operation->started)
        return;
    for (uint32_t s = 0; s < operation->nsegments; s++) {
        if (operation->segments[s].active || !atomic_load_explicit(&operation->gates[s], memory_order_acquire))
            continue;
        activate(operation, s);
    }
    complete_if_done(operation);
}

/* ---- what peers say ------------------------------------------------------------------------------------------ */

static void verify(cl_operation *operation, uint32_t p)
{
    operation->unverified -= !operation->verified[p];
    operation->verified[p] = 1;
}

static void take_grant(cl_operation *operation, uint32_t s, uint32_t p, uint64_t upto)
{
    cl_segment *segment = &operation->segments[s];
    const cl_plan_peer *peer = plan_peer(operation, p);
    if (segment->waiting == NULL)
        return;
    uint32_t from = segment->granted_out[p], most = upto > peer->nsends ? peer->nsends : (uint32_t)upto;
    segment->granted_out[p] = most > from ? most : from;
    for (uint32_t k = from; k < segment->granted_out[p]; k++)
        if (segment->state[peer->sends[k]] == CL_STEP_OPEN)
            push_ready(operation, s, peer->sends[k], CL_STEP_POSTED);
}

void cl_operation_on_post(cl_operation *operation, int32_t peer, const cl_frame *frame)
{
    uint32_t p;
    if (find_peer(operation, peer, &p) != CL_OK)
        return;
    verify(operation, p);
    for (uint32_t s = 0; s < frame->segment && s < operation->nsegments; s++)
        if (frame->arg > 0)
            take_grant(operation, s, p, frame->arg);
    if (frame->flags & CL_FLAG_WANT && !operation->wants[p] && !is_over(operation)) {
        operation->wants[p] = 1;
        cl_frame answer = frame_of(operation, CL_FRAME_GRANT, 0);
        answer.arg = operation->segments[0].waiting == NULL ? 0 : operation->segments[0].granted_in[p];
        if (answer.arg > 0)
            cl_engine_tell(operation->engine, peer, &answer, NULL);
    }
    complete_if_done(operation);
}

void cl_operation_on_grant(cl_operation *operation, int32_t peer, const cl_frame *frame)
{
    uint32_t p;
    if (find_peer(operation, peer, &p) != CL_OK || frame->segment >= operation->nsegments)
        return;
    verify(operation, p);
    take_grant(operation, frame->segment, p, frame->arg);
    complete_if_done(operation);
}

int cl_operation_accepts(cl_operation *operation, int32_t peer, const cl_frame *frame, uint32_t *step)
{
    uint32_t p, s = frame->segment;
    if (find_peer(operation, peer, &p) != CL_OK)
        return CL_INVALID;
    verify(operation, p);
    if (!operation->started || s >= operation->nsegments || !operation->segments[s].active)
        return CL_AGAIN;
    const cl_plan_peer *from = plan_peer(operation, p);
    if (frame->step >= from->nrecvs || operation->segments[s].waiting == NULL)
        return CL_INVALID;
    *step = from->recvs[frame->step];
    if (operation->segments[s].state[*step] != CL_STEP_OPEN)
        return operation->segments[s].state[*step] == CL_STEP_WAITING ? CL_AGAIN : CL_INVALID;
    return step_nbytes(operation, s, *step) == frame->nbytes ? CL_OK : CL_INVALID;
}

bool cl_operation_granted(const cl_operation *operation, int32_t peer, const cl_frame *frame)
{
    uint32_t p;
    if (!operation->started || find_peer(operation, peer, &p) != CL_OK || frame->segment >= operation->nsegments)
        return false;
    const cl_segment *segment = &operation->segments[frame->segment];
    if (!segment->active || segment->waiting == NULL || frame->step >= segment->granted_in[p])
        return false;
    uint32_t step = plan_peer(operation, p)->recvs[frame->step];
    return segment->state[step] == CL_STEP_WAITING && step_nbytes(operation, frame->segment, step) == frame->nbytes;
}

void cl_operation_keep(cl_operation *operation, cl_kept *kept)
{
    uint32_t step;
    int status = cl_operation_accepts(operation, kept->peer, &kept->frame, &step);
    if (status == CL_OK) {
        cl_operation_hold(operation); /* a cascade may complete it */
        use_kept(operation, kept->frame.segment, step, kept);
        complete_if_done(operation);
        cl_operation_release(operation);
        return;
    }
    if (status == CL_INVALID) {
        int32_t peer = kept->peer;
        cl_engine_return_credit(operation->engine, peer, &kept->frame);
        cl_kept_free(kept);
        cl_control_fail_everywhere(operation, CL_SYSTEM, peer, "a message came in that has no place in its plan");
        return;
    }
    kept->next = operation->kept;
    operation->kept = kept;
}

const void *cl_operation_frame(cl_operation *operation, uint32_t segment, uint32_t step, cl_frame *frame)
{
    *frame = frame_of(operation, CL_FRAME_DATA, segment);
    frame->step = operation->plan->pair_index[step];
    frame->nbytes = step_nbytes(operation, segment, step);
    frame->flags = operation->segments[segment].state[step] == CL_STEP_POSTED_EAGER ? CL_FLAG_EAGER : CL_FRAME_AWAITED;
    frame->arg = step;
    frame->token = (uint64_t)(uintptr_t)operation;
    if (operation->plan->answer[step] != 0 && !operation->eager)
        frame->flags |= CL_FRAME_LENDS;
    if (operation->segments[segment].kept != NULL && operation->segments[segment].kept_for == step)
        return operation->segments[segment].kept;
    return cl_operation_place(operation, segment, step);
}

/* False too if its message has come and is kept, or if nothing travels: the peer's part is done. */
static bool step_awaits(const cl_operation *operation, uint32_t s, uint32_t step)
{
    const cl_segment *segment = &operation->segments[s];
    if ((segment->active && segment->state[step] == CL_STEP_DONE) || step_count(operation, s, step) == 0)
        return false;
    for (const cl_kept *kept = operation->kept; kept != NULL; kept = kept->next)
        if (feeds(kept, operation->plan, s, step))
            return false;
    return true;
}

bool cl_operation_awaits(const cl_operation *operation, int32_t peer)
{
    uint32_t p;
    if (operation->exchange != NULL && !operation->exchange->finished)
        return cl_exchange_awaits(operation, peer);
    if (find_peer(operation, peer, &p) != CL_OK)
        return false;
    if (!operation->verified[p])
        return true;
    for (uint32_t s = 0; s < operation->nsegments; s++) {
        const cl_segment *segment = &operation->segments[s];
        if (segment->active && segment->waiting == NULL)
            continue;
        for (uint32_t i = 0; i < operation->plan->nsteps; i++)
            if (operation->plan->peer_of[i] == p && step_awaits(operation, s, i))
                return true;
    }
    return false;
}

/* ---- the end ------------------------------------------------------------------------------------------------- */

/* What was kept gives its eager budget back, used or not. */
static void drop_kept(cl_operation *operation)
{
    while (operation->kept != NULL) {
        cl_kept *kept = operation->kept;
        operation->kept = kept->next;
        cl_engine_return_credit(operation->engine, kept->peer, &kept->frame);
        cl_kept_free(kept);
    }
}

/* Sends that have not begun give their eager budget back; those on the link go on without our memory. */
static void withdraw_sends(cl_operation *operation, uint32_t p)
{
    int32_t rank = plan_peer(operation, p)->rank;
    cl_peer *peer = &operation->engine->peers[rank];
    for (size_t i = 0; i < peer->ready.count; i++) {
        const cl_ready *entry = &peer->ready.entries[i];
        if (entry->operation == operation && operation->segments[entry->segment].state[entry->step] == CL_STEP_POSTED_EAGER)
            peer->eager_used -= step_nbytes(operation, entry->segment, entry->step);
    }
    cl_heap_remove(&peer->ready, operation);
    cl_engine_forget(operation->engine, rank, operation->request.key);
    peer->posted_nbytes -= operation->posted[p];
    operation->posted[p] = 0;
    cl_engine_touch(operation->engine, rank); /* there is room for others, and no sent() will say so */
}

void cl_operation_fail(cl_operation *operation, int status, int32_t blamed, const char *text)
{
    cl_engine *engine = operation->engine;
    if (is_over(operation))
        return;
    for (uint32_t p = 0; operation->plan != NULL && p < operation->plan->npeers; p++)
        withdraw_sends(operation, p);
    cl_incoming_drop(engine, operation);
    cl_early_drop(engine, operation->request.key);
    drop_kept(operation);
    if (operation->request.kind == CL_TICKET)
        cl_tickets_forget(operation);
    operation->blamed = blamed;
    operation->error = malloc(CL_ERROR_NBYTES); /* without memory, the status must do */
    if (operation->error != NULL)
        snprintf(operation->error, CL_ERROR_NBYTES, "%s failed: %s", operation->request.text, text);
    cl_engine_failed_key(engine, operation->request.key);
    cl_operation_complete(operation, status);
}
