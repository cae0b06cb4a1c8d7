/*
 * fuzz_shm.c: the peers of an engine share memory with it and write anything at all there: frames in their rings, references
 * to payload, positions of either side, flags.
 */
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "../../native/ring.h"
#include "fuzz.h"

static cl_engine *others[FUZZ_RANKS]; /* only their memory is used */

/* A rank's slot in another rank's memory. */
static int32_t slot_of(int32_t rank, int32_t memory)
{
    return rank - (rank > memory);
}

/* What `writer` writes and `reader` reads; fresh from what both now say. */
static ring ring_between(const fuzz *f, int32_t writer, int32_t reader)
{
    cl_engine *engine = writer == f->rank ? f->engine : others[writer];
    ring r = ring_at(engine, engine->shm->memory, slot_of(reader, writer));
    r.head = atomic_load(&r.header->head);
    r.tail = atomic_load(&r.header->tail);
    return r;
}

static void shm_link(fuzz *f)
{
    const struct rlimit no_heap = {INT64_MAX / 2, INT64_MAX / 2}; /* which would be as large as the machine's memory, and slow */
    int memfd, doorbell;
    CHECK(setrlimit(RLIMIT_FSIZE, &no_heap) == 0);
    CHECK(cl_shm_create(f->engine, f->p.size - 1, &memfd, &doorbell) == CL_OK);
    for (int32_t peer = 0; peer < f->p.size; peer++) {
        if (peer == f->rank)
            continue;
        CHECK(cl_engine_new(peer, f->p.size, &f->settings, &others[peer]) == CL_OK);
        CHECK(cl_shm_create(others[peer], f->p.size - 1, &memfd, &doorbell) == CL_OK);
        int32_t mine = slot_of(f->rank, peer), theirs = slot_of(peer, f->rank);
        CHECK(cl_shm_attach(f->engine, peer, dup(memfd), dup(doorbell), -1, mine, theirs) == CL_OK);
    }
}

/* As far as there is room: a peer that does not care overwrites what was not read, too. */
static void write_ring(ring *r, const void *data, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i++)
        r->data[(r->head + i) & r->mask] = ((const uint8_t *)data)[i];
    publish(r, padded(nbytes));
}

static uint64_t somewhere(fuzz *f)
{
    const struct cl_shm *shm = f->engine->shm;
    const uint64_t places[] = {0, shm->stages_offset, shm->stages_offset + CL_STAGE_NBYTES, shm->heap_offset, shm->nbytes,
                               shm->nbytes - 64};
    uint8_t place = fuzz_byte(&f->bytes);
    return place < 192 ? places[place % 6] : fuzz_number(&f->bytes);
}

static void shm_say(fuzz *f, int32_t peer, const cl_frame *frame, const void *payload, size_t nbytes)
{
    ring r = ring_between(f, peer, f->rank);
    cl_frame sent = *frame;
    uint8_t path = fuzz_byte(&f->bytes);
    sent.path = path < 128 ? 0 : path < 240 ? path % 3 : path;
    if (sent.path != 0) {
        cl_reference *reference = &r.header->references[path / 8 % CL_REFERENCES];
        reference->offset = somewhere(f);
        atomic_store(&reference->state, fuzz_byte(&f->bytes) % 8);
    }
    write_ring(&r, &sent, sizeof sent);
    if (sent.path == 0)
        write_ring(&r, payload, nbytes);
}

/* Lies about positions and states: the peer's own, and those that it has in the engine's memory. */
static void shm_act(fuzz *f, int32_t peer)
{
    ring in = ring_between(f, peer, f->rank), out = ring_between(f, f->rank, peer);
    uint8_t what = fuzz_byte(&f->bytes);
    uint64_t number = fuzz_number(&f->bytes);
    cl_reference *references = what & 64 ? in.header->references : out.header->references;
    switch (what % 8) {
    case 0: atomic_store(&out.header->tail, out.head); break; /* it has read all */
    case 1: atomic_store(&out.header->tail, number); break;
    case 2: atomic_store(&in.header->head, what & 64 ? number : in.head + number); break;
    case 3: atomic_store(&in.header->tail, number); break;
    case 4: atomic_store(&references[number % CL_REFERENCES].state, what / 8 % 8); break;
    case 5: references[number % CL_REFERENCES].offset = somewhere(f); break;
    case 6: atomic_store(&in.header->wants_room, (int)number); break;
    default: atomic_store(&((cl_memory_header *)others[peer]->shm->memory)->sleeping, (int)number % 4);
    }
}

static void shm_hang_up(fuzz *f, int32_t peer)
{
    ring r = ring_between(f, peer, f->rank);
    atomic_store(&r.header->closed, 1);
}

static void shm_end(fuzz *f)
{
    for (int32_t peer = 0; peer < f->p.size; peer++)
        if (peer != f->rank)
            cl_engine_free(others[peer]);
}

static const fuzz_links links = {shm_link, shm_say, shm_act, shm_hang_up, shm_end};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    fuzz_run(&links, data, nbytes);
    return 0;
}
