/*
 * shm.h: a rank's shared memory, between the file that makes it (shm_memory.c) and the one that sends through it (shm.c).
 *
 *     page 0           the rank's "ring my doorbell" flag
 *     slot 0, 1, ...   one ring per local peer, written by this rank: a page of positions, then the ring's bytes
 *     staging          places for payload that is sent from private memory and may be answered where it lies
 *     heap             arrays of the user (cl_shared_new); reserved, and allocated piece by piece before use
 *
 * Every local peer maps all of it. Offsets are the same on both sides.
 */
#ifndef CL_SHM_H
#define CL_SHM_H

#include <pthread.h>
#include <stdalign.h>

#include "engine.h"

enum {
    CL_PAGE = 4096,
    CL_LINE = 64,
    CL_REFERENCES = 32, /* by reference and not yet read, per ring; a power of two */
    CL_STAGES = 2,
    CL_STAGE_NBYTES = 256 * 1024 /* one is filled while the other is read; both take half of a core's second-level cache */
};

/* Of one payload that goes by reference. */
enum {
    CL_REFERENCE_BUSY = 1,   /* the reader writes into it */
    CL_REFERENCE_KEPT = 2,   /* the reader has written, and will answer from there */
    CL_REFERENCE_REVOKED = 4 /* the sender wants its memory back: what was read of it is worthless */
};

typedef struct {
    alignas(CL_LINE) uint64_t offset; /* in the sender's memory, or in the reader's, as the frame's path says */
    atomic_int state;
} cl_reference;

typedef struct {
    alignas(CL_LINE) atomic_int sleeping;
    alignas(CL_LINE) uint64_t heap_offset;
} cl_memory_header;

typedef struct {
    alignas(CL_LINE) _Atomic uint64_t head; /* written by the writer */
    alignas(CL_LINE) _Atomic uint64_t tail; /* written by the reader */
    alignas(CL_LINE) atomic_int wants_room; /* the writer sleeps until the reader has read on */
    alignas(CL_LINE) atomic_int closed;     /* nothing follows what is in the ring */
    cl_reference references[CL_REFERENCES]; /* the n-th by reference since the start has the n-th, round and round */
} cl_ring_header;

_Static_assert(sizeof(cl_memory_header) <= CL_PAGE && sizeof(cl_ring_header) <= CL_PAGE, "headers fit in their pages");

/* A free range of the heap. */
typedef struct cl_range {
    struct cl_range *next;
    uint64_t first, end;
} cl_range;

/* A place for payload on its way; touched by the engine's owner alone. */
typedef struct {
    const void *link; /* whose; NULL: free */
    uint64_t key;
    bool unread;      /* the peer has not passed the frame */
    bool returned;    /* the answer has come and been read */
} cl_stage;

struct cl_shm {
    atomic_int references; /* the engine, and every block of the heap */
    int owner_pid;         /* a forked child frees nothing */
    uint8_t *memory;
    size_t nbytes, stages_offset, heap_offset;
    cl_stage stages[CL_STAGES];
    int memfd, doorbell;
    pthread_mutex_t heap_lock;
    cl_range *free_ranges; /* by offset */
};

size_t cl_shm_slot_nbytes(const cl_engine *engine);
/* Where the slot begins in a rank's memory. */
size_t cl_shm_slot_offset(const cl_engine *engine, int32_t slot);
/* Maps all of a memfd; the first `private_nbytes` are not inherited by forked children. NULL: no. */
uint8_t *cl_shm_map(int memfd, size_t nbytes, size_t private_nbytes);

#endif
