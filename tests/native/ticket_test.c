/*
 * ticket_test.c: tickets over real links and threads, and over the simulated network where "before" has a meaning.
 *
 * The bytes that a ticket stands for are nobody's here: whoever takes one writes it down and returns it.
 */
#include <pthread.h>
#include <string.h>

#include "world.h"

enum { OPERATIONS = 40, MAX_TICKETS = 400, SEGMENT_COUNT = 100 };

typedef struct {
    world *w;
    int32_t rank;
    uint64_t seed;
    uint32_t ntickets;
    uint64_t tickets[MAX_TICKETS]; /* key << 8 | segment, as they came */
} ticket_taker;

static cl_request ticket_request(const world *w, int32_t rank, uint64_t key, uint64_t count)
{
    static const int32_t members[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    return (cl_request){.key = key, .text = "allreduce 'x' int32 sum", .kind = CL_TICKET, .dtype = CL_INT32, .root = -1,
                        .prescale = 1, .postscale = 1, .count = count, .segment_count = SEGMENT_COUNT,
                        .members = members, .nmembers = w->size, .my_part = rank};
}

static uint32_t segments_of(uint64_t count)
{
    return count <= SEGMENT_COUNT ? 1 : (uint32_t)((count + SEGMENT_COUNT - 1) / SEGMENT_COUNT);
}

static uint64_t count_of(uint64_t number)
{
    return number % 5 == 0 ? 0 : number * 37 % 700;
}

/* Takes a ticket down, checks what it says of itself, and returns it. */
static void note(ticket_taker *taker, const cl_ticket *ticket)
{
    CHECK(ticket->nsplits == (uint64_t)taker->w->size);
    for (int32_t r = 0; r < taker->w->size; r++)
        CHECK(ticket->splits[r] == ticket->key + (uint64_t)r);
    uint64_t count = count_of(ticket->key), first = (uint64_t)ticket->segment * SEGMENT_COUNT;
    bool last = ticket->segment + 1 == segments_of(count);
    CHECK(ticket->first == first && ticket->count == (last ? count - first : SEGMENT_COUNT));
    CHECK(taker->ntickets < MAX_TICKETS);
    taker->tickets[taker->ntickets++] = ticket->key << 8 | ticket->segment;
    cl_ticket_return(ticket);
}

static void *take(void *argument)
{
    ticket_taker *taker = argument;
    cl_ticket ticket;
    int status;
    while ((status = cl_ticket_next(taker->w->engines[taker->rank], 20, &ticket)) == CL_OK || status == CL_AGAIN)
        if (status == CL_OK)
            note(taker, &ticket);
    CHECK(status == CL_SHUTDOWN || status == CL_PEER_LOST);
    return NULL;
}

static void *submit_in_own_order(void *argument)
{
    ticket_taker *taker = argument;
    uint64_t random = taker->seed * 31 + (uint64_t)taker->rank + 1;
    uint32_t order[OPERATIONS];
    cl_operation *operations[OPERATIONS];
    for (uint32_t i = 0; i < OPERATIONS; i++)
        order[i] = i;
    for (uint32_t i = OPERATIONS; i > 1; i--) {
        uint32_t j = (uint32_t)(next_random(&random) % i), kept = order[i - 1];
        order[i - 1] = order[j];
        order[j] = kept;
    }
    for (uint32_t i = 0; i < OPERATIONS; i++) {
        uint64_t key = order[i] + 1, split = key + (uint64_t)taker->rank;
        cl_request request = ticket_request(taker->w, taker->rank, key, count_of(key));
        request.priority = (int64_t)(key % 7);
        request.splits = &split, request.nsplits = 1;
        CHECK(cl_submit(taker->w->engines[taker->rank], &request, &operations[order[i]]) == CL_OK);
    }
    for (uint32_t i = 0; i < OPERATIONS; i++) {
        wait_for(operations[i], CL_OK);
        cl_operation_release(operations[i]);
    }
    return NULL;
}

/* Ranks that submit in opposite orders all get the same tickets in the same order, each once, and finish. */
static void test_one_order(world *w, uint64_t seed)
{
    pthread_t submitters[MAX_RANKS], takers[MAX_RANKS];
    ticket_taker *arguments = calloc(MAX_RANKS, sizeof *arguments);
    CHECK(arguments != NULL);
    for (int32_t r = 0; r < w->size; r++) {
        arguments[r] = (ticket_taker){.w = w, .rank = r, .seed = seed};
        CHECK(pthread_create(&takers[r], NULL, take, &arguments[r]) == 0);
        CHECK(pthread_create(&submitters[r], NULL, submit_in_own_order, &arguments[r]) == 0);
    }
    for (int32_t r = 0; r < w->size; r++)
        pthread_join(submitters[r], NULL);
    for (int32_t r = 0; r < w->size; r++)
        CHECK(cl_engine_shutdown(w->engines[r], 1000) == CL_OK);
    uint32_t expected = 0;
    for (uint64_t key = 1; key <= OPERATIONS; key++)
        expected += segments_of(count_of(key));
    for (int32_t r = 0; r < w->size; r++) {
        pthread_join(takers[r], NULL);
        CHECK(arguments[r].ntickets == expected);
        CHECK(memcmp(arguments[r].tickets, arguments[0].tickets, sizeof arguments[0].tickets) == 0);
    }
    free(arguments);
}

/* No ticket for what ranks disagree on; the next operation gets its own. Then one rank can move no bytes any more. */
static void test_failures(world *w, uint64_t seed)
{
    cl_operation *operations[MAX_RANKS];
    const char *text;
    int32_t peer;
    cl_ticket ticket;
    (void)seed;
    for (int32_t r = 0; r < w->size; r++) {
        cl_request request = ticket_request(w, r, 1, r == w->size - 1 ? 5 : 4);
        request.text = r == w->size - 1 ? "the long one" : "the short one";
        CHECK(cl_submit(w->engines[r], &request, &operations[r]) == CL_OK);
    }
    for (int32_t r = 0; r < w->size; r++) {
        wait_for(operations[r], CL_MISMATCH);
        cl_operation_status(operations[r], &text, &peer);
        CHECK(strstr(text, "the long one") != NULL && strstr(text, "the short one") != NULL);
        cl_operation_release(operations[r]);
        CHECK(cl_ticket_next(w->engines[r], 0, &ticket) == CL_AGAIN);
    }
    for (int32_t r = 0; r < w->size; r++) {
        cl_request request = ticket_request(w, r, 2, 4);
        CHECK(cl_submit(w->engines[r], &request, &operations[r]) == CL_OK);
    }
    for (int32_t r = 0; r < w->size; r++)
        CHECK(cl_ticket_next(w->engines[r], 10000, &ticket) == CL_OK && (cl_ticket_return(&ticket), ticket.key == 2));
    for (int32_t r = 0; r < w->size; r++) {
        wait_for(operations[r], CL_OK);
        cl_operation_release(operations[r]);
    }
    for (int32_t r = 0; r < w->size; r++) {
        cl_request request = ticket_request(w, r, 3, 1000);
        CHECK(cl_submit(w->engines[r], &request, &operations[r]) == CL_OK);
    }
    CHECK(cl_ticket_next(w->engines[0], 10000, &ticket) == CL_OK); /* the others' stay with the engine: freed with it */
    cl_engine_fail(w->engines[1], "its wires were cut");
    for (int32_t r = 0; r < w->size; r++) {
        wait_for(operations[r], CL_PEER_LOST);
        cl_operation_status(operations[r], &text, &peer);
        CHECK(peer == 1 && strstr(text, "rank 1 was lost: its wires were cut") != NULL);
        cl_operation_release(operations[r]);
    }
    cl_ticket_return(&ticket);
    while (cl_ticket_next(w->engines[0], 10000, &ticket) == CL_OK)
        cl_ticket_return(&ticket);
    CHECK(cl_ticket_next(w->engines[0], 0, &ticket) == CL_PEER_LOST);
}

/* ---- simulated ----------------------------------------------------------------------------------------------- */

static cl_sim *simulation(world *w, int32_t size)
{
    int32_t hosts[MAX_RANKS];
    cl_sim_link link = {.alpha_s = 20e-6, .beta_s_per_byte = 8e-10};
    cl_settings settings = ordinary_settings();
    cl_sim *sim;
    for (int32_t r = 0; r < size; r++)
        hosts[r] = r;
    CHECK(cl_sim_new(size, hosts, &link, &link, &settings, &sim) == CL_OK);
    w->size = size;
    for (int32_t r = 0; r < size; r++)
        w->engines[r] = cl_sim_engine(sim, r);
    return sim;
}

static void submit_everywhere(const world *w, uint64_t key, uint64_t count, int64_t priority)
{
    for (int32_t r = 0; r < w->size; r++) {
        cl_operation *operation;
        cl_request request = ticket_request(w, r, key, count);
        request.priority = priority;
        CHECK(cl_submit(w->engines[r], &request, &operation) == CL_OK);
        cl_operation_release(operation);
    }
}

static void run_until_idle(cl_sim *sim)
{
    int32_t rank;
    uint64_t token;
    while (cl_sim_next(sim, &rank, &token) != CL_SIM_IDLE)
        ;
}

/* An urgent operation that comes behind a long one waits for the tickets that are out, and for no more. */
static void test_urgent_overtakes(void)
{
    world w = {0};
    cl_sim *sim = simulation(&w, 11); /* the tree has two levels */
    cl_ticket ticket;
    submit_everywhere(&w, 1, 10 * SEGMENT_COUNT, 5);
    run_until_idle(sim);
    submit_everywhere(&w, 2, 10, 0);
    run_until_idle(sim);
    static const uint64_t expected[] = {1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1};
    uint32_t segment = 0;
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++) {
        for (int32_t r = 0; r < w.size; r++) {
            CHECK(cl_ticket_next(w.engines[r], 0, &ticket) == CL_OK);
            CHECK(ticket.key == expected[i] && ticket.segment == (expected[i] == 1 ? segment : 0));
            cl_ticket_return(&ticket);
        }
        segment += expected[i] == 1;
        run_until_idle(sim);
    }
    CHECK(cl_ticket_next(w.engines[0], 0, &ticket) == CL_AGAIN);
    cl_sim_free(sim);
}

/* Two are out at a time, however many are ready; a slow member holds up the first of members only through its bytes. */
static void test_few_at_a_time(void)
{
    world w = {0};
    cl_sim *sim = simulation(&w, 3);
    cl_ticket ticket;
    for (uint64_t key = 1; key <= 5; key++)
        submit_everywhere(&w, key, 10, (int64_t)(10 - key));
    run_until_idle(sim);
    uint32_t out[3] = {0};
    for (int32_t r = 0; r < w.size; r++)
        while (cl_ticket_next(w.engines[r], 0, &ticket) == CL_OK) {
            out[r]++;
            cl_ticket_return(&ticket);
        }
    CHECK(out[0] == 2 && out[1] == 2 && out[2] == 2);
    cl_sim_free(sim); /* with operations in flight */
}

int main(int argc, char **argv)
{
    uint64_t seeds = argc > 1 ? strtoull(argv[1], NULL, 10) : 2;
    static const make_world worlds[] = {shm_world, tcp_world};
    static void (*const tests[])(world *, uint64_t) = {test_one_order, test_failures};
    test_urgent_overtakes();
    test_few_at_a_time();
    for (size_t m = 0; m < sizeof worlds / sizeof worlds[0]; m++)
        for (uint64_t seed = 1; seed <= seeds; seed++)
            for (int32_t size = 2; size <= 4; size++)
                for (size_t t = 0; t < sizeof tests / sizeof tests[0]; t++) {
                    fprintf(stderr, "%s, %d ranks, seed %d, test %d\n", m == 0 ? "shm" : "tcp", size, (int)seed, (int)t);
                    cl_settings settings = seed % 2 == 0 ? tiny_settings() : ordinary_settings();
                    world w = worlds[m](size, &settings);
                    tests[t](&w, seed);
                    free_world(&w);
                }
    puts("all ticket tests passed");
    return 0;
}
