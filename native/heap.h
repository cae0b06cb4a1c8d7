/* heap.h: the sends that may go to one peer, the most urgent on top: lowest (priority, sequence, segment, step). */
#ifndef CL_HEAP_H
#define CL_HEAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cl_operation;

typedef struct {
    int64_t priority;
    uint64_t sequence;
    uint32_t segment, step;
    struct cl_operation *operation;
} cl_ready;

typedef struct {
    cl_ready *entries;
    size_t count, capacity;
} cl_heap;

/* True if a goes before b. */
bool cl_ready_before(const cl_ready *a, const cl_ready *b);
/* Returns CL_OK or CL_NO_MEMORY. */
int cl_heap_push(cl_heap *heap, cl_ready entry);
/* The heap must not be empty. */
cl_ready cl_heap_pop(cl_heap *heap);
/* Removes every entry of an operation. */
void cl_heap_remove(cl_heap *heap, const struct cl_operation *operation);
void cl_heap_free(cl_heap *heap);

#endif
