/*
 * instructions.c: the engine's hot paths, each in a loop that callgrind counts; instructions.py runs it.
 *
 * Two ranks in one process over shared memory. What is driven by hand takes the same path in every run, so the count is the
 * same too, however loaded the machine is. Both ranks' work is counted.
 */
#include <string.h>

#include "../native/engine.h"
#include "../tests/native/world.h"

enum { RANKS = 2, REPEATS = 200, AT_ONCE = 1000, MOST_COUNT = 1 << 18 };

typedef struct {
    const char *name;
    void (*run)(world *w, uint64_t count, uint64_t first_key, int repeats);
    uint64_t count; /* of int32 */
    int operations; /* per repeat */
} path;

static int32_t data[RANKS][MOST_COUNT];

static cl_request request_of(world *w, int32_t rank, uint64_t key, uint64_t count)
{
    cl_request request = sum_request(w, rank, key, data[rank], count);
    request.plan = count * sizeof(int32_t) <= 16 * 1024 ? w->exchange[rank] : w->halving[rank];
    return request;
}

static void finish(world *w, cl_operation **operations, int count)
{
    for (int i = 0; i < count; i++)
        for (int r = 0; r < RANKS; r++) {
            while (!cl_operation_done(operations[i * RANKS + r]))
                for (int32_t other = 0; other < RANKS; other++)
                    cl_engine_progress(w->engines[other]);
            cl_operation_release(operations[i * RANKS + r]);
        }
}

/* Rank 1 comes first, so rank 0's call ends in its first round. */
static void prepared(world *w, uint64_t count, uint64_t first_key, int repeats)
{
    cl_operation *place = NULL, *peers;
    cl_request request = request_of(w, 0, first_key - 1, count);
    for (int n = 0; n < repeats; n++) {
        cl_request other = request_of(w, 1, first_key + (uint64_t)n, count);
        CHECK(cl_submit(w->engines[1], &other, &peers) == CL_OK);
        cl_engine_progress(w->engines[1]);
        CHECK(cl_run_again(w->engines[0], &request, 1, 10000, &place) == CL_OK);
        cl_engine_progress(w->engines[1]);
        CHECK(cl_operation_done(peers));
        cl_operation_release(peers);
    }
    cl_operation_release(place);
}

static void one_by_one(world *w, uint64_t count, uint64_t first_key, int repeats)
{
    cl_operation *operations[RANKS];
    for (int n = 0; n < repeats; n++) {
        for (int32_t r = 0; r < RANKS; r++) {
            cl_request request = request_of(w, r, first_key + (uint64_t)n, count);
            CHECK(cl_submit(w->engines[r], &request, &operations[r]) == CL_OK);
        }
        finish(w, operations, 1);
    }
}

static void at_once(world *w, uint64_t count, uint64_t first_key, int repeats)
{
    static cl_operation *operations[AT_ONCE * RANKS];
    for (int n = 0; n < repeats; n++) {
        for (int i = 0; i < AT_ONCE; i++)
            for (int32_t r = 0; r < RANKS; r++) {
                cl_request request = request_of(w, r, first_key + (uint64_t)(n * AT_ONCE + i), count);
                CHECK(cl_submit(w->engines[r], &request, &operations[i * RANKS + r]) == CL_OK);
            }
        finish(w, operations, AT_ONCE);
    }
}

static const path paths[] = {
    {"prepared 8 B", prepared, 2, 1},
    {"blocking 64 KiB", one_by_one, 1 << 14, 1},
    {"blocking 1 MiB", one_by_one, 1 << 18, 1},
    {"1000 of 4 KiB at once", at_once, 1 << 10, AT_ONCE},
};

/* callgrind collects inside this function only. */
__attribute__((noinline)) void counted(world *w, const path *p, int repeats);
void counted(world *w, const path *p, int repeats)
{
    p->run(w, p->count, UINT64_C(1) << 40, repeats);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++)
            puts(paths[i].name);
        return 0;
    }
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        if (strcmp(paths[i].name, argv[1]) != 0)
            continue;
        cl_settings settings = ordinary_settings();
        world w = shm_links(RANKS, &settings);
        if (paths[i].run == prepared)
            CHECK(cl_engine_start(w.engines[0]) == CL_OK);
        int repeats = paths[i].operations > 1 ? 3 : REPEATS;
        paths[i].run(&w, paths[i].count, 1, repeats); /* tables and heaps grow now */
        counted(&w, &paths[i], repeats);
        printf("operations: %d\n", repeats * paths[i].operations);
        free_world(&w);
        return 0;
    }
    return 1;
}
