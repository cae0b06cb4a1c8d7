/* heap.c: a binary heap in an array; a failed operation's entries are removed in one pass, and the rest heaped anew. */
#include "heap.h"

#include <stdlib.h>

#include "transport.h"

bool cl_ready_before(const cl_ready *a, const cl_ready *b)
{
    if (a->priority != b->priority)
        return a->priority < b->priority;
    if (a->sequence != b->sequence)
        return a->sequence < b->sequence;
    if (a->segment != b->segment)
        return a->segment < b->segment;
    return a->step < b->step;
}

static void sift_up(cl_heap *heap, size_t child)
{
    cl_ready entry = heap->entries[child];
    while (child > 0 && cl_ready_before(&entry, &heap->entries[(child - 1) / 2])) {
        heap->entries[child] = heap->entries[(child - 1) / 2];
        child = (child - 1) / 2;
    }
    heap->entries[child] = entry;
}

static void sift_down(cl_heap *heap, size_t parent)
{
    cl_ready entry = heap->entries[parent];
    for (;;) {
        size_t child = 2 * parent + 1;
        if (child + 1 < heap->count && cl_ready_before(&heap->entries[child + 1], &heap->entries[child]))
            child++;
        if (child >= heap->count || !cl_ready_before(&heap->entries[child], &entry))
            break;
        heap->entries[parent] = heap->entries[child];
        parent = child;
    }
    heap->entries[parent] = entry;
}

int cl_heap_push(cl_heap *heap, cl_ready entry)
{
    if (heap->count == heap->capacity) {
        size_t capacity = heap->capacity == 0 ? 16 : 2 * heap->capacity;
        cl_ready *entries = realloc(heap->entries, capacity * sizeof(cl_ready));
        if (entries == NULL)
            return CL_NO_MEMORY;
        heap->entries = entries;
        heap->capacity = capacity;
    }
    heap->entries[heap->count] = entry;
    sift_up(heap, heap->count++);
    return CL_OK;
}

cl_ready cl_heap_pop(cl_heap *heap)
{
    cl_ready top = heap->entries[0];
    heap->entries[0] = heap->entries[--heap->count];
    if (heap->count > 0)
        sift_down(heap, 0);
    return top;
}

void cl_heap_remove(cl_heap *heap, const struct cl_operation *operation)
{
    size_t kept = 0;
    for (size_t i = 0; i < heap->count; i++)
        if (heap->entries[i].operation != operation)
            heap->entries[kept++] = heap->entries[i];
    heap->count = kept;
    for (size_t i = kept / 2; i-- > 0;)
        sift_down(heap, i);
}

void cl_heap_free(cl_heap *heap)
{
    free(heap->entries);
    *heap = (cl_heap){0};
}
