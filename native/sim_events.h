/* sim_events.h: what will happen in a simulation, by time, and at one time in the order in which it was made. */
#ifndef CL_SIM_EVENTS_H
#define CL_SIM_EVENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "transport.h"

typedef enum {
    EVENT_SWITCH,  /* a frame enters the switch */
    EVENT_ARRIVE,  /* its first byte is at the receiver's port */
    EVENT_DELIVER, /* the port has all of it */
    EVENT_END,     /* it has been added */
    EVENT_SENT,    /* the sender's port has given all of it away */
    EVENT_LOST,    /* a link's peer is dead */
    EVENT_TIMER
} cl_event_kind;

struct sim_link;

/* A frame on its way, its payload behind it. */
typedef struct cl_parcel {
    struct cl_parcel *next;
    double ready_s; /* the receiver's port has all of it; before it arrives: not sooner than this */
    bool has_payload;
    bool forgotten; /* of a receipt: nobody wants it any more */
    cl_frame frame;
    uint8_t payload[];
} cl_parcel;

typedef struct {
    double at_s;
    uint64_t order;
    cl_event_kind kind;
    int32_t rank;              /* timer: whose */
    union {
        uint64_t token;        /* timer */
        struct sim_link *link; /* else: the link object of the side where it happens */
    };
    cl_parcel *parcel;         /* owned; NULL: none */
} cl_event;

/* A binary heap: entries[0] is what happens next. */
typedef struct {
    cl_event *entries;
    size_t count, capacity;
    uint64_t order;
} cl_events;

/* Returns CL_NO_MEMORY, and has freed the parcel, or CL_OK. */
int cl_events_add(cl_events *events, cl_event added);
/* There must be one. */
cl_event cl_events_take(cl_events *events);
void cl_events_free(cl_events *events);

#endif
