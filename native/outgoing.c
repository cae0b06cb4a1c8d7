/*
 * outgoing.c: frames of the engine's own: grants, exchanges, failures and last words. They go before all data.
 *
 * Failures must get out when memory is short, or others wait for ever: that a rank was lost, and goodbye, are flags of
 * each peer until their frames go, and need no memory.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

static void push(cl_outgoing_queue *queue, cl_outgoing *outgoing)
{
    outgoing->next = NULL;
    if (queue->last != NULL)
        queue->last->next = outgoing;
    else
        queue->first = outgoing;
    queue->last = outgoing;
}

static void push_front(cl_outgoing_queue *queue, cl_outgoing *outgoing)
{
    outgoing->next = queue->first;
    queue->first = outgoing;
    if (queue->last == NULL)
        queue->last = outgoing;
}

static cl_outgoing *pop(cl_outgoing_queue *queue)
{
    cl_outgoing *outgoing = queue->first;
    if (outgoing != NULL && (queue->first = outgoing->next) == NULL)
        queue->last = NULL;
    return outgoing;
}

static void take_out(cl_outgoing_queue *queue, const cl_outgoing *outgoing)
{
    cl_outgoing *before = NULL, *at = queue->first;
    while (at != NULL && at != outgoing) {
        before = at;
        at = at->next;
    }
    if (at == NULL)
        return;
    if (before == NULL)
        queue->first = at->next;
    else
        before->next = at->next;
    if (queue->last == at)
        queue->last = before;
}

static void free_outgoing(cl_outgoing *outgoing)
{
    if (outgoing != NULL)
        free(outgoing->payload);
    free(outgoing);
}

static cl_outgoing *new_outgoing(const cl_frame *frame, const void *payload)
{
    cl_outgoing *outgoing = calloc(1, sizeof(cl_outgoing));
    if (outgoing == NULL)
        return NULL;
    outgoing->frame = *frame;
    outgoing->frame.token = (uint64_t)(uintptr_t)outgoing;
    if (frame->nbytes == 0)
        return outgoing;
    outgoing->payload = malloc(frame->nbytes);
    if (outgoing->payload == NULL) {
        free(outgoing);
        return NULL;
    }
    memcpy(outgoing->payload, payload, frame->nbytes);
    return outgoing;
}

/* ---- telling ------------------------------------------------------------------------------------------------- */

/* A grant that has not left yet is brought up to date instead of followed by another. */
static bool merge_grant(cl_peer *peer, const cl_frame *frame)
{
    cl_outgoing *last = peer->told.last;
    if (last == NULL || frame->type != CL_FRAME_GRANT || last->frame.type != CL_FRAME_GRANT ||
        last->frame.key != frame->key || last->frame.segment != frame->segment)
        return false;
    last->frame.arg = frame->arg;
    return true;
}

void cl_engine_tell(cl_engine *engine, int32_t rank, const cl_frame *frame, const void *payload)
{
    cl_peer *peer = &engine->peers[rank];
    if (peer->link == NULL || peer->lost || merge_grant(peer, frame))
        return;
    cl_outgoing *outgoing = new_outgoing(frame, payload);
    if (outgoing == NULL) {
        cl_engine_lost(engine, engine->rank, "out of memory for an outgoing message", true);
        return;
    }
    engine->stats.grants += frame->type == CL_FRAME_GRANT;
    push(&peer->told, outgoing);
    cl_engine_touch(engine, rank);
}

void cl_engine_tell_listeners(const cl_operation *operation, const cl_frame *frame, const void *payload)
{
    cl_engine *engine = operation->engine;
    const int32_t *listeners = operation->request.listeners;
    int32_t count = listeners == NULL ? engine->size : operation->request.nlisteners;
    for (int32_t l = 0; l < count; l++) {
        int32_t rank = listeners == NULL ? l : listeners[l];
        if (rank != engine->rank && !engine->peers[rank].left)
            cl_engine_tell(engine, rank, frame, payload);
    }
}

/* ---- sending ------------------------------------------------------------------------------------------------- */

static bool send_last_word(cl_engine *engine, cl_peer *peer, const cl_frame *frame, const void *payload, bool *owed)
{
    if (*owed && cl_peer_send(peer, frame, payload) != CL_OK)
        return false;
    engine->stats.frames += *owed;
    *owed = false;
    return true;
}

/* The reason lives as long as the engine, so longer than the link. */
static bool send_last_words(cl_engine *engine, cl_peer *peer)
{
    cl_frame bye = {.type = CL_FRAME_BYE, .flags = CL_FRAME_WAKES};
    cl_frame lost = {.type = CL_FRAME_LOST, .flags = CL_FRAME_WAKES, .arg = (uint64_t)engine->blamed};
    if (peer->owes_lost)
        lost.nbytes = (uint32_t)strlen(engine->health_reason);
    return send_last_word(engine, peer, &lost, engine->health_reason, &peer->owes_lost) &&
           send_last_word(engine, peer, &bye, NULL, &peer->owes_bye);
}

bool cl_outgoing_pump(cl_engine *engine, cl_peer *peer)
{
    for (cl_outgoing *outgoing; (outgoing = pop(&peer->told)) != NULL;) {
        bool carries = outgoing->frame.nbytes > 0;
        if (carries) /* before send: it may call sent at once */
            push(&peer->leaving, outgoing);
        if (cl_peer_send(peer, &outgoing->frame, outgoing->payload) != CL_OK) {
            if (carries)
                take_out(&peer->leaving, outgoing);
            push_front(&peer->told, outgoing);
            return false;
        }
        engine->stats.frames++;
        if (!carries)
            free_outgoing(outgoing);
    }
    return send_last_words(engine, peer);
}

bool cl_outgoing_waits(const cl_peer *peer)
{
    return peer->told.first != NULL || peer->owes_lost || peer->owes_bye;
}

void cl_outgoing_sent(cl_peer *peer, const cl_frame *frame)
{
    cl_outgoing *outgoing = (cl_outgoing *)(uintptr_t)frame->token; /* NULL: last words */
    take_out(&peer->leaving, outgoing);
    free_outgoing(outgoing);
}

/* ---- the end ------------------------------------------------------------------------------------------------- */

void cl_engine_forget(cl_engine *engine, int32_t rank, uint64_t key)
{
    cl_peer *peer = &engine->peers[rank];
    if (peer->link == NULL)
        return;
    peer->link->transport->forget(peer->link, key);
    for (cl_outgoing *outgoing = peer->leaving.first, *next; outgoing != NULL; outgoing = next) {
        next = outgoing->next;
        if (outgoing->frame.key != key)
            continue;
        take_out(&peer->leaving, outgoing); /* sent() will not be called for it */
        free_outgoing(outgoing);
    }
}

void cl_outgoing_free_all(cl_peer *peer)
{
    for (cl_outgoing *outgoing; (outgoing = pop(&peer->told)) != NULL;)
        free_outgoing(outgoing);
    for (cl_outgoing *outgoing; (outgoing = pop(&peer->leaving)) != NULL;)
        free_outgoing(outgoing);
}
