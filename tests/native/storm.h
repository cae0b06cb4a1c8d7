/*
 * storm.h: a simulated network that does all that a transport is allowed to do, at the worst of times.
 *
 * The network of native/sim.c says how long things take, and is kind otherwise. This one keeps the contract of transport.h
 * to the letter and no further: it reads payloads from the caller's memory until the last moment, in pieces; refuses sends;
 * lends memory, takes it back; delays every link by times of its own; and links break, ranks stop for a while, die, or lose
 * the host under them. A rank runs (cl_engine_progress) only when something has woken it: who forgets to wake it hangs.
 */
#ifndef STORM_H
#define STORM_H

#include <stdio.h>

#include "../../native/engine.h"
#include "world.h"

typedef struct storm storm;

typedef struct {
    int32_t size;
    uint64_t seed;
    double latency_s;       /* of a packet, at least */
    double late_s;          /* and at most so much more */
    double slow_s;          /* a woken rank runs after at most so long */
    uint32_t refuses;       /* of 256 sends, so many are refused for no reason */
    uint32_t shares;        /* of 256 pairs, so many share memory: payloads may be lent */
    uint64_t window_nbytes; /* on the way in one direction of one link; a longer frame goes alone */
    bool by_edges;          /* ranks look at links that had an event, and at no others */
    FILE *trace;            /* NULL: none */
} storm_weather;

typedef enum { STORM_IDLE = 0, STORM_TIMER, STORM_DONE, STORM_TICKETS } storm_event;

/* What storm_next says about an operation that has ended; the caller may have released it. */
typedef struct {
    int32_t rank;
    uint64_t key; /* or a timer's token */
    int status, blamed;
    char text[CL_ERROR_NBYTES];
} storm_news;

storm *storm_new(const storm_weather *weather, const cl_settings *settings);
void storm_free(storm *s);
cl_engine *storm_engine(storm *s, int32_t rank);
double storm_now(const storm *s);
void storm_timer(storm *s, int32_t rank, double at_s, uint64_t token);
/*
 * Runs until a timer fires, an operation ends, or a rank has been given tickets. STORM_IDLE: nothing has happened for so
 * long that nothing will; what is unfinished then hangs.
 */
storm_event storm_next(storm *s, storm_news *news);
/* The process ends. `silently`: its host with it, so that nobody is told and only silence tells. */
void storm_kill(storm *s, int32_t rank, bool silently);
/* Nothing passes between two ranks any more. They see that their connection broke, soon or by its silence. */
void storm_cut(storm *s, int32_t a, int32_t b);
/* The rank does nothing for a while. */
void storm_pause(storm *s, int32_t rank, double until_s);
/* In the longest: from when one living rank knows something until it has told another. */
double storm_word_s(const storm *s);
/* The most urgent send of a rank was passed over, too much was posted at once, ...: NULL, or what was seen first. */
const char *storm_complaint(const storm *s);

#endif
