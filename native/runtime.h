/*
 * runtime.h: what thread.c and watch.c share: an engine's life in a real process.
 */
#ifndef CL_RUNTIME_H
#define CL_RUNTIME_H

#include <pthread.h>
#include <sys/epoll.h>

#include "engine.h"

enum { CL_MAX_EVENTS = 64 };

struct cl_runtime {
    atomic_int lock;   /* who holds it owns the engine */
    atomic_int ending; /* held through the whole of a shutdown */
    atomic_int *sleeping;
    atomic_int own_sleeping; /* used where there is no shared memory */
    int doorbell, own_doorbell, epoll;
    uint32_t *interest; /* per peer that is not watched by edges: what epoll waits for */
    bool polls;   /* some link is looked at in memory, or through a library: that is cheap, and nothing else tells of arrivals */
    bool watches; /* some link is watched by edges */
    pthread_t thread;
    bool running;
    bool ticks; /* some link wants to know the time */
    atomic_int sleepers; /* callers that sleep until an operation is done */
    bool woke; /* the owner has woken a caller, who goes on by himself: it must not poll in his way */
    bool crowded; /* this host has more ranks than processors: who polls gives his processor to another, who may be waited for */
    bool sockets; /* some link is polled by epoll, and not woken by a flag */
    double next_tick_s;
    double next_stall_s, stall_period_s; /* 0: nobody looks for stalls */
    atomic_int stopping; /* the thread is to end; links are closed after it */
};

/* watch.c */
/* Puts the doorbell, the processes on this host and all sockets into epoll. */
int cl_watch(cl_engine *engine);
/* The owner goes to sleep: what epoll is to wait for on a link that is not watched by edges. */
void cl_watch_for_sleep(cl_engine *engine, int32_t peer);
/* Waits for events, by the owner or not: remembers which sockets are awake. Returns how many events there are. */
int cl_look(cl_engine *engine, struct epoll_event *events, int timeout_ms);
/* As the owner: does what the events ask for. */
void cl_on_events(cl_engine *engine, const struct epoll_event *events, int count);
/* As the owner: what has become ready by now. Returns how much. */
int cl_look_now(cl_engine *engine);
/* As the owner: this rank's process has died. */
void cl_bury(cl_engine *engine, int32_t rank);

#endif
