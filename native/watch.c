/*
 * watch.c: which descriptors an engine sleeps on, and what their events mean.
 *
 * Sockets are watched by edges and for good: with many peers it is epoll that says whom to read, and not a system call for
 * each of them. Knows links and descriptors; who owns the engine when is thread.c's business.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "runtime.h"

enum { DOORBELL = -1 /* among epoll's tags, which else are peers */ };

/* Sockets are watched by edges, for both directions at once: whoever sees one remembers it, the owner or not. */
int cl_look(cl_engine *engine, struct epoll_event *events, int timeout_ms)
{
    int count = epoll_wait(engine->runtime->epoll, events, CL_MAX_EVENTS, timeout_ms);
    for (int i = 0; i < count; i++) {
        int64_t tag = (int64_t)events[i].data.u64;
        if (tag != DOORBELL && engine->peers[tag].watched)
            atomic_store_explicit(&engine->peers[tag].awake, true, memory_order_release);
    }
    return count;
}

/* A dead process may have said its last words: they are read first, since a goodbye makes its death no failure. */
void cl_bury(cl_engine *engine, int32_t rank)
{
    cl_peer *peer = &engine->peers[rank];
    while (!peer->lost && peer->link->transport->progress(peer->link) > 0)
        ;
    cl_engine_lost(engine, rank, "its process died", true);
}

static void on_death(cl_engine *engine, int32_t rank)
{
    cl_link *link = engine->peers[rank].link;
    if (link == NULL)
        return;
    epoll_ctl(engine->runtime->epoll, EPOLL_CTL_DEL, cl_shm_pidfd(link), NULL);
    cl_bury(engine, rank);
}

static void stop_polling(cl_engine *engine, int32_t rank)
{
    uint32_t events;
    cl_link *link = engine->peers[rank].link;
    int descriptor = link == NULL ? -1 : link->transport->pollfd(link, &events);
    if (descriptor >= 0 && engine->runtime->interest[rank] != 0) {
        epoll_ctl(engine->runtime->epoll, EPOLL_CTL_DEL, descriptor, NULL);
        engine->runtime->interest[rank] = 0;
    }
}

static void on_event(cl_engine *engine, int64_t tag)
{
    uint64_t count;
    if (tag == DOORBELL)
        while (read(engine->runtime->doorbell, &count, sizeof count) < 0 && errno == EINTR)
            ;
    else if (engine->peers[tag].watched)
        return;
    else if (cl_shm_pidfd(engine->peers[tag].link) >= 0)
        on_death(engine, (int32_t)tag);
    else if (engine->peers[tag].lost)
        stop_polling(engine, (int32_t)tag);
}

void cl_on_events(cl_engine *engine, const struct epoll_event *events, int count)
{
    for (int i = 0; i < count; i++)
        on_event(engine, (int64_t)events[i].data.u64);
}

int cl_look_now(cl_engine *engine)
{
    struct epoll_event events[CL_MAX_EVENTS];
    int count = cl_look(engine, events, 0);
    cl_on_events(engine, events, count);
    return count;
}

void cl_watch_for_sleep(cl_engine *engine, int32_t peer)
{
    struct cl_runtime *runtime = engine->runtime;
    cl_link *link = engine->peers[peer].link;
    uint32_t events = 0;
    int descriptor = link->transport->pollfd(link, &events);
    if (descriptor < 0 || events == runtime->interest[peer])
        return;
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)(int64_t)peer};
    int change = runtime->interest[peer] == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
    if (epoll_ctl(runtime->epoll, change, descriptor, &event) == 0)
        runtime->interest[peer] = events;
}

static int add_to_epoll(struct cl_runtime *runtime, int descriptor, uint32_t events, int64_t tag)
{
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)tag};
    return epoll_ctl(runtime->epoll, EPOLL_CTL_ADD, descriptor, &event) == 0 ? CL_OK : CL_SYSTEM;
}

/* Pidfds and sockets stay in epoll for good; other descriptors come and change with cl_watch_for_sleep. */
static int watch_peer(struct cl_runtime *runtime, cl_peer *peer, int32_t rank)
{
    const cl_transport *transport = peer->link->transport;
    uint32_t events;
    int pidfd = cl_shm_pidfd(peer->link);
    runtime->ticks |= transport->tick != NULL;
    runtime->sockets |= transport != &cl_shm_transport;
    runtime->watches |= transport->edges;
    runtime->polls |= !transport->edges;
    peer->watched = transport->edges;
    if (transport->edges)
        return add_to_epoll(runtime, transport->pollfd(peer->link, &events),
                            EPOLLIN | EPOLLOUT | EPOLLRDHUP | (uint32_t)EPOLLET, rank);
    return pidfd >= 0 ? add_to_epoll(runtime, pidfd, EPOLLIN, rank) : CL_OK;
}

int cl_watch(cl_engine *engine)
{
    CL_TRY(add_to_epoll(engine->runtime, engine->runtime->doorbell, EPOLLIN, DOORBELL));
    for (int32_t r = 0; r < engine->size; r++)
        if (engine->peers[r].link != NULL)
            CL_TRY(watch_peer(engine->runtime, &engine->peers[r], r));
    return CL_OK;
}
