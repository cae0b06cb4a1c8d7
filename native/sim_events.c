/* sim_events.c: what will happen in a simulation, as a heap. It knows times and order, and not what events mean. */
#include <stdlib.h>

#include "sim_events.h"

static bool earlier(const cl_event *a, const cl_event *b)
{
    return a->at_s < b->at_s || (a->at_s == b->at_s && a->order < b->order);
}

static int make_room(cl_events *events)
{
    if (events->count < events->capacity)
        return CL_OK;
    size_t capacity = events->capacity == 0 ? 1024 : 2 * events->capacity;
    cl_event *entries = realloc(events->entries, capacity * sizeof(cl_event));
    if (entries == NULL)
        return CL_NO_MEMORY;
    events->entries = entries;
    events->capacity = capacity;
    return CL_OK;
}

int cl_events_add(cl_events *events, cl_event added)
{
    if (make_room(events) != CL_OK) {
        free(added.parcel);
        return CL_NO_MEMORY;
    }
    cl_event *entries = events->entries;
    added.order = events->order++;
    size_t child = events->count++;
    for (; child > 0 && earlier(&added, &entries[(child - 1) / 2]); child = (child - 1) / 2)
        entries[child] = entries[(child - 1) / 2];
    entries[child] = added;
    return CL_OK;
}

cl_event cl_events_take(cl_events *events)
{
    cl_event *entries = events->entries, first = entries[0], last = entries[--events->count];
    size_t parent = 0;
    for (;;) {
        size_t child = 2 * parent + 1;
        if (child + 1 < events->count && earlier(&entries[child + 1], &entries[child]))
            child++;
        if (child >= events->count || !earlier(&entries[child], &last))
            break;
        entries[parent] = entries[child];
        parent = child;
    }
    entries[parent] = last;
    return first;
}

void cl_events_free(cl_events *events)
{
    for (size_t i = 0; i < events->count; i++)
        free(events->entries[i].parcel);
    free(events->entries);
    *events = (cl_events){0};
}
