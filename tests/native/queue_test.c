/*
 * queue_test.c: finished operations told to a thread of the user's: each exactly once, with its own token, in both races
 * (asked for before the end and after it), also by operations that fail.
 */
#include <pthread.h>
#include <string.h>

#include "world.h"

enum { OPERATIONS = 400, COUNT = 1000 };

typedef struct {
    cl_queue *queue;
    uint32_t told[OPERATIONS]; /* how often each was */
    uint32_t failed, expected;
} queue_taker;

typedef struct {
    uint32_t number;
    cl_operation *operation;
    int32_t data[COUNT];
} job;

static cl_queue *queues[MAX_RANKS]; /* freed after their engines have ended */

/* Takes until all have come; what is submitted meanwhile, its owner has not let go of yet. */
static void *take(void *argument)
{
    queue_taker *taker = argument;
    for (uint32_t came = 0; came < taker->expected;) {
        cl_operation *operation;
        void *token;
        if (cl_queue_next(taker->queue, 20, &operation, &token) != CL_OK)
            continue;
        const char *text;
        int32_t peer;
        job *done = token;
        CHECK(done->operation == operation);
        CHECK(cl_operation_status(operation, &text, &peer) != CL_AGAIN);
        taker->failed += cl_operation_status(operation, &text, &peer) != CL_OK;
        CHECK(done->number < OPERATIONS && taker->told[done->number]++ == 0);
        cl_operation_release(operation);
        cl_operation_release(done->operation);
        came++;
    }
    return NULL;
}

static cl_request request_of(const world *w, int32_t rank, job *mine)
{
    for (uint32_t i = 0; i < COUNT; i++)
        mine->data[i] = rank + (int32_t)i;
    return sum_request(w, rank, 1000 + mine->number, mine->data, mine->number % 3 == 0 ? 1 : COUNT);
}

static void *submit_all(void *argument)
{
    const rank_arguments *me = argument;
    queue_taker *taker = calloc(1, sizeof *taker);
    job *jobs = calloc(OPERATIONS, sizeof *jobs);
    CHECK(taker != NULL && jobs != NULL && cl_queue_new(&taker->queue) == CL_OK);
    taker->expected = OPERATIONS;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, take, taker) == 0);
    for (uint32_t i = 0; i < OPERATIONS; i++) {
        jobs[i].number = i;
        cl_request request = request_of(me->w, me->rank, &jobs[i]);
        CHECK(cl_submit(me->w->engines[me->rank], &request, &jobs[i].operation) == CL_OK);
        if (i % 4 == 1)
            wait_for(jobs[i].operation, CL_OK); /* so that it is done before anybody asks */
        cl_operation_tell(jobs[i].operation, taker->queue, &jobs[i]);
    }
    pthread_join(thread, NULL);
    CHECK(taker->failed == 0);
    for (uint32_t i = 0; i < OPERATIONS; i++)
        CHECK(taker->told[i] == 1 && jobs[i].data[0] == me->w->size * (me->w->size - 1) / 2);
    queues[me->rank] = taker->queue;
    free(jobs);
    free(taker);
    return NULL;
}

/* Nobody else submits: the operations end with the engine. */
static void test_shutdown(world *w)
{
    queue_taker taker = {.expected = 3};
    job *jobs = calloc(taker.expected, sizeof *jobs);
    CHECK(jobs != NULL && cl_queue_new(&taker.queue) == CL_OK);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, take, &taker) == 0);
    for (uint32_t i = 0; i < taker.expected; i++) {
        jobs[i].number = i;
        cl_request request = request_of(w, 0, &jobs[i]);
        CHECK(cl_submit(w->engines[0], &request, &jobs[i].operation) == CL_OK);
        cl_operation_tell(jobs[i].operation, taker.queue, &jobs[i]);
    }
    CHECK(cl_engine_shutdown(w->engines[0], 100) == CL_OK);
    pthread_join(thread, NULL);
    CHECK(taker.failed == taker.expected);
    cl_queue_free(taker.queue);
    free(jobs);
}

/* What nobody took goes with the queue. */
static void test_not_taken(world *w)
{
    cl_queue *queue;
    CHECK(cl_queue_new(&queue) == CL_OK);
    int32_t data = 1;
    cl_request request = sum_request(w, 0, 7, &data, 1);
    cl_operation *operation;
    CHECK(cl_submit(w->engines[0], &request, &operation) == CL_OK);
    cl_operation_tell(operation, queue, NULL);
    cl_operation_release(operation);
    cl_queue_free(queue);
}

int main(void)
{
    const cl_settings settings = ordinary_settings();
    const make_world worlds[] = {shm_world, tcp_world};
    for (uint32_t i = 0; i < sizeof worlds / sizeof *worlds; i++)
        for (int32_t size = 2; size <= 3; size++) {
            world w = worlds[i](size, &settings);
            on_all_ranks(&w, 1, submit_all);
            test_shutdown(&w);
            test_not_taken(&w);
            free_world(&w);
            for (int32_t r = 0; r < size; r++)
                cl_queue_free(queues[r]);
        }
    const cl_functions *functions = cl_engine_functions();
    CHECK(functions->version == CL_FUNCTIONS_VERSION && functions->nbytes == sizeof *functions + sizeof(cl_request));
    printf("passed\n");
    return 0;
}
