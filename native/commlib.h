/*
 * commlib.h: everything that Python may call in the engine.
 *
 * Plain C without macros or conditions, because two readers parse it: the compiler and cffi (which is given no '#' lines).
 * Buffers cross as (address, count, dtype); nothing here knows a framework, an environment variable or a host name.
 * Every function that can fail returns a cl_status; data goes through out-pointers.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* ---- words ------------------------------------------------------------------------------------------------- */

typedef enum {
    CL_OK = 0,
    CL_AGAIN,      /* not now: nothing was done, try later */
    CL_INVALID,    /* an argument is wrong; nothing was done */
    CL_NO_MEMORY,  /* allocation failed */
    CL_SYSTEM,     /* a system call failed; the text names it */
    CL_MISMATCH,   /* ranks submitted different things under one key */
    CL_PEER_LOST,  /* a rank died or cannot be reached */
    CL_PEER_LEFT,  /* a rank shut down while it was still needed */
    CL_SHUTDOWN,   /* this engine was shut down */
    CL_JOINED,     /* a rank has joined, and the operation cannot do without it */
    CL_FORKED,     /* called in a forked child, which holds no engine */
    CL_STALLED,    /* a rank did not submit the operation within settings.stall_shutdown_s */
    CL_STATUS_END
} cl_status;

typedef enum {
    CL_UINT8 = 0, CL_INT8, CL_INT16, CL_INT32, CL_INT64,
    CL_FLOAT16, CL_BFLOAT16, CL_FLOAT32, CL_FLOAT64, CL_BOOL,
    CL_DTYPE_END
} cl_dtype;

/* Average is SUM with a postscale of 1/size. On CL_BOOL: SUM and MAX are "or", PRODUCT and MIN are "and". */
typedef enum { CL_SUM = 0, CL_MIN, CL_MAX, CL_PRODUCT, CL_REDUCTION_END } cl_reduction;

typedef enum {
    CL_ALLREDUCE = 0, CL_BROADCAST, CL_ALLGATHER, CL_REDUCESCATTER, CL_ALLTOALL, CL_BARRIER,
    CL_EXCHANGE,   /* control plane: every member's bytes, told to every member */
    CL_TICKET,     /* control plane: turns in one order that all members share, for bytes that somebody else moves */
    CL_KIND_END
} cl_kind;

typedef enum { CL_SEND = 0, CL_RECV, CL_RECV_REDUCE, CL_STEP_KIND_END } cl_step_kind;

typedef struct cl_engine cl_engine;
typedef struct cl_plan cl_plan;
typedef struct cl_operation cl_operation;

/* "operation failed: rank 2 was lost" and the like, without the text of one case. Never NULL. */
const char *cl_status_text(int status);

/* ---- plans -------------------------------------------------------------------------------------------------- */

/* One step of one rank: `kind` of the chunks [first_chunk, end_chunk) with `peer` (a rank of the world). */
typedef struct { int32_t kind; int32_t peer; int32_t first_chunk; int32_t end_chunk; } cl_step;

/*
 * Packs a plan; dependencies between its steps are inferred from the chunks that they read and write.
 * The i-th send of rank a to rank b is the i-th receive of b from a. `inputs` chunks [0, inputs) are read from the
 * input buffer (all-to-all), the rest lives in the output buffer; 0 for every in-place algorithm.
 * Out: *plan, owned by the caller; it may be freed while operations still run on it (it is counted).
 * Returns: CL_INVALID for an empty or backward chunk range, an unknown kind or a peer < 0.
 */
int cl_plan_new(const cl_step *steps, size_t nsteps, int32_t nchunks, int32_t inputs, cl_plan **plan);
void cl_plan_free(cl_plan *plan);

/* ---- pieces -------------------------------------------------------------------------------------------------- */

/* Copies pieces that lie elsewhere (addresses, and bytes of each) into one that holds them in order, or back; no overlap. */
void cl_gather(void *whole, const uintptr_t *pieces, const uint64_t *nbytes, size_t count);
void cl_scatter(const void *whole, const uintptr_t *pieces, const uint64_t *nbytes, size_t count);

/* ---- kernels ------------------------------------------------------------------------------------------------ */

/* acc[i] = acc[i] (reduction) in[i], with this processor's best kernel. 16-bit floats are added in fp32, rounded once. */
int cl_reduce(int32_t dtype, int32_t reduction, void *acc, const void *in, size_t count);
/* out[i] = in[i] * factor; out may be in. Integers and fp64 multiply in fp64, other floats in fp32; integers round toward zero. */
int cl_scale(int32_t dtype, void *out, const void *in, size_t count, double factor);
/* The kernel sets compiled in, best first ("avx512", "avx2", "neon", "plain"); NULL past the end. */
const char *cl_kernels_name(int index);
/* 1 if this processor can run the set. */
int cl_kernels_supported(int index);
/* As cl_reduce and cl_scale, with one given set: for tests and benchmarks. CL_INVALID if it is not supported here. */
int cl_reduce_with(int index, int32_t dtype, int32_t reduction, void *acc, const void *in, size_t count);
/* As cl_reduce_with, and in[i] = acc[i]: for memory that two ranks share. */
int cl_reduce_both_with(int index, int32_t dtype, int32_t reduction, void *acc, void *in, size_t count);
int cl_scale_with(int index, int32_t dtype, void *out, const void *in, size_t count, double factor);
size_t cl_dtype_nbytes(int32_t dtype);

/*
 * For Adasum, on floats: sums[0..3) = a.a, a.b, b.b, in fp64 and in one order whatever the memory's alignment; and
 * out[i] = ca * a[i] + cb * b[i], of 16-bit floats in fp32, rounded once; out may be a or b. CL_INVALID: no floats.
 */
int cl_adasum_dots(int32_t dtype, const void *a, const void *b, size_t count, double *sums);
int cl_adasum_mix(int32_t dtype, void *out, const void *a, const void *b, size_t count, double ca, double cb);

/* ---- engine ------------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t eager_nbytes;         /* operations up to this size send without waiting for a grant */
    uint64_t eager_budget_nbytes;  /* eager bytes on the way to one peer, at most; beyond it they wait for grants */
    uint64_t inflight_nbytes;      /* data posted to one peer's link and not yet sent, at most (one step may exceed it) */
    uint64_t inflight_most_nbytes; /* tcp: so far what the kernel holds unsent may grow with bandwidth x delay */
    uint32_t spin_us;              /* a waiting caller polls this long before it blocks */
    uint32_t heartbeat_ms;         /* tcp: an idle link says that it lives, this often */
    uint32_t lost_ms;              /* tcp: a link silent this long is lost, or one whose bytes nobody acknowledges */
    uint32_t shm_ring_nbytes;      /* shm: bytes of one direction of one link; a power of two, at least 4096 */
    double stall_warning_s;        /* an operation that some rank has not submitted by then is reported; 0: never */
    double stall_shutdown_s;       /* and fails on all ranks by then; 0: never */
} cl_settings;

/*
 * An engine without links and without a thread. Returns CL_INVALID if rank is outside [0, size) or a setting is 0
 * where it must not be (all but spin_us and eager_nbytes).
 */
int cl_engine_new(int32_t rank, int32_t size, const cl_settings *settings, cl_engine **engine);

/*
 * shm, two calls: (1) make this rank's memory, which holds its outgoing rings to all of `npeers` local peers, and hand
 * out its memfd and its doorbell (eventfd), which the caller passes to every peer over a local socket, with its own slot:
 * the peer's index in [0, npeers) inside this memory; (2) attach each peer. The memfd and the doorbell of (1) stay the
 * engine's: pass them on, do not close them.
 * cl_shm_attach takes ownership of `memfd`, `doorbell` and `pidfd` (pidfd of the peer, -1 if the kernel has none) in every case.
 * `my_slot` is this rank's slot in the peer's memory, `peer_slot` the peer's slot in ours.
 */
int cl_shm_create(cl_engine *engine, int32_t npeers, int *memfd, int *doorbell);
int cl_shm_attach(cl_engine *engine, int32_t peer, int memfd, int doorbell, int pidfd, int32_t my_slot, int32_t peer_slot);
/*
 * Memory that all ranks of this host map, of at least `nbytes`, allocated, zero and page-aligned: operations on it copy nothing
 * on their way to those ranks. Out: *block, which may outlive the engine. In a forked child the memory is the parent's,
 * and cl_shared_free does nothing.
 * Returns: CL_INVALID without cl_shm_create; CL_NO_MEMORY if there is no memory, or if limits (ulimit -v, -f) forbid a heap.
 */
typedef struct cl_shared cl_shared;
int cl_shared_new(cl_engine *engine, uint64_t nbytes, cl_shared **block);
void *cl_shared_address(const cl_shared *block);
/* No operation may be running on it. */
void cl_shared_free(cl_shared *block);
/* tcp: takes ownership of a connected socket, in every case. */
int cl_tcp_attach(cl_engine *engine, int32_t peer, int socket);
/* The host of a rank, for errors that name the rank; cut after 63 bytes. Before cl_engine_start. CL_INVALID: no such rank. */
int cl_engine_name_host(cl_engine *engine, int32_t rank, const char *host);

/*
 * mpi: a library that the process has loaded and initialised, given by the addresses of its functions (MPI_Isend, ...) and
 * by its handles as C passes them: ints, or pointers. The communicator is ours alone, returns errors, and has the engine's
 * ranks. Calls come from whoever owns the engine, one at a time: the library grants MPI_THREAD_SERIALIZED at least.
 */
typedef void (*cl_mpi_function)(void);
typedef struct {
    cl_mpi_function isend, issend, irecv, testsome, test, cancel, test_cancelled, error_string, abort;
    uint64_t communicator, byte; /* MPI_BYTE */
    uint32_t handle_nbytes, status_nbytes;
} cl_mpi_library;
/* Before the first cl_mpi_attach. CL_INVALID if there is a library already, or its handles have no known size. */
int cl_mpi_create(cl_engine *engine, const cl_mpi_library *library);
int cl_mpi_attach(cl_engine *engine, int32_t peer);
/* After cl_engine_shutdown. 1: the communicator holds nothing of ours, and may be freed; else it must be left alone. */
int cl_mpi_ended(const cl_engine *engine);

/* Starts the progress thread; from here on the engine lives by itself. All links must be attached. */
int cl_engine_start(cl_engine *engine);
/*
 * Says goodbye to the peers (they are told which operations they need not wait for), fails what is in flight with
 * CL_SHUTDOWN, flushes for at most `linger_ms`, stops the thread and closes all links. Idempotent.
 */
int cl_engine_shutdown(cl_engine *engine, int32_t linger_ms);
/* Frees a shut-down engine. Operations that the caller still holds stay valid. */
void cl_engine_free(cl_engine *engine);
/* For a forked child: closes this process's copies of descriptors and touches nothing shared. The engine is dead there. */
void cl_engine_forked(cl_engine *engine);
/* The first failure that ended this engine (a lost peer), CL_OK while it is well. *text lives as long as the engine. */
int cl_engine_health(cl_engine *engine, const char **text, int32_t *peer);

typedef struct {
    uint64_t operations, failed;         /* completed; of these with an error */
    uint64_t sent_nbytes, received_nbytes;
    uint64_t eager_kept, eager_starved;  /* eager messages that came early; that found no budget and fell back */
    uint64_t grants, frames;             /* grant frames sent; all frames sent */
} cl_stats;
void cl_engine_stats(cl_engine *engine, cl_stats *stats);

/* ---- operations --------------------------------------------------------------------------------------------- */

/*
 * What one rank asks for. Memory behind input, output and plan must live until the operation is done; the rest is copied.
 *
 * With `members` set (broadcast, all-gather, all-to-all, exchange), members first tell each other their `splits`
 * (control plane, a tree through members[0]), which also checks metadata on every rank before a byte moves:
 *   broadcast   no splits;
 *   all-gather  splits[0] = my element count. The result is allocated by the engine: all parts in member order;
 *   all-to-all  splits[j] = elements of `input` that go to member j, in order. Result: what I got, in member order;
 *   exchange    input/count = my bytes (CL_UINT8). Result: all members' bytes, in member order. No plan.
 *   ticket      any splits, or none. No plan, no memory: see cl_ticket. Result: all members' splits, in member order.
 * For all-gather and all-to-all, chunk j is member j's part (all-to-all: of the input; chunk n + j: of the result).
 * Reduce-scatter: parts = offsets of nchunks + 1; the engine reduces in a copy of input, the result is chunk `my_part`.
 */
typedef struct {
    uint64_t key;             /* equal on all ranks, unique in time */
    const char *text;         /* "allreduce 'layer1.weight' float32 (3, 4) sum": for error messages, cut at 255 bytes */
    int32_t kind, dtype, reduction, root;
    int64_t priority;         /* 0 is needed first */
    uint32_t shape_hash;      /* compared between ranks */
    uint32_t settings_hash;   /* compared between ranks */
    double prescale, postscale;
    cl_plan *plan;
    const void *input;        /* may be the output; NULL with NULL output: timing only, no payload (sim alone) */
    void *output;
    uint64_t count;           /* elements of input */
    const uint64_t *parts;    /* element offsets of the plan's chunks, nchunks + 1 of them; NULL: equal parts */
    int32_t my_part;          /* reduce-scatter, all-gather, all-to-all: my index among the members */
    uint64_t segment_count;   /* elements per segment; 0: one segment */
    int32_t gated;            /* 1: segments wait for cl_operation_ready */
    int32_t lazy;             /* 1: the caller waits next and moves the data itself; do not wake the thread for it */
    const int32_t *members;   /* see above; NULL: no exchange */
    int32_t nmembers;
    const uint64_t *splits;
    int32_t nsplits;
    const int32_t *listeners; /* who hears that the operation failed: the ranks of a smaller group; NULL: all */
    int32_t nlisteners;
    uint32_t hint;            /* the caller's own: told to ranks that have joined, see cl_announced */
} cl_request;

/*
 * Posts an operation and returns at once, from any thread.
 * Out: *operation, held by the caller until cl_operation_release.
 * Returns CL_INVALID for a request that contradicts itself, CL_FORKED in a forked child. A dead engine is no error
 * here: the operation is made, and has failed.
 */
int cl_submit(cl_engine *engine, const cl_request *request, cl_operation **operation);
/* Opens the gates of segments [first, end) of a gated operation. */
int cl_operation_ready(cl_operation *operation, uint32_t first, uint32_t end);
/*
 * Waits until the operation is done or `timeout_ms` has passed, and moves data meanwhile.
 * Returns CL_AGAIN on time-out, else the operation's status. A timed-out operation goes on.
 */
int cl_operation_wait(cl_operation *operation, int32_t timeout_ms);
/*
 * cl_submit (lazy, whatever the request says) and cl_operation_wait in one call, for operations that are made again and again.
 * Returns the operation's status, CL_AGAIN on time-out. Out: *operation is NULL after CL_OK, and if there is none
 * (CL_INVALID, CL_FORKED, CL_NO_MEMORY); else it is held by the caller, who may wait on or ask for the error.
 */
int cl_run(cl_engine *engine, const cl_request *request, int32_t timeout_ms, cl_operation **operation);
/*
 * As cl_submit (which wakes the thread) and cl_run (for at most 100 ms), with another key and other memory than the request
 * says: it may be shared between threads.
 */
int cl_submit_at(cl_engine *engine, const cl_request *request, uint64_t key, const void *input, void *output,
                 cl_operation **operation);
int cl_run_at(cl_engine *engine, const cl_request *request, uint64_t key, const void *input, void *output,
              cl_operation **operation);
/*
 * As cl_run, again and again on the same memory: adds `stride` to request->key, and uses the operation of the last call anew.
 * In, out: *operation, NULL before the first call, else what the last call left, done and with CL_OK; what is left after
 * any other status is the caller's, to wait on, ask for the error and release, and the next call begins with NULL.
 */
int cl_run_again(cl_engine *engine, cl_request *request, uint64_t stride, int32_t timeout_ms, cl_operation **operation);
/*
 * 1 if a peer's word of an operation that is not posted here has come (an exchange tells its first member of the others).
 * Looks at all links first; 0 in a forked child.
 */
int cl_engine_is_begun(cl_engine *engine, uint64_t key);
/* 1 if the operation is done, well or not. */
int cl_operation_done(cl_operation *operation);
/* CL_AGAIN while it runs, else its status; *text (never NULL) lives as long as the operation; *peer: the rank to blame or -1. */
int cl_operation_status(cl_operation *operation, const char **text, int32_t *peer);
/* Result memory of a kind that allocates it, and each member's number of elements (bytes for exchange). Valid until release. */
int cl_operation_result(cl_operation *operation, void **address, uint64_t *count, const uint64_t **member_counts);
/* Seconds on the engine's clock: submitted, first step begun, done (negative: not yet). `segments`: how many are done. */
void cl_operation_times(cl_operation *operation, double *submitted, double *started, double *done, uint32_t *segments);
void cl_operation_release(cl_operation *operation);
/* Seconds on the clock of cl_operation_times: CLOCK_MONOTONIC, or the simulated clock. */
double cl_engine_now(cl_engine *engine);

/* ---- queues of finished operations -------------------------------------------------------------------------- */

/*
 * For a thread that waits for whatever is done next. One thread takes from a queue; operations of any engine may be told to it.
 * It is freed after the engines of all that were told to it were shut down: who tells may still be about to wake the thread.
 */
typedef struct cl_queue cl_queue;
int cl_queue_new(cl_queue **queue);
void cl_queue_free(cl_queue *queue);
/* Once, after submission: when the operation is done, or at once if it is, it goes to the queue with its token. */
void cl_operation_tell(cl_operation *operation, cl_queue *queue, void *token);
/*
 * The operation that was done first. Out: *operation, to be released by the caller beside his own hold; *token.
 * CL_AGAIN: none came for timeout_ms, or the thread woke without reason.
 */
int cl_queue_next(cl_queue *queue, int32_t timeout_ms, cl_operation **operation, void **token);

/*
 * What a library needs that submits by itself and is not linked with the engine: a framework's op library, say, which gets
 * this table's address at run time. It works with one version and one size only, as requests cross as they are.
 */
enum { CL_FUNCTIONS_VERSION = 1 };
typedef struct {
    uint32_t version, nbytes; /* of this struct and cl_request together */
    int (*submit_at)(cl_engine *engine, const cl_request *request, uint64_t key, const void *input, void *output,
                     cl_operation **operation);
    void (*tell)(cl_operation *operation, cl_queue *queue, void *token);
    int (*status)(cl_operation *operation, const char **text, int32_t *peer);
    void (*release)(cl_operation *operation);
    const char *(*status_text)(int status);
    int (*queue_new)(cl_queue **queue);
    int (*queue_next)(cl_queue *queue, int32_t timeout_ms, cl_operation **operation, void **token);
} cl_functions;
const cl_functions *cl_engine_functions(void);

/*
 * Waits for the next report of an operation that waits for ranks which have not submitted it; one thread takes them all. Of the
 * ranks that wait, one reports, in the words that people read.
 * Out: text, cut to `nbytes`. Returns CL_AGAIN on time-out; CL_SHUTDOWN or CL_PEER_LOST once the engine has ended.
 */
int cl_stall_next(cl_engine *engine, int32_t timeout_ms, char *text, uint32_t nbytes);

/* ---- joining ------------------------------------------------------------------------------------------------ */

/* What another rank has submitted, while this one has joined and submits nothing. */
typedef struct cl_announced {
    struct cl_announced *next; /* the engine's own */
    int32_t from;
    cl_request request; /* as that rank gave it, without plan, memory and members; text and listeners live as long as this */
} cl_announced;

/*
 * Joins: from here on this rank submits nothing of its own, and stands in for its part in what others submit, until all ranks
 * have joined. Called again, it changes nothing. Returns CL_FORKED, CL_SHUTDOWN.
 */
int cl_join(cl_engine *engine);
/*
 * Waits for what is to be done while joined; one thread does it all.
 * Returns CL_OK and *told: an operation that this rank may not have submitted; give it to cl_stand_in or cl_join_refuse, or leave
 * it if it has; then to cl_announced_free. CL_OK and NULL: all have joined, *last was the last, and nothing more will be told.
 * CL_AGAIN on time-out; CL_PEER_LOST, CL_PEER_LEFT or CL_SHUTDOWN: *last has gone, and not all will join.
 */
int cl_join_next(cl_engine *engine, int32_t timeout_ms, cl_announced **told, int32_t *last);
/*
 * As cl_submit, of told->request, into which the caller has put plan, memory and members: a contribution that changes nothing,
 * which is not prescaled.
 */
int cl_stand_in(cl_engine *engine, const cl_announced *told, cl_operation **operation);
/* The operation fails on all ranks that submit it, with CL_JOINED and this text. */
int cl_join_refuse(cl_engine *engine, const cl_announced *told, const char *text);
void cl_announced_free(cl_announced *told);
/* After all have joined, and the caller's stand-ins are done: a new epoch begins, whose keys must differ from all before. */
int cl_join_end(cl_engine *engine);

/* ---- tickets ------------------------------------------------------------------------------------------------ */

/*
 * Libraries such as gloo, NCCL and MPI want every rank to begin its collectives in one order, while operations become
 * ready on every rank in an order of its own. An operation of kind CL_TICKET is such a foreign collective: once all
 * members have posted it (and agree on its metadata), members[0] hands out its segments as tickets, the most urgent
 * operation first, and few at a time: an urgent operation that comes later waits for no more than those. All members
 * get the same tickets in the same order. Whoever takes a ticket moves that segment's bytes and returns it; the
 * operation is done with its last ticket. All operations of this kind in one engine have the same members.
 */
typedef struct {
    cl_operation *operation; /* held for the caller until cl_ticket_return */
    uint64_t key;
    uint32_t segment;
    uint64_t first, count;   /* the segment's elements */
    const uint64_t *splits;  /* all members' splits, in member order; valid until cl_ticket_return */
    uint64_t nsplits;        /* how many these are in all */
} cl_ticket;

/*
 * Waits for this rank's next ticket; one thread takes them all.
 * Returns CL_AGAIN on time-out; CL_SHUTDOWN or CL_PEER_LOST once the engine has ended and no ticket is left.
 */
int cl_ticket_next(cl_engine *engine, int32_t timeout_ms, cl_ticket *ticket);
/* This rank is done with a ticket; the ticket of an operation that has failed meanwhile is returned like any other. */
void cl_ticket_return(const cl_ticket *ticket);
/*
 * For a caller that cannot move bytes any more: ends this engine as if its rank had been lost. Everything in flight
 * fails on every rank with CL_PEER_LOST, this rank to blame and `text` as the reason.
 */
void cl_engine_fail(cl_engine *engine, const char *text);

/* ---- simulation --------------------------------------------------------------------------------------------- */

typedef struct cl_sim cl_sim;
typedef struct {
    double alpha_s;            /* latency from the end of sending to the start of receiving */
    double beta_s_per_byte;    /* 1 / bandwidth; a rank sends one message at a time and receives one at a time */
    double gamma_s_per_byte;   /* reduction, on the receiver, of one message at a time */
} cl_sim_link;
typedef struct {
    int32_t size;
    const int32_t *hosts;           /* per rank: its host. Within a host `inside` holds, else `between` */
    cl_sim_link inside, between;
    int32_t shares_port;            /* 1: the ranks of a host share one port between hosts; 0: each has its own */
    double switch_beta_s_per_byte;  /* 1 / bandwidth of the switch through which all hosts together send; 0: no limit */
    double jitter_s;                /* latencies between hosts are longer by a random time of this mean (exponential) */
    uint64_t seed;                  /* of the jitter */
    const double *slowness;         /* per rank: its reductions take so many times longer; NULL: 1 */
    int32_t unconnected;            /* 1: ranks are linked by cl_sim_connect, before they submit what needs it */
    int32_t cores;                  /* of each processor; 0: messages take no processor time */
    int32_t hosts_per_processor;    /* hosts [0, n), [n, 2n), ... share a processor; 0: each has its own */
    double message_s, busy_s_per_byte; /* processor time of a message, on either side */
} cl_sim_network;
typedef enum { CL_SIM_IDLE = 0, CL_SIM_TIMER, CL_SIM_DONE, CL_SIM_NO_MEMORY } cl_sim_event;

/* `size` engines in one process under one virtual clock. hosts[r]: host of rank r; within a host `inside` holds, else `between`. */
int cl_sim_new(int32_t size, const int32_t *hosts, const cl_sim_link *inside, const cl_sim_link *between,
               const cl_settings *settings, cl_sim **sim);
/* As cl_sim_new, with all that a network may have. CL_INVALID: no ranks, or a negative time. */
int cl_sim_new_on(const cl_sim_network *network, const cl_settings *settings, cl_sim **sim);
/* Links two ranks; those that are linked stay so. */
int cl_sim_connect(cl_sim *sim, int32_t a, int32_t b);
void cl_sim_free(cl_sim *sim);
cl_engine *cl_sim_engine(cl_sim *sim, int32_t rank);
double cl_sim_now(cl_sim *sim);
/* A timer of rank `rank` that cl_sim_next reports at time `at_s` with `token`. */
int cl_sim_timer(cl_sim *sim, int32_t rank, double at_s, uint64_t token);
/*
 * Runs until a timer fires or an operation completes. Out: the event's rank; token (timer) or operation key (done).
 * CL_SIM_IDLE: nothing is left to happen; operations still unfinished are stuck for ever.
 * CL_SIM_NO_MEMORY: the simulation lost an event for want of memory, and cannot go on.
 */
int cl_sim_next(cl_sim *sim, int32_t *rank, uint64_t *token);
/* From now on rank is dead: nothing leaves it, and its peers lose it after settings.lost_ms. */
int cl_sim_kill(cl_sim *sim, int32_t rank);
