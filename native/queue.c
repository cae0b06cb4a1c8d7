/*
 * queue.c: finished operations for one thread that is told of them, instead of waiting for each.
 *
 * Whoever finishes an operation owns the engine, so it does no more here than to put it on a list and to wake a thread that
 * sleeps: what follows from the end of an operation (a framework's callback, which may submit the next one) is that thread's
 * work. An operation is told exactly once, whether it was done before or after somebody asked to be told.
 */
#include <stdlib.h>

#include "engine.h"
#include "lock.h"

struct cl_queue {
    _Atomic(cl_operation *) landed; /* newest first */
    cl_operation *taken;            /* the taking thread's own: oldest first */
    atomic_int asleep;              /* futex: 1 while that thread sleeps */
};

int cl_queue_new(cl_queue **queue)
{
    *queue = calloc(1, sizeof(cl_queue));
    return *queue == NULL ? CL_NO_MEMORY : CL_OK;
}

void cl_queue_free(cl_queue *queue)
{
    for (cl_operation *operation; cl_queue_next(queue, 0, &operation, &(void *){NULL}) == CL_OK;)
        cl_operation_release(operation);
    free(queue);
}

/* ---- putting on ---------------------------------------------------------------------------------------------- */

static void put(cl_queue *queue, cl_operation *operation)
{
    cl_operation *head = atomic_load_explicit(&queue->landed, memory_order_relaxed);
    do
        operation->queue_next = head;
    while (!atomic_compare_exchange_weak(&queue->landed, &head, operation));
    if (atomic_load(&queue->asleep) && atomic_exchange(&queue->asleep, 0))
        cl_futex_wake_all(&queue->asleep);
}

/* Who sees both the end and the queue puts it there; the exchange makes that one of two who see them at once. */
void cl_queue_landed(cl_operation *operation)
{
    if (atomic_load(&operation->queue) == NULL)
        return;
    cl_queue *queue = atomic_exchange(&operation->queue, NULL);
    if (queue != NULL)
        put(queue, operation);
}

void cl_operation_tell(cl_operation *operation, cl_queue *queue, void *token)
{
    cl_operation_hold(operation); /* the caller's, or the taker's: it may be released before this returns */
    cl_operation_hold(operation);
    operation->token = token;
    atomic_store(&operation->queue, queue);
    if (atomic_load(&operation->done))
        cl_queue_landed(operation);
    cl_operation_release(operation);
}

/* ---- taking off ---------------------------------------------------------------------------------------------- */

static cl_operation *oldest(cl_queue *queue)
{
    if (queue->taken == NULL) {
        cl_operation *newest = atomic_exchange_explicit(&queue->landed, NULL, memory_order_acquire);
        while (newest != NULL) {
            cl_operation *next = newest->queue_next;
            newest->queue_next = queue->taken;
            queue->taken = newest;
            newest = next;
        }
    }
    cl_operation *first = queue->taken;
    if (first != NULL)
        queue->taken = first->queue_next;
    return first;
}

int cl_queue_next(cl_queue *queue, int32_t timeout_ms, cl_operation **operation, void **token)
{
    *operation = oldest(queue);
    if (*operation == NULL && timeout_ms > 0) {
        atomic_store(&queue->asleep, 1);
        if (atomic_load(&queue->landed) == NULL)
            cl_futex_wait(&queue->asleep, 1, 1e-3 * timeout_ms);
        atomic_store(&queue->asleep, 0);
        *operation = oldest(queue);
    }
    if (*operation == NULL)
        return CL_AGAIN;
    *token = (*operation)->token;
    return CL_OK;
}

/* ---- for libraries of other languages and frameworks ------------------------------------------------------------- */

const cl_functions *cl_engine_functions(void)
{
    static const cl_functions functions = {
        .version = CL_FUNCTIONS_VERSION, .nbytes = sizeof(cl_functions) + sizeof(cl_request),
        .submit_at = cl_submit_at, .tell = cl_operation_tell, .status = cl_operation_status, .release = cl_operation_release,
        .status_text = cl_status_text, .queue_new = cl_queue_new, .queue_next = cl_queue_next,
    };
    return &functions;
}
