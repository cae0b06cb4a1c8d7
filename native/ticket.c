/*
 * ticket.c: one order, shared by all members, for operations whose bytes somebody else moves.
 *
 * Such an operation is an exchange first (control.c). When it is finished at members[0], everybody has posted the
 * operation and agrees on it, so its segments may begin anywhere: members[0] hands them out, the most urgent first,
 * down the exchange's tree. All tickets take the same links in the same order, so every member sees the same order.
 * Tickets wait in a list of their own for the one thread that takes them; what it returns comes back through the gates.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "lock.h"

/* One is being worked on while the next one's word travels; an urgent operation waits for no more than these. */
enum { OUTSTANDING = 2 };

static bool is_root(const cl_operation *operation)
{
    return operation->exchange != NULL && operation->exchange->my_index == 0;
}

/* ---- handing out --------------------------------------------------------------------------------------------- */

/* To the thread that takes tickets; newest first, it turns them round. */
static void enqueue(cl_operation *operation, uint32_t segment)
{
    cl_engine *engine = operation->engine;
    cl_granted *granted = calloc(1, sizeof(cl_granted));
    if (granted == NULL) {
        cl_engine_lost(engine, engine->rank, "out of memory for a ticket", true);
        return;
    }
    cl_operation_hold(operation);
    granted->operation = operation;
    granted->segment = segment;
    granted->next = atomic_load_explicit(&engine->tickets.granted, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&engine->tickets.granted, &granted->next, granted))
        ;
    cl_futex_wake(&engine->tickets.events);
}

static void issue(cl_operation *operation, uint32_t segment)
{
    cl_frame frame = {.key = operation->request.key, .type = CL_FRAME_TICKET, .segment = segment, .meta = operation->meta};
    if (operation->started_s < 0)
        operation->started_s = cl_engine_now(operation->engine);
    cl_operation_hold(operation); /* without memory to tell, the engine is lost and lets go of it */
    cl_exchange_tell_children(operation, &frame, NULL);
    enqueue(operation, segment);
    cl_operation_release(operation);
}

static void hand_out(cl_engine *engine)
{
    cl_tickets *tickets = &engine->tickets;
    while (tickets->outstanding < OUTSTANDING && tickets->waiting.count > 0 && engine->health == CL_OK && !engine->leaving) {
        cl_operation *operation = tickets->waiting.entries[0].operation;
        uint32_t segment = operation->handed_out++;
        if (operation->handed_out == operation->nsegments)
            cl_heap_pop(&tickets->waiting);
        tickets->outstanding++;
        issue(operation, segment);
    }
}

int cl_tickets_start(cl_operation *operation)
{
    operation->started = true;
    if (!is_root(operation))
        return CL_OK;
    cl_ready entry = {operation->request.priority, operation->sequence, 0, 0, operation};
    CL_TRY(cl_heap_push(&operation->engine->tickets.waiting, entry));
    hand_out(operation->engine);
    return CL_OK;
}

void cl_tickets_on_ticket(cl_operation *operation, uint32_t segment)
{
    if (operation->request.kind == CL_TICKET && segment < operation->nsegments)
        issue(operation, segment);
}

/* ---- taking back --------------------------------------------------------------------------------------------- */

void cl_tickets_collect(cl_operation *operation)
{
    uint32_t before = operation->segments_done;
    for (uint32_t s = 0; s < operation->nsegments; s++)
        if (!operation->segments[s].active && atomic_load_explicit(&operation->gates[s], memory_order_acquire)) {
            operation->segments[s].active = true;
            operation->segments_done++;
        }
    cl_engine *engine = operation->engine;
    if (is_root(operation))
        engine->tickets.outstanding -= operation->segments_done - before;
    if (operation->segments_done == operation->nsegments)
        cl_operation_complete(operation, CL_OK);
    hand_out(engine);
}

void cl_tickets_forget(cl_operation *operation)
{
    cl_engine *engine = operation->engine;
    if (!is_root(operation) || !operation->started)
        return;
    cl_heap_remove(&engine->tickets.waiting, operation);
    engine->tickets.outstanding -= operation->handed_out - operation->segments_done;
    hand_out(engine);
}

void cl_tickets_close(cl_engine *engine, int status)
{
    int open = CL_OK; /* the first end is the one that is told */
    (void)atomic_compare_exchange_strong(&engine->tickets.closed, &open, status);
    cl_futex_wake(&engine->tickets.events);
}

void cl_tickets_free(cl_engine *engine)
{
    for (cl_ticket ticket; cl_ticket_next(engine, 0, &ticket) == CL_OK;)
        cl_operation_release(ticket.operation);
    cl_heap_free(&engine->tickets.waiting);
}

/* ---- the thread that takes tickets --------------------------------------------------------------------------- */

static cl_granted *oldest(cl_tickets *tickets)
{
    if (tickets->taken == NULL) {
        cl_granted *newest = atomic_exchange_explicit(&tickets->granted, NULL, memory_order_acquire);
        while (newest != NULL) {
            cl_granted *next = newest->next;
            newest->next = tickets->taken;
            tickets->taken = newest;
            newest = next;
        }
    }
    cl_granted *first = tickets->taken;
    if (first != NULL)
        tickets->taken = first->next;
    return first;
}

static void describe(const cl_operation *operation, uint32_t segment, cl_ticket *ticket)
{
    const cl_request *r = &operation->request;
    uint64_t size = operation->nsegments == 1 ? r->count : r->segment_count;
    bool last = segment + 1 == operation->nsegments;
    *ticket = (cl_ticket){.key = r->key, .segment = segment, .first = segment * size};
    ticket->count = last ? r->count - ticket->first : size;
    ticket->splits = (const uint64_t *)(const void *)operation->memory;
    ticket->nsplits = operation->result_count / sizeof(uint64_t);
}

int cl_ticket_next(cl_engine *engine, int32_t timeout_ms, cl_ticket *ticket)
{
    cl_tickets *tickets = &engine->tickets;
    double deadline_s = cl_engine_now(engine) + 1e-3 * timeout_ms;
    for (;;) {
        int seen = atomic_load(&tickets->events);
        cl_granted *granted = oldest(tickets);
        if (granted != NULL) {
            describe(granted->operation, granted->segment, ticket);
            ticket->operation = granted->operation;
            free(granted);
            return CL_OK;
        }
        int closed = atomic_load(&tickets->closed);
        if (closed != CL_OK)
            return closed;
        double left_s = deadline_s - cl_engine_now(engine);
        if (left_s <= 0)
            return CL_AGAIN;
        cl_futex_wait(&tickets->events, seen, left_s);
    }
}

void cl_ticket_return(const cl_ticket *ticket)
{
    cl_operation_open(ticket->operation, ticket->segment, ticket->segment + 1);
    cl_operation_release(ticket->operation);
}
