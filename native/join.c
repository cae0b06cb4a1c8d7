/*
 * join.c: ranks that have run out of work, and what the others still submit.
 *
 * A rank that joins says so to all. From then on each of them announces to it what it submits, and what it has in flight: all
 * that the joined rank needs to stand in for itself (Python makes the plan, and memory that changes nothing). The first rank
 * counts; when all have joined it tells who was last, and each rank begins a new epoch. Ranks are an epoch apart at most, as
 * nobody ends one before all have joined. Words of one rank to another keep their order, which is all that this relies on.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "lock.h"

/* What a CL_FRAME_JOIN says, in `segment`. */
enum {
    WORD_JOINED = 1, /* the sender submits nothing more in this epoch */
    WORD_ANNOUNCED,  /* all that the sender had in flight when it learned that the receiver has joined was announced */
    WORD_LAST        /* all have joined; arg: the last one */
};

/* An announcement as it travels; members and text follow. */
typedef struct {
    int32_t kind, dtype, reduction, root;
    int64_t priority;
    uint32_t shape_hash, settings_hash;
    double prescale, postscale;
    uint64_t count, segment_count;
    uint32_t hint;
    int32_t nmembers; /* 0: all ranks */
    uint32_t text_nbytes, unused;
} announcement;

_Static_assert(sizeof(announcement) == 80, "an announcement has padding");

static bool has_joined(const cl_engine *engine, int32_t rank)
{
    return engine->peers[rank].joins > engine->join.epoch;
}

static bool is_member(const cl_operation *operation, int32_t rank)
{
    const cl_request *r = &operation->request;
    for (int32_t l = 0; r->listeners != NULL && l < r->nlisteners; l++)
        if (r->listeners[l] == rank)
            return true;
    return r->listeners == NULL;
}

static void say(cl_engine *engine, int32_t rank, uint32_t word, uint64_t arg)
{
    cl_frame frame = {.type = CL_FRAME_JOIN, .flags = CL_FRAME_WAKES, .segment = word, .arg = arg};
    cl_engine_tell(engine, rank, &frame, NULL);
}

static void say_to_all(cl_engine *engine, uint32_t word, uint64_t arg)
{
    for (int32_t r = 0; r < engine->size; r++)
        if (r != engine->rank)
            say(engine, r, word, arg);
}

/* ---- announcing ---------------------------------------------------------------------------------------------- */

static void announce(cl_operation *operation, int32_t rank)
{
    const cl_request *r = &operation->request;
    cl_engine *engine = operation->engine;
    announcement head = {
        .kind = r->kind, .dtype = r->dtype, .reduction = r->reduction, .root = r->root, .priority = r->priority,
        .shape_hash = r->shape_hash, .settings_hash = r->settings_hash, .prescale = r->prescale, .postscale = r->postscale,
        .count = operation->travels_for_nothing ? 0 : r->count, .segment_count = r->segment_count, .hint = r->hint,
        .nmembers = r->listeners == NULL ? 0 : r->nlisteners, .text_nbytes = (uint32_t)strlen(r->text),
    };
    size_t members_nbytes = (size_t)head.nmembers * sizeof(int32_t), nbytes = sizeof head + members_nbytes + head.text_nbytes;
    uint8_t *payload = malloc(nbytes);
    if (payload == NULL) {
        cl_engine_lost(engine, engine->rank, "out of memory for telling a rank that has joined", true);
        return;
    }
    memcpy(payload, &head, sizeof head);
    if (members_nbytes > 0)
        memcpy(payload + sizeof head, r->listeners, members_nbytes);
    memcpy(payload + sizeof head + members_nbytes, r->text, head.text_nbytes);
    cl_frame frame = {.key = r->key, .type = CL_FRAME_ANNOUNCE, .flags = CL_FRAME_WAKES, .nbytes = (uint32_t)nbytes};
    cl_engine_tell(engine, rank, &frame, payload);
    free(payload);
}

void cl_join_announce(cl_operation *operation)
{
    cl_engine *engine = operation->engine;
    operation->epoch = engine->join.epoch;
    for (int32_t r = 0; engine->join.njoined > 0 && !operation->stands_in && r < engine->size; r++)
        if (r != engine->rank && has_joined(engine, r) && is_member(operation, r))
            announce(operation, r);
}

/* A rank has joined in my epoch. */
static void greet(cl_engine *engine, int32_t rank)
{
    engine->join.njoined++;
    for (cl_operation *operation = engine->first, *next; operation != NULL && engine->health == CL_OK; operation = next) {
        next = operation->next;
        if (!operation->stands_in && operation->epoch == engine->join.epoch && is_member(operation, rank))
            announce(operation, rank);
    }
    say(engine, rank, WORD_ANNOUNCED, engine->join.epoch);
}

/* ---- counting, at the first rank ----------------------------------------------------------------------------- */

static void note_last(cl_engine *engine, int32_t last)
{
    engine->join.last = last;
    cl_futex_wake(&engine->join.events);
}

/* Of this epoch or the next: nobody is further. */
static void count(cl_engine *engine, int32_t rank, uint32_t epoch)
{
    if (engine->rank != 0)
        return;
    uint32_t *arrived = &engine->join.arrived[epoch % 2];
    if (++*arrived < (uint32_t)engine->size)
        return;
    *arrived = 0;
    say_to_all(engine, WORD_LAST, (uint64_t)rank);
    note_last(engine, rank);
}

/* ---- what peers say ------------------------------------------------------------------------------------------ */

void cl_join_close(cl_engine *engine, int status, int32_t blamed)
{
    int open = CL_OK;
    engine->join.blamed = blamed;
    (void)atomic_compare_exchange_strong(&engine->join.closed, &open, status);
    cl_futex_wake(&engine->join.events);
}

/* False: this is no word that there is. */
bool cl_join_on_word(cl_engine *engine, int32_t peer, const cl_frame *frame)
{
    switch (frame->segment) {
    case WORD_JOINED:
        if (engine->peers[peer].joins > engine->join.epoch + 1)
            return false;
        count(engine, peer, engine->peers[peer].joins++);
        if (engine->peers[peer].joins == engine->join.epoch + 1)
            greet(engine, peer);
        break;
    case WORD_ANNOUNCED:
        engine->join.announced_by += frame->arg == engine->join.epoch;
        break;
    case WORD_LAST:
        if (peer != 0 || frame->arg >= (uint64_t)engine->size)
            return false;
        note_last(engine, (int32_t)frame->arg);
        break;
    default:
        return false;
    }
    cl_futex_wake(&engine->join.events);
    return true;
}

void cl_join_on_bye(cl_engine *engine, int32_t peer)
{
    if (engine->join.joined && !has_joined(engine, peer))
        cl_join_close(engine, CL_PEER_LEFT, peer);
}

/* The request of an announcement; NULL: it is malformed, or there is no memory (which is told). */
static cl_announced *unpack(cl_engine *engine, int32_t peer, const cl_frame *frame, const uint8_t *data)
{
    announcement head;
    if (frame->nbytes < sizeof head)
        return NULL;
    memcpy(&head, data, sizeof head);
    uint64_t members_nbytes = head.nmembers < 0 ? UINT64_MAX / 2 : (uint64_t)head.nmembers * sizeof(int32_t);
    if (sizeof head + members_nbytes + head.text_nbytes != frame->nbytes || head.nmembers > engine->size)
        return NULL;
    cl_announced *told = calloc(1, sizeof(cl_announced) + members_nbytes + head.text_nbytes + 1);
    if (told == NULL) {
        cl_engine_lost(engine, engine->rank, "out of memory for what another rank has announced", true);
        return NULL;
    }
    int32_t *members = (int32_t *)(void *)(told + 1);
    memcpy(members, data + sizeof head, members_nbytes);
    char *text = memcpy((uint8_t *)members + members_nbytes, data + sizeof head + members_nbytes, head.text_nbytes);
    told->from = peer;
    told->request = (cl_request){
        .key = frame->key, .text = text, .kind = head.kind, .dtype = head.dtype, .reduction = head.reduction, .root = head.root,
        .priority = head.priority, .shape_hash = head.shape_hash, .settings_hash = head.settings_hash,
        .prescale = head.prescale, .postscale = head.postscale, .count = head.count, .segment_count = head.segment_count,
        .hint = head.hint, .listeners = head.nmembers == 0 ? NULL : members, .nlisteners = head.nmembers,
    };
    return told;
}

static bool was_done(cl_engine *engine, uint64_t key)
{
    for (uint32_t i = 0; i < CL_DONE_KEYS; i++)
        if (engine->done_keys[i] == key)
            return true;
    return cl_engine_find(engine, key) != NULL || cl_table_get(&engine->failed, key) != NULL;
}

bool cl_join_on_announcement(cl_engine *engine, int32_t peer, const cl_frame *frame, const uint8_t *data)
{
    if (was_done(engine, frame->key))
        return true; /* this rank has submitted it itself */
    cl_announced *told = unpack(engine, peer, frame, data);
    if (told == NULL)
        return engine->health != CL_OK;
    told->next = atomic_load_explicit(&engine->join.told, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&engine->join.told, &told->next, told))
        ;
    cl_futex_wake(&engine->join.events);
    return true;
}

/* ---- the rank that joins ------------------------------------------------------------------------------------- */

static void check_who_left(cl_engine *engine)
{
    for (int32_t r = 0; r < engine->size; r++)
        if (r != engine->rank && engine->peers[r].left)
            cl_join_on_bye(engine, r);
}

static void begin(cl_engine *engine, void *unused)
{
    (void)unused;
    if (engine->join.joined)
        return;
    cl_engine_flush(engine); /* what was submitted before is announced before */
    engine->join.joined = true;
    engine->peers[engine->rank].joins = engine->join.epoch + 1;
    say_to_all(engine, WORD_JOINED, engine->join.epoch);
    count(engine, engine->rank, engine->join.epoch);
    check_who_left(engine);
    if (engine->health != CL_OK)
        cl_join_close(engine, engine->health, engine->blamed);
}

int cl_join(cl_engine *engine)
{
    return cl_owned(engine, begin, NULL);
}

/* All have joined, and every word that they had for this rank in this epoch has come. */
static bool is_over(const cl_engine *engine)
{
    const cl_joining *join = &engine->join;
    uint32_t others = (uint32_t)engine->size - 1;
    return join->joined && join->last >= 0 && join->announced_by == others && join->njoined == others;
}

static void end(cl_engine *engine, void *unused)
{
    cl_joining *join = &engine->join;
    (void)unused;
    if (!is_over(engine))
        return;
    join->joined = false;
    join->epoch++;
    join->last = -1;
    join->announced_by = join->njoined = 0;
    for (int32_t r = 0; r < engine->size; r++)
        if (r != engine->rank && has_joined(engine, r))
            greet(engine, r); /* it was faster, and has joined again */
}

int cl_join_end(cl_engine *engine)
{
    return cl_owned(engine, end, NULL);
}

static cl_announced *oldest(cl_joining *join)
{
    if (join->taken == NULL) {
        cl_announced *newest = atomic_exchange(&join->told, NULL);
        while (newest != NULL) {
            cl_announced *next = newest->next;
            newest->next = join->taken;
            join->taken = newest;
            newest = next;
        }
    }
    cl_announced *first = join->taken;
    if (first != NULL)
        join->taken = first->next;
    return first;
}

static void look(cl_engine *engine, void *last)
{
    *(int32_t *)last = is_over(engine) ? engine->join.last : -1;
}

int cl_join_next(cl_engine *engine, int32_t timeout_ms, cl_announced **told, int32_t *last)
{
    double deadline_s = cl_engine_now(engine) + 1e-3 * timeout_ms;
    for (;;) {
        int seen = atomic_load(&engine->join.events);
        *told = NULL;
        CL_TRY(cl_owned(engine, look, last)); /* before the list: all that belongs to it is in there by then */
        int closed = atomic_load(&engine->join.closed);
        if (closed != CL_OK) {
            *last = engine->join.blamed;
            return closed;
        }
        *told = oldest(&engine->join);
        if (*told != NULL || *last >= 0)
            return CL_OK;
        double left_s = deadline_s - cl_engine_now(engine);
        if (left_s <= 0)
            return CL_AGAIN;
        cl_futex_wait(&engine->join.events, seen, left_s);
    }
}

void cl_announced_free(cl_announced *told)
{
    free(told);
}

void cl_join_free(cl_engine *engine)
{
    for (cl_announced *told; (told = oldest(&engine->join)) != NULL;)
        free(told);
}

int cl_stand_in(cl_engine *engine, const cl_announced *told, cl_operation **out)
{
    cl_operation *operation;
    *out = NULL;
    if (atomic_load_explicit(&engine->forked, memory_order_relaxed))
        return CL_FORKED;
    CL_TRY(cl_operation_new(engine, &told->request, &operation));
    operation->stands_in = true;
    operation->request.prescale = 1; /* what it contributes changes nothing as it is; the metadata is the others' */
    *out = operation;
    cl_enqueue(engine, operation);
    return CL_OK;
}

typedef struct {
    const cl_announced *told;
    const char *text;
} refusal;

static void refuse(cl_engine *engine, void *argument)
{
    const cl_request *r = &((refusal *)argument)->told->request;
    const char *text = ((refusal *)argument)->text;
    cl_frame frame = {.key = r->key, .type = CL_FRAME_FAIL, .flags = CL_FRAME_WAKES, .step = (uint32_t)engine->rank,
                      .arg = CL_JOINED, .nbytes = (uint32_t)strlen(text)};
    int32_t members = r->listeners == NULL ? engine->size : r->nlisteners;
    cl_engine_failed_key(engine, r->key);
    cl_early_drop(engine, r->key);
    for (int32_t l = 0; l < members; l++) {
        int32_t rank = r->listeners == NULL ? l : r->listeners[l];
        if (rank >= 0 && rank < engine->size && rank != engine->rank && !engine->peers[rank].left)
            cl_engine_tell(engine, rank, &frame, text);
    }
}

int cl_join_refuse(cl_engine *engine, const cl_announced *told, const char *text)
{
    refusal argument = {told, text};
    return cl_owned(engine, refuse, &argument);
}
