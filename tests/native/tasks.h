/*
 * tasks.h: random operations that every rank knows from one seed: what each rank asks for, and what must come of it.
 *
 * Shared by the simulated runs and by the ones over real links: it knows engines and requests, and neither clocks nor links.
 */
#ifndef TASKS_H
#define TASKS_H

#include "../../native/engine.h"
#include "world.h"

enum { MOST_TASKS = 20, MOST_COUNT = 3000 };

typedef enum {
    SUM_RING, SUM_EXCHANGE, SUM_HALVING, SUM_DIRECT, SCATTER, STRAIGHT, BROADCAST, GATHER, SHUFFLE, EXCHANGE, BARRIER, TICKET,
    FORMS
} task_form;

/* One operation, as all ranks know it. */
typedef struct {
    task_form form;
    int32_t dtype, reduction;
    double prescale, postscale;
    uint64_t count, segment_count;
    int32_t nmembers, members[MAX_RANKS]; /* in order; members[0] is the root */
    cl_plan *plans[MAX_RANKS];            /* per member; NULL: none, or one of all ranks */
    int32_t odd_rank;                     /* who submits something else; -1: nobody */
    int odd_field;
    uint8_t *reference;                   /* of a reduction: all members have this; made when it is first wanted */
} task;

/* One rank's part in it. */
typedef struct {
    cl_operation *operation; /* NULL: not submitted, or released */
    uint8_t *input, *output; /* may be the same */
    uint8_t *retired[2];     /* what they were before the operation ended */
    size_t nbytes;           /* of each of these */
    uint64_t count, splits[MAX_RANKS], parts[MAX_RANKS + 1];
    int64_t priority;
    bool submitted, gated;
    uint32_t nsegments;
    int times_done, status, blamed;
} part;

typedef struct {
    uint64_t random;
    int32_t size;
    uint32_t ntasks;
    bool mismatches;
    task tasks[MOST_TASKS];
    part parts[MAX_RANKS][MOST_TASKS];
} program;

/* Draws the tasks of ranks [0, size): program->random is the seed. */
void tasks_draw(program *p);
void tasks_free(program *p);
uint64_t tasks_pick(program *p, uint64_t below);

/* The rank's place among the members, or -1. */
int32_t tasks_member(const task *t, int32_t rank);
/* True: nobody can finish before he has heard, or been refused something, by everybody. */
bool tasks_need_everybody(const task *t);
/* Submits the rank's part; `random` draws what ranks need not agree on. */
void tasks_submit(program *p, cl_engine *engine, int32_t rank, uint32_t number, uint64_t *random);
/* NULL, or what is wrong with the result of an operation that has ended well. `released`: without its handle. */
const char *tasks_check(program *p, int32_t rank, uint32_t number);
/* The caller's memory is his again: it is overwritten, so that who looks at it later goes wrong. */
void tasks_end(program *p, int32_t rank, uint32_t number);
const char *tasks_name(task_form form);
const char *tasks_text(const program *p, int32_t rank, uint32_t number);

#endif
