/*
 * engine.c: the engine itself: takes in submissions, feeds each link the most urgent granted bytes, and ends in order.
 *
 * For every peer the engine's own frames (grants, failures) go first, then data from the ready heap while less than
 * settings.inflight_nbytes (or what the link holds by itself) is posted: what is urgent never waits behind more.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "mpi_link.h"

static double monotonic_s(void *argument)
{
    (void)argument;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static bool settings_are_sound(const cl_settings *s)
{
    bool power_of_two = (s->shm_ring_nbytes & (s->shm_ring_nbytes - 1)) == 0;
    return s->eager_budget_nbytes > 0 && s->inflight_nbytes > 0 && s->heartbeat_ms > 0 && s->lost_ms > 0 &&
           s->shm_ring_nbytes >= 4096 && power_of_two && s->stall_warning_s >= 0 && s->stall_shutdown_s >= 0;
}

int cl_engine_new(int32_t rank, int32_t size, const cl_settings *settings, cl_engine **out)
{
    if (size < 1 || rank < 0 || rank >= size || !settings_are_sound(settings))
        return CL_INVALID;
    cl_engine *engine = calloc(1, sizeof(cl_engine));
    if (engine == NULL)
        return CL_NO_MEMORY;
    engine->rank = rank;
    engine->size = size;
    engine->settings = *settings;
    engine->clock = monotonic_s;
    engine->kernels = cl_kernels_best();
    engine->blamed = -1;
    engine->join.last = -1;
    engine->peers = calloc((size_t)size, sizeof(cl_peer));
    engine->dirty = calloc((size_t)size, sizeof(int32_t));
    if (engine->peers == NULL || engine->dirty == NULL) {
        free(engine->dirty);
        free(engine->peers);
        free(engine);
        return CL_NO_MEMORY;
    }
    *out = engine;
    return CL_OK;
}

void cl_engine_attach(cl_engine *engine, int32_t peer, cl_link *link)
{
    link->sink = &cl_engine_sink;
    link->owner = engine;
    link->peer = peer;
    engine->peers[peer].link = link;
}

static bool can_attach(const cl_engine *engine, int32_t peer)
{
    return peer >= 0 && peer < engine->size && peer != engine->rank && engine->peers[peer].link == NULL;
}

int cl_tcp_attach(cl_engine *engine, int32_t peer, int socket)
{
    cl_link *link;
    if (!can_attach(engine, peer)) {
        close(socket);
        return CL_INVALID;
    }
    CL_TRY(cl_tcp_link_new(socket, &engine->settings, &link));
    cl_engine_attach(engine, peer, link);
    return CL_OK;
}

int cl_mpi_create(cl_engine *engine, const cl_mpi_library *library)
{
    return engine->mpi != NULL ? CL_INVALID : cl_mpi_new(library, engine->size, &engine->settings, &engine->mpi);
}

int cl_mpi_attach(cl_engine *engine, int32_t peer)
{
    cl_link *link;
    if (engine->mpi == NULL || !can_attach(engine, peer))
        return CL_INVALID;
    CL_TRY(cl_mpi_link_new(engine->mpi, peer, 0, 0, &link));
    cl_engine_attach(engine, peer, link);
    return CL_OK;
}

int cl_mpi_ended(const cl_engine *engine)
{
    return engine->mpi_ended;
}

int cl_engine_name_host(cl_engine *engine, int32_t rank, const char *host)
{
    if (rank < 0 || rank >= engine->size)
        return CL_INVALID;
    snprintf(engine->peers[rank].host, sizeof engine->peers[rank].host, "%s", host);
    return CL_OK;
}

double cl_engine_now(cl_engine *engine)
{
    return engine->clock(engine->clock_argument);
}

cl_operation *cl_engine_find(cl_engine *engine, uint64_t key)
{
    return cl_table_get(&engine->operations, key);
}

/* Remembers the last keys that failed, so that what still comes for them is dropped and not kept for ever. */
void cl_engine_failed_key(cl_engine *engine, uint64_t key)
{
    uint64_t *slot = &engine->failed_keys[engine->nfailed % CL_FAILED_KEYS];
    if (cl_table_get(&engine->failed, key) != NULL)
        return;
    if (engine->nfailed++ >= CL_FAILED_KEYS)
        cl_table_take(&engine->failed, *slot);
    *slot = key;
    /* Without memory for it, late frames of this key are kept: a small leak, no wrong result. */
    (void)cl_table_put(&engine->failed, key, slot);
}

/* ---- feeding links ------------------------------------------------------------------------------------------- */

void cl_engine_touch(cl_engine *engine, int32_t peer)
{
    if (engine->peers[peer].dirty)
        return;
    engine->peers[peer].dirty = true;
    engine->dirty[engine->ndirty++] = peer;
}

static void return_credit(cl_engine *engine, int32_t rank)
{
    cl_peer *peer = &engine->peers[rank];
    /* A quarter of the budget at a time: often enough to keep the sender going, seldom enough to cost nothing. */
    if (peer->eager_returnable == 0 || peer->eager_returnable < engine->settings.eager_budget_nbytes / 4)
        return;
    cl_frame frame = {.type = CL_FRAME_CREDIT, .arg = peer->eager_returnable};
    peer->eager_returnable = 0;
    cl_engine_tell(engine, rank, &frame, NULL);
}

static uint64_t window_of(const cl_engine *engine, const cl_peer *peer)
{
    uint64_t own = peer->link->window_nbytes, set = engine->settings.inflight_nbytes;
    return own > set ? own : set;
}

int cl_peer_send(cl_peer *peer, const cl_frame *frame, const void *payload)
{
    int status = peer->link->transport->send(peer->link, frame, payload);
    if (status == CL_OK && peer->watched)
        atomic_store_explicit(&peer->awake, true, memory_order_relaxed);
    return status;
}

/* Posts the peer's most urgent send. False: there is none, or too much is posted, or the link takes no more now. */
static bool pump_one(cl_engine *engine, cl_peer *peer)
{
    if (peer->ready.count == 0)
        return false;
    cl_ready top = peer->ready.entries[0];
    cl_frame frame;
    const void *payload = cl_operation_frame(top.operation, top.segment, top.step, &frame);
    if (peer->posted_nbytes > 0 && peer->posted_nbytes + frame.nbytes > window_of(engine, peer))
        return false;
    cl_heap_pop(&peer->ready);
    uint64_t *posted = &top.operation->posted[top.operation->plan->peer_of[top.step]];
    peer->posted_nbytes += frame.nbytes;
    *posted += frame.nbytes;
    if (cl_peer_send(peer, &frame, payload) != CL_OK) {
        peer->posted_nbytes -= frame.nbytes;
        *posted -= frame.nbytes;
        (void)cl_heap_push(&peer->ready, top); /* its place is still there */
        return false;
    }
    engine->stats.frames++;
    engine->stats.sent_nbytes += frame.nbytes;
    return true;
}

/* True: it may take more. */
static bool pump(cl_engine *engine, int32_t rank)
{
    cl_peer *peer = &engine->peers[rank];
    if (peer->link == NULL || peer->lost)
        return false;
    return_credit(engine, rank);
    return cl_outgoing_pump(engine, peer) && engine->health == CL_OK && pump_one(engine, peer);
}

/* The peer whose next frame is the most urgent; frames of our own come before all data. */
static int32_t most_urgent(const cl_engine *engine)
{
    int32_t best = 0;
    for (int32_t i = 0; i < engine->ndirty; i++) {
        const cl_peer *peer = &engine->peers[engine->dirty[i]], *before = &engine->peers[engine->dirty[best]];
        if (cl_outgoing_waits(peer) || peer->ready.count == 0)
            return i; /* soon done with */
        if (before->ready.count > 0 && cl_ready_before(&peer->ready.entries[0], &before->ready.entries[0]))
            best = i;
    }
    return best;
}

/* Feeds all links, one frame at a time, the most urgent first: peers share this rank's port, or its one processor. */
static void pump_all(cl_engine *engine)
{
    while (engine->ndirty > 0) { /* pumping may touch peers again: sent() within send() */
        int32_t index = most_urgent(engine), rank = engine->dirty[index];
        if (pump(engine, rank))
            continue;
        /* What it did may have added peers behind, but moved none. */
        engine->dirty[index] = engine->dirty[--engine->ndirty];
        engine->peers[rank].dirty = false;
    }
}

/* ---- taking in ----------------------------------------------------------------------------------------------- */

static void link_operation(cl_engine *engine, cl_operation *operation)
{
    operation->previous = NULL;
    operation->next = engine->first;
    if (engine->first != NULL)
        engine->first->previous = operation;
    engine->first = operation;
}

static void unlink_operation(cl_engine *engine, cl_operation *operation)
{
    if (engine->first != operation && operation->previous == NULL)
        return; /* it failed before it was listed */
    if (operation->previous != NULL)
        operation->previous->next = operation->next;
    else
        engine->first = operation->next;
    if (operation->next != NULL)
        operation->next->previous = operation->previous;
}

void cl_operation_complete(cl_operation *operation, int status)
{
    cl_engine *engine = operation->engine;
    operation->status = status;
    operation->done_s = cl_engine_now(engine);
    unlink_operation(engine, operation);
    if (cl_engine_find(engine, operation->request.key) == operation)
        cl_table_take(&engine->operations, operation->request.key);
    engine->done_keys[engine->ndone++ % CL_DONE_KEYS] = operation->request.key;
    engine->stats.operations++;
    engine->stats.failed += status != CL_OK;
    if (engine->on_done != NULL)
        engine->on_done(engine, operation);
    cl_runtime_completed(operation);
    cl_operation_release(operation);
}

static void fail_if_somebody_left(cl_engine *engine, cl_operation *operation)
{
    for (int32_t r = 0; engine->somebody_left && r < engine->size; r++) {
        if (atomic_load_explicit(&operation->done, memory_order_relaxed))
            return;
        if (!engine->peers[r].left || !cl_operation_awaits(operation, r))
            continue;
        char text[64];
        snprintf(text, sizeof text, "rank %d has shut down and will not take part", r);
        cl_control_fail_everywhere(operation, CL_PEER_LEFT, r, text);
    }
}

static void begin(cl_engine *engine, cl_operation *operation)
{
    (operation->request.members != NULL ? cl_exchange_start : cl_operation_start)(operation);
    if (!atomic_load_explicit(&operation->done, memory_order_relaxed))
        cl_engine_replay(engine, operation);
}

void cl_engine_post(cl_engine *engine, cl_operation *operation)
{
    operation->sequence = engine->sequence++;
    if (engine->leaving || engine->health != CL_OK) {
        cl_operation_fail(operation, engine->leaving ? CL_SHUTDOWN : engine->health, engine->blamed,
                          engine->leaving ? "this communicator was shut down" : engine->health_text);
        return;
    }
    if (engine->join.joined && !operation->stands_in) {
        cl_operation_fail(operation, CL_JOINED, engine->rank, "this rank has joined: it submits nothing until join() returns");
        return;
    }
    link_operation(engine, operation);
    if (cl_table_put(&engine->operations, operation->request.key, operation) != CL_OK) {
        cl_control_fail_everywhere(operation, CL_NO_MEMORY, engine->rank, "out of memory for the table of operations");
        return;
    }
    cl_operation_hold(operation);
    cl_join_announce(operation);
    begin(engine, operation);
    if (!atomic_load_explicit(&operation->done, memory_order_relaxed))
        fail_if_somebody_left(engine, operation);
    cl_operation_release(operation);
}

/* Both inboxes are stacks: whole lists are taken at once and turned round, so that order is kept. */
static cl_operation *take_inbox(cl_engine *engine)
{
    cl_operation *newest = atomic_exchange_explicit(&engine->inbox, NULL, memory_order_acquire), *oldest = NULL;
    while (newest != NULL) {
        cl_operation *next = newest->inbox_next;
        newest->inbox_next = oldest;
        oldest = newest;
        newest = next;
    }
    return oldest;
}

static void take_gates(cl_engine *engine)
{
    cl_operation *operation = atomic_exchange_explicit(&engine->gate_inbox, NULL, memory_order_acquire);
    while (operation != NULL) {
        cl_operation *next = operation->gate_next;
        /* An exchange, not a store: whoever found it still queued has opened his gates before what we read now. */
        (void)atomic_exchange_explicit(&operation->gate_queued, 0, memory_order_acq_rel);
        if (!atomic_load_explicit(&operation->done, memory_order_relaxed))
            cl_operation_open_gates(operation);
        cl_operation_release(operation);
        operation = next;
    }
}

bool cl_engine_has_submissions(cl_engine *engine)
{
    return atomic_load(&engine->inbox) != NULL || atomic_load(&engine->gate_inbox) != NULL;
}

void cl_engine_flush(cl_engine *engine)
{
    for (cl_operation *operation = take_inbox(engine), *next; operation != NULL; operation = next) {
        next = operation->inbox_next;
        cl_engine_post(engine, operation);
    }
    take_gates(engine);
    pump_all(engine);
}

static bool sleeps(cl_peer *peer)
{
    return peer->watched && !atomic_load_explicit(&peer->awake, memory_order_acquire);
}

/* The flag is cleared first: a descriptor that becomes ready meanwhile is looked at again. */
static int progress_of(cl_peer *peer)
{
    if (peer->watched)
        (void)atomic_exchange(&peer->awake, false);
    int moved = peer->link->transport->progress(peer->link);
    if (moved > 0 && peer->watched)
        atomic_store_explicit(&peer->awake, true, memory_order_relaxed);
    return moved;
}

int cl_engine_progress(cl_engine *engine)
{
    int events = 0;
    for (int32_t r = 0; r < engine->size; r++) {
        cl_peer *peer = &engine->peers[r];
        if (peer->link == NULL || peer->lost || sleeps(peer))
            continue;
        events += progress_of(peer);
        if (cl_outgoing_waits(peer) || peer->ready.count > 0)
            cl_engine_touch(engine, r); /* what was refused is offered again */
    }
    events += cl_engine_has_submissions(engine);
    cl_engine_flush(engine);
    return events;
}

void cl_engine_tick(cl_engine *engine)
{
    double now_s = cl_engine_now(engine);
    for (int32_t r = 0; r < engine->size; r++) {
        cl_link *link = engine->peers[r].link;
        if (link != NULL && !engine->peers[r].lost && link->transport->tick != NULL)
            link->transport->tick(link, now_s);
    }
}

/* ---- the end ------------------------------------------------------------------------------------------------- */

/* True if rank still listens to last words. */
static bool says_goodbye_to(const cl_engine *engine, int32_t rank)
{
    const cl_peer *peer = &engine->peers[rank];
    return peer->link != NULL && !peer->left && !peer->lost;
}

/*
 * Seen here: the rank is no more, which is no failure if it had said goodbye. Heard from others (tell is false): they have
 * ended, whatever that rank had said to us; and our own link to it may still carry the news.
 */
void cl_engine_lost(cl_engine *engine, int32_t rank, const char *reason, bool tell)
{
    bool is_peer = rank >= 0 && rank < engine->size && rank != engine->rank;
    if (is_peer && tell) {
        if (engine->peers[rank].lost)
            return;
        engine->peers[rank].lost = true;
        if (engine->peers[rank].left)
            return;
    }
    if (engine->health != CL_OK || engine->leaving)
        return; /* the first loss is the one that is told */
    engine->health = CL_PEER_LOST;
    engine->blamed = rank;
    const char *host = rank >= 0 && rank < engine->size ? engine->peers[rank].host : "";
    int length = snprintf(engine->health_text, sizeof engine->health_text, "rank %d%s%s was lost%s: ", rank,
                          host[0] ? " on host " : "", host, !tell && rank == engine->rank ? " to the others" : "");
    engine->health_reason = engine->health_text + length;
    snprintf(engine->health_text + length, sizeof engine->health_text - (size_t)length, "%s", reason);
    for (int32_t r = 0; r < engine->size; r++)
        if ((tell || r == rank) && says_goodbye_to(engine, r)) {
            engine->peers[r].owes_lost = true;
            cl_engine_touch(engine, r);
        }
    while (engine->first != NULL)
        cl_operation_fail(engine->first, CL_PEER_LOST, rank, engine->health_text);
    cl_tickets_close(engine, CL_PEER_LOST);
    cl_stall_close(engine, CL_PEER_LOST);
    cl_join_close(engine, CL_PEER_LOST, rank);
}

void cl_engine_leave(cl_engine *engine)
{
    if (engine->leaving)
        return;
    cl_engine_flush(engine);
    engine->leaving = true;
    cl_tickets_close(engine, CL_SHUTDOWN);
    cl_stall_close(engine, CL_SHUTDOWN);
    cl_join_close(engine, CL_SHUTDOWN, engine->rank);
    char text[64];
    snprintf(text, sizeof text, "rank %d has shut down", engine->rank);
    while (engine->first != NULL) {
        cl_operation *operation = engine->first;
        cl_frame frame = {.key = operation->request.key, .type = CL_FRAME_FAIL, .arg = CL_PEER_LEFT,
                          .step = (uint32_t)engine->rank, .nbytes = (uint32_t)strlen(text)};
        cl_engine_tell_listeners(operation, &frame, text);
        cl_operation_fail(operation, CL_SHUTDOWN, engine->rank, "this communicator was shut down while it was in flight");
    }
    for (int32_t r = 0; r < engine->size; r++)
        if (says_goodbye_to(engine, r)) {
            engine->peers[r].owes_bye = true;
            cl_engine_touch(engine, r);
        }
    cl_engine_flush(engine);
}

size_t cl_engine_pending(cl_engine *engine)
{
    size_t pending = 0;
    for (int32_t r = 0; r < engine->size; r++) {
        const cl_peer *peer = &engine->peers[r];
        if (says_goodbye_to(engine, r)) /* who has left reads nothing any more */
            pending += peer->link->transport->pending(peer->link) + cl_outgoing_waits(peer);
    }
    return pending;
}

void cl_engine_close_links(cl_engine *engine, int32_t linger_ms)
{
    for (int32_t r = 0; r < engine->size; r++) {
        cl_peer *peer = &engine->peers[r];
        cl_link *link = peer->link;
        peer->link = NULL; /* first: a child forked meanwhile by another thread must not meet a freed link */
        if (link != NULL)
            link->transport->close(link);
        cl_outgoing_free_all(peer);
        cl_heap_free(&peer->ready);
        if (peer->keeping != NULL)
            cl_kept_free(peer->keeping);
        peer->keeping = NULL;
    }
    if (engine->mpi != NULL)
        engine->mpi_ended = cl_mpi_free(engine->mpi, linger_ms) == CL_OK;
    engine->mpi = NULL;
}

static void free_early(cl_engine *engine)
{
    for (size_t slot = 0; slot < engine->early.capacity; slot++)
        for (cl_kept *kept = engine->early.values[slot], *next; kept != NULL; kept = next) {
            next = kept->next;
            cl_kept_free(kept);
        }
}

void cl_engine_free(cl_engine *engine)
{
    if (engine == NULL)
        return;
    (void)cl_engine_shutdown(engine, 0);
    take_gates(engine); /* opened while the end came */
    cl_runtime_free(engine);
    cl_shm_free(engine);
    cl_tickets_free(engine);
    cl_stall_free(engine);
    cl_join_free(engine);
    free_early(engine);
    cl_table_free(&engine->early);
    cl_table_free(&engine->failed);
    cl_table_free(&engine->operations);
    free(engine->dirty);
    free(engine->peers);
    free(engine);
}
