/*
 * frames.c: what comes in over the links, matched with operations by key and never by order.
 *
 * A frame for an operation that is not posted (or not started) here is kept and replayed at its start. Only eager data
 * can come that early, within the sender's budget, so what is kept is bounded. Granted data may have to be staged
 * until a send of the same chunk has left: at most one segment's bytes for each segment.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

enum { MOST_WORDS_NBYTES = 1 << 20 /* of a text, or of an operation that is announced with its members */ };

void cl_kept_free(cl_kept *kept)
{
    free(kept->data);
    free(kept);
}

static cl_kept *kept_new(int32_t peer, const cl_frame *frame)
{
    cl_kept *kept = calloc(1, sizeof(cl_kept));
    if (kept == NULL)
        return NULL;
    kept->peer = peer;
    kept->frame = *frame;
    if (frame->nbytes > 0 && (kept->data = malloc((size_t)frame->nbytes + 1)) == NULL) {
        free(kept);
        return NULL;
    }
    return kept;
}

/* Keeps in order of arrival: what a peer says first must be replayed first. */
static void keep_early(cl_engine *engine, cl_kept *kept)
{
    kept->next = NULL;
    cl_kept *first = cl_table_get(&engine->early, kept->frame.key);
    if (first != NULL) {
        while (first->next != NULL)
            first = first->next;
        first->next = kept;
    } else if (cl_table_put(&engine->early, kept->frame.key, kept) != CL_OK) {
        cl_kept_free(kept);
        cl_engine_lost(engine, engine->rank, "out of memory for messages that came early", true);
    }
}

void cl_early_drop(cl_engine *engine, uint64_t key)
{
    for (cl_kept *kept = cl_table_take(&engine->early, key), *next; kept != NULL; kept = next) {
        next = kept->next;
        cl_engine_return_credit(engine, kept->peer, &kept->frame);
        cl_kept_free(kept);
    }
}

void cl_engine_return_credit(cl_engine *engine, int32_t peer, const cl_frame *frame)
{
    if (frame->type != CL_FRAME_DATA || !(frame->flags & CL_FLAG_EAGER))
        return;
    engine->peers[peer].eager_returnable += frame->nbytes;
    cl_engine_touch(engine, peer);
}

/* ---- frames with a place among operations -------------------------------------------------------------------- */

static void handle_data(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    (void)engine;
    cl_operation_keep(operation, kept);
}

static void handle_post(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    (void)engine;
    cl_operation_on_post(operation, kept->peer, &kept->frame);
    cl_kept_free(kept);
}

static void handle_grant(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    (void)engine;
    cl_operation_on_grant(operation, kept->peer, &kept->frame);
    cl_kept_free(kept);
}

static void handle_up(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    (void)engine;
    cl_exchange_on_up(operation, kept->peer, kept->data, kept->frame.nbytes);
    cl_kept_free(kept);
}

static void handle_down(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    (void)engine;
    cl_exchange_on_down(operation, kept->data, kept->frame.nbytes);
    cl_kept_free(kept);
}

static void handle_ticket(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    (void)engine;
    cl_tickets_on_ticket(operation, kept->frame.segment);
    cl_kept_free(kept);
}

static void handle_mismatch(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    (void)engine;
    kept->data[kept->frame.nbytes] = 0;
    cl_control_on_mismatch(operation, kept->peer, (const char *)kept->data);
    cl_kept_free(kept);
}

/* The rank that a peer blames; itself, if it names none that there is. */
static int32_t blamed_by(const cl_engine *engine, int32_t peer, uint64_t rank)
{
    return rank < (uint64_t)engine->size ? (int32_t)rank : peer;
}

/* A peer that has gone wrong must not pass for success what it calls a failure. */
static void handle_fail(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    const cl_frame *frame = &kept->frame;
    const bool is_failure = frame->arg > CL_AGAIN && frame->arg < CL_STATUS_END;
    const int32_t blamed = blamed_by(engine, kept->peer, frame->step);
    kept->data[frame->nbytes] = 0;
    cl_operation_fail(operation, is_failure ? (int)frame->arg : CL_SYSTEM, blamed, (const char *)kept->data);
    cl_kept_free(kept);
}

typedef struct {
    void (*handle)(cl_engine *engine, cl_operation *operation, cl_kept *kept);
    bool needs_start;   /* kept until the operation has started (posted is not enough) */
    bool compares_meta; /* both sides must have submitted the same */
    bool needs_text;
} frame_rule;

static const frame_rule rules[] = {
    [CL_FRAME_POST] = {handle_post, true, true, false},
    [CL_FRAME_GRANT] = {handle_grant, true, true, false},
    [CL_FRAME_DATA] = {handle_data, true, true, false},
    [CL_FRAME_EXCHANGE_UP] = {handle_up, false, false, true},
    [CL_FRAME_EXCHANGE_DOWN] = {handle_down, false, false, true},
    [CL_FRAME_TICKET] = {handle_ticket, true, true, false},
    [CL_FRAME_MISMATCH] = {handle_mismatch, false, false, true},
    [CL_FRAME_FAIL] = {handle_fail, false, false, true},
};

static bool matches(cl_operation *operation, const cl_frame *frame)
{
    return !rules[frame->type].compares_meta || memcmp(&frame->meta, &operation->meta, sizeof(cl_meta)) == 0;
}

static bool can_handle(const cl_operation *operation, const cl_frame *frame)
{
    return operation != NULL && (operation->started || !rules[frame->type].needs_start);
}

static void dispatch(cl_engine *engine, cl_operation *operation, cl_kept *kept)
{
    if (!matches(operation, &kept->frame)) {
        int32_t peer = kept->peer;
        cl_engine_return_credit(engine, peer, &kept->frame);
        cl_kept_free(kept);
        cl_control_mismatch(operation, peer);
        return;
    }
    cl_operation_hold(operation);
    rules[kept->frame.type].handle(engine, operation, kept);
    cl_operation_release(operation);
}

/* Others know that it has failed: what came before must not complete it here. */
static cl_kept *failure_first(cl_kept *first)
{
    for (cl_kept **at = &first; *at != NULL; at = &(*at)->next) {
        cl_kept *failure = *at;
        if (failure->frame.type != CL_FRAME_FAIL)
            continue;
        *at = failure->next;
        failure->next = first;
        return failure;
    }
    return first;
}

void cl_engine_replay(cl_engine *engine, cl_operation *operation)
{
    uint64_t key = operation->request.key;
    cl_kept *next = failure_first(cl_table_take(&engine->early, key));
    cl_operation_hold(operation);
    while (next != NULL) {
        cl_kept *kept = next;
        next = kept->next;
        if (atomic_load_explicit(&operation->done, memory_order_relaxed)) {
            cl_engine_return_credit(engine, kept->peer, &kept->frame);
            cl_kept_free(kept);
        } else if (can_handle(operation, &kept->frame)) {
            dispatch(engine, operation, kept);
        } else {
            keep_early(engine, kept);
        }
    }
    cl_operation_release(operation);
}

/* ---- the sink ------------------------------------------------------------------------------------------------ */

static void protocol_error(cl_engine *engine, int32_t peer)
{
    cl_engine_lost(engine, peer, "it broke the protocol (is it another version of commlib?)", true);
}

static bool is_known(uint8_t type)
{
    return type >= CL_FRAME_POST && type <= CL_FRAME_BYE;
}

/* Nobody may have memory made for more than he would ever send. What members exchange may be of any length. */
static bool promises_too_much(const cl_engine *engine, const cl_frame *frame)
{
    if (frame->type == CL_FRAME_EXCHANGE_UP || frame->type == CL_FRAME_EXCHANGE_DOWN)
        return false;
    if (frame->type != CL_FRAME_DATA)
        return frame->nbytes > MOST_WORDS_NBYTES;
    return (frame->flags & CL_FLAG_EAGER) && frame->nbytes > engine->settings.eager_budget_nbytes;
}

static uint8_t *begin_keeping(cl_engine *engine, cl_peer *peer, int32_t rank, const cl_frame *frame)
{
    peer->mode = CL_INCOMING_KEEP;
    peer->keeping = kept_new(rank, frame);
    if (peer->keeping == NULL) {
        peer->mode = CL_INCOMING_DISCARD;
        cl_engine_lost(engine, engine->rank, "out of memory for an incoming message", true);
        return NULL;
    }
    return peer->keeping->data;
}

/* Its operation has failed here: known by its key, or, if that is long ago, by the grant that we gave it. */
static bool is_too_late(const cl_engine *engine, const cl_operation *operation, const cl_frame *frame)
{
    return operation == NULL && (!(frame->flags & CL_FLAG_EAGER) || cl_table_get(&engine->failed, frame->key) != NULL);
}

static uint8_t *begin_data(cl_engine *engine, cl_peer *peer, int32_t rank, const cl_frame *frame)
{
    cl_operation *operation = cl_engine_find(engine, frame->key);
    if (is_too_late(engine, operation, frame))
        return NULL;
    if (operation != NULL && !matches(operation, frame)) {
        cl_control_mismatch(operation, rank);
        return NULL;
    }
    if (operation != NULL && cl_operation_accepts(operation, rank, frame, &peer->step) == CL_OK) {
        peer->mode = CL_INCOMING_APPLY;
        peer->operation = operation;
        peer->segment = frame->segment;
        bool lands = operation->plan->steps[peer->step].kind == CL_RECV;
        return lands ? cl_operation_place(operation, frame->segment, peer->step) : NULL;
    }
    if (frame->flags & CL_FLAG_EAGER || (operation != NULL && cl_operation_granted(operation, rank, frame)))
        return begin_keeping(engine, peer, rank, frame);
    protocol_error(engine, rank);
    return NULL;
}

static void *on_begin(void *owner, cl_link *link, const cl_frame *frame)
{
    cl_engine *engine = owner;
    cl_peer *peer = &engine->peers[link->peer];
    peer->mode = CL_INCOMING_DISCARD;
    engine->stats.received_nbytes += frame->nbytes;
    if (!is_known(frame->type) || promises_too_much(engine, frame)) {
        protocol_error(engine, link->peer);
        return NULL;
    }
    if (frame->type == CL_FRAME_DATA)
        return begin_data(engine, peer, link->peer, frame);
    return frame->nbytes > 0 ? begin_keeping(engine, peer, link->peer, frame) : NULL;
}

static void on_piece(void *owner, cl_link *link, const cl_frame *frame, size_t offset, const void *data, size_t nbytes)
{
    cl_peer *peer = &((cl_engine *)owner)->peers[link->peer];
    (void)frame;
    if (peer->mode == CL_INCOMING_APPLY && link->lent == CL_LENT &&
        cl_operation_apply_there(peer->operation, peer->segment, peer->step, (void *)(uintptr_t)data, nbytes))
        link->lent = CL_LENT_KEPT;
    else if (peer->mode == CL_INCOMING_APPLY)
        cl_operation_apply(peer->operation, peer->segment, peer->step, offset, data, nbytes);
    else if (peer->mode == CL_INCOMING_KEEP && data != NULL && peer->keeping->data + offset != data)
        memcpy(peer->keeping->data + offset, data, nbytes);
}

static void end_data(cl_engine *engine, int32_t rank, const cl_frame *frame, cl_kept *kept)
{
    if (kept == NULL) {
        cl_engine_return_credit(engine, rank, frame);
        return;
    }
    engine->stats.eager_kept += (frame->flags & CL_FLAG_EAGER) != 0;
    cl_operation *operation = cl_engine_find(engine, frame->key);
    if (can_handle(operation, frame)) {
        dispatch(engine, operation, kept);
    } else if (is_too_late(engine, operation, frame)) { /* it failed while this came in */
        cl_engine_return_credit(engine, rank, frame);
        cl_kept_free(kept);
    } else {
        keep_early(engine, kept);
    }
}

static void end_applied(cl_engine *engine, cl_peer *peer, int32_t rank, const cl_frame *frame)
{
    cl_operation *operation = peer->operation;
    peer->mode = CL_INCOMING_DISCARD;
    peer->operation = NULL;
    cl_engine_return_credit(engine, rank, frame);
    cl_operation_hold(operation);
    cl_operation_step_done(operation, frame->segment, peer->step);
    cl_operation_release(operation);
}

static void end_keyed(cl_engine *engine, int32_t rank, const cl_frame *frame, cl_kept *kept)
{
    if (kept == NULL && frame->nbytes > 0)
        return; /* there was no memory to keep it, which is told */
    if (kept == NULL && rules[frame->type].needs_text) {
        protocol_error(engine, rank);
        return;
    }
    cl_operation *operation = cl_engine_find(engine, frame->key);
    if (kept == NULL && (kept = kept_new(rank, frame)) == NULL) {
        cl_engine_lost(engine, engine->rank, "out of memory for an incoming message", true);
        return;
    }
    if (can_handle(operation, frame))
        dispatch(engine, operation, kept);
    else if (cl_table_get(&engine->failed, frame->key) != NULL || frame->type == CL_FRAME_MISMATCH)
        cl_kept_free(kept);
    else
        keep_early(engine, kept);
}

static void on_bye(cl_engine *engine, int32_t rank)
{
    engine->peers[rank].left = engine->somebody_left = true;
    cl_join_on_bye(engine, rank);
    for (cl_operation *operation = engine->first, *next; operation != NULL; operation = next) {
        next = operation->next;
        if (!cl_operation_awaits(operation, rank))
            continue;
        char text[64];
        snprintf(text, sizeof text, "rank %d has shut down and will not take part", rank);
        cl_control_fail_everywhere(operation, CL_PEER_LEFT, rank, text);
        next = engine->first; /* failing one may have changed the list anywhere */
    }
}

static void on_end(void *owner, cl_link *link, const cl_frame *frame)
{
    cl_engine *engine = owner;
    cl_peer *peer = &engine->peers[link->peer];
    cl_kept *kept = peer->mode == CL_INCOMING_KEEP ? peer->keeping : NULL;
    peer->keeping = NULL;
    if (peer->mode == CL_INCOMING_APPLY) {
        end_applied(engine, peer, link->peer, frame);
        return;
    }
    peer->mode = CL_INCOMING_DISCARD;
    switch (frame->type) {
    case CL_FRAME_DATA:
        end_data(engine, link->peer, frame, kept);
        return;
    case CL_FRAME_CREDIT:
        peer->eager_used -= frame->arg < peer->eager_used ? frame->arg : peer->eager_used;
        break;
    case CL_FRAME_JOIN:
        if (!cl_join_on_word(engine, link->peer, frame))
            protocol_error(engine, link->peer);
        break;
    case CL_FRAME_ANNOUNCE:
        if (kept != NULL && !cl_join_on_announcement(engine, link->peer, frame, kept->data))
            protocol_error(engine, link->peer);
        break;
    case CL_FRAME_QUERY:
        cl_stall_on_query(engine, link->peer, frame);
        break;
    case CL_FRAME_ANSWER:
        if (kept != NULL)
            kept->data[frame->nbytes] = 0;
        cl_stall_on_answer(engine, link->peer, frame, kept != NULL ? (const char *)kept->data : NULL);
        break;
    case CL_FRAME_BYE:
        on_bye(engine, link->peer);
        break;
    case CL_FRAME_LOST:
        if (kept != NULL) {
            kept->data[frame->nbytes] = 0;
            cl_engine_lost(engine, blamed_by(engine, link->peer, frame->arg), (const char *)kept->data, false);
        }
        break;
    default:
        if (is_known(frame->type))
            end_keyed(engine, link->peer, frame, kept);
        return;
    }
    if (kept != NULL)
        cl_kept_free(kept);
}

/* Its operation fails over there, and word of that follows. What it took of the eager budget comes back all the same. */
static void on_revoked(void *owner, cl_link *link, const cl_frame *frame)
{
    cl_peer *peer = &((cl_engine *)owner)->peers[link->peer];
    if (peer->keeping != NULL)
        cl_kept_free(peer->keeping);
    peer->keeping = NULL;
    peer->operation = NULL;
    peer->mode = CL_INCOMING_DISCARD;
    cl_engine_return_credit(owner, link->peer, frame);
}

static void on_sent(void *owner, cl_link *link, const cl_frame *frame)
{
    cl_engine *engine = owner;
    cl_peer *peer = &engine->peers[link->peer];
    if (frame->type != CL_FRAME_DATA) {
        cl_outgoing_sent(peer, frame);
        return;
    }
    cl_operation *operation = (cl_operation *)(uintptr_t)frame->token;
    uint32_t step = (uint32_t)frame->arg;
    peer->posted_nbytes -= frame->nbytes;
    operation->posted[operation->plan->peer_of[step]] -= frame->nbytes;
    cl_engine_touch(engine, link->peer);
    cl_operation_hold(operation);
    cl_operation_step_done(operation, frame->segment, step);
    cl_operation_release(operation);
}

static void on_lost(void *owner, cl_link *link, const char *reason)
{
    cl_engine_lost(owner, link->peer, reason, true);
}

void cl_incoming_drop(cl_engine *engine, const cl_operation *operation)
{
    for (int32_t r = 0; r < engine->size; r++)
        if (engine->peers[r].mode == CL_INCOMING_APPLY && engine->peers[r].operation == operation) {
            engine->peers[r].mode = CL_INCOMING_DISCARD;
            engine->peers[r].operation = NULL;
            cl_engine_forget(engine, r, operation->request.key);
        }
}

const cl_sink cl_engine_sink = {on_begin, on_piece, on_end, on_revoked, on_sent, on_lost};
