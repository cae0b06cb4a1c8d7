/*
 * engine_test.c: the engine with real threads and links, several ranks in one process, so that sanitizers see both ends.
 *
 * Every test runs over every transport of the table, with ordinary and with tiny budgets. A hang is the runner's to stop.
 */
#define _GNU_SOURCE
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "world.h"

enum { OPERATIONS = 60, MAX_COUNT = 6000 };

static void shuffle(uint32_t *order, uint32_t count, uint64_t *random)
{
    for (uint32_t i = 0; i < count; i++)
        order[i] = i;
    for (uint32_t i = count; i > 1; i--) {
        uint32_t j = (uint32_t)(next_random(random) % i), kept = order[i - 1];
        order[i - 1] = order[j];
        order[j] = kept;
    }
}

static uint64_t count_of(uint64_t seed, uint32_t number)
{
    uint64_t random = seed * 977 + number * 7919 + 1;
    next_random(&random);
    return next_random(&random) % 3 == 0 ? next_random(&random) % 40 : next_random(&random) % MAX_COUNT;
}

static void check_sum(const int32_t *data, uint64_t count, uint32_t number, int32_t size)
{
    for (uint64_t i = 0; i < count; i++)
        CHECK(data[i] == size * (int32_t)(number + i) + size * (size - 1) / 2);
}

/* Many sums, submitted and awaited in another order on every rank, some gated, some handles dropped. */
static void *random_order(void *argument)
{
    rank_arguments *a = argument;
    uint64_t random = a->seed * 31 + (uint64_t)a->rank + 1;
    uint32_t order[OPERATIONS];
    int32_t *data[OPERATIONS];
    cl_operation *operations[OPERATIONS];
    shuffle(order, OPERATIONS, &random);
    for (uint32_t i = 0; i < OPERATIONS; i++) {
        uint32_t n = order[i];
        uint64_t count = count_of(a->seed, n);
        data[n] = malloc((count + 1) * sizeof(int32_t));
        for (uint64_t k = 0; k < count; k++)
            data[n][k] = (int32_t)(n + k) + a->rank;
        cl_request request = sum_request(a->w, a->rank, a->seed * 1000 + n, data[n], count);
        request.priority = (int64_t)(n % 7);
        request.segment_count = n % 2 == 0 ? 1024 : 0;
        if (n % 5 == 0 && a->w->exchange[a->rank] != NULL)
            request.plan = a->w->exchange[a->rank];
        request.gated = n % 4 == 1;
        CHECK(cl_submit(a->w->engines[a->rank], &request, &operations[n]) == CL_OK);
        uint32_t nsegments = request.segment_count == 0 || count <= 1024 ? 1 : (uint32_t)((count + 1023) / 1024);
        for (uint32_t s = nsegments; request.gated && s-- > 0;)
            CHECK(cl_operation_ready(operations[n], s, s + 1) == CL_OK);
    }
    shuffle(order, OPERATIONS, &random);
    for (uint32_t i = 0; i < OPERATIONS; i++) {
        uint32_t n = order[i];
        wait_for(operations[n], CL_OK);
        check_sum(data[n], count_of(a->seed, n), n, a->w->size);
        cl_operation_release(operations[n]);
        free(data[n]);
    }
    return NULL;
}

static void test_random_order(world *w, uint64_t seed)
{
    on_all_ranks(w, seed, random_order);
}

static void *every_kind(void *argument)
{
    rank_arguments *a = argument;
    int32_t size = a->w->size, rank = a->rank, members[MAX_RANKS];
    cl_engine *engine = a->w->engines[rank];
    uint64_t key = a->seed * 1000 + 500;
    for (int32_t r = 0; r < size; r++)
        members[r] = r;
    int32_t data[64 * MAX_RANKS];
    cl_operation *operation;
    void *result;
    uint64_t count;
    const uint64_t *counts;

    cl_request base = sum_request(a->w, rank, key, data, 0);
    base.members = members;
    base.nmembers = size;
    base.my_part = rank;

    cl_request gather = base; /* rank r gives r + 1 elements of value r; of rank 0 comes one */
    uint64_t own = (uint64_t)rank + 1;
    for (uint64_t i = 0; i < own; i++)
        data[i] = rank;
    gather.kind = CL_ALLGATHER, gather.plan = a->w->gather[rank], gather.output = NULL, gather.count = own;
    gather.splits = &own, gather.nsplits = 1, gather.key = key++;
    CHECK(cl_submit(engine, &gather, &operation) == CL_OK);
    wait_for(operation, CL_OK);
    CHECK(cl_operation_result(operation, &result, &count, &counts) == CL_OK);
    CHECK(count == (uint64_t)(size * (size + 1) / 2));
    for (int32_t r = 0, at = 0; r < size; r++)
        for (int32_t i = 0; i <= r; i++)
            CHECK(((int32_t *)result)[at++] == r && counts[r] == (uint64_t)r + 1);
    cl_operation_release(operation);

    cl_request broadcast = base;
    broadcast.kind = CL_BROADCAST, broadcast.plan = a->w->from_zero[rank], broadcast.root = 0, broadcast.count = 64;
    broadcast.key = key++;
    for (int32_t i = 0; i < 64; i++)
        data[i] = rank == 0 ? i * i : -1;
    CHECK(cl_submit(engine, &broadcast, &operation) == CL_OK);
    wait_for(operation, CL_OK);
    for (int32_t i = 0; i < 64; i++)
        CHECK(data[i] == i * i);
    cl_operation_release(operation);

    uint64_t splits[MAX_RANKS]; /* rank r sends r + j elements to j */
    cl_request all = base;
    all.count = 0;
    for (int32_t r = 0; r < size; r++)
        all.count += splits[r] = (uint64_t)(rank + r);
    for (uint64_t i = 0; i < all.count; i++)
        data[i] = rank;
    all.kind = CL_ALLTOALL, all.plan = a->w->shuffle[rank], all.output = NULL, all.splits = splits, all.nsplits = size;
    all.key = key++;
    CHECK(cl_submit(engine, &all, &operation) == CL_OK);
    wait_for(operation, CL_OK);
    CHECK(cl_operation_result(operation, &result, &count, &counts) == CL_OK);
    for (int32_t r = 0, at = 0; r < size; r++) {
        CHECK(counts[r] == (uint64_t)(r + rank));
        for (uint64_t i = 0; i < counts[r]; i++)
            CHECK(((int32_t *)result)[at++] == r);
    }
    cl_operation_release(operation);

    uint64_t parts[MAX_RANKS + 1] = {0};
    cl_request scatter = sum_request(a->w, rank, key++, data, 0);
    for (int32_t r = 0; r < size; r++)
        parts[r + 1] = parts[r] + 10 + (uint64_t)r;
    scatter.count = parts[size];
    for (uint64_t i = 0; i < scatter.count; i++)
        data[i] = (int32_t)i + rank;
    scatter.kind = CL_REDUCESCATTER, scatter.plan = a->w->scatter[rank], scatter.output = NULL, scatter.parts = parts;
    scatter.my_part = rank;
    CHECK(cl_submit(engine, &scatter, &operation) == CL_OK);
    wait_for(operation, CL_OK);
    CHECK(cl_operation_result(operation, &result, &count, &counts) == CL_OK && count == 10 + (uint64_t)rank);
    for (uint64_t i = 0; i < count; i++)
        CHECK(((int32_t *)result)[i] == size * (int32_t)(parts[rank] + i) + size * (size - 1) / 2);
    cl_operation_release(operation);

    char text[16];
    cl_request exchange = base;
    exchange.kind = CL_EXCHANGE, exchange.dtype = CL_UINT8, exchange.plan = NULL, exchange.output = NULL;
    exchange.count = (uint64_t)snprintf(text, sizeof text, "rank %d", rank), exchange.input = text, exchange.key = key++;
    CHECK(cl_submit(engine, &exchange, &operation) == CL_OK);
    wait_for(operation, CL_OK);
    CHECK(cl_operation_result(operation, &result, &count, &counts) == CL_OK && count == 6 * (uint64_t)size);
    for (int32_t r = 0; r < size; r++)
        CHECK(((char *)result)[6 * r + 5] == '0' + r);
    cl_operation_release(operation);
    return NULL;
}

static void test_every_kind(world *w, uint64_t seed)
{
    on_all_ranks(w, seed, every_kind);
}

/*
 * Sums on the same memory, one after the other, each run as the last one's operation again; in between, others in flight and
 * pauses of every length, so that ranks meet while they poll, sleep and have nothing to do.
 */
static void *again(void *argument)
{
    rank_arguments *a = argument;
    cl_engine *engine = a->w->engines[a->rank];
    uint64_t random = a->seed * 97 + (uint64_t)a->rank;
    int32_t data[700], other[90], size = a->w->size;
    cl_operation *place = NULL, *beside = NULL;
    cl_request request = sum_request(a->w, a->rank, a->seed * 100000 + 7, data, a->seed % 2 == 0 ? 700 : 2);
    request.segment_count = a->seed % 3 == 0 ? 64 : 0;
    for (uint64_t n = 0; n < 60; n++) {
        const struct timespec pause = {0, (long)(next_random(&random) % 60000)};
        if (next_random(&random) % 3 == 0)
            nanosleep(&pause, NULL);
        cl_request more = sum_request(a->w, a->rank, a->seed * 100000 + 500 + n, other, 90);
        for (int32_t k = 0; n % 4 == 1 && k < 90; k++)
            other[k] = k + a->rank;
        if (n % 4 == 1)
            CHECK(cl_submit(engine, &more, &beside) == CL_OK);
        for (uint64_t k = 0; k < request.count; k++)
            data[k] = (int32_t)(n + k) + a->rank;
        int status = cl_run_again(engine, &request, 1000003, 100, &place);
        CHECK((status == CL_OK || status == CL_AGAIN) && place != NULL);
        wait_for(place, CL_OK);
        for (uint64_t k = 0; k < request.count; k++)
            CHECK(data[k] == size * (int32_t)(n + k) + size * (size - 1) / 2);
        if (n % 4 == 3) {
            wait_for(beside, CL_OK);
            check_sum(other, 90, 0, size);
            cl_operation_release(beside);
        }
    }
    cl_operation_release(place);
    return NULL;
}

static void test_again(world *w, uint64_t seed)
{
    on_all_ranks(w, seed, again);
}

/* The last rank submits another count: all ranks hear of both sides, and the next operation works. */
static void *mismatch(void *argument)
{
    rank_arguments *a = argument;
    static const uint64_t counts[] = {3, 2000};
    int32_t data[4001];
    for (int i = 0; i < 2; i++) {
        cl_operation *operation;
        const char *text;
        int32_t peer;
        uint64_t count = counts[i] + (a->rank == a->w->size - 1);
        for (uint64_t k = 0; k < count; k++)
            data[k] = 1;
        cl_request request = sum_request(a->w, a->rank, a->seed * 1000 + 900 + 2 * (uint64_t)i, data, count);
        request.text = a->rank == a->w->size - 1 ? "the long one" : "the short one";
        CHECK(cl_submit(a->w->engines[a->rank], &request, &operation) == CL_OK);
        wait_for(operation, CL_MISMATCH);
        cl_operation_status(operation, &text, &peer);
        CHECK(strstr(text, "the long one") != NULL && strstr(text, "the short one") != NULL);
        cl_operation_release(operation);
        request = sum_request(a->w, a->rank, a->seed * 1000 + 901 + 2 * (uint64_t)i, data, counts[i]);
        for (uint64_t k = 0; k < counts[i]; k++)
            data[k] = (int32_t)k + a->rank;
        CHECK(cl_submit(a->w->engines[a->rank], &request, &operation) == CL_OK);
        wait_for(operation, CL_OK);
        check_sum(data, counts[i], 0, a->w->size);
        cl_operation_release(operation);
    }
    return NULL;
}

static void test_mismatch(world *w, uint64_t seed)
{
    on_all_ranks(w, seed, mismatch);
}

/* A wait that times out and a handle that is dropped change nothing. */
static void *late_rank(void *argument)
{
    rank_arguments *a = argument;
    static int32_t data[MAX_RANKS][3000]; /* outlives the dropped handle */
    cl_operation *operation, *barrier;
    for (int k = 0; k < 3000; k++)
        data[a->rank][k] = k + a->rank;
    cl_request request = sum_request(a->w, a->rank, a->seed * 1000 + 950, data[a->rank], 3000);
    int32_t token = 1;
    cl_request meet = sum_request(a->w, a->rank, a->seed * 1000 + 951, &token, 1);
    if (a->rank == 0) {
        CHECK(cl_submit(a->w->engines[0], &meet, &barrier) == CL_OK);
        wait_for(barrier, CL_OK);
        cl_operation_release(barrier);
    }
    CHECK(cl_submit(a->w->engines[a->rank], &request, &operation) == CL_OK);
    if (a->rank != 0) {
        CHECK(cl_operation_wait(operation, 2) == CL_AGAIN); /* rank 0 cannot have come */
        CHECK(cl_submit(a->w->engines[a->rank], &meet, &barrier) == CL_OK);
        wait_for(barrier, CL_OK);
        cl_operation_release(barrier);
    }
    if (a->rank % 2 == 1)
        cl_operation_release(operation);
    int32_t last = 1;
    cl_operation *end;
    meet = sum_request(a->w, a->rank, a->seed * 1000 + 952, &last, 1);
    meet.priority = 1;
    if (a->rank % 2 == 0) {
        wait_for(operation, CL_OK);
        check_sum(data[a->rank], 3000, 0, a->w->size);
        cl_operation_release(operation);
    }
    CHECK(cl_submit(a->w->engines[a->rank], &meet, &end) == CL_OK);
    wait_for(end, CL_OK);
    cl_operation_release(end);
    return NULL;
}

static void test_late_rank(world *w, uint64_t seed)
{
    on_all_ranks(w, seed, late_rank);
}

/* Rank 0 learns that rank 1 has begun an exchange before it does so itself, and of one that nobody begins it does not. */
static void *begun(void *argument)
{
    rank_arguments *a = argument;
    static const int32_t members[2] = {0, 1};
    uint8_t byte = (uint8_t)a->rank;
    const uint64_t key = a->seed * 1000 + 993;
    cl_engine *engine = a->w->engines[a->rank];
    if (a->rank > 1)
        return NULL;
    while (a->rank == 0 && cl_engine_is_begun(engine, key) == 0)
        usleep(100);
    cl_request request = {.key = key, .text = "exchange", .kind = CL_EXCHANGE, .dtype = CL_UINT8, .prescale = 1, .postscale = 1,
                          .input = &byte, .count = 1, .members = members, .nmembers = 2, .my_part = a->rank};
    cl_operation *operation;
    CHECK(cl_submit(engine, &request, &operation) == CL_OK);
    wait_for(operation, CL_OK);
    cl_operation_release(operation);
    CHECK(cl_engine_is_begun(engine, key) == 0 && cl_engine_is_begun(engine, key + 1) == 0);
    return NULL;
}

static void test_begun(world *w, uint64_t seed)
{
    on_all_ranks(w, seed, begun);
}

/* The last test of a world: rank 0 leaves while everybody else still waits for it. */
static void *leaving(void *argument)
{
    rank_arguments *a = argument;
    cl_engine *engine = a->w->engines[a->rank];
    int32_t data[2000] = {0}, token = 0;
    cl_operation *operation, *meeting, *after;
    cl_request request = sum_request(a->w, a->rank, a->seed * 1000 + 990, data, 2000);
    cl_request meet = sum_request(a->w, a->rank, a->seed * 1000 + 991, &token, 1);
    if (a->rank != 0)
        CHECK(cl_submit(engine, &request, &operation) == CL_OK);
    CHECK(cl_submit(engine, &meet, &meeting) == CL_OK);
    wait_for(meeting, CL_OK);
    cl_operation_release(meeting);
    if (a->rank == 0) {
        CHECK(cl_engine_shutdown(engine, 1000) == CL_OK);
        CHECK(cl_submit(engine, &request, &operation) == CL_OK);
        wait_for(operation, CL_SHUTDOWN);
        cl_operation_release(operation);
        return NULL;
    }
    wait_for(operation, CL_PEER_LEFT);
    cl_operation_release(operation);
    request.key++, request.key++;
    CHECK(cl_submit(engine, &request, &after) == CL_OK);
    wait_for(after, CL_PEER_LEFT);
    cl_operation_release(after);
    return NULL;
}

static void test_leaving(world *w, uint64_t seed)
{
    on_all_ranks(w, seed, leaving);
}

typedef struct {
    const char *name;
    make_world make;
} transport;

static const transport transports[] = {{"shm", shm_world}, {"tcp", tcp_world}};

static const struct {
    const char *name;
    void (*run)(world *w, uint64_t seed);
} tests[] = {
    {"random order", test_random_order}, {"every kind", test_every_kind}, {"again", test_again}, {"mismatch", test_mismatch},
    {"late rank", test_late_rank}, {"begun", test_begun}, {"leaving", test_leaving}, /* last: nothing works after it */
};

int main(int argc, char **argv)
{
    uint64_t seeds = argc > 1 ? strtoull(argv[1], NULL, 10) : 3;
    for (size_t t = 0; t < sizeof transports / sizeof transports[0]; t++)
        for (uint64_t seed = 1; seed <= seeds; seed++)
            for (int32_t size = 2; size <= 4; size++)
                for (int tiny = 0; tiny < 2; tiny++) {
                    cl_settings settings = tiny ? tiny_settings() : ordinary_settings();
                    world w = transports[t].make(size, &settings);
                    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
                        fprintf(stderr, "%s, %d ranks, %s budgets, seed %d: %s\n", transports[t].name, size,
                                tiny ? "tiny" : "ordinary", (int)seed, tests[i].name);
                        tests[i].run(&w, seed);
                    }
                    free_world(&w);
                }
    puts("all engine tests passed");
    return 0;
}
