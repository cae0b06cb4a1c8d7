/*
 * transport.h: the one page between the engine and whatever moves bytes.
 *
 * A transport moves frames between two ranks, in order, each exactly once. It knows nothing of operations, plans or
 * priorities, never blocks, never calls the engine but through the sink, and is called by one thread at a time (the
 * engine's owner). What comes after one link is lost is not its business: the engine closes it.
 */
#ifndef CL_TRANSPORT_H
#define CL_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "commlib.h"

/* What both sides must agree on, small enough to travel in every frame. Byte-wise comparable: no padding. */
typedef struct {
    uint64_t count;
    uint32_t shape_hash;
    uint32_t scale_hash; /* prescale, postscale, settings */
    int32_t root;
    uint8_t dtype, reduction, kind, wire;
} cl_meta;

/* One cache line, little-endian on the wire (x86-64 and aarch64 both are). */
typedef struct {
    uint64_t key;
    uint8_t type;  /* cl_frame_type, the engine's business */
    uint8_t flags; /* the engine's business, but for CL_FRAME_LENDS */
    uint16_t path; /* the transport's business */
    uint32_t segment;
    uint32_t step;
    uint32_t nbytes; /* payload that follows */
    uint64_t arg;
    cl_meta meta;
    uint64_t token; /* the sender's own; meaningless to the receiver */
} cl_frame;

_Static_assert(sizeof(cl_meta) == 24, "cl_meta has padding");
_Static_assert(sizeof(cl_frame) == 64, "a frame is one cache line");

/*
 * A flag: until the answer to this frame has come, its receiver may write into the payload where it lies, if the transport
 * can offer that (cl_link.lent). The answer is then sent from there: both sides see the same memory, so it does not move.
 */
enum { CL_FRAME_LENDS = 0x80 };

/* What cl_link.lent says during piece(). */
typedef enum {
    CL_NOT_LENT = 0,
    CL_LENT,      /* the whole payload lies at `data`, and may be written: it was sent with CL_FRAME_LENDS */
    CL_LENT_KEPT  /* set by the sink: it has, and will send from there, to the same peer, once */
} cl_lent;

/*
 * Flags: WAKES wakes also a receiver that has no operation in flight; frames of operations wait until it has. AWAITED says
 * that it has: it granted this frame, so that a caller polls there, or else it sleeps and says so.
 */
enum { CL_FRAME_WAKES = 0x40, CL_FRAME_AWAITED = 0x20 };

typedef struct cl_link cl_link;

/* What a link tells its owner. `owner` is the engine, opaque here. */
typedef struct {
    /*
     * A frame's header has come (also when nbytes is 0). Returns where its payload may be written directly, or NULL:
     * the transport then hands over pieces of its own memory. Called once per frame, before payload and end.
     */
    void *(*begin)(void *owner, cl_link *link, const cl_frame *frame);
    /*
     * The next piece of payload lies at `data` (inside the direct place if begin gave one, which then was written by the
     * transport). Pieces come in order; every piece but the last of a frame is a multiple of 64 bytes.
     */
    void (*piece)(void *owner, cl_link *link, const cl_frame *frame, size_t offset, const void *data, size_t nbytes);
    /* The whole frame has come. */
    void (*end)(void *owner, cl_link *link, const cl_frame *frame);
    /* The sender took its payload back: what was read of it is worthless, and the frame never ends. */
    void (*revoked)(void *owner, cl_link *link, const cl_frame *frame);
    /* A frame with payload was sent: its memory is the caller's again. May be called inside send. */
    void (*sent)(void *owner, cl_link *link, const cl_frame *frame);
    /* The peer is gone; `reason` is a sentence without the rank. Called at most once per link; nothing comes after it. */
    void (*lost)(void *owner, cl_link *link, const char *reason);
} cl_sink;

typedef struct {
    const char *name;
    /* The descriptor of pollfd is for good, and tells of everything: progress does nothing until it becomes ready again. */
    bool edges;
    /*
     * Takes a frame to be sent after all earlier ones. The frame is copied; `payload` (frame->nbytes bytes, or NULL in a
     * timing-only simulation) must stay until sent() or forget().
     * Returns CL_OK when taken, CL_AGAIN when it cannot be taken now (nothing was kept; try after progress). Type 255 is
     * the transports' own (heartbeats): CL_INVALID. CL_PEER_LOST after lost().
     */
    int (*send)(cl_link *link, const cl_frame *frame, const void *payload);
    /* Moves what can be moved without blocking, both ways. Returns the number of events; 0: nothing to do now. */
    int (*progress)(cl_link *link);
    /*
     * Prepares to sleep: from CL_OK on, an arrival or new room rings the doorbell or makes pollfd ready.
     * CL_AGAIN: there is something to do now, do not sleep. disarm undoes it; both may be called repeatedly.
     */
    int (*arm)(cl_link *link);
    void (*disarm)(cl_link *link);
    /* A descriptor to poll while armed and the epoll events to poll it for; -1 if the doorbell alone wakes (shm). */
    int (*pollfd)(cl_link *link, uint32_t *events);
    /*
     * Stops touching the caller's memory for frames of this key: unsent frames are finished from a private copy (the
     * stream of frames stays whole), and a direct place given by begin for a frame now coming in is given up (the rest
     * of that frame is handed over in pieces). sent() is not called for them. A peer that is writing into memory that was
     * lent to it is waited for: it is in the midst of one piece.
     */
    void (*forget)(cl_link *link, uint64_t key);
    /* Bytes accepted and not yet given to the peer or the kernel: 0 means flushed. */
    size_t (*pending)(const cl_link *link);
    /* Frees the link and all that it owns; unsent frames are dropped without sent(). Not called inside the sink but in lost(). */
    void (*close)(cl_link *link);
    /* In a forked child: closes descriptors of this process without a word to the peer, frees nothing shared. */
    void (*forked)(cl_link *link);
    /* Called about every settings.heartbeat_ms with the engine's clock; NULL if the transport needs none. */
    void (*tick)(cl_link *link, double now_s);
} cl_transport;

/* The first member of every transport's own link structure. */
struct cl_link {
    const cl_transport *transport;
    const cl_sink *sink;
    void *owner;
    int32_t peer;
    cl_lent lent;           /* of the piece that is being handed over */
    uint64_t window_nbytes; /* as much may be posted at once if it is more than settings.inflight_nbytes */
};

/* Each transport exports its table; the constructors take their arguments from commlib.h's attach functions. */
extern const cl_transport cl_shm_transport;
extern const cl_transport cl_tcp_transport;
extern const cl_transport cl_sim_transport;
extern const cl_transport cl_mpi_transport;

/* tcp.c: takes ownership of the socket in every case. The caller sets transport-independent fields. */
int cl_tcp_link_new(int socket, const cl_settings *settings, cl_link **link);

/* tcp.c: what the kernel may hold of one connection that is not yet on the wire, in bytes: bandwidth x delay, between bounds. */
int cl_tcp_unsent_nbytes(const cl_settings *settings, double bytes_per_s, double delay_s);

#endif
