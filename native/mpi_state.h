/*
 * mpi_state.h: a link over MPI from within: mpi.c opens, sends, sleeps and ends; mpi_receive.c takes in.
 */
#ifndef CL_MPI_STATE_H
#define CL_MPI_STATE_H

#include <stdbool.h>

#include "mpi_calls.h"
#include "mpi_link.h"

enum {
    HEARTBEAT = 255,            /* a frame type reserved for transports: it says "alive", and no sink sees it */
    SHORT_NBYTES = 16 * 1024,   /* payloads that travel with their frame: copying is cheaper than a turn */
    ROUND = 8,                  /* messages that a receiver has posted receives for */
    PIECE_NBYTES = 256 * 1024,  /* a multiple of 64; stays in the second-level cache until it is reduced */
    AHEAD = 2,                  /* pieces posted: one comes in while the other is reduced */
    LARGE_FRAMES = 16,          /* more would only hide from the engine what is urgent */
    WINDOW_NBYTES = 1 << 20,    /* posted at once: a frame goes while the next one is announced */
    LAST_LOOKS = 1000,          /* at a request that should have ended; then its memory is left to MPI */
    REASON_NBYTES = 160
};

enum { MESSAGE_TAG = 1, TURN_TAG, PIECE_TAG, GOODBYE_TAG, TAGS };

typedef struct {
    uint64_t taken; /* pieces that the sender of this has received: who reads on must have noticed that they left */
    cl_frame frame;
    uint8_t payload[SHORT_NBYTES];
} mpi_message;

typedef struct {
    cl_frame frame;
    const uint8_t *payload;
    uint8_t *copy;    /* owned; the rest of a forgotten payload */
    bool forgotten;
    size_t given, sent; /* bytes that MPI has got, and that have left */
} mpi_large;

typedef struct {
    cl_mpi_request request;
    size_t nbytes;
    bool placed;   /* received straight into the sink's place */
    uint8_t *from; /* where the bytes are */
} mpi_piece;

typedef struct {
    uint64_t messages, pieces; /* that were sent before */
} mpi_goodbye;

typedef struct mpi_link {
    cl_link link; /* first: a cl_link is cast to it */
    cl_mpi *mpi;
    struct mpi_link *next;
    int rank, out_tag, in_tag;
    uint64_t seen_look;

    mpi_message *outbox, *inbox;                 /* ROUND of each */
    cl_mpi_request out_requests[ROUND], in_requests[ROUND];
    uint64_t out_sent, out_left;                 /* messages given to MPI; of these, gone */
    uint64_t arrived, consumed;                  /* messages that came; of these, dealt with */

    mpi_large large[LARGE_FRAMES];               /* a ring */
    uint64_t large_taken, large_done, large_fed; /* frames accepted; wholly sent; wholly given to MPI */
    cl_mpi_request turns_in[AHEAD], piece_sends[AHEAD];
    size_t piece_nbytes[AHEAD];
    uint64_t turns, given, left;                 /* turns that came; pieces given to MPI; of these, gone */

    bool begun;                                  /* the frame of message `consumed` */
    cl_frame frame;
    uint8_t *place;
    size_t told;                                 /* bytes of it handed over */
    mpi_piece pieces[AHEAD];
    cl_mpi_request turns_out[AHEAD];
    uint8_t *staging;                            /* AHEAD pieces */
    uint64_t posted, taken;                      /* pieces posted; of these, handed over */
    uint64_t cursor;                             /* message whose payload is posted next ... */
    size_t cursor_offset;                        /* ... from here */

    bool sent_lately, received_lately, ticked;   /* since the last tick */
    double last_sent_s, last_received_s;

    mpi_goodbye last_out, last_in;
    cl_mpi_request last_out_request, last_in_request;
    bool parting;  /* our goodbye is said */
    bool closed;   /* by its owner: the sink is not called any more */
    bool failed;   /* `reason` waits to be told */
    bool over;     /* lost() was told */
    char reason[REASON_NBYTES];
} mpi_link;

struct cl_mpi {
    cl_mpi_calls calls;
    mpi_link *links;
    int timer;
    mpi_link *leader; /* whose descriptor the timer is */
    uint64_t looks;
    bool moved;       /* since the last sleep */
    double idle_since_s, heartbeat_s, lost_s;
    bool forked;
};

static inline bool cl_mpi_has_ended(const cl_mpi_request *request)
{
    return request->active && request->done;
}

/* A peer that only is slow may be silent for so long. */
static inline double cl_mpi_longest_s(const mpi_link *l)
{
    return 2 * l->mpi->lost_s;
}

static inline void cl_mpi_send_on(mpi_link *l, int kind, const void *data, size_t nbytes, cl_mpi_request *request)
{
    cl_mpi_post(&l->mpi->calls, l->mpi->calls.library.isend, data, nbytes, l->rank, l->out_tag + kind, request);
}

static inline void cl_mpi_receive_on(mpi_link *l, int kind, void *data, size_t nbytes, cl_mpi_request *request)
{
    cl_mpi_post(&l->mpi->calls, l->mpi->calls.library.irecv, data, nbytes, l->rank, l->in_tag + kind, request);
}

/* mpi.c */
void cl_mpi_fail(mpi_link *l, const char *reason);
/* The last that is sent on this link, and no message: it must not wait for room. */
void cl_mpi_say_goodbye(mpi_link *l);

/* mpi_receive.c */
void cl_mpi_post_inbox(mpi_link *l, uint64_t number);
/* Both return the number of events. */
int cl_mpi_note_arrivals(mpi_link *l);
/* Hands over what has come, in order, and posts what comes next. */
int cl_mpi_deliver(mpi_link *l);
/* The oldest message is dealt with. */
void cl_mpi_consume(mpi_link *l);
/* MPI lets go of the place of the frame that is coming in: the rest of it comes as pieces of our memory. */
void cl_mpi_forget_place(mpi_link *l);

#endif
