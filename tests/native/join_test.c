/*
 * join_test.c: ranks with different numbers of sums, which join when they have no more; over links and threads, for sanitizers.
 *
 * Rank r makes r sums in each epoch, so that the last rank is alone in the end; what stands in for a rank contributes zeros.
 */
#include <string.h>

#include "world.h"

enum { COUNT = 700, EPOCHS = 4, REFUSED = 99 };

static uint64_t key_of(uint64_t seed, int32_t epoch, int32_t number)
{
    return seed * 100000 + (uint64_t)epoch * 1000 + (uint64_t)number + 1;
}

/* Takes part in what the others do until all have joined. Returns the last one. */
static int32_t join(const world *w, int32_t rank, uint64_t first_unknown, uint64_t *seen)
{
    cl_engine *engine = w->engines[rank];
    int32_t zeros[EPOCHS * MAX_RANKS][COUNT] = {{0}}, nstanding = 0, last;
    cl_operation *standing[EPOCHS * MAX_RANKS];
    cl_announced *told;
    CHECK(cl_join(engine) == CL_OK);
    for (;;) {
        int status = cl_join_next(engine, 20, &told, &last);
        CHECK(status == CL_OK || status == CL_AGAIN);
        if (status == CL_AGAIN)
            continue;
        if (told == NULL)
            break;
        uint64_t number = told->request.key - first_unknown;
        bool is_known = told->request.key < first_unknown || (number < 64 && *seen >> number & 1);
        if (!is_known && told->request.key % 1000 == REFUSED) {
            CHECK(cl_join_refuse(engine, told, "this one has no more work") == CL_OK);
        } else if (!is_known) {
            *seen |= UINT64_C(1) << number;
            told->request.plan = w->ring[rank];
            told->request.input = told->request.output = zeros[nstanding];
            CHECK(cl_stand_in(engine, told, &standing[nstanding++]) == CL_OK);
        }
        cl_announced_free(told);
    }
    for (int32_t i = 0; i < nstanding; i++) {
        wait_for(standing[i], CL_OK);
        cl_operation_release(standing[i]);
    }
    CHECK(cl_join_end(engine) == CL_OK);
    return last;
}

static void *uneven(void *argument)
{
    rank_arguments *a = argument;
    cl_engine *engine = a->w->engines[a->rank];
    for (int32_t epoch = 0; epoch < EPOCHS; epoch++) {
        int32_t data[MAX_RANKS][COUNT];
        cl_operation *operations[MAX_RANKS];
        for (int32_t i = 0; i < a->rank; i++) {
            for (int32_t k = 0; k < COUNT; k++)
                data[i][k] = a->rank + 1;
            cl_request request = sum_request(a->w, a->rank, key_of(a->seed, epoch, i), data[i], COUNT);
            CHECK(cl_submit(engine, &request, &operations[i]) == CL_OK);
        }
        uint64_t seen = 0;
        int32_t last = join(a->w, a->rank, key_of(a->seed, epoch, a->rank), &seen); /* with all of them in flight */
        CHECK(last >= 0 && last < a->w->size);
        for (int32_t i = 0; i < a->rank; i++) {
            wait_for(operations[i], CL_OK);
            int32_t sum = 0; /* of the ranks that have an i-th sum */
            for (int32_t r = i + 1; r < a->w->size; r++)
                sum += r + 1;
            for (int32_t k = 0; k < COUNT; k++)
                CHECK(data[i][k] == sum);
            cl_operation_release(operations[i]);
        }
    }
    return NULL;
}

/* Rank 0 has joined: what it refuses fails on the others; and it can submit nothing itself. */
static void *refused(void *argument)
{
    rank_arguments *a = argument;
    cl_engine *engine = a->w->engines[a->rank];
    uint64_t seen = 0, key = a->seed * 100000 + REFUSED;
    int32_t data[COUNT] = {0};
    if (a->rank > 0) {
        cl_operation *operation;
        cl_request request = sum_request(a->w, a->rank, key, data, COUNT);
        CHECK(cl_submit(engine, &request, &operation) == CL_OK);
        wait_for(operation, CL_JOINED);
        cl_operation_release(operation);
    }
    (void)join(a->w, a->rank, a->rank > 0 ? key + 1 : key, &seen);
    return NULL;
}

int main(int argc, char **argv)
{
    uint64_t seeds = argc > 1 ? strtoull(argv[1], NULL, 10) : 3;
    static const make_world worlds[] = {shm_world, tcp_world};
    for (size_t m = 0; m < sizeof worlds / sizeof worlds[0]; m++)
        for (uint64_t seed = 1; seed <= seeds; seed++)
            for (int32_t size = 2; size <= 4; size++) {
                fprintf(stderr, "%s, %d ranks, seed %d\n", m == 0 ? "shm" : "tcp", size, (int)seed);
                cl_settings settings = seed % 2 == 0 ? tiny_settings() : ordinary_settings();
                world w = worlds[m](size, &settings);
                on_all_ranks(&w, seed, uneven);
                on_all_ranks(&w, seed + 500, refused);
                free_world(&w);
            }
    puts("all join tests passed");
    return 0;
}
