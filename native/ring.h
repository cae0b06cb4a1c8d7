/*
 * ring.h: a stream of bytes in shared memory, written by one rank and read by another: positions, and nothing of frames.
 *
 * Positions only grow; each is written by one side, and pieces are whole cache lines.
 */
#ifndef CL_RING_H
#define CL_RING_H

#include "shm.h"

typedef struct {
    cl_ring_header *header;
    uint8_t *data;
    uint64_t mask; /* size - 1 */
    uint64_t head, tail; /* what we know of both */
} ring;

static inline ring ring_at(const cl_engine *engine, uint8_t *memory, int32_t slot)
{
    uint8_t *base = memory + cl_shm_slot_offset(engine, slot);
    return (ring){(cl_ring_header *)base, base + CL_PAGE, engine->settings.shm_ring_nbytes - 1, 0, 0};
}

static inline size_t padded(size_t nbytes)
{
    return (nbytes + CL_LINE - 1) & ~(size_t)(CL_LINE - 1);
}

static inline size_t room(ring *r)
{
    if (r->head - r->tail > r->mask / 2) /* look at the reader's cache line only when it matters */
        r->tail = atomic_load_explicit(&r->header->tail, memory_order_acquire);
    return (size_t)(r->mask + 1 - (r->head - r->tail));
}

/* Sequentially consistent, as consume: who then finds the other side asleep is not overlooked by it. */
static inline void publish(ring *r, size_t nbytes)
{
    r->head += nbytes;
    atomic_store(&r->header->head, r->head);
}

static inline void consume(ring *r, size_t nbytes)
{
    r->tail += nbytes;
    atomic_store(&r->header->tail, r->tail);
}

/* Closed is looked at first: what was published before it is then seen. */
static inline bool is_at_end(const ring *r)
{
    return atomic_load(&r->header->closed) && atomic_load(&r->header->head) == r->tail;
}

#endif
