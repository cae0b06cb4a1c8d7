/*
 * shm.c: frames through shared memory, between ranks of one host.
 *
 * Every rank owns one anonymous memory (a memfd, allocated before use: no SIGBUS later), with one ring per peer, which it
 * writes and the peer reads. A ring is a stream of frames, each followed by its payload padded to 64 bytes; the reader
 * adds straight out of the ring. Positions only grow; each is written by one side.
 *
 * Sleeping: a rank that is about to block sets its flag, then looks once more; who finds the flag set after publishing
 * takes it down and rings the doorbell. The two orders are sequentially consistent, so one of the two always sees the other.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdalign.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"

enum {
    PAGE = 4096,
    LINE = 64,
    /* Published at a time: the reader adds one part from its cache while the writer copies the next. */
    PART_NBYTES = 32 * 1024
};

typedef struct {
    alignas(LINE) atomic_int sleeping;
} memory_header;

typedef struct {
    alignas(LINE) _Atomic uint64_t head; /* written by the writer */
    alignas(LINE) _Atomic uint64_t tail; /* written by the reader */
    alignas(LINE) atomic_int wants_room; /* the writer sleeps until the reader has read on */
} ring_header;

_Static_assert(sizeof(memory_header) <= PAGE && sizeof(ring_header) <= PAGE, "headers fit in their pages");

struct cl_shm {
    uint8_t *memory;
    size_t nbytes;
    int memfd, doorbell;
};

typedef struct {
    ring_header *header;
    uint8_t *data;
    uint64_t mask; /* size - 1 */
    uint64_t head, tail; /* what we know of both */
} ring;

typedef struct {
    cl_link base;
    uint8_t *peer_memory;
    size_t peer_nbytes;
    atomic_int *peer_sleeping;
    int peer_doorbell, peer_pidfd;
    ring out, in;
    bool refused;        /* a frame found no room */
    bool sending;        /* a frame is partly in the ring */
    bool broken;         /* half a frame is in the ring, and the rest is gone */
    cl_frame out_frame;
    const uint8_t *out_payload;
    uint8_t *out_copy;   /* owned: what forget() saved */
    size_t out_offset;
    bool receiving;
    cl_frame in_frame;
    size_t in_offset;
} shm_link;

static size_t slot_nbytes(const cl_engine *engine)
{
    return PAGE + (size_t)engine->settings.shm_ring_nbytes;
}

static size_t memory_nbytes(const cl_engine *engine, int32_t npeers)
{
    return PAGE + (size_t)npeers * slot_nbytes(engine);
}

static ring ring_at(const cl_engine *engine, uint8_t *memory, int32_t slot)
{
    uint8_t *base = memory + PAGE + (size_t)slot * slot_nbytes(engine);
    return (ring){(ring_header *)base, base + PAGE, engine->settings.shm_ring_nbytes - 1, 0, 0};
}

void cl_ring(atomic_int *sleeping, int doorbell)
{
    uint64_t one = 1;
    if (!atomic_load(sleeping) || !atomic_exchange(sleeping, 0))
        return;
    while (write(doorbell, &one, sizeof one) < 0 && errno == EINTR)
        ; /* EAGAIN: the counter is full, so it rings already */
}

/* ---- writing ------------------------------------------------------------------------------------------------- */

static size_t padded(size_t nbytes)
{
    return (nbytes + LINE - 1) & ~(size_t)(LINE - 1);
}

static size_t room(ring *r)
{
    if (r->head - r->tail > r->mask / 2) /* look at the reader's cache line only when it matters */
        r->tail = atomic_load_explicit(&r->header->tail, memory_order_acquire);
    return (size_t)(r->mask + 1 - (r->head - r->tail));
}

static void publish(ring *r, size_t nbytes)
{
    r->head += nbytes;
    atomic_store(&r->header->head, r->head); /* sequentially consistent: see wake_peer */
}

/* After publishing: either we see the peer's flag here, or the peer, which set it first, sees what we published. */
static void wake_peer(shm_link *link)
{
    cl_ring(link->peer_sleeping, link->peer_doorbell);
}

static void finish_frame(shm_link *link)
{
    bool forgotten = link->out_copy != NULL;
    link->sending = false;
    free(link->out_copy);
    link->out_copy = NULL;
    if (!forgotten)
        link->base.sink->sent(link->base.owner, &link->base, &link->out_frame);
}

/* Copies payload into the ring until it is full. Returns the number of parts. */
static int write_payload(shm_link *link)
{
    int parts = 0;
    while (link->sending) {
        size_t left = link->out_frame.nbytes - link->out_offset;
        size_t at = (size_t)(link->out.head & link->out.mask);
        size_t span = (size_t)link->out.mask + 1 - at;
        size_t free_nbytes = room(&link->out);
        size_t take = left < PART_NBYTES ? left : PART_NBYTES;
        take = take < span ? take : span;
        take = take < free_nbytes ? take : free_nbytes; /* both are multiples of LINE, so a short part is too */
        if (take == 0)
            break;
        memcpy(link->out.data + at, link->out_payload + link->out_offset, take);
        link->out_offset += take;
        publish(&link->out, padded(take));
        parts++;
        if (link->out_offset == link->out_frame.nbytes)
            finish_frame(link);
    }
    return parts;
}

static int shm_send(cl_link *base, const cl_frame *frame, const void *payload)
{
    shm_link *link = (shm_link *)base;
    if (link->sending || link->broken || room(&link->out) < LINE) {
        link->refused = true;
        return CL_AGAIN;
    }
    memcpy(link->out.data + (link->out.head & link->out.mask), frame, sizeof *frame);
    publish(&link->out, LINE);
    if (frame->nbytes > 0) {
        link->sending = true;
        link->out_frame = *frame;
        link->out_payload = payload;
        link->out_offset = 0;
        write_payload(link);
    }
    wake_peer(link);
    return CL_OK;
}

/* ---- reading ------------------------------------------------------------------------------------------------- */

static void consume(ring *r, size_t nbytes)
{
    r->tail += nbytes;
    atomic_store(&r->header->tail, r->tail);
}

static void read_frame(shm_link *link)
{
    memcpy(&link->in_frame, link->in.data + (link->in.tail & link->in.mask), sizeof link->in_frame);
    consume(&link->in, LINE);
    link->receiving = true;
    link->in_offset = 0;
    (void)link->base.sink->begin(link->base.owner, &link->base, &link->in_frame); /* pieces are taken from the ring */
}

static bool read_payload(shm_link *link)
{
    size_t left = link->in_frame.nbytes - link->in_offset;
    size_t at = (size_t)(link->in.tail & link->in.mask);
    size_t span = (size_t)link->in.mask + 1 - at;
    size_t there = (size_t)(link->in.head - link->in.tail);
    size_t take = left < PART_NBYTES ? left : PART_NBYTES;
    take = take < span ? take : span;
    take = take < there ? take : there;
    if (take == 0)
        return false;
    link->base.sink->piece(link->base.owner, &link->base, &link->in_frame, link->in_offset, link->in.data + at, take);
    link->in_offset += take;
    consume(&link->in, padded(take));
    return true;
}

/* One frame at most is finished per call, so that a busy peer does not starve the others. */
static int read_some(shm_link *link)
{
    int events = 0;
    link->in.head = atomic_load_explicit(&link->in.header->head, memory_order_acquire);
    if (link->in.head == link->in.tail)
        return 0;
    if (!link->receiving) {
        read_frame(link);
        events++;
    }
    while (link->in_offset < link->in_frame.nbytes && read_payload(link))
        events++;
    if (link->in_offset == link->in_frame.nbytes) {
        link->receiving = false;
        link->base.sink->end(link->base.owner, &link->base, &link->in_frame);
    }
    return events;
}

static int shm_progress(cl_link *base)
{
    shm_link *link = (shm_link *)base;
    if (link->broken) {
        link->broken = false;
        base->sink->lost(base->owner, base, "out of memory for the rest of a message");
        return 0;
    }
    int written = link->sending ? write_payload(link) : 0;
    int events = written + read_some(link);
    if (link->refused && room(&link->out) >= LINE && !link->sending) {
        link->refused = false;
        events++;
    }
    if (events == 0)
        return 0;
    bool gives_room = atomic_load(&link->in.header->wants_room) && atomic_exchange(&link->in.header->wants_room, 0);
    if (written > 0 || gives_room)
        wake_peer(link);
    return events;
}

/* ---- sleeping ------------------------------------------------------------------------------------------------ */

static int shm_arm(cl_link *base)
{
    shm_link *link = (shm_link *)base;
    bool wants = link->sending || link->refused;
    if (wants)
        atomic_store(&link->out.header->wants_room, 1);
    if (atomic_load(&link->in.header->head) != link->in.tail)
        return CL_AGAIN;
    if (!wants)
        return CL_OK;
    link->out.tail = atomic_load(&link->out.header->tail);
    return link->out.head - link->out.tail > link->out.mask + 1 - LINE ? CL_OK : CL_AGAIN;
}

static void shm_disarm(cl_link *base)
{
    (void)base; /* a ring for nothing is harmless */
}

static int shm_pollfd(cl_link *base, uint32_t *events)
{
    (void)base;
    *events = 0;
    return -1;
}

int cl_shm_pidfd(const cl_link *link)
{
    return link->transport == &cl_shm_transport ? ((const shm_link *)link)->peer_pidfd : -1;
}

/* ---- ends ---------------------------------------------------------------------------------------------------- */

static void shm_forget(cl_link *base, uint64_t key)
{
    shm_link *link = (shm_link *)base;
    if (!link->sending || link->out_copy != NULL || link->out_frame.key != key)
        return;
    size_t left = link->out_frame.nbytes - link->out_offset;
    link->out_copy = malloc(left);
    if (link->out_copy == NULL) {
        link->sending = false;
        link->broken = true; /* told by progress: the caller is in the middle of something */
        return;
    }
    memcpy(link->out_copy, link->out_payload + link->out_offset, left);
    /* Indexed by out_offset, which goes on from here. */
    link->out_frame.nbytes = (uint32_t)left;
    link->out_offset = 0;
    link->out_payload = link->out_copy;
}

static size_t shm_pending(const cl_link *base)
{
    const shm_link *link = (const shm_link *)base;
    return link->sending ? link->out_frame.nbytes - link->out_offset : 0;
}

static void close_descriptors(shm_link *link)
{
    close(link->peer_doorbell);
    if (link->peer_pidfd >= 0)
        close(link->peer_pidfd);
}

static void shm_close(cl_link *base)
{
    shm_link *link = (shm_link *)base;
    close_descriptors(link);
    munmap(link->peer_memory, link->peer_nbytes);
    free(link->out_copy);
    free(link);
}

static void shm_forked(cl_link *base)
{
    close_descriptors((shm_link *)base);
}

const cl_transport cl_shm_transport = {
    .name = "shm",
    .send = shm_send,
    .progress = shm_progress,
    .arm = shm_arm,
    .disarm = shm_disarm,
    .pollfd = shm_pollfd,
    .forget = shm_forget,
    .pending = shm_pending,
    .close = shm_close,
    .forked = shm_forked,
    .tick = NULL,
};

/* ---- making -------------------------------------------------------------------------------------------------- */

/* Maps shared memory that a forked child does not get: it could neither use it nor must keep it alive. */
static uint8_t *map_shared(int memfd, size_t nbytes)
{
    uint8_t *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (memory == MAP_FAILED)
        return NULL;
    (void)madvise(memory, nbytes, MADV_DONTFORK);
    return memory;
}

int cl_shm_create(cl_engine *engine, int32_t npeers, int *memfd, int *doorbell)
{
    if (engine->shm != NULL || npeers < 1 || npeers >= engine->size)
        return CL_INVALID;
    struct cl_shm *shm = calloc(1, sizeof(struct cl_shm));
    if (shm == NULL)
        return CL_NO_MEMORY;
    *shm = (struct cl_shm){NULL, memory_nbytes(engine, npeers), -1, -1};
    engine->shm = shm;
    shm->doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    shm->memfd = memfd_create("commlib", MFD_CLOEXEC);
    if (shm->doorbell < 0 || shm->memfd < 0)
        return CL_SYSTEM;
    int failed = posix_fallocate(shm->memfd, 0, (off_t)shm->nbytes);
    if (failed != 0) {
        errno = failed;
        return failed == ENOSPC || failed == ENOMEM ? CL_NO_MEMORY : CL_SYSTEM;
    }
    shm->memory = map_shared(shm->memfd, shm->nbytes);
    if (shm->memory == NULL)
        return CL_NO_MEMORY;
    *memfd = shm->memfd;
    *doorbell = shm->doorbell;
    return CL_OK;
}

static int attach(cl_engine *engine, shm_link *link, int32_t peer, int memfd, int32_t my_slot, int32_t peer_slot)
{
    off_t length = lseek(memfd, 0, SEEK_END);
    bool sound = peer >= 0 && peer < engine->size && peer != engine->rank && engine->peers[peer].link == NULL &&
                 engine->shm != NULL && engine->shm->memory != NULL && my_slot >= 0 && peer_slot >= 0 &&
                 memory_nbytes(engine, peer_slot + 1) <= engine->shm->nbytes && length > 0 &&
                 memory_nbytes(engine, my_slot + 1) <= (size_t)length;
    if (!sound)
        return CL_INVALID;
    link->peer_nbytes = (size_t)length;
    link->peer_memory = map_shared(memfd, link->peer_nbytes);
    if (link->peer_memory == NULL)
        return CL_NO_MEMORY;
    link->peer_sleeping = &((memory_header *)link->peer_memory)->sleeping;
    link->out = ring_at(engine, engine->shm->memory, peer_slot);
    link->in = ring_at(engine, link->peer_memory, my_slot);
    return CL_OK;
}

int cl_shm_attach(cl_engine *engine, int32_t peer, int memfd, int doorbell, int pidfd, int32_t my_slot, int32_t peer_slot)
{
    shm_link *link = calloc(1, sizeof(shm_link));
    int status = CL_NO_MEMORY;
    if (link != NULL) {
        link->peer_doorbell = doorbell;
        link->peer_pidfd = pidfd;
        status = attach(engine, link, peer, memfd, my_slot, peer_slot);
    }
    close(memfd); /* the mapping holds the memory */
    if (status != CL_OK) {
        close(doorbell);
        if (pidfd >= 0)
            close(pidfd);
        free(link);
        return status;
    }
    link->base.transport = &cl_shm_transport;
    cl_engine_attach(engine, peer, &link->base);
    return CL_OK;
}

bool cl_shm_doorbell(cl_engine *engine, atomic_int **sleeping, int *doorbell)
{
    if (engine->shm == NULL || engine->shm->memory == NULL)
        return false;
    *sleeping = &((memory_header *)engine->shm->memory)->sleeping;
    *doorbell = engine->shm->doorbell;
    return true;
}

void cl_shm_close_memfd(cl_engine *engine)
{
    if (engine->shm != NULL && engine->shm->memfd >= 0) {
        close(engine->shm->memfd);
        engine->shm->memfd = -1;
    }
}

void cl_shm_free(cl_engine *engine)
{
    if (engine->shm == NULL)
        return;
    cl_shm_close_memfd(engine);
    if (engine->shm->doorbell >= 0)
        close(engine->shm->doorbell);
    if (engine->shm->memory != NULL)
        munmap(engine->shm->memory, engine->shm->nbytes);
    free(engine->shm);
    engine->shm = NULL;
}
