/* world.h: several ranks in one process, for tests of the engine: real links and threads, or the simulated network. */
#ifndef WORLD_H
#define WORLD_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../native/commlib.h"

enum { MAX_RANKS = 12 };

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);            \
            abort();                                                                           \
        }                                                                                      \
    } while (0)

typedef struct {
    int32_t size;
    cl_engine *engines[MAX_RANKS];
    cl_plan *ring[MAX_RANKS];     /* all-reduce in `size` chunks */
    cl_plan *exchange[MAX_RANKS]; /* all-reduce of one chunk: everybody to everybody's neighbour, doubling; powers of two only */
    cl_plan *halving[MAX_RANKS];  /* all-reduce in halves of halves, several chunks per step; powers of two only */
    cl_plan *direct[MAX_RANKS];   /* all-reduce in two shots: every rank adds its own chunk, in rank order */
    cl_plan *gather[MAX_RANKS];   /* all-gather round the ring */
    cl_plan *scatter[MAX_RANKS];  /* reduce-scatter round the ring: chunk r ends at rank r */
    cl_plan *straight[MAX_RANKS]; /* reduce-scatter in one shot: the first half of `direct` */
    cl_plan *shuffle[MAX_RANKS];  /* all-to-all */
    cl_plan *from_zero[MAX_RANKS]; /* broadcast from rank 0, one after the other */
} world;

typedef world (*make_world)(int32_t size, const cl_settings *settings);

cl_settings ordinary_settings(void);
cl_settings tiny_settings(void);
world shm_world(int32_t size, const cl_settings *settings);
/* Without threads: driven by cl_engine_progress. */
world shm_links(int32_t size, const cl_settings *settings);
world tcp_links(int32_t size, const cl_settings *settings);
world tcp_world(int32_t size, const cl_settings *settings);
/* A connection through the loopback interface. */
void tcp_pair(int pair[2]);
void plan_world(world *w);
void free_world(world *w);
void free_plans(world *w);

/* A sum of int32 over all ranks under `key`; the plan is the ring unless another is given. */
cl_request sum_request(const world *w, int32_t rank, uint64_t key, int32_t *data, uint64_t count);
/* Waits without end for success: a test that hangs is stopped by whoever runs it. */
void wait_for(cl_operation *operation, int expected_status);
uint64_t next_random(uint64_t *state);

/* What a rank's own thread is told. */
typedef struct {
    world *w;
    int32_t rank;
    uint64_t seed;
} rank_arguments;

/* Runs `body` on one thread per rank, with its rank_arguments, and waits for all. */
void on_all_ranks(world *w, uint64_t seed, void *(*body)(void *));

#endif
