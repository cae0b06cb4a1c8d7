/*
 * engine.h: the engine's own structures, shared by its files and by nobody else. Transports see transport.h only.
 *
 * The engine is a state machine: no thread, no clock, no I/O of its own. Everything below is touched by the one owner
 * of the engine at a time, except what is marked atomic.
 */
#ifndef CL_ENGINE_H
#define CL_ENGINE_H

#include <stdatomic.h>
#include <stdbool.h>

#include "commlib.h"
#include "heap.h"
#include "reduce.h"
#include "table.h"
#include "transport.h"

#define CL_TRY(call)                   \
    do {                               \
        int cl_try_status = (call);    \
        if (cl_try_status != CL_OK)    \
            return cl_try_status;      \
    } while (0)

enum { CL_TEXT_NBYTES = 256, CL_ERROR_NBYTES = 768 };

typedef enum {
    CL_FRAME_POST = 1,      /* metadata; arg steps of each of the segments [0, segment) are granted */
    CL_FRAME_GRANT,         /* arg steps of `segment` are granted in all */
    CL_FRAME_DATA,          /* payload of the step-th send of `segment` to this peer */
    CL_FRAME_CREDIT,        /* arg bytes of eager budget come back */
    CL_FRAME_EXCHANGE_UP,   /* entries of a subtree */
    CL_FRAME_EXCHANGE_DOWN, /* all entries */
    CL_FRAME_TICKET,        /* `segment` may be moved now, by whoever takes tickets */
    CL_FRAME_JOIN,          /* join.c's words */
    CL_FRAME_ANNOUNCE,      /* payload: an operation that the sender has submitted, for a rank that has joined */
    CL_FRAME_QUERY,         /* how is it with this key? */
    CL_FRAME_ANSWER,        /* step: stall.c's answer; arg: how many operations the sender waits for; payload: the oldest of them */
    CL_FRAME_MISMATCH,      /* payload: what the sender submitted under this key */
    CL_FRAME_FAIL,          /* arg: status; step: rank to blame; payload: text */
    CL_FRAME_LOST,          /* arg: the lost rank; payload: text */
    CL_FRAME_BYE            /* the sender shuts down; nothing follows */
} cl_frame_type;

enum { CL_FLAG_EAGER = 1, CL_FLAG_WANT = 2 };

/* ---- plan: packed steps of one rank, and what follows from them -------------------------------------------- */

typedef struct {
    int32_t rank;
    uint32_t nsends, nrecvs;
    uint32_t *sends, *recvs; /* indices of steps */
    uint32_t initial_grant;  /* leading receives that wait for nothing but sends that are open from the start */
    bool sends_first;        /* the first step with this peer is a send: metadata may travel with it */
} cl_plan_peer;

struct cl_plan {
    atomic_int references;
    int32_t nchunks, inputs;
    bool single_chunks; /* every step moves one chunk: chunks may be cut into segments each for itself */
    uint32_t nsteps, npeers;
    cl_step *steps;
    uint32_t *peer_of;   /* step -> index into peers */
    uint32_t *pair_index; /* step -> its number among the sends to (receives from) that peer */
    uint32_t *needs;     /* step -> number of steps it depends on */
    uint32_t *dependents_end; /* dependents of step i: dependents[dependents_end[i - 1] .. dependents_end[i]) */
    uint32_t *dependents;
    uint32_t *answer;    /* of a send, the receive that brings the same chunks back from the same peer, and waits for nothing
                            else: until then nobody looks at them. Of a recv_reduce, such a send. + 1; 0: there is none */
    uint32_t *last_writer; /* chunk -> the last step that writes it, + 1; 0: none does */
    cl_plan_peer *peers;
};

/* ---- operation --------------------------------------------------------------------------------------------- */

typedef enum {
    CL_STEP_WAITING = 0,  /* for steps that it depends on */
    CL_STEP_OPEN,         /* may go; a send still needs a grant */
    CL_STEP_POSTED,       /* a send in the ready heap or on its link */
    CL_STEP_POSTED_EAGER, /* ditto, on the eager budget and without a grant */
    CL_STEP_DONE
} cl_step_state;

typedef struct {
    bool active;          /* its gate is open */
    uint32_t remaining;   /* steps not done */
    uint32_t *waiting;    /* per step: unmet dependencies; NULL before the start and after the end */
    uint32_t *blocked;    /* per step: of these, the ones that are not sends already open. A receive that waits for nothing
                             but such sends may be granted: its bytes are staged until the sends have left, so that two
                             ranks that exchange the same chunk do not wait for each other */
    uint8_t *state;       /* per step: cl_step_state */
    uint32_t *granted_out; /* per plan peer: sends that the peer can take */
    uint32_t *granted_in; /* per plan peer: receives that we have granted, or could */
    const uint8_t *kept;  /* where the peer's payload lies that holds the result of a step too, NULL: none does, */
    uint32_t kept_for;    /* and the send that answers with it */
} cl_segment;

/* A frame that came before it could be used. */
typedef struct cl_kept {
    struct cl_kept *next;
    int32_t peer;
    cl_frame frame;
    uint8_t *data; /* frame.nbytes, owned; NULL if none */
} cl_kept;

typedef struct {
    uint8_t *data; /* owned */
    uint32_t nbytes;
} cl_entry;

typedef struct {
    int32_t my_index;
    uint32_t awaited;   /* children whose entries have not come */
    bool came[8];       /* per child; 8 is the tree's fan-out */
    cl_entry up;        /* entries of my subtree, as they travel (not at the root) */
    cl_entry *entries;  /* per member */
    uint32_t nentries;
    bool finished;
} cl_exchange;

typedef struct cl_stall cl_stall; /* stall.c */

struct cl_operation {
    atomic_int references;
    atomic_int done;             /* futex: 0 running, 1 done; what is written before is readable after */
    atomic_int waiters;          /* callers that sleep on it */
    _Atomic(cl_queue *) queue;   /* who is told of the end; NULL: nobody, or he was */
    void *token;
    struct cl_operation *queue_next;
    struct cl_operation *inbox_next;
    struct cl_operation *gate_next;
    atomic_int gate_queued;
    atomic_uchar *gates;         /* per segment, set by any thread */
    cl_engine *engine;
    struct cl_operation *previous, *next; /* the engine's list of posted operations */
    cl_request request;          /* text, plan, splits, parts, members, listeners point to our copies */
    cl_meta meta;
    cl_plan *plan;
    uint64_t *chunk_first, *chunk_end; /* elements, per chunk, of uneven operations; NULL: equal parts */
    bool travels_for_nothing;    /* it has no elements, but all ranks are to hear of each other */
    bool laid_out_later;         /* segments are known after an exchange, and in blocks of their own */
    uint32_t nsegments;
    cl_segment *segments;
    uint32_t *single;            /* the steps of an only segment that was known at once, else NULL */
    uint8_t *verified, *wants, *starved; /* per plan peer */
    uint64_t *posted;            /* per plan peer: bytes accepted by the link and not yet sent */
    /* From here on: what one run leaves behind, zero before the next; see cl_operation_renew. */
    bool started, eager;
    bool stands_in;          /* for a part that this rank, which has joined, does not have */
    uint32_t epoch;          /* how many joins were before it */
    uint64_t sequence;
    uint8_t *input, *output; /* bases of input and output chunks; both NULL: timing only */
    uint8_t *memory;         /* the result, if the engine allocated it */
    void *result;
    uint64_t result_count;
    uint64_t *member_counts;
    uint32_t segments_done;
    uint32_t handed_out;     /* tickets, at members[0] */
    uint32_t unverified;
    cl_kept *kept;
    cl_exchange *exchange;
    cl_stall *stall;         /* what is known of those that have not submitted it; NULL: nobody asked */
    double submitted_s, started_s, done_s;
    int status, blamed;
    char *error;             /* why it failed; owned */
};

/* ---- tickets ----------------------------------------------------------------------------------------------- */

typedef struct cl_granted {
    struct cl_granted *next;
    cl_operation *operation; /* held */
    uint32_t segment;
} cl_granted;

typedef struct {
    cl_heap waiting;      /* at members[0]: operations with segments to hand out */
    uint32_t outstanding; /* handed out and not come back */
    _Atomic(cl_granted *) granted; /* newest first, for the thread that takes them */
    cl_granted *taken;    /* that thread's own: oldest first */
    atomic_int events;    /* futex: counts what that thread should look at */
    atomic_int closed;    /* cl_status: no tickets will come */
} cl_tickets;

/* ---- stalls -------------------------------------------------------------------------------------------------- */

enum { CL_REPORT_NBYTES = 1024 };

typedef struct cl_report {
    struct cl_report *next;
    char text[CL_REPORT_NBYTES];
} cl_report;

typedef struct {
    _Atomic(cl_report *) reports; /* newest first, for the thread that tells people */
    atomic_uint nreports;
    cl_report *taken;             /* that thread's own: oldest first */
    atomic_int events;            /* futex: counts what that thread should look at */
    atomic_int closed;            /* cl_status: there will be no more */
} cl_stalls;

/* ---- joining ------------------------------------------------------------------------------------------------- */

typedef struct {
    bool joined;           /* this rank, in this epoch */
    uint32_t epoch;        /* joins of all ranks that have ended here */
    uint32_t njoined;      /* peers that have joined in this epoch */
    uint32_t announced_by; /* peers that have announced what they had in flight when this rank joined */
    uint32_t arrived[2];   /* at the first rank: ranks that have joined in an even, an odd epoch */
    int32_t last;          /* who joined last; -1: not all have */
    _Atomic(cl_announced *) told; /* newest first, for the thread that joins */
    cl_announced *taken;   /* that thread's own: oldest first */
    atomic_int events;     /* futex: counts what that thread should look at */
    atomic_int closed;     /* cl_status: not all will join */
    int32_t blamed;
} cl_joining;

/* ---- peers and engine -------------------------------------------------------------------------------------- */

typedef struct cl_outgoing {
    struct cl_outgoing *next;
    cl_frame frame;
    uint8_t *payload; /* owned */
} cl_outgoing;

typedef struct {
    cl_outgoing *first, *last;
} cl_outgoing_queue;

typedef enum { CL_INCOMING_DISCARD = 0, CL_INCOMING_APPLY, CL_INCOMING_KEEP } cl_incoming_mode;

typedef struct {
    cl_link *link; /* NULL: none, or closed */
    bool left, lost;
    uint32_t joins;       /* how often it has joined */
    bool dirty;           /* in the engine's list of peers to pump */
    bool watched;         /* by epoll: progress of the link can do nothing while it is not awake */
    atomic_bool awake;    /* its descriptor became ready, or something was sent */
    cl_heap ready;        /* granted sends */
    cl_outgoing_queue told; /* frames of the engine itself, before any data */
    cl_outgoing_queue leaving; /* of these, the ones whose payload the link is reading */
    bool owes_lost, owes_bye;  /* last words, which follow what is told and need no memory */
    uint64_t posted_nbytes;    /* data accepted by the link and not yet sent */
    uint64_t eager_used;       /* eager bytes on their way */
    uint64_t eager_returnable; /* eager bytes consumed here and not yet given back */
    cl_incoming_mode mode;     /* of the frame now coming in */
    cl_operation *operation;
    uint32_t segment, step;
    cl_kept *keeping;
    char host[64]; /* where it lives, for people; empty if nobody has said */
} cl_peer;

enum { CL_FAILED_KEYS = 1024, CL_DONE_KEYS = 4096 };

struct cl_engine {
    int32_t rank, size;
    cl_settings settings;
    double (*clock)(void *argument);
    void *clock_argument;
    const cl_kernels *kernels;
    _Atomic(cl_operation *) inbox; /* submitted, newest first */
    _Atomic(cl_operation *) gate_inbox;
    cl_table operations; /* key -> cl_operation, posted */
    cl_table early;      /* key -> cl_kept list, not posted */
    cl_table failed;     /* keys that failed lately: what still comes for them is dropped */
    uint64_t failed_keys[CL_FAILED_KEYS];
    uint32_t nfailed;
    uint32_t ndone;
    cl_operation *first;
    uint64_t sequence;
    /* Submitted and not done: one more before the operation is in the inbox, one less before its `done` is set. Read without
     * order, as a hint whether to sleep idle: a 0 that is too old does no harm, as whoever arms looks into the inbox last, and
     * whoever submits rings after that; one that is too high costs a wake-up. */
    atomic_uint unfinished;
    cl_peer *peers;
    int32_t *dirty, ndirty;
    int health, blamed;
    bool leaving;
    bool somebody_left; /* of the peers */
    cl_tickets tickets;
    cl_stalls stalls;
    cl_joining join;
    char health_text[CL_ERROR_NBYTES];
    const char *health_reason; /* the end of it: why the rank was lost */
    cl_stats stats;
    /* Told of each completion; the simulator's hook, else NULL. */
    void (*on_done)(cl_engine *engine, cl_operation *operation);
    /* Called after a submission, from any thread: the thread's doorbell, or the simulator's list of who has work. */
    void (*wake)(cl_engine *engine);
    void *driver; /* the simulator */
    struct cl_runtime *runtime; /* thread.c; NULL: driven by hand */
    struct cl_shm *shm;         /* shm.c: this rank's rings */
    struct cl_mpi *mpi;         /* mpi.c: the library */
    bool mpi_ended;
    atomic_int forked;
    atomic_int ended; /* shut down: links are closed, nothing moves any more */
    uint64_t done_keys[CL_DONE_KEYS]; /* the last keys that were completed: whoever asks learns that all have submitted them */
};

/* plan.c */
void cl_plan_hold(cl_plan *plan);

/* engine.c */
void cl_engine_attach(cl_engine *engine, int32_t peer, cl_link *link);
/* Takes in submissions and opened gates, and posts what may be sent. No I/O but through link->send. */
void cl_engine_flush(cl_engine *engine);
/* One round over all links, then a flush. Returns the number of events. */
int cl_engine_progress(cl_engine *engine);
/* The transport's send, remembering that the link now has something to do. */
int cl_peer_send(cl_peer *peer, const cl_frame *frame, const void *payload);
void cl_engine_tick(cl_engine *engine);
bool cl_engine_has_submissions(cl_engine *engine);
void cl_engine_touch(cl_engine *engine, int32_t peer);
void cl_engine_lost(cl_engine *engine, int32_t rank, const char *reason, bool tell);
void cl_engine_leave(cl_engine *engine);
size_t cl_engine_pending(cl_engine *engine);
/* Links are closed, and what they leave to the end is waited for at most `linger_ms`. */
void cl_engine_close_links(cl_engine *engine, int32_t linger_ms);
void cl_engine_post(cl_engine *engine, cl_operation *operation);
void cl_engine_failed_key(cl_engine *engine, uint64_t key);
cl_operation *cl_engine_find(cl_engine *engine, uint64_t key);

/* request.c: an operation's memory, from request to release */
int cl_operation_new(cl_engine *engine, const cl_request *request, cl_operation **operation);
/* As new, for another run under this key. CL_AGAIN: somebody still holds it, or it is of a kind that cannot be. */
int cl_operation_renew(cl_operation *operation, uint64_t key);
void cl_operation_hold(cl_operation *operation);
int cl_operation_layout(cl_operation *operation);
/* What the steps of one segment take. */
size_t cl_segment_nbytes(const cl_plan *plan);
void cl_chunks_of(const cl_operation *operation, uint32_t segment, const cl_step *step, uint64_t *first, uint64_t *count);

/* operation.c: the data path */
/* Fails it everywhere if it cannot start. */
void cl_operation_start(cl_operation *operation);
void cl_operation_open_gates(cl_operation *operation);
void cl_operation_on_post(cl_operation *operation, int32_t peer, const cl_frame *frame);
void cl_operation_on_grant(cl_operation *operation, int32_t peer, const cl_frame *frame);
/* The step that a data frame feeds if it can be taken right now, else CL_AGAIN. */
int cl_operation_accepts(cl_operation *operation, int32_t peer, const cl_frame *frame, uint32_t *step);
/* True if the frame was granted: it may come before its step can take it, and is staged then. */
bool cl_operation_granted(const cl_operation *operation, int32_t peer, const cl_frame *frame);
uint8_t *cl_operation_place(const cl_operation *operation, uint32_t segment, uint32_t step);
void cl_operation_step_done(cl_operation *operation, uint32_t segment, uint32_t step);
void cl_operation_keep(cl_operation *operation, cl_kept *kept);
/* The frame of a send that was taken from the ready heap, and where its payload lies. */
const void *cl_operation_frame(cl_operation *operation, uint32_t segment, uint32_t step, cl_frame *frame);
void cl_operation_fail(cl_operation *operation, int status, int32_t blamed, const char *text);
bool cl_operation_awaits(const cl_operation *operation, int32_t peer);
void cl_operation_complete(cl_operation *operation, int status);

/* arithmetic.c: what is added, scaled and copied */
/* My own contribution goes into the output, scaled: the plan works in place there. */
void cl_operation_contribute(cl_operation *operation, uint32_t segment);
/* What came for a step, or a part of it, goes to its place. */
void cl_operation_apply(cl_operation *operation, uint32_t segment, uint32_t step, size_t offset, const void *data,
                        size_t nbytes);
/* All that came for a step lies in memory that was lent: true if the result was written there, too, and will be sent from it. */
bool cl_operation_apply_there(cl_operation *operation, uint32_t segment, uint32_t step, void *data, size_t nbytes);
/* What of a segment no step has scaled. */
void cl_operation_scale_rest(cl_operation *operation, uint32_t segment);

/* control.c: the control plane's links */
void cl_exchange_start(cl_operation *operation);
void cl_exchange_on_up(cl_operation *operation, int32_t peer, const uint8_t *data, size_t nbytes);
void cl_exchange_on_down(cl_operation *operation, const uint8_t *data, size_t nbytes);
bool cl_exchange_awaits(const cl_operation *operation, int32_t peer);
void cl_exchange_free(cl_operation *operation);
void cl_exchange_tell_children(cl_operation *operation, const cl_frame *frame, const void *payload);
void cl_control_mismatch(cl_operation *operation, int32_t peer);
void cl_control_on_mismatch(cl_operation *operation, int32_t peer, const char *text);
void cl_control_fail_everywhere(cl_operation *operation, int status, int32_t blamed, const char *text);

/* ticket.c: turns for operations whose bytes somebody else moves */
int cl_tickets_start(cl_operation *operation);
void cl_tickets_on_ticket(cl_operation *operation, uint32_t segment);
/* Counts what was returned; the operation is done with its last ticket. */
void cl_tickets_collect(cl_operation *operation);
/* The operation fails: its tickets come back by themselves. */
void cl_tickets_forget(cl_operation *operation);
void cl_tickets_close(cl_engine *engine, int status);
void cl_tickets_free(cl_engine *engine);

/* join.c: ranks that have run out of work */
/* Before it begins: tells those who have joined. */
void cl_join_announce(cl_operation *operation);
/* Both: false if the peer breaks the protocol. */
bool cl_join_on_word(cl_engine *engine, int32_t peer, const cl_frame *frame);
bool cl_join_on_announcement(cl_engine *engine, int32_t peer, const cl_frame *frame, const uint8_t *data);
void cl_join_on_bye(cl_engine *engine, int32_t peer);
void cl_join_close(cl_engine *engine, int status, int32_t blamed);
void cl_join_free(cl_engine *engine);

/* stall.c: operations that some rank has not submitted */
/* How often to look; 0: never. */
double cl_stall_period_s(const cl_engine *engine);
void cl_stall_look(cl_engine *engine, double now_s);
#define CL_NEVER_S 1e300
/* When there will be something to find, if nothing else happens; CL_NEVER_S: never. */
double cl_stall_due_s(const cl_engine *engine);
void cl_stall_on_query(cl_engine *engine, int32_t peer, const cl_frame *frame);
/* `text` is what the peer waits for; NULL: nothing. */
void cl_stall_on_answer(cl_engine *engine, int32_t peer, const cl_frame *frame, const char *text);
void cl_stall_close(cl_engine *engine, int status);
void cl_stall_free(cl_engine *engine);

/* frames.c: what came in */
extern const cl_sink cl_engine_sink;
void cl_engine_replay(cl_engine *engine, cl_operation *operation);
void cl_kept_free(cl_kept *kept);
/* Gives back the eager budget that a frame took. */
void cl_engine_return_credit(cl_engine *engine, int32_t peer, const cl_frame *frame);
/* What came for an operation before it could be used gives its eager budget back. */
void cl_early_drop(cl_engine *engine, uint64_t key);
void cl_incoming_drop(cl_engine *engine, const cl_operation *operation);

/* outgoing.c: frames of the engine's own, before all data */
/* Queues a frame; `payload` is copied. Without memory for it this engine is lost, and says so. */
void cl_engine_tell(cl_engine *engine, int32_t peer, const cl_frame *frame, const void *payload);
void cl_engine_tell_listeners(const cl_operation *operation, const cl_frame *frame, const void *payload);
/* Gives the link what is queued, then the last words. False: it takes no more now. */
bool cl_outgoing_pump(cl_engine *engine, cl_peer *peer);
bool cl_outgoing_waits(const cl_peer *peer);
/* A frame's payload was sent. */
void cl_outgoing_sent(cl_peer *peer, const cl_frame *frame);
/* The link stops touching payloads of this key. */
void cl_engine_forget(cl_engine *engine, int32_t peer, uint64_t key);
void cl_outgoing_free_all(cl_peer *peer);

/* queue.c */
/* The operation is done: tells it to who wants to know. */
void cl_queue_landed(cl_operation *operation);

/* thread.c */
/* Has something done by the owner, from any thread. CL_FORKED, CL_SHUTDOWN: it was not. */
int cl_owned(cl_engine *engine, void (*act)(cl_engine *engine, void *argument), void *argument);
/* Posts an operation that the caller goes on holding. */
void cl_enqueue(cl_engine *engine, cl_operation *operation);
void cl_runtime_completed(cl_operation *operation);
/* Tells the owner, from any thread, that segments are ready: their gates, or tickets that come back. */
void cl_operation_open(cl_operation *operation, uint32_t first, uint32_t end);
void cl_runtime_free(cl_engine *engine);

/* shm.c */
void cl_shm_free(cl_engine *engine);
/* In a forked child, which has not got the memory: closes its descriptors. */
void cl_shm_forked(cl_engine *engine);
/* This rank's "ring my doorbell" flag, which its peers see, and its doorbell; false: there is no shared memory. */
bool cl_shm_doorbell(cl_engine *engine, atomic_int **sleeping, int *doorbell);
/* The pidfd of a link's peer, or -1. */
int cl_shm_pidfd(const cl_link *link);
/* Wakes whoever sleeps behind a flag, once per sleep. */
void cl_ring(atomic_int *sleeping, int doorbell);

/* What a rank's flag says to those who have something for it. */
enum {
    CL_AWAKE = 0, /* somebody moves data, and looks once more before he stops: no need to ring */
    CL_ASLEEP,    /* ring */
    CL_IDLE       /* nothing is in flight here, or a caller polls: ring only for what is no operation's business */
};

#endif
