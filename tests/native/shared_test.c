/* shared_test.c: arrays in memory that all ranks of a host map: lent out, summed without copies, taken back at any time. */
#define _GNU_SOURCE
#include <poll.h>
#include <string.h>
#include <time.h>

#include "../../native/shm.h"
#include "world.h"

enum { BLOCKS = 40, ROUNDS = 400, OPERATIONS = 30, HUGE_PAGE_NBYTES = 2 << 20 };

/* Of a large block not every byte is looked at. */
static uint64_t stride_of(uint64_t nbytes)
{
    return nbytes < HUGE_PAGE_NBYTES ? 1 : 1021;
}

/* Blocks made and freed at random keep their contents, begin as zeros, and never overlap. */
static void test_blocks(uint64_t seed)
{
    cl_settings settings = ordinary_settings();
    world w = shm_world(2, &settings);
    cl_shared *blocks[BLOCKS] = {NULL};
    uint64_t nbytes[BLOCKS], random = seed * 77 + 5;
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t i = (uint32_t)(next_random(&random) % BLOCKS);
        if (blocks[i] == NULL) {
            nbytes[i] = next_random(&random) % (round % 16 == 0 ? 4 * HUGE_PAGE_NBYTES : 50000);
            CHECK(cl_shared_new(w.engines[0], nbytes[i], &blocks[i]) == CL_OK);
            uint8_t *bytes = cl_shared_address(blocks[i]);
            CHECK((uintptr_t)bytes % (nbytes[i] < HUGE_PAGE_NBYTES ? 4096 : HUGE_PAGE_NBYTES) == 0);
            for (uint64_t k = 0; k < nbytes[i]; k += stride_of(nbytes[i]))
                CHECK(bytes[k] == 0);
            memset(bytes, (int)i + 1, nbytes[i]);
        } else {
            const uint8_t *bytes = cl_shared_address(blocks[i]);
            for (uint64_t k = 0; k < nbytes[i]; k += stride_of(nbytes[i]))
                CHECK(bytes[k] == i + 1);
            cl_shared_free(blocks[i]);
            blocks[i] = NULL;
        }
    }
    free_world(&w); /* blocks outlive their engine */
    for (uint32_t i = 0; i < BLOCKS; i++)
        if (blocks[i] != NULL) {
            CHECK(nbytes[i] == 0 || *(uint8_t *)cl_shared_address(blocks[i]) == i + 1);
            cl_shared_free(blocks[i]);
        }
}

/* More than there is; and what was freed is lent out again, as zeros, whole or in parts. */
static void test_full_heap(void)
{
    cl_settings settings = ordinary_settings();
    world w = shm_world(2, &settings);
    cl_shared *block, *other;
    CHECK(cl_shared_new(w.engines[0], UINT64_MAX, &block) == CL_NO_MEMORY);
    CHECK(cl_shared_new(w.engines[0], UINT64_C(1) << 46, &block) == CL_NO_MEMORY);
    CHECK(cl_shared_new(w.engines[0], 3 * HUGE_PAGE_NBYTES + 5, &block) == CL_OK);
    uint8_t *address = cl_shared_address(block);
    memset(address, 1, 3 * HUGE_PAGE_NBYTES + 5);
    cl_shared_free(block);
    CHECK(cl_shared_new(w.engines[0], HUGE_PAGE_NBYTES, &block) == CL_OK && cl_shared_address(block) == address);
    CHECK(cl_shared_new(w.engines[0], HUGE_PAGE_NBYTES, &other) == CL_OK);
    CHECK((uint8_t *)cl_shared_address(other) == address + HUGE_PAGE_NBYTES);
    for (uint32_t k = 0; k < 2 * HUGE_PAGE_NBYTES; k += 509)
        CHECK(address[k] == 0);
    cl_shared_free(block);
    cl_shared_free(other);
    free_world(&w);
}

/* A reference to where nothing lies ends the link with an error instead of an operation that is never done. */
static void test_unsound_reference(void)
{
    enum { COUNT = 100000 };
    cl_settings settings = ordinary_settings();
    world w = shm_links(2, &settings);
    cl_shared *block;
    cl_operation *operations[2];
    int32_t *other = calloc(COUNT, sizeof(int32_t));
    CHECK(cl_shared_new(w.engines[0], COUNT * sizeof(int32_t), &block) == CL_OK);
    cl_request first = sum_request(&w, 0, 1, cl_shared_address(block), COUNT), second = sum_request(&w, 1, 1, other, COUNT);
    CHECK(cl_submit(w.engines[0], &first, &operations[0]) == CL_OK);
    CHECK(cl_submit(w.engines[1], &second, &operations[1]) == CL_OK);
    cl_ring_header *ring = (cl_ring_header *)(w.engines[0]->shm->memory + cl_shm_slot_offset(w.engines[0], 0));
    for (int round = 0; ring->references[0].offset == 0; round++) {
        CHECK(round < 10);
        cl_engine_progress(w.engines[1]);
        cl_engine_progress(w.engines[0]);
    }
    ring->references[0].offset = UINT64_MAX - 64;
    for (int round = 0; round < 10; round++) {
        cl_engine_progress(w.engines[1]);
        cl_engine_progress(w.engines[0]);
    }
    for (int r = 0; r < 2; r++) {
        CHECK(cl_operation_done(operations[r]) && w.engines[r]->health == CL_PEER_LOST);
        cl_operation_release(operations[r]);
    }
    cl_shared_free(block);
    free(other);
    free_world(&w);
}

/*
 * Who polls without having said that he is awake is not rung for what he awaits, though it waits for a stage, or for room in
 * the ring: a bell would call his thread to where he polls.
 */
static void test_no_bell_while_polling(uint64_t segment_count)
{
    enum { COUNT = 1 << 20 };
    cl_settings settings = ordinary_settings();
    world w = shm_links(2, &settings);
    cl_operation *operations[2];
    int32_t *data[2];
    for (int32_t r = 0; r < 2; r++) {
        data[r] = calloc(COUNT, sizeof(int32_t));
        cl_request request = sum_request(&w, r, 1, data[r], COUNT);
        request.plan = w.ring[r];
        request.segment_count = segment_count;
        atomic_store(&((cl_memory_header *)w.engines[r]->shm->memory)->sleeping, CL_IDLE);
        CHECK(cl_submit(w.engines[r], &request, &operations[r]) == CL_OK);
    }
    for (int round = 0; !cl_operation_done(operations[0]) || !cl_operation_done(operations[1]); round++) {
        CHECK(round < 100000);
        cl_engine_progress(w.engines[0]);
        cl_engine_progress(w.engines[1]);
    }
    for (int32_t r = 0; r < 2; r++) {
        struct pollfd bell = {.fd = w.engines[r]->shm->doorbell, .events = POLLIN};
        CHECK(atomic_load(&((cl_memory_header *)w.engines[r]->shm->memory)->sleeping) == CL_IDLE && poll(&bell, 1, 0) == 0);
        cl_operation_release(operations[r]);
        free(data[r]);
    }
    free_world(&w);
}

static uint64_t count_of(uint64_t seed, uint32_t number)
{
    uint64_t random = seed * 131 + number * 17 + 3;
    next_random(&random);
    return 1 + next_random(&random) % (number % 5 == 0 ? 150000 : 40000);
}

/* All ways to a result, of which some write it into the sender's memory: what it is scaled with, and by which plan. */
static void vary(const rank_arguments *a, uint32_t n, cl_request *request)
{
    cl_plan *plans[] = {a->w->ring[a->rank], a->w->direct[a->rank], a->w->exchange[a->rank], a->w->halving[a->rank]};
    if (plans[n % 4] != NULL)
        request->plan = plans[n % 4];
    request->segment_count = n % 3 == 0 ? 50000 : n % 3 == 1 ? 8192 : 0;
    request->priority = n % 5;
    request->postscale = 1 + n % 2;
}

/* Sums of arrays of which every rank has some in shared and some in private memory, all in flight at once. */
static void *sums(void *argument)
{
    rank_arguments *a = argument;
    cl_shared *blocks[OPERATIONS] = {NULL};
    int32_t *data[OPERATIONS];
    cl_operation *operations[OPERATIONS];
    for (uint32_t n = 0; n < OPERATIONS; n++) {
        uint64_t count = count_of(a->seed, n);
        if ((n + (uint32_t)a->rank) % 3 == 0) {
            data[n] = malloc(count * sizeof(int32_t));
        } else {
            CHECK(cl_shared_new(a->w->engines[a->rank], count * sizeof(int32_t), &blocks[n]) == CL_OK);
            data[n] = cl_shared_address(blocks[n]);
        }
        for (uint64_t k = 0; k < count; k++)
            data[n][k] = (int32_t)(n + k) + a->rank;
        cl_request request = sum_request(a->w, a->rank, a->seed * 1000 + n, data[n], count);
        vary(a, n, &request);
        CHECK(cl_submit(a->w->engines[a->rank], &request, &operations[n]) == CL_OK);
    }
    for (uint32_t n = 0; n < OPERATIONS; n++) {
        wait_for(operations[n], CL_OK);
        int32_t size = a->w->size;
        for (uint64_t k = 0; k < count_of(a->seed, n); k++)
            CHECK(data[n][k] == (int32_t)(1 + n % 2) * (size * (int32_t)(n + k) + size * (size - 1) / 2));
        cl_operation_release(operations[n]);
        if (blocks[n] == NULL)
            free(data[n]);
        cl_shared_free(blocks[n]);
    }
    return NULL;
}

/* Rank 0 leaves in the middle and writes over its array at once: the others fail, or were done before with the right sum. */
static void *leaving(void *argument)
{
    rank_arguments *a = argument;
    enum { COUNT = 500000 };
    cl_shared *block;
    cl_operation *operation;
    CHECK(cl_shared_new(a->w->engines[a->rank], COUNT * sizeof(int32_t), &block) == CL_OK);
    int32_t *data = cl_shared_address(block), size = a->w->size;
    for (int32_t k = 0; k < COUNT; k++)
        data[k] = k + a->rank;
    cl_request request = sum_request(a->w, a->rank, a->seed * 1000 + 900, data, COUNT);
    request.segment_count = 65536;
    CHECK(cl_submit(a->w->engines[a->rank], &request, &operation) == CL_OK);
    if (a->rank == 0) {
        (void)cl_operation_wait(operation, (int32_t)(a->seed % 3));
        CHECK(cl_engine_shutdown(a->w->engines[0], 1000) == CL_OK);
        memset(data, 0xff, COUNT * sizeof(int32_t));
        nanosleep(&(struct timespec){0, 3000000}, NULL); /* whoever still wrote into it would be seen */
        for (int32_t k = 0; k < COUNT; k++)
            CHECK(data[k] == -1);
    } else {
        int status;
        while ((status = cl_operation_wait(operation, 100)) == CL_AGAIN)
            ;
        CHECK(status == CL_OK || status == CL_PEER_LEFT);
        for (int32_t k = 0; status == CL_OK && k < COUNT; k++)
            CHECK(data[k] == size * k + size * (size - 1) / 2);
    }
    cl_operation_release(operation);
    cl_shared_free(block);
    return NULL;
}

int main(void)
{
    test_full_heap();
    test_unsound_reference();
    test_no_bell_while_polling(64 << 10);
    test_no_bell_while_polling(0);
    for (uint64_t seed = 1; seed <= 3; seed++) {
        test_blocks(seed);
        for (int32_t size = 2; size <= 4; size++)
            for (int tiny = 0; tiny < 2; tiny++) {
                cl_settings settings = tiny ? tiny_settings() : ordinary_settings();
                world w = shm_world(size, &settings);
                on_all_ranks(&w, seed, sums);
                on_all_ranks(&w, seed, leaving);
                free_world(&w);
            }
    }
    puts("all tests of shared memory passed");
    return 0;
}
