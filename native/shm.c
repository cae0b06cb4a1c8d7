/*
 * shm.c: frames through shared memory, between ranks of one host.
 *
 * Every rank owns one anonymous memory (shm.h), with one ring per peer, which it writes and the peer reads. A ring is a
 * stream of frames, each followed by its payload padded to 64 bytes; the reader adds straight out of the ring. Positions
 * only grow; each is written by one side. Payload that already lies in shared memory is not copied: a reference to it goes
 * with the frame, and the reader adds straight out of the sender's array. Private payload that is lent (CL_FRAME_LENDS) is
 * copied to a stage and goes by reference as well: the reader writes its answer there, or into the sender's array, and
 * sends back a reference into the memory of the rank that it goes to (decision 0007).
 *
 * Sleeping: a rank that is about to block sets its flag, then looks once more; who finds the flag set after publishing
 * takes it down and rings the doorbell. The two orders are sequentially consistent, so one of the two always sees the other.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "ring.h"
#include "shm.h"

enum {
    /* Published at a time: the reader adds one part from its cache while the writer copies the next. */
    PART_NBYTES = 32 * 1024,
    /* Payload that lies in the shared heap goes by reference from this size on; below, a copy costs less than the wait. */
    REFERENCE_NBYTES = 4096,
    /* A stage is read when it is full, the ring as it fills: for less than a few parts the ring is faster. */
    LEAST_STAGED_NBYTES = 2 * PART_NBYTES,
    SMALL_NBYTES = 16 * 1024, /* up to here a payload is published at once with its header */
    NO_STAGE = -1
};

static const char BROKEN[] = "it broke the protocol (is it another version of commlib?)";

/* Where a frame's payload lies. */
enum { PATH_RING = 0, PATH_SENDER, PATH_READER };

typedef struct {
    cl_link base;
    struct cl_shm *shm; /* ours: the engine frees it after its links */
    uint8_t *peer_memory;
    size_t peer_nbytes;
    atomic_int *peer_sleeping;
    int peer_doorbell, peer_pidfd;
    uint32_t lost_ms;
    ring out, in;
    bool refused;        /* a frame found no room, */
    bool unstaged;       /* or no stage */
    bool ended;          /* the peer has closed its ring, and all that was in it is read */
    bool sending;        /* a frame is partly in the ring */
    const char *broken;  /* why this link cannot go on */
    cl_frame out_frame;
    const uint8_t *out_payload;
    uint8_t *out_copy;   /* owned: what forget() saved */
    size_t out_offset;
    struct {
        cl_frame frame;
        uint64_t end; /* the reader is done with it when it has passed this position */
        int stage;    /* whose sent() was called at once; or NO_STAGE */
        bool forgotten;
    } references[CL_REFERENCES];
    uint32_t first_reference, nreferences;
    uint32_t in_references; /* read so far */
    bool receiving;
    cl_frame in_frame;
    uint16_t in_path;
    size_t in_offset;
} shm_link;

void cl_ring(atomic_int *sleeping, int doorbell)
{
    uint64_t one = 1;
    if (atomic_load(sleeping) == CL_AWAKE || atomic_exchange(sleeping, CL_AWAKE) == CL_AWAKE)
        return;
    while (write(doorbell, &one, sizeof one) < 0 && errno == EINTR)
        ; /* EAGAIN: the counter is full, so it rings already */
}

/* ---- writing ------------------------------------------------------------------------------------------------- */

/* After publishing: either we see the peer's flag here, or the peer, which set it first, sees what we published. */
static void wake_peer(shm_link *link)
{
    cl_ring(link->peer_sleeping, link->peer_doorbell);
}

/* An idle peer is not woken for what can wait in the ring while there is room, nor for what it awaits: then it polls. */
static void wake_peer_for(shm_link *link, uint8_t flags)
{
    if (atomic_load(link->peer_sleeping) != CL_IDLE || (flags & CL_FRAME_WAKES) ||
        (link->sending && !(flags & CL_FRAME_AWAITED)))
        wake_peer(link);
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
        take = take < free_nbytes ? take : free_nbytes; /* both are multiples of CL_LINE, so a short part is too */
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

static bool lies_in(const void *payload, size_t nbytes, const uint8_t *memory, size_t first, size_t end)
{
    uintptr_t at = (uintptr_t)payload, base = (uintptr_t)memory;
    return at >= base + first && at + nbytes <= base + end;
}

static bool takes_reference(shm_link *link)
{
    return link->nreferences < CL_REFERENCES && room(&link->out) >= CL_LINE;
}

static void write_header(shm_link *link, const cl_frame *frame, uint16_t path)
{
    uint8_t *header = link->out.data + (link->out.head & link->out.mask);
    memcpy(header, frame, sizeof *frame);
    ((cl_frame *)header)->path = path;
    publish(&link->out, CL_LINE);
}

/* The reader takes the payload from where it lies; `sent` follows when it has. */
static int send_reference(shm_link *link, const cl_frame *frame, uint16_t path, uint64_t offset, int stage)
{
    uint32_t slot = (link->first_reference + link->nreferences++) % CL_REFERENCES;
    cl_reference *reference = &link->out.header->references[slot];
    reference->offset = offset;
    atomic_store_explicit(&reference->state, 0, memory_order_relaxed); /* published with the header */
    write_header(link, frame, path);
    link->references[slot].frame = *frame;
    link->references[slot].end = link->out.head;
    link->references[slot].stage = stage;
    link->references[slot].forgotten = false;
    wake_peer_for(link, frame->flags);
    return CL_OK;
}

/* ---- stages -------------------------------------------------------------------------------------------------- */

static int free_stage(const shm_link *link)
{
    for (int i = 0; i < CL_STAGES; i++)
        if (link->shm->stages[i].link == NULL)
            return i;
    return NO_STAGE;
}

/* The peer has nothing more to read, so nothing that it could do would free a stage of ours. */
static bool is_drained(shm_link *link)
{
    link->out.tail = atomic_load_explicit(&link->out.header->tail, memory_order_acquire);
    return link->out.head == link->out.tail && link->nreferences == 0;
}

static int send_staged(shm_link *link, const cl_frame *frame, const void *payload, int i)
{
    cl_stage *stage = &link->shm->stages[i];
    size_t offset = link->shm->stages_offset + (size_t)i * CL_STAGE_NBYTES;
    memcpy(link->shm->memory + offset, payload, frame->nbytes);
    *stage = (cl_stage){.link = link, .key = frame->key, .unread = true};
    (void)send_reference(link, frame, PATH_SENDER, offset, i);
    link->base.sink->sent(link->base.owner, &link->base, frame);
    return CL_OK;
}

/* The peer has read what was staged, and will answer from there or not. */
static void stage_was_read(cl_stage *stage, bool kept)
{
    stage->unread = false;
    if (!kept || stage->returned)
        stage->link = NULL;
}

/* An answer was taken out of a stage of ours, if that is where it lay. */
static void stage_came_back(shm_link *link, uint64_t offset)
{
    if (offset < link->shm->stages_offset || offset >= link->shm->heap_offset)
        return;
    cl_stage *stage = &link->shm->stages[(offset - link->shm->stages_offset) / CL_STAGE_NBYTES];
    if (stage->link != link || stage->key != link->in_frame.key)
        return; /* forgotten meanwhile, and perhaps lent anew */
    stage->returned = true;
    if (!stage->unread)
        stage->link = NULL;
}

/* No answers will come for this key, or for any. */
static void free_stages(shm_link *link, const uint64_t *key)
{
    for (int i = 0; i < CL_STAGES; i++) {
        cl_stage *stage = &link->shm->stages[i];
        if (stage->link != link || (key != NULL && stage->key != *key))
            continue;
        stage->returned = true;
        if (!stage->unread || key == NULL)
            stage->link = NULL;
    }
}

/* ---- sending ------------------------------------------------------------------------------------------------- */

/* Reports the references that the reader has passed. Returns how many. */
static int finish_references(shm_link *link)
{
    int finished = 0;
    if (link->nreferences == 0)
        return 0;
    link->out.tail = atomic_load_explicit(&link->out.header->tail, memory_order_acquire);
    while (link->nreferences > 0 && link->references[link->first_reference].end <= link->out.tail) {
        uint32_t slot = link->first_reference;
        cl_frame frame = link->references[slot].frame;
        bool told = link->references[slot].forgotten;
        int state = atomic_load_explicit(&link->out.header->references[slot].state, memory_order_relaxed);
        if (link->references[slot].stage != NO_STAGE) {
            stage_was_read(&link->shm->stages[link->references[slot].stage], (state & CL_REFERENCE_KEPT) != 0);
            told = true;
        }
        link->first_reference = (slot + 1) % CL_REFERENCES;
        link->nreferences--;
        finished++;
        if (!told)
            link->base.sink->sent(link->base.owner, &link->base, &frame);
    }
    return finished;
}

static int refuse(shm_link *link, const cl_frame *frame, bool for_a_stage)
{
    link->refused = true;
    link->unstaged = for_a_stage;
    if (atomic_load(link->peer_sleeping) == CL_IDLE && !(frame->flags & CL_FRAME_AWAITED))
        wake_peer(link); /* it was not for what fills the ring, and has to make room */
    return CL_AGAIN;
}

/* Header and payload at once: one position to publish, and to look at. */
static int send_small(shm_link *link, const cl_frame *frame, const void *payload)
{
    uint8_t *header = link->out.data + (link->out.head & link->out.mask);
    memcpy(header, frame, sizeof *frame);
    ((cl_frame *)header)->path = PATH_RING;
    if (frame->nbytes > 0)
        memcpy(header + CL_LINE, payload, frame->nbytes);
    publish(&link->out, CL_LINE + padded(frame->nbytes));
    wake_peer_for(link, frame->flags);
    if (frame->nbytes > 0)
        link->base.sink->sent(link->base.owner, &link->base, frame); /* last: the frame may end with it */
    return CL_OK;
}

static bool is_small(shm_link *link, const cl_frame *frame)
{
    size_t whole = CL_LINE + padded(frame->nbytes), at = (size_t)(link->out.head & link->out.mask);
    return frame->nbytes <= SMALL_NBYTES && room(&link->out) >= whole && link->out.mask + 1 - at >= whole;
}

static int send_copy(shm_link *link, const cl_frame *frame, const void *payload)
{
    if (is_small(link, frame))
        return send_small(link, frame, payload);
    uint8_t flags = frame->flags;
    write_header(link, frame, PATH_RING);
    if (frame->nbytes > 0) {
        link->sending = true;
        link->out_frame = *frame;
        link->out_payload = payload;
        link->out_offset = 0;
        write_payload(link);
    }
    wake_peer_for(link, flags); /* the frame may have ended with its payload */
    return CL_OK;
}

static int shm_send(cl_link *base, const cl_frame *frame, const void *payload)
{
    shm_link *link = (shm_link *)base;
    struct cl_shm *shm = link->shm;
    size_t nbytes = frame->nbytes;
    if (link->sending || link->broken || !takes_reference(link))
        return refuse(link, frame, false);
    if (nbytes > 0 && lies_in(payload, nbytes, link->peer_memory, 0, link->peer_nbytes))
        return send_reference(link, frame, PATH_READER, (uint64_t)((const uint8_t *)payload - link->peer_memory), NO_STAGE);
    if (nbytes >= REFERENCE_NBYTES && lies_in(payload, nbytes, shm->memory, shm->heap_offset, shm->nbytes))
        return send_reference(link, frame, PATH_SENDER, (uint64_t)((const uint8_t *)payload - shm->memory), NO_STAGE);
    if (!(frame->flags & CL_FRAME_LENDS) || nbytes < LEAST_STAGED_NBYTES || nbytes > CL_STAGE_NBYTES)
        return send_copy(link, frame, payload);
    int stage = free_stage(link);
    if (stage != NO_STAGE)
        return send_staged(link, frame, payload, stage);
    /* Answers will free stages; but those may have to wait for this very frame, so it does not wait for them for ever. */
    return is_drained(link) ? send_copy(link, frame, payload) : refuse(link, frame, true);
}

/* ---- reading ------------------------------------------------------------------------------------------------- */

static void read_frame(shm_link *link)
{
    memcpy(&link->in_frame, link->in.data + (link->in.tail & link->in.mask), sizeof link->in_frame);
    link->in_path = link->in_frame.path;
    link->in_frame.path = 0;
    if (link->in_path == PATH_RING) /* else its end tells the sender that the payload was read */
        consume(&link->in, CL_LINE);
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

/* Where it lies, or NULL: not inside the memory that it is said to lie in. */
static uint8_t *referenced(const shm_link *link, uint64_t offset)
{
    bool ours = link->in_path == PATH_READER;
    size_t nbytes = ours ? link->shm->nbytes : link->peer_nbytes;
    uint8_t *memory = ours ? link->shm->memory : link->peer_memory;
    return offset <= nbytes && link->in_frame.nbytes <= nbytes - offset ? memory + offset : NULL;
}

/*
 * The payload is read where it lies, and written if it was lent. If the sender wanted it back meanwhile, the frame never
 * ends: the operation is failing over there, and word of it follows. The exchanges keep the reads between them.
 */
static bool read_reference(shm_link *link)
{
    cl_reference *reference = &link->in.header->references[link->in_references++ % CL_REFERENCES];
    bool lends = (link->in_frame.flags & CL_FRAME_LENDS) && link->in_path == PATH_SENDER;
    uint64_t offset = reference->offset;
    uint8_t *data = referenced(link, offset);
    link->in_offset = link->in_frame.nbytes;
    if (data == NULL) {
        link->broken = BROKEN;
        return false;
    }
    int before = lends ? atomic_fetch_or(&reference->state, CL_REFERENCE_BUSY) : atomic_load(&reference->state);
    link->base.lent = lends ? CL_LENT : CL_NOT_LENT;
    if (!(before & CL_REFERENCE_REVOKED) && link->in_frame.nbytes > 0)
        link->base.sink->piece(link->base.owner, &link->base, &link->in_frame, 0, data, link->in_frame.nbytes);
    int kept = link->base.lent == CL_LENT_KEPT ? CL_REFERENCE_KEPT : 0;
    link->base.lent = CL_NOT_LENT;
    int after = atomic_fetch_xor(&reference->state, (lends ? CL_REFERENCE_BUSY : 0) | kept);
    if (link->in_path == PATH_READER)
        stage_came_back(link, offset);
    return !(after & CL_REFERENCE_REVOKED);
}

/* One frame at most is finished per call, so that a busy peer does not starve the others. */
static int read_some(shm_link *link)
{
    int events = 0;
    link->in.head = atomic_load_explicit(&link->in.header->head, memory_order_acquire);
    if (link->in.head == link->in.tail)
        return 0;
    if (link->in.head - link->in.tail > link->in.mask + 1 || link->in.head % CL_LINE != 0) { /* it would never end */
        link->broken = BROKEN;
        return 1;
    }
    if (!link->receiving) {
        read_frame(link);
        events++;
    }
    bool whole = true;
    if (link->in_path != PATH_RING) {
        whole = read_reference(link);
        consume(&link->in, CL_LINE);
    }
    while (link->in_offset < link->in_frame.nbytes && read_payload(link))
        events++;
    if (link->in_offset == link->in_frame.nbytes) {
        link->receiving = false;
        if (link->broken)
            return events;
        (whole ? link->base.sink->end : link->base.sink->revoked)(link->base.owner, &link->base, &link->in_frame);
    }
    return events;
}

/* The peer reads what is there, and then knows that this is the end. */
static void close_ring(shm_link *link)
{
    atomic_store(&link->out.header->closed, 1);
    wake_peer(link);
}

/* Room for a frame of any kind, so that what was refused may be offered again. */
static bool takes_again(shm_link *link)
{
    bool stages = !link->unstaged || free_stage(link) != NO_STAGE || is_drained(link);
    return !link->sending && takes_reference(link) && stages;
}

static int shm_progress(cl_link *base)
{
    shm_link *link = (shm_link *)base;
    if (link->ended)
        return 0;
    if (is_at_end(&link->in)) {
        link->ended = true;
        base->sink->lost(base->owner, base, "it closed the connection");
        return 1;
    }
    if (link->broken) {
        link->ended = true;
        close_ring(link); /* the peer must not wait for the rest */
        base->sink->lost(base->owner, base, link->broken);
        return 1;
    }
    uint8_t flags = link->out_frame.flags;
    int written = link->sending ? write_payload(link) : 0;
    int events = written + finish_references(link) + read_some(link);
    if (link->refused && takes_again(link)) {
        link->refused = false;
        events++;
    }
    if (events == 0)
        return 0;
    bool gives_room = atomic_load(&link->in.header->wants_room) && atomic_exchange(&link->in.header->wants_room, 0);
    if (written > 0 || gives_room)
        wake_peer_for(link, gives_room ? CL_FRAME_WAKES : flags);
    return events;
}

/* ---- sleeping ------------------------------------------------------------------------------------------------ */

static int shm_arm(cl_link *base)
{
    shm_link *link = (shm_link *)base;
    bool wants = link->sending || link->refused || link->nreferences > 0;
    if (wants)
        atomic_store(&link->out.header->wants_room, 1);
    if (link->ended)
        return CL_OK;
    if (atomic_load(&link->in.header->head) != link->in.tail || is_at_end(&link->in))
        return CL_AGAIN;
    if (!wants)
        return CL_OK;
    link->out.tail = atomic_load(&link->out.header->tail);
    if (link->nreferences > 0 && link->references[link->first_reference].end <= link->out.tail)
        return CL_AGAIN;
    if (link->refused && takes_again(link))
        return CL_AGAIN;
    return link->sending && room(&link->out) >= CL_LINE ? CL_AGAIN : CL_OK;
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

static bool is_dead(const shm_link *link)
{
    struct pollfd process = {.fd = link->peer_pidfd, .events = POLLIN};
    return link->peer_pidfd >= 0 && poll(&process, 1, 0) > 0;
}

/*
 * The peer is in the midst of adding to this payload: a matter of microseconds, unless it is not scheduled. A dead one
 * writes no more. One that is stopped right here for longer than a link may be silent might still write a part of the
 * payload later, into an array whose operation has failed: the lesser evil than to stop with it.
 */
static void wait_for_writer(const shm_link *link, const cl_reference *reference)
{
    const struct timespec pause = {0, 50000};
    uint64_t pauses = UINT64_C(20) * link->lost_ms;
    while ((atomic_load(&reference->state) & CL_REFERENCE_BUSY) && pauses-- > 0 && !is_dead(link))
        nanosleep(&pause, NULL);
}

static void revoke_references(shm_link *link, uint64_t key)
{
    for (uint32_t i = 0; i < link->nreferences; i++) {
        uint32_t slot = (link->first_reference + i) % CL_REFERENCES;
        if (link->references[slot].frame.key != key || link->references[slot].stage != NO_STAGE)
            continue; /* what is staged is a copy, and goes on */
        cl_reference *reference = &link->out.header->references[slot];
        int before = atomic_fetch_or(&reference->state, CL_REFERENCE_REVOKED);
        if (before & CL_REFERENCE_BUSY)
            wait_for_writer(link, reference);
        link->references[slot].forgotten = true;
    }
}

static void shm_forget(cl_link *base, uint64_t key)
{
    shm_link *link = (shm_link *)base;
    revoke_references(link, key);
    free_stages(link, &key);
    if (!link->sending || link->out_copy != NULL || link->out_frame.key != key)
        return;
    size_t left = link->out_frame.nbytes - link->out_offset;
    link->out_copy = malloc(left);
    if (link->out_copy == NULL) {
        link->sending = false;
        link->broken = "out of memory for the rest of a message"; /* told by progress: the caller is busy */
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
    return link->nreferences + (link->sending ? link->out_frame.nbytes - link->out_offset : 0);
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
    close_ring(link);
    free_stages(link, NULL);
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

static int attach(cl_engine *engine, shm_link *link, int32_t peer, int memfd, int32_t my_slot, int32_t peer_slot)
{
    off_t length = lseek(memfd, 0, SEEK_END);
    bool sound = peer >= 0 && peer < engine->size && peer != engine->rank && engine->peers[peer].link == NULL &&
                 engine->shm != NULL && engine->shm->memory != NULL && my_slot >= 0 && peer_slot >= 0 &&
                 cl_shm_slot_offset(engine, peer_slot + 1) <= engine->shm->heap_offset && length > 0 &&
                 cl_shm_slot_offset(engine, my_slot + 1) <= (size_t)length;
    if (!sound)
        return CL_INVALID;
    link->peer_nbytes = (size_t)length;
    link->shm = engine->shm;
    link->lost_ms = engine->settings.lost_ms;
    link->peer_memory = cl_shm_map(memfd, link->peer_nbytes, link->peer_nbytes);
    if (link->peer_memory == NULL)
        return CL_NO_MEMORY;
    link->peer_sleeping = &((cl_memory_header *)link->peer_memory)->sleeping;
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
    link->base.window_nbytes = engine->settings.shm_ring_nbytes; /* copied payload fills the ring; references match that */
    cl_engine_attach(engine, peer, &link->base);
    return CL_OK;
}
