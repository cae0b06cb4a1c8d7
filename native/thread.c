/*
 * thread.c: the engine in a real process: one progress thread, and callers that help while they wait.
 *
 * Whoever holds the lock owns the engine. The thread sleeps in epoll without the lock; a waiting caller takes the lock if
 * it is free, moves data itself for a moment (which saves two context switches for small operations), and leaves the rest to
 * the thread. Before the owner leaves, the engine is armed: what comes later rings the doorbell, so nobody polls.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "lock.h"
#include "runtime.h"

enum {
    RUN_SLICE_MS = 100, /* so long cl_run_at waits */
    CROWDED_SHARE = 8, /* of the time that is polled, where that keeps other ranks from the processor */
    ROUNDS_PER_LOOK = 8 /* a look at the clock costs as much as a round in which nothing happens */
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Without a thread the caller is alone; in a forked child the parent's owner will never unlock. */
static bool is_shared(const cl_engine *engine)
{
    return engine->runtime != NULL && !atomic_load_explicit(&engine->forked, memory_order_relaxed);
}

static void own(cl_engine *engine)
{
    if (is_shared(engine))
        cl_lock(&engine->runtime->lock);
}

static void disown(cl_engine *engine)
{
    if (is_shared(engine))
        cl_unlock(&engine->runtime->lock);
}

static void ring_own(struct cl_runtime *runtime)
{
    atomic_store(runtime->sleeping, CL_ASLEEP);
    cl_ring(runtime->sleeping, runtime->doorbell);
}

/* ---- owning -------------------------------------------------------------------------------------------------- */

static void tick_if_due(cl_engine *engine, double now_s)
{
    struct cl_runtime *runtime = engine->runtime;
    if (runtime->ticks && now_s >= runtime->next_tick_s) {
        runtime->next_tick_s = now_s + 0.5e-3 * engine->settings.heartbeat_ms;
        cl_engine_tick(engine);
    }
    if (runtime->stall_period_s > 0 && now_s >= runtime->next_stall_s) {
        runtime->next_stall_s = now_s + runtime->stall_period_s;
        cl_stall_look(engine, now_s);
    }
}

/* Whether to look once more now that nothing moved: at descriptors once, at memory for as long as that is cheap. */
static bool looks_again(cl_engine *engine)
{
    if (!engine->runtime->polls)
        return cl_look_now(engine) > 0;
    if (engine->runtime->crowded)
        sched_yield();
    else
        relax();
    return true;
}

static void drive_on(cl_engine *engine, const cl_operation *until, double deadline_s)
{
    double idle_since_s = 0, spin_s = 1e-6 * engine->settings.spin_us;
    if (engine->runtime->crowded)
        spin_s /= CROWDED_SHARE;
    bool moved = true; /* the first look sets the clock */
    engine->runtime->woke = false;
    for (uint32_t round = 1;; round++) {
        int events = cl_engine_progress(engine);
        if (until != NULL && atomic_load_explicit(&until->done, memory_order_relaxed))
            return;
        moved |= events > 0;
        if (events == 0 && !looks_again(engine))
            return;
        if (round % ROUNDS_PER_LOOK != 0)
            continue;
        if (engine->runtime->watches && engine->runtime->polls)
            (void)cl_look_now(engine); /* the thread may be waiting for us to leave */
        double now_s = cl_engine_now(engine);
        tick_if_due(engine, now_s);
        if (now_s >= deadline_s || atomic_load_explicit(&engine->runtime->stopping, memory_order_relaxed))
            return;
        if (moved)
            idle_since_s = now_s;
        moved = false;
        bool waiting = until != NULL || (!engine->runtime->woke &&
                                         atomic_load_explicit(&engine->runtime->sleepers, memory_order_relaxed) > 0);
        if (idle_since_s != now_s && (!waiting || now_s - idle_since_s >= spin_s))
            return;
    }
}

/*
 * With the lock: everything that can be done now, and a short time longer while a caller waits; beside compute nobody polls.
 * A calling thread may flush denormals (a framework's setting); the kernels' bits must not depend on who drives.
 */
static void drive(cl_engine *engine, const cl_operation *until, double deadline_s)
{
    uint64_t mode = cl_float_mode_enter();
    if (until != NULL)
        cl_engine_flush(engine); /* first, so that what has come for it already finds its place */
    if (engine->runtime->ticks || until == NULL)
        tick_if_due(engine, cl_engine_now(engine));
    drive_on(engine, until, deadline_s);
    if (cl_engine_pending(engine) > 0)
        (void)cl_engine_progress(engine); /* what the last events queued leaves now, and not with the next wake-up */
    cl_float_mode_restore(mode);
}

/* Nothing here waits for a peer, nor a peer for more than what lies in its ring. */
static bool is_idle(cl_engine *engine)
{
    return !engine->runtime->sockets && atomic_load_explicit(&engine->unfinished, memory_order_relaxed) == 0 &&
           cl_engine_pending(engine) == 0;
}

/* True: whatever happens next rings the doorbell or wakes epoll. False: there is more to do now. */
static bool arm(cl_engine *engine)
{
    bool quiet = true;
    atomic_store(engine->runtime->sleeping, is_idle(engine) ? CL_IDLE : CL_ASLEEP);
    for (int32_t r = 0; r < engine->size; r++) {
        cl_peer *peer = &engine->peers[r];
        if (peer->link == NULL || peer->lost)
            continue;
        bool awake = peer->watched && atomic_load_explicit(&peer->awake, memory_order_acquire);
        quiet &= peer->link->transport->arm(peer->link) == CL_OK && !awake;
        if (!peer->watched)
            cl_watch_for_sleep(engine, r);
    }
    return quiet && !cl_engine_has_submissions(engine);
}

static void disarm(cl_engine *engine)
{
    atomic_store_explicit(engine->runtime->sleeping, CL_AWAKE, memory_order_relaxed);
    for (int32_t r = 0; r < engine->size; r++)
        if (engine->peers[r].link != NULL && !engine->peers[r].lost)
            engine->peers[r].link->transport->disarm(engine->peers[r].link);
}

/* ---- the thread ---------------------------------------------------------------------------------------------- */

static int sleep_ms(const cl_engine *engine)
{
    const struct cl_runtime *runtime = engine->runtime;
    double stall_ms = runtime->stall_period_s < 86400 ? 1e3 * runtime->stall_period_s : 86400e3;
    int tick_ms = (int)engine->settings.heartbeat_ms / 2 + 1, look_ms = stall_ms > 0 ? (int)stall_ms + 1 : -1;
    if (!runtime->ticks)
        return look_ms;
    return look_ms > 0 && look_ms < tick_ms ? look_ms : tick_ms;
}

static void *run(void *argument)
{
    cl_engine *engine = argument;
    struct cl_runtime *runtime = engine->runtime;
    struct epoll_event events[CL_MAX_EVENTS];
    bool quiet = false;
    while (!atomic_load_explicit(&runtime->stopping, memory_order_acquire)) {
        int count = cl_look(engine, events, quiet ? sleep_ms(engine) : 0);
        own(engine);
        disarm(engine);
        cl_on_events(engine, events, count);
        drive(engine, NULL, 1e300);
        quiet = arm(engine);
        disown(engine);
    }
    return NULL;
}

static void wake_thread(cl_engine *engine)
{
    cl_ring(engine->runtime->sleeping, engine->runtime->doorbell);
}

static int start_thread(cl_engine *engine)
{
    sigset_t all, before; /* signals belong to the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&engine->runtime->thread, NULL, run, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    engine->runtime->running = failed == 0;
    return failed == 0 ? CL_OK : CL_SYSTEM;
}

static void close_descriptor(int *descriptor)
{
    if (*descriptor >= 0)
        close(*descriptor);
    *descriptor = -1;
}

void cl_runtime_free(cl_engine *engine)
{
    struct cl_runtime *runtime = engine->runtime;
    if (runtime == NULL)
        return;
    close_descriptor(&runtime->epoll);
    close_descriptor(&runtime->own_doorbell); /* not before: who submits after the end may still ring */
    free(runtime->interest);
    free(runtime);
    engine->runtime = NULL;
}

/* By the ranks whose memory is shared with this one; a processor bound to each rank is no crowd. */
static bool is_crowded(const cl_engine *engine)
{
    int32_t ranks = 1;
    for (int32_t r = 0; r < engine->size; r++)
        ranks += engine->peers[r].link != NULL && cl_shm_pidfd(engine->peers[r].link) >= 0;
    return ranks > sysconf(_SC_NPROCESSORS_ONLN);
}

int cl_engine_start(cl_engine *engine)
{
    if (engine->runtime != NULL || engine->leaving)
        return CL_INVALID;
    struct cl_runtime *runtime = calloc(1, sizeof(struct cl_runtime));
    if (runtime == NULL)
        return CL_NO_MEMORY;
    runtime->own_doorbell = -1;
    runtime->epoll = epoll_create1(EPOLL_CLOEXEC);
    runtime->interest = calloc((size_t)engine->size, sizeof(uint32_t));
    if (!cl_shm_doorbell(engine, &runtime->sleeping, &runtime->doorbell)) {
        runtime->sleeping = &runtime->own_sleeping;
        runtime->doorbell = runtime->own_doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    }
    runtime->stall_period_s = cl_stall_period_s(engine);
    engine->runtime = runtime;
    runtime->crowded = is_crowded(engine);
    int status = runtime->epoll < 0 || runtime->doorbell < 0 ? CL_SYSTEM : CL_OK;
    if (runtime->interest == NULL)
        status = CL_NO_MEMORY;
    if (status == CL_OK)
        status = cl_watch(engine);
    if (status == CL_OK)
        status = start_thread(engine);
    if (status != CL_OK) {
        cl_runtime_free(engine);
        return status;
    }
    engine->wake = wake_thread;
    return CL_OK;
}

/* ---- callers ------------------------------------------------------------------------------------------------- */

/* After the end nobody owns the engine: who still submits makes the operation fail himself. */
static void fail_submissions(cl_engine *engine)
{
    own(engine);
    cl_engine_flush(engine);
    disown(engine);
}

static void one_round(cl_engine *engine)
{
    if (atomic_load(&engine->ended))
        return;
    disarm(engine);
    uint64_t mode = cl_float_mode_enter();
    (void)cl_engine_progress(engine);
    cl_float_mode_restore(mode);
    if (!arm(engine))
        ring_own(engine->runtime);
}

/*
 * Who submits owns the engine for one round, if nobody else does: what he submitted leaves without a change of threads, which
 * costs compute on this core as much as a small operation. The rest is the thread's. Sockets, which cost a call each, are too.
 */
static void post(cl_engine *engine)
{
    if (!is_shared(engine) || engine->runtime->ticks || !cl_try_lock(&engine->runtime->lock)) {
        engine->wake(engine);
        return;
    }
    one_round(engine);
    disown(engine);
}

static void enqueue(cl_engine *engine, cl_operation *operation, bool lazy)
{
    cl_operation_hold(operation); /* one for the caller, one for the engine */
    atomic_fetch_add_explicit(&engine->unfinished, 1, memory_order_relaxed);
    cl_operation *head = atomic_load_explicit(&engine->inbox, memory_order_relaxed);
    do
        operation->inbox_next = head;
    while (!atomic_compare_exchange_weak(&engine->inbox, &head, operation));
    if (engine->wake != NULL && !lazy)
        post(engine);
    if (atomic_load(&engine->ended))
        fail_submissions(engine);
}

void cl_enqueue(cl_engine *engine, cl_operation *operation)
{
    enqueue(engine, operation, false);
}

static int submit(cl_engine *engine, const cl_request *request, bool lazy, cl_operation **out)
{
    cl_operation *operation;
    *out = NULL;
    if (atomic_load_explicit(&engine->forked, memory_order_relaxed))
        return CL_FORKED;
    CL_TRY(cl_operation_new(engine, request, &operation));
    *out = operation; /* before the engine has it, which may end it at once */
    enqueue(engine, operation, lazy);
    return CL_OK;
}

int cl_submit(cl_engine *engine, const cl_request *request, cl_operation **out)
{
    return submit(engine, request, request->lazy, out);
}

int cl_operation_ready(cl_operation *operation, uint32_t first, uint32_t end)
{
    if (!operation->request.gated || first > end || end > operation->nsegments)
        return CL_INVALID;
    bool forked = !atomic_load(&operation->done) && atomic_load_explicit(&operation->engine->forked, memory_order_relaxed);
    cl_operation_open(operation, first, end);
    return forked ? CL_FORKED : CL_OK;
}

void cl_operation_open(cl_operation *operation, uint32_t first, uint32_t end)
{
    cl_engine *engine = operation->engine;
    if (atomic_load(&operation->done) || atomic_load_explicit(&engine->forked, memory_order_relaxed))
        return; /* a forked child has no doorbell, and the memory of its flag is not its own */
    for (uint32_t s = first; s < end; s++)
        atomic_store_explicit(&operation->gates[s], 1, memory_order_release);
    if (atomic_exchange(&operation->gate_queued, 1) == 0) {
        cl_operation_hold(operation);
        cl_operation *head = atomic_load_explicit(&engine->gate_inbox, memory_order_relaxed);
        do
            operation->gate_next = head;
        while (!atomic_compare_exchange_weak(&engine->gate_inbox, &head, operation));
    }
    if (engine->wake != NULL)
        engine->wake(engine);
}

void cl_runtime_completed(cl_operation *operation)
{
    atomic_fetch_sub_explicit(&operation->engine->unfinished, 1, memory_order_relaxed);
    atomic_store(&operation->done, 1);
    if (atomic_load(&operation->waiters) > 0) {
        operation->engine->runtime->woke = true;
        cl_futex_wake_all(&operation->done);
    }
    cl_queue_landed(operation);
}

int cl_engine_is_begun(cl_engine *engine, uint64_t key)
{
    if (atomic_load_explicit(&engine->forked, memory_order_relaxed))
        return 0;
    own(engine);
    if (engine->runtime != NULL)
        one_round(engine); /* a rank with nothing in flight is not woken for what lies in its rings */
    bool is_begun = cl_table_get(&engine->early, key) != NULL;
    disown(engine);
    return is_begun;
}

static void sleep_until_done(cl_operation *operation, double left_s)
{
    atomic_fetch_add(&operation->engine->runtime->sleepers, 1);
    atomic_fetch_add(&operation->waiters, 1);
    cl_futex_wait(&operation->done, 0, left_s);
    atomic_fetch_sub(&operation->waiters, 1);
    atomic_fetch_sub(&operation->engine->runtime->sleepers, 1);
}

/* Moves data as the owner, if nobody else does. */
static void help(cl_engine *engine, const cl_operation *operation, double deadline_s)
{
    if (!cl_try_lock(&engine->runtime->lock)) {
        /* The owner may be past its last look at what was submitted lazily, and nobody has rung for it. */
        if (cl_engine_has_submissions(engine))
            engine->wake(engine);
        return;
    }
    if (atomic_load(&engine->ended)) {
        disown(engine);
        return;
    }
    /*
     * Between operations the flag says "idle", and it may stay so: peers do not ring while this caller polls, and what
     * they then have for him, he finds. So a series of small operations changes no flag, and no cache line but the rings'.
     */
    bool was_idle = atomic_load_explicit(engine->runtime->sleeping, memory_order_relaxed) == CL_IDLE;
    if (!was_idle)
        disarm(engine);
    drive(engine, operation, deadline_s);
    if (!(was_idle && is_idle(engine)) && !arm(engine))
        ring_own(engine->runtime);
    disown(engine);
}

static int wait_from(cl_operation *operation, double begin_s, int32_t timeout_ms)
{
    cl_engine *engine = operation->engine;
    double deadline_s = begin_s + 1e-3 * (timeout_ms < 0 ? 0 : timeout_ms);
    while (engine->runtime != NULL) {
        help(engine, operation, deadline_s);
        if (atomic_load_explicit(&operation->done, memory_order_acquire))
            return operation->status;
        double now_s = cl_engine_now(engine);
        if (now_s >= deadline_s)
            break;
        sleep_until_done(operation, deadline_s - now_s);
        if (atomic_load_explicit(&operation->done, memory_order_acquire))
            return operation->status;
    }
    return CL_AGAIN;
}

int cl_operation_wait(cl_operation *operation, int32_t timeout_ms)
{
    if (atomic_load_explicit(&operation->done, memory_order_acquire))
        return operation->status;
    if (atomic_load_explicit(&operation->engine->forked, memory_order_relaxed))
        return CL_FORKED;
    return wait_from(operation, cl_engine_now(operation->engine), timeout_ms);
}

int cl_run(cl_engine *engine, const cl_request *request, int32_t timeout_ms, cl_operation **out)
{
    CL_TRY(submit(engine, request, true, out));
    int status = wait_from(*out, (*out)->submitted_s, timeout_ms);
    if (status == CL_OK) {
        cl_operation_release(*out);
        *out = NULL;
    }
    return status;
}

static cl_request at(const cl_request *request, uint64_t key, const void *input, void *output)
{
    cl_request moved = *request;
    moved.key = key;
    moved.input = input;
    moved.output = output;
    return moved;
}

int cl_submit_at(cl_engine *engine, const cl_request *request, uint64_t key, const void *input, void *output,
                 cl_operation **out)
{
    cl_request moved = at(request, key, input, output);
    return submit(engine, &moved, false, out);
}

int cl_run_at(cl_engine *engine, const cl_request *request, uint64_t key, const void *input, void *output,
              cl_operation **out)
{
    cl_request moved = at(request, key, input, output);
    return cl_run(engine, &moved, RUN_SLICE_MS, out);
}

int cl_run_again(cl_engine *engine, cl_request *request, uint64_t stride, int32_t timeout_ms, cl_operation **out)
{
    request->key += stride;
    if (atomic_load_explicit(&engine->forked, memory_order_relaxed))
        return CL_FORKED;
    if (*out != NULL && cl_operation_renew(*out, request->key) != CL_OK) {
        cl_operation_release(*out); /* the thread has not let go of it yet */
        *out = NULL;
    }
    if (*out == NULL)
        CL_TRY(cl_operation_new(engine, request, out));
    enqueue(engine, *out, true);
    return wait_from(*out, (*out)->submitted_s, timeout_ms);
}

int cl_engine_health(cl_engine *engine, const char **text, int32_t *peer)
{
    own(engine);
    *text = engine->health_text;
    *peer = engine->blamed;
    int health = engine->health;
    disown(engine);
    return health;
}

void cl_engine_stats(cl_engine *engine, cl_stats *stats)
{
    own(engine);
    *stats = engine->stats;
    disown(engine);
}

int cl_owned(cl_engine *engine, void (*act)(cl_engine *engine, void *argument), void *argument)
{
    if (atomic_load_explicit(&engine->forked, memory_order_relaxed))
        return CL_FORKED;
    own(engine);
    bool has_ended = atomic_load(&engine->ended);
    if (!has_ended) {
        act(engine, argument);
        cl_engine_flush(engine);
        if (engine->runtime != NULL)
            ring_own(engine->runtime); /* what did not leave yet is the thread's */
    }
    disown(engine);
    return has_ended ? CL_SHUTDOWN : CL_OK;
}

static void fail(cl_engine *engine, void *text)
{
    cl_engine_lost(engine, engine->rank, text, true);
}

void cl_engine_fail(cl_engine *engine, const char *text)
{
    (void)cl_owned(engine, fail, (void *)(uintptr_t)text);
}

/* ---- the end ------------------------------------------------------------------------------------------------- */

/* The thread, which else hears of it, is kept out here. */
static void bury_the_dead(cl_engine *engine)
{
    for (int32_t r = 0; r < engine->size; r++) {
        const cl_peer *peer = &engine->peers[r];
        struct pollfd process = {.fd = peer->link == NULL || peer->lost ? -1 : cl_shm_pidfd(peer->link), .events = POLLIN};
        if (process.fd >= 0 && poll(&process, 1, 0) > 0)
            cl_bury(engine, r);
    }
}

static void flush_links(cl_engine *engine, double deadline_s)
{
    const struct timespec pause = {0, 50000};
    while (cl_engine_pending(engine) > 0 && cl_engine_now(engine) < deadline_s)
        if (cl_engine_progress(engine) == 0 && (engine->runtime == NULL || cl_look_now(engine) == 0)) {
            bury_the_dead(engine); /* who reads nothing any more is not waited for */
            nanosleep(&pause, NULL); /* only at the end of a life: not worth arming */
        }
}

static void stop_thread(struct cl_runtime *runtime)
{
    atomic_store(&runtime->stopping, 1);
    ring_own(runtime);
    pthread_join(runtime->thread, NULL);
    runtime->running = false;
}

static void end(cl_engine *engine, int32_t linger_ms)
{
    own(engine);
    cl_engine_leave(engine);
    if (engine->driver == NULL) /* a virtual clock stands still here, and its network delivers without us */
        flush_links(engine, cl_engine_now(engine) + 1e-3 * linger_ms);
    disown(engine);
    if (engine->runtime != NULL && engine->runtime->running)
        stop_thread(engine->runtime);
    own(engine);
    cl_engine_close_links(engine, linger_ms);
    atomic_store(&engine->ended, 1);
    cl_engine_flush(engine); /* what was submitted meanwhile fails */
    disown(engine);
}

int cl_engine_shutdown(cl_engine *engine, int32_t linger_ms)
{
    if (atomic_load_explicit(&engine->forked, memory_order_relaxed))
        return CL_FORKED;
    if (engine->runtime != NULL)
        cl_lock(&engine->runtime->ending); /* who comes second returns when the first is done */
    if (!atomic_load(&engine->ended))
        end(engine, linger_ms);
    if (engine->runtime != NULL)
        cl_unlock(&engine->runtime->ending);
    return CL_OK;
}

void cl_engine_forked(cl_engine *engine)
{
    atomic_store(&engine->forked, 1);
    if (engine->runtime != NULL) {
        close_descriptor(&engine->runtime->epoll);
        close_descriptor(&engine->runtime->own_doorbell);
    }
    cl_shm_forked(engine);
    for (int32_t r = 0; r < engine->size; r++)
        if (engine->peers[r].link != NULL)
            engine->peers[r].link->transport->forked(engine->peers[r].link);
}
