#define _GNU_SOURCE
/*
 * world.c: engines of several ranks over real links, and small plans of every kind for any number of ranks.
 *
 * It knows commlib.h only. The plans are the plainest that do their job: what is tested is the engine.
 */
#include "world.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

cl_settings ordinary_settings(void)
{
    return (cl_settings){.eager_nbytes = 4096, .eager_budget_nbytes = 1 << 16, .inflight_nbytes = 1 << 16, .spin_us = 5,
                         .heartbeat_ms = 200, .lost_ms = 5000, .shm_ring_nbytes = 1 << 16};
}

/* Everything runs dry at once: budgets hold one small message, a ring holds a page, one step is in flight. */
cl_settings tiny_settings(void)
{
    return (cl_settings){.eager_nbytes = 512, .eager_budget_nbytes = 600, .inflight_nbytes = 1, .spin_us = 0,
                         .heartbeat_ms = 200, .lost_ms = 5000, .shm_ring_nbytes = 4096};
}

uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13; /* xorshift64 */
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static cl_plan *pack(const cl_step *steps, size_t count, int32_t nchunks, int32_t inputs)
{
    cl_plan *plan;
    CHECK(cl_plan_new(steps, count, nchunks, inputs, &plan) == CL_OK);
    return plan;
}

static size_t ring_pass(cl_step *steps, int32_t size, int32_t rank, int32_t first_sent, int32_t kind)
{
    int32_t left = (rank + size - 1) % size, right = (rank + 1) % size;
    size_t count = 0;
    for (int32_t i = 0; i + 1 < size; i++) {
        int32_t out = (first_sent - i + 2 * size) % size, in = (out - 1 + size) % size;
        steps[count++] = (cl_step){CL_SEND, right, out, out + 1};
        steps[count++] = (cl_step){kind, left, in, in + 1};
    }
    return count;
}

static size_t halve(cl_step *steps, int32_t size, int32_t rank)
{
    size_t count = 0;
    int32_t first = 0, end = size, rounds = 0;
    for (int32_t half = size / 2; half > 0; half /= 2, rounds++) {
        int32_t middle = first + half;
        bool low = rank < middle;
        steps[count++] = (cl_step){CL_SEND, rank ^ half, low ? middle : first, low ? end : middle};
        steps[count++] = (cl_step){CL_RECV_REDUCE, rank ^ half, low ? first : middle, low ? middle : end};
        first = low ? first : middle;
        end = low ? middle : end;
    }
    while (rounds-- > 0) { /* the same again backwards: what was given away comes back */
        cl_step sent = steps[2 * rounds], got = steps[2 * rounds + 1];
        steps[count++] = (cl_step){CL_SEND, sent.peer, got.first_chunk, got.end_chunk};
        steps[count++] = (cl_step){CL_RECV, sent.peer, sent.first_chunk, sent.end_chunk};
    }
    return count;
}

static size_t send_to_all(cl_step *steps, int32_t size, int32_t rank, bool own)
{
    size_t count = 0;
    for (int32_t i = 1; i < size; i++) {
        int32_t to = (rank + i) % size, chunk = own ? rank : to;
        steps[count++] = (cl_step){CL_SEND, to, chunk, chunk + 1};
    }
    return count;
}

static size_t take_from_all(cl_step *steps, int32_t size, int32_t rank, int32_t kind)
{
    size_t count = 0;
    for (int32_t from = 0; from < size; from++) {
        int32_t chunk = kind == CL_RECV ? from : rank;
        if (from != rank)
            steps[count++] = (cl_step){kind, from, chunk, chunk + 1};
    }
    return count;
}

static void plan_direct(world *w, int32_t rank)
{
    cl_step steps[4 * MAX_RANKS] = {{0}};
    size_t count = send_to_all(steps, w->size, rank, false);
    count += take_from_all(steps + count, w->size, rank, CL_RECV_REDUCE);
    w->straight[rank] = pack(steps, count, w->size, 0);
    count += send_to_all(steps + count, w->size, rank, true);
    count += take_from_all(steps + count, w->size, rank, CL_RECV);
    w->direct[rank] = pack(steps, count, w->size, 0);
}

static void plan_rank(world *w, int32_t rank)
{
    int32_t size = w->size;
    cl_step steps[4 * MAX_RANKS] = {{0}};
    size_t count = ring_pass(steps, size, rank, rank, CL_RECV_REDUCE);
    count += ring_pass(steps + count, size, rank, rank + 1, CL_RECV);
    w->ring[rank] = pack(steps, count, size, 0);
    count = ring_pass(steps, size, rank, rank, CL_RECV);
    w->gather[rank] = pack(steps, count, size, 0);
    count = ring_pass(steps, size, rank, rank - 1 + size, CL_RECV_REDUCE);
    w->scatter[rank] = pack(steps, count, size, 0);
    count = 0;
    for (int32_t bit = 1; bit < size; bit *= 2) {
        steps[count++] = (cl_step){CL_SEND, rank ^ bit, 0, 1};
        steps[count++] = (cl_step){CL_RECV_REDUCE, rank ^ bit, 0, 1};
    }
    if ((size & (size - 1)) == 0) {
        w->exchange[rank] = pack(steps, count, 1, 0);
        count = halve(steps, size, rank);
        w->halving[rank] = pack(steps, count, size, 0);
    }
    plan_direct(w, rank);
    count = 0;
    for (int32_t i = 1; i < size; i++) {
        int32_t to = (rank + i) % size, from = (rank + size - i) % size;
        steps[count++] = (cl_step){CL_SEND, to, to, to + 1};
        steps[count++] = (cl_step){CL_RECV, from, size + from, size + from + 1};
    }
    w->shuffle[rank] = pack(steps, count, 2 * size, size);
    count = 0;
    for (int32_t to = 1; rank == 0 && to < size; to++)
        steps[count++] = (cl_step){CL_SEND, to, 0, 1};
    if (rank > 0)
        steps[count++] = (cl_step){CL_RECV, 0, 0, 1};
    w->from_zero[rank] = pack(steps, count, 1, 0);
}

void plan_world(world *w)
{
    for (int32_t r = 0; r < w->size; r++)
        plan_rank(w, r);
}

world shm_links(int32_t size, const cl_settings *settings)
{
    world w = {.size = size};
    int memfds[MAX_RANKS], doorbells[MAX_RANKS];
    for (int32_t r = 0; r < size; r++) {
        CHECK(cl_engine_new(r, size, settings, &w.engines[r]) == CL_OK);
        CHECK(cl_shm_create(w.engines[r], size - 1, &memfds[r], &doorbells[r]) == CL_OK);
    }
    for (int32_t r = 0; r < size; r++)
        for (int32_t peer = 0; peer < size; peer++) {
            /* A rank's slot in a peer's memory: its index among the peer's peers. */
            int32_t my_slot = r - (r > peer), peer_slot = peer - (peer > r);
            if (peer != r)
                CHECK(cl_shm_attach(w.engines[r], peer, dup(memfds[peer]), dup(doorbells[peer]), -1, my_slot, peer_slot) == CL_OK);
        }
    plan_world(&w);
    return w;
}

static world started(world w)
{
    for (int32_t r = 0; r < w.size; r++)
        CHECK(cl_engine_start(w.engines[r]) == CL_OK);
    return w;
}

world shm_world(int32_t size, const cl_settings *settings)
{
    return started(shm_links(size, settings));
}

void tcp_pair(int pair[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connect(pair[0], (struct sockaddr *)&address, sizeof address) == 0);
    pair[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    CHECK(pair[1] >= 0);
    close(listener);
}

world tcp_links(int32_t size, const cl_settings *settings)
{
    world w = {.size = size};
    for (int32_t r = 0; r < size; r++)
        CHECK(cl_engine_new(r, size, settings, &w.engines[r]) == CL_OK);
    for (int32_t a = 0; a < size; a++)
        for (int32_t b = a + 1; b < size; b++) {
            int pair[2];
            tcp_pair(pair);
            CHECK(cl_tcp_attach(w.engines[a], b, pair[0]) == CL_OK);
            CHECK(cl_tcp_attach(w.engines[b], a, pair[1]) == CL_OK);
        }
    plan_world(&w);
    return w;
}

world tcp_world(int32_t size, const cl_settings *settings)
{
    return started(tcp_links(size, settings));
}

void free_plans(world *w)
{
    for (int32_t r = 0; r < w->size; r++) {
        cl_plan_free(w->ring[r]);
        cl_plan_free(w->exchange[r]);
        cl_plan_free(w->halving[r]);
        cl_plan_free(w->direct[r]);
        cl_plan_free(w->straight[r]);
        cl_plan_free(w->gather[r]);
        cl_plan_free(w->scatter[r]);
        cl_plan_free(w->shuffle[r]);
        cl_plan_free(w->from_zero[r]);
    }
}

void free_world(world *w)
{
    free_plans(w);
    for (int32_t r = 0; r < w->size; r++)
        cl_engine_free(w->engines[r]);
}

cl_request sum_request(const world *w, int32_t rank, uint64_t key, int32_t *data, uint64_t count)
{
    return (cl_request){.key = key, .text = "allreduce 'x' int32 sum", .kind = CL_ALLREDUCE, .dtype = CL_INT32, .root = -1,
                        .prescale = 1, .postscale = 1, .plan = w->ring[rank], .input = data, .output = data, .count = count};
}

void wait_for(cl_operation *operation, int expected_status)
{
    int status;
    do
        status = cl_operation_wait(operation, 100);
    while (status == CL_AGAIN);
    if (status != expected_status) {
        const char *text;
        int32_t peer;
        cl_operation_status(operation, &text, &peer);
        fprintf(stderr, "status %d instead of %d: %s\n", status, expected_status, text);
    }
    CHECK(status == expected_status);
}

void on_all_ranks(world *w, uint64_t seed, void *(*body)(void *))
{
    pthread_t threads[MAX_RANKS];
    rank_arguments arguments[MAX_RANKS];
    for (int32_t r = 0; r < w->size; r++) {
        arguments[r] = (rank_arguments){w, r, seed};
        CHECK(pthread_create(&threads[r], NULL, body, &arguments[r]) == 0);
    }
    for (int32_t r = 0; r < w->size; r++)
        pthread_join(threads[r], NULL);
}
