/*
 * sim.c: many engines in one process under one virtual clock: the same engine, the same plans, another transport.
 *
 * The network: every rank has one sending and one receiving port per link class (inside a host, between hosts), each busy
 * with one message at a time. A message leaves when the sender's port is free, its first byte arrives alpha later, and it
 * is there when the receiver's port has taken all of it; then it is added, one message of a rank at a time. Frames without
 * payload take alpha and no port, but never overtake on their link. On request the ranks of a host share one port between
 * hosts, all that goes between hosts passes one switch, latencies between hosts vary, and every message keeps a core of its
 * sender's and of its receiver's processor busy, which hosts may share. Events at one time happen in the
 * order in which they were made: one seed, one run. Links may be made when they are first wanted: 2,048 ranks have two
 * million pairs and use a few.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "sim_events.h"
#include "sim_processor.h"

enum { INSIDE = 0, BETWEEN = 1, CLASSES = 2 };

typedef struct sim_link {
    cl_link base;
    cl_sim *sim;
    struct sim_link *remote;
    int class;
    double last_switch_s, last_arrival_s; /* of what was sent on this link */
    cl_parcel *first, *last;    /* arrived on this side, not handed over: in order, one at a time */
    double last_ready_s;
    bool adding;             /* the engine is adding what was handed over last */
    size_t pending_nbytes;
} sim_link;

typedef struct {
    double send_free_s, receive_free_s;
} port;

typedef struct {
    int32_t rank;
    uint64_t key;
} completion;

struct cl_sim {
    int32_t size;
    double now_s;
    cl_sim_link classes[CLASSES];
    double switch_beta_s_per_byte, switch_free_s; /* between hosts; 0: the switch is as fast as it need be */
    double jitter_s;
    uint64_t random;
    int32_t *hosts;
    double *slowness;   /* of each rank's reductions */
    double *added_s;    /* when each rank has added all that was handed over */
    int32_t *port_rank; /* whose port between hosts a rank uses */
    cl_processors processors;
    cl_settings settings;
    cl_engine **engines;
    sim_link **links; /* rank's end of the link to peer at [rank * size + peer], NULL: not made; they outlive engines */
    bool *dead, *woken;
    port *ports; /* CLASSES per rank */
    int32_t *to_flush, nto_flush;
    cl_events events;
    completion *done;
    size_t done_first, ndone, done_capacity;
    int status; /* out of memory somewhere: reported by cl_sim_next */
};

/* ---- events -------------------------------------------------------------------------------------------------- */

static void add_event(cl_sim *sim, cl_event added)
{
    if (cl_events_add(&sim->events, added) != CL_OK)
        sim->status = CL_NO_MEMORY;
}

/* Large simulations wait for memory most of the time: what comes next, and then what that will look at, is asked for now. */
static void fetch_early(const cl_sim *sim)
{
    for (size_t i = 0; i < 3 && i < sim->events.count; i++) {
        const cl_event *soon = &sim->events.entries[i];
        if (soon->kind == EVENT_TIMER)
            continue;
        __builtin_prefetch(soon->link);
        __builtin_prefetch(soon->parcel);
        __builtin_prefetch((const char *)soon->parcel + 64);
    }
    if (sim->events.count == 0 || sim->events.entries[0].kind == EVENT_TIMER)
        return;
    const sim_link *link = sim->events.entries[0].link; /* asked for an event ago */
    const cl_engine *engine = link->base.owner;
    if (engine == NULL)
        return;
    __builtin_prefetch(&engine->peers);
    __builtin_prefetch(&engine->operations);
    __builtin_prefetch(link->remote);
}

static cl_event take_event(cl_sim *sim)
{
    cl_event first = cl_events_take(&sim->events);
    fetch_early(sim);
    return first;
}

/* ---- the transport ------------------------------------------------------------------------------------------- */

static sim_link **link_of(cl_sim *sim, int32_t rank, int32_t peer)
{
    return &sim->links[(size_t)rank * (size_t)sim->size + (size_t)peer];
}

static port *port_of(cl_sim *sim, int32_t rank, int class)
{
    return &sim->ports[CLASSES * (class == BETWEEN ? sim->port_rank[rank] : rank) + class];
}

/* What a message takes longer than alpha: exponential, so that most are quick and a few are late. */
static double next_jitter_s(cl_sim *sim, int class)
{
    if (sim->jitter_s == 0 || class == INSIDE)
        return 0;
    sim->random = sim->random * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX generator */
    return -sim->jitter_s * log(((double)(sim->random >> 11) + 0.5) * 0x1p-53);
}

static int32_t rank_of(const sim_link *link)
{
    return link->remote->base.peer;
}

static cl_parcel *pack(const cl_frame *frame, const void *payload)
{
    cl_parcel *packed = malloc(sizeof(cl_parcel) + (payload == NULL ? 0 : frame->nbytes));
    if (packed == NULL)
        return NULL;
    *packed = (cl_parcel){.has_payload = payload != NULL, .frame = *frame};
    if (payload != NULL)
        memcpy(packed->payload, payload, frame->nbytes);
    return packed;
}

/* A frame leaves the switch, or the sender if there is none, and will arrive no earlier than what went before. */
static void travel(cl_sim *sim, sim_link *link, cl_parcel *sent, double start_s)
{
    double alpha_s = sim->classes[link->class].alpha_s + next_jitter_s(sim, link->class);
    double arrive_s = fmax(start_s + alpha_s, link->last_arrival_s);
    link->last_arrival_s = arrive_s;
    add_event(sim, (cl_event){.at_s = arrive_s, .kind = EVENT_ARRIVE, .link = link->remote, .parcel = sent});
}

/*
 * The switch carries packets of all messages in turn: the first byte passes at once, and the last one when all that the
 * switch was given up to now has passed.
 */
static void on_switch(cl_sim *sim, sim_link *link, cl_parcel *sent)
{
    if (sent->frame.nbytes > 0) {
        sim->switch_free_s = fmax(sim->now_s, sim->switch_free_s) + sent->frame.nbytes * sim->switch_beta_s_per_byte;
        sent->ready_s = fmax(sent->ready_s, sim->switch_free_s + sim->classes[link->class].alpha_s);
    }
    travel(sim, link->remote, sent, sim->now_s);
}

static void enter(cl_sim *sim, sim_link *link, cl_parcel *sent, double start_s)
{
    if (link->class == INSIDE || sim->switch_beta_s_per_byte == 0) {
        travel(sim, link, sent, start_s);
        return;
    }
    link->last_switch_s = fmax(start_s, link->last_switch_s);
    add_event(sim, (cl_event){.at_s = link->last_switch_s, .kind = EVENT_SWITCH, .link = link->remote, .parcel = sent});
}

static int sim_send(cl_link *base, const cl_frame *frame, const void *payload)
{
    sim_link *link = (sim_link *)base;
    cl_sim *sim = link->sim;
    const cl_sim_link *class = &sim->classes[link->class];
    port *from = port_of(sim, rank_of(link), link->class);
    cl_parcel *sent = pack(frame, payload), *receipt = NULL;
    bool carries = frame->nbytes > 0;
    if (sent == NULL || (carries && (receipt = pack(frame, NULL)) == NULL)) {
        free(sent);
        sim->status = CL_NO_MEMORY;
        return CL_OK;
    }
    double posted_s = cl_processors_take(&sim->processors, rank_of(link), sim->now_s, 0);
    double moved_s = cl_processors_move(&sim->processors, rank_of(link), sim->now_s, frame->nbytes); /* while it leaves */
    double start_s = carries ? fmax(posted_s, from->send_free_s) : posted_s;
    sent->ready_s = moved_s + class->alpha_s;
    enter(sim, link, sent, start_s);
    if (carries) {
        from->send_free_s = fmax(moved_s, start_s + frame->nbytes * class->beta_s_per_byte);
        link->pending_nbytes += frame->nbytes;
        add_event(sim, (cl_event){.at_s = from->send_free_s, .kind = EVENT_SENT, .link = link, .parcel = receipt});
    }
    return CL_OK;
}

/* True if this rank spends time on adding the frame that begin() has just announced. */
static bool reduces(const sim_link *link, const cl_frame *frame)
{
    if (link->base.sink != &cl_engine_sink)
        return false; /* a test of links without engines */
    const cl_peer *peer = &((cl_engine *)link->base.owner)->peers[link->base.peer];
    return frame->type == CL_FRAME_DATA && peer->mode == CL_INCOMING_APPLY &&
           peer->operation->plan->steps[peer->step].kind == CL_RECV_REDUCE;
}

static void end_parcel(sim_link *link, cl_parcel *handed)
{
    link->base.sink->end(link->base.owner, &link->base, &handed->frame);
    free(handed);
}

static void hand_over(cl_sim *sim, sim_link *link, cl_parcel *handed)
{
    const cl_sink *sink = link->base.sink;
    const cl_frame *frame = &handed->frame;
    (void)sink->begin(link->base.owner, &link->base, frame);
    if (frame->nbytes > 0)
        sink->piece(link->base.owner, &link->base, frame, 0, handed->has_payload ? handed->payload : NULL, frame->nbytes);
    double gamma_s_per_byte = sim->classes[link->class].gamma_s_per_byte * sim->slowness[rank_of(link)];
    double adding_s = reduces(link, frame) ? frame->nbytes * gamma_s_per_byte : 0;
    link->adding = adding_s > 0 || cl_processors_cost(&sim->processors);
    if (!link->adding) {
        end_parcel(link, handed);
        return;
    }
    double *added_s = &sim->added_s[rank_of(link)]; /* a rank adds one message at a time, whatever link it came on */
    double start_s = fmax(sim->now_s, *added_s);
    *added_s = cl_processors_take(&sim->processors, rank_of(link), start_s, adding_s);
    add_event(sim, (cl_event){.at_s = *added_s, .kind = EVENT_END, .link = link, .parcel = handed});
}

static void hand_over_ready(cl_sim *sim, sim_link *link)
{
    while (!link->adding && link->first != NULL && link->first->ready_s <= sim->now_s) {
        cl_parcel *handed = link->first;
        link->first = handed->next;
        if (link->first == NULL)
            link->last = NULL;
        hand_over(sim, link, handed);
    }
}

static void on_arrive(cl_sim *sim, sim_link *link, cl_parcel *arrived)
{
    double ready_s = sim->now_s;
    if (arrived->frame.nbytes > 0) {
        port *to = port_of(sim, rank_of(link), link->class);
        ready_s = fmax(ready_s, to->receive_free_s) + arrived->frame.nbytes * sim->classes[link->class].beta_s_per_byte;
        ready_s = fmax(ready_s, cl_processors_move(&sim->processors, rank_of(link), sim->now_s, arrived->frame.nbytes));
        to->receive_free_s = ready_s = fmax(ready_s, arrived->ready_s);
    }
    arrived->ready_s = link->last_ready_s = fmax(ready_s, link->last_ready_s);
    arrived->next = NULL;
    if (link->last != NULL)
        link->last->next = arrived;
    else
        link->first = arrived;
    link->last = arrived;
    if (arrived->ready_s <= sim->now_s)
        hand_over_ready(sim, link);
    else
        add_event(sim, (cl_event){.at_s = arrived->ready_s, .kind = EVENT_DELIVER, .link = link});
}

static void on_sent(sim_link *link, cl_parcel *receipt)
{
    link->pending_nbytes -= receipt->frame.nbytes;
    if (!receipt->forgotten)
        link->base.sink->sent(link->base.owner, &link->base, &receipt->frame);
    free(receipt);
}

static int sim_progress(cl_link *base)
{
    (void)base; /* the clock drives */
    return 0;
}

static int sim_arm(cl_link *base)
{
    (void)base;
    return CL_OK;
}

static void sim_disarm(cl_link *base)
{
    (void)base;
}

static int sim_pollfd(cl_link *base, uint32_t *events)
{
    (void)base;
    *events = 0;
    return -1;
}

static void sim_forget(cl_link *base, uint64_t key)
{
    cl_sim *sim = ((sim_link *)base)->sim; /* payloads were copied at send: only receipts are to be recalled */
    for (size_t i = 0; i < sim->events.count; i++) {
        cl_event *e = &sim->events.entries[i];
        if (e->kind == EVENT_SENT && &e->link->base == base && e->parcel->frame.key == key)
            e->parcel->forgotten = true;
    }
}

static size_t sim_pending(const cl_link *base)
{
    return ((const sim_link *)base)->pending_nbytes;
}

static void sim_close(cl_link *base)
{
    base->owner = NULL; /* events on their way still point here: the simulation frees it */
}

const cl_transport cl_sim_transport = {
    .name = "sim",
    .send = sim_send,
    .progress = sim_progress,
    .arm = sim_arm,
    .disarm = sim_disarm,
    .pollfd = sim_pollfd,
    .forget = sim_forget,
    .pending = sim_pending,
    .close = sim_close,
    .forked = sim_disarm,
    .tick = NULL,
};

/* ---- making -------------------------------------------------------------------------------------------------- */

static double sim_clock(void *sim)
{
    return ((cl_sim *)sim)->now_s;
}

static void wake_engine(cl_engine *engine)
{
    cl_sim *sim = engine->driver;
    if (sim->woken[engine->rank])
        return;
    sim->woken[engine->rank] = true;
    sim->to_flush[sim->nto_flush++] = engine->rank;
}

static void on_done(cl_engine *engine, cl_operation *operation)
{
    cl_sim *sim = engine->driver;
    if (sim->ndone == sim->done_capacity) {
        size_t capacity = sim->done_capacity == 0 ? 256 : 2 * sim->done_capacity;
        completion *done = realloc(sim->done, capacity * sizeof(completion));
        if (done == NULL) {
            sim->status = CL_NO_MEMORY;
            return;
        }
        sim->done = done;
        sim->done_capacity = capacity;
    }
    sim->done[sim->ndone++] = (completion){engine->rank, operation->request.key};
}

static int make_engine(cl_sim *sim, int32_t rank)
{
    CL_TRY(cl_engine_new(rank, sim->size, &sim->settings, &sim->engines[rank]));
    cl_engine *engine = sim->engines[rank];
    engine->clock = sim_clock;
    engine->clock_argument = sim;
    engine->on_done = on_done;
    engine->wake = wake_engine;
    engine->driver = sim;
    return CL_OK;
}

int cl_sim_connect(cl_sim *sim, int32_t a, int32_t b)
{
    if (a < 0 || b < 0 || a >= sim->size || b >= sim->size || a == b)
        return CL_INVALID;
    if (*link_of(sim, a, b) != NULL)
        return CL_OK;
    sim_link *near = calloc(1, sizeof(sim_link)), *far = calloc(1, sizeof(sim_link));
    if (near == NULL || far == NULL) {
        free(near);
        free(far);
        return CL_NO_MEMORY;
    }
    *near = (sim_link){.sim = sim, .remote = far, .class = sim->hosts[a] == sim->hosts[b] ? INSIDE : BETWEEN};
    *far = (sim_link){.sim = sim, .remote = near, .class = near->class};
    near->base.transport = far->base.transport = &cl_sim_transport;
    *link_of(sim, a, b) = near;
    *link_of(sim, b, a) = far;
    cl_engine_attach(sim->engines[a], b, &near->base);
    cl_engine_attach(sim->engines[b], a, &far->base);
    return CL_OK;
}

static void place_ranks(cl_sim *sim, const cl_sim_network *network)
{
    for (int32_t r = 0; r < sim->size; r++) {
        sim->hosts[r] = network->hosts[r];
        sim->slowness[r] = network->slowness == NULL ? 1 : network->slowness[r];
        sim->port_rank[r] = r;
        for (int32_t before = 0; network->shares_port && before < r; before++)
            if (sim->hosts[before] == sim->hosts[r]) {
                sim->port_rank[r] = before;
                break;
            }
    }
}

static int make_parts(cl_sim *sim, const cl_sim_network *network)
{
    size_t size = (size_t)sim->size;
    sim->hosts = calloc(size, sizeof(int32_t));
    sim->slowness = calloc(size, sizeof(double));
    sim->added_s = calloc(size, sizeof(double));
    sim->port_rank = calloc(size, sizeof(int32_t));
    sim->engines = calloc(size, sizeof(cl_engine *));
    sim->links = calloc(size * size, sizeof(sim_link *));
    sim->dead = calloc(size, sizeof(bool));
    sim->woken = calloc(size, sizeof(bool));
    sim->ports = calloc(CLASSES * size, sizeof(port));
    sim->to_flush = calloc(size, sizeof(int32_t));
    if (!sim->hosts || !sim->slowness || !sim->added_s || !sim->port_rank || !sim->engines || !sim->links || !sim->dead ||
        !sim->woken || !sim->ports || !sim->to_flush)
        return CL_NO_MEMORY;
    place_ranks(sim, network);
    CL_TRY(cl_processors_init(&sim->processors, network));
    for (int32_t r = 0; r < sim->size; r++)
        CL_TRY(make_engine(sim, r));
    for (int32_t a = 0; !network->unconnected && a < sim->size; a++)
        for (int32_t b = a + 1; b < sim->size; b++)
            CL_TRY(cl_sim_connect(sim, a, b));
    return CL_OK;
}

int cl_sim_new_on(const cl_sim_network *network, const cl_settings *settings, cl_sim **out)
{
    if (network->size < 1 || !(network->jitter_s >= 0) || !(network->switch_beta_s_per_byte >= 0))
        return CL_INVALID;
    cl_sim *sim = calloc(1, sizeof(cl_sim));
    if (sim == NULL)
        return CL_NO_MEMORY;
    *sim = (cl_sim){.size = network->size, .classes = {network->inside, network->between}, .settings = *settings,
                    .switch_beta_s_per_byte = network->switch_beta_s_per_byte, .jitter_s = network->jitter_s,
                    .random = network->seed};
    int status = make_parts(sim, network);
    if (status != CL_OK) {
        cl_sim_free(sim);
        return status;
    }
    *out = sim;
    return CL_OK;
}

int cl_sim_new(int32_t size, const int32_t *hosts, const cl_sim_link *inside, const cl_sim_link *between,
               const cl_settings *settings, cl_sim **out)
{
    cl_sim_network network = {.size = size, .hosts = hosts, .inside = *inside, .between = *between};
    return cl_sim_new_on(&network, settings, out);
}

static void free_link(sim_link *link)
{
    while (link != NULL && link->first != NULL) {
        cl_parcel *next = link->first->next;
        free(link->first);
        link->first = next;
    }
    free(link);
}

static void free_links(cl_sim *sim)
{
    for (size_t i = 0; sim->links != NULL && i < (size_t)sim->size * (size_t)sim->size; i++)
        free_link(sim->links[i]);
    free(sim->links);
}

void cl_sim_free(cl_sim *sim)
{
    if (sim == NULL)
        return;
    for (int32_t r = 0; sim->engines != NULL && r < sim->size; r++)
        cl_engine_free(sim->engines[r]); /* fails what is unfinished; what it says is never delivered */
    cl_events_free(&sim->events);
    cl_processors_free(&sim->processors);
    free_links(sim);
    free(sim->done);
    free(sim->to_flush);
    free(sim->ports);
    free(sim->woken);
    free(sim->dead);
    free(sim->engines);
    free(sim->port_rank);
    free(sim->added_s);
    free(sim->slowness);
    free(sim->hosts);
    free(sim);
}

/* ---- running ------------------------------------------------------------------------------------------------- */

cl_engine *cl_sim_engine(cl_sim *sim, int32_t rank)
{
    return rank < 0 || rank >= sim->size ? NULL : sim->engines[rank];
}

double cl_sim_now(cl_sim *sim)
{
    return sim->now_s;
}

int cl_sim_timer(cl_sim *sim, int32_t rank, double at_s, uint64_t token)
{
    if (rank < 0 || rank >= sim->size || !(at_s >= sim->now_s))
        return CL_INVALID;
    add_event(sim, (cl_event){.at_s = at_s, .kind = EVENT_TIMER, .rank = rank, .token = token});
    return sim->status;
}

int cl_sim_kill(cl_sim *sim, int32_t rank)
{
    if (rank < 0 || rank >= sim->size || sim->dead[rank])
        return CL_INVALID;
    sim->dead[rank] = true;
    for (int32_t r = 0; r < sim->size; r++) {
        if (r == rank)
            continue;
        CL_TRY(cl_sim_connect(sim, r, rank)); /* who never wanted it must hear of it all the same */
        add_event(sim, (cl_event){.at_s = sim->now_s + 1e-3 * sim->settings.lost_ms, .kind = EVENT_LOST,
                               .link = *link_of(sim, r, rank)});
    }
    return sim->status;
}

static void flush_woken(cl_sim *sim)
{
    while (sim->nto_flush > 0) {
        int32_t rank = sim->to_flush[--sim->nto_flush];
        sim->woken[rank] = false;
        if (!sim->dead[rank])
            cl_engine_flush(sim->engines[rank]);
    }
}

/* A dead rank neither hears nor is heard; what it had given to the network still arrives. */
static void happen(cl_sim *sim, cl_event *e)
{
    sim_link *link = e->link;
    int32_t rank = rank_of(link);
    if (sim->dead[rank] || link->base.owner == NULL) {
        free(e->parcel);
        return;
    }
    switch (e->kind) {
    case EVENT_SWITCH: on_switch(sim, link, e->parcel); return;
    case EVENT_ARRIVE: on_arrive(sim, link, e->parcel); break;
    case EVENT_SENT: on_sent(link, e->parcel); break;
    case EVENT_LOST: link->base.sink->lost(link->base.owner, &link->base, "its process died"); break;
    case EVENT_END:
        link->adding = false;
        end_parcel(link, e->parcel);
        hand_over_ready(sim, link); /* the next may be waiting */
        break;
    default: hand_over_ready(sim, link); break;
    }
    wake_engine(sim->engines[rank]);
}

/* Engines act after all that happens at one time, as a real one does that looks at all its links before it sends. */
static bool more_happens_now(const cl_sim *sim)
{
    return sim->events.count > 0 && sim->events.entries[0].at_s <= sim->now_s;
}

/* Nothing is left to happen but that somebody notices a stall. False: nobody will. */
static bool pass_time(cl_sim *sim)
{
    double due_s = CL_NEVER_S;
    for (int32_t r = 0; r < sim->size; r++) {
        double own_s = cl_stall_due_s(sim->engines[r]);
        due_s = own_s < due_s ? own_s : due_s;
    }
    if (due_s >= CL_NEVER_S)
        return false;
    sim->now_s = due_s > sim->now_s ? due_s : sim->now_s;
    for (int32_t r = 0; r < sim->size; r++) {
        cl_stall_look(sim->engines[r], sim->now_s);
        cl_engine_flush(sim->engines[r]);
    }
    return true;
}

int cl_sim_next(cl_sim *sim, int32_t *rank, uint64_t *token)
{
    for (;;) {
        if (sim->status != CL_OK)
            return CL_SIM_NO_MEMORY;
        if (sim->done_first < sim->ndone) {
            *rank = sim->done[sim->done_first].rank;
            *token = sim->done[sim->done_first++].key;
            if (sim->done_first == sim->ndone)
                sim->done_first = sim->ndone = 0;
            return CL_SIM_DONE;
        }
        if (sim->nto_flush > 0 && !more_happens_now(sim)) {
            flush_woken(sim);
            continue;
        }
        if (sim->events.count == 0 && !pass_time(sim))
            return CL_SIM_IDLE;
        if (sim->events.count == 0)
            continue;
        cl_event e = take_event(sim);
        sim->now_s = e.at_s;
        if (e.kind == EVENT_TIMER) {
            *rank = e.rank;
            *token = e.token;
            return CL_SIM_TIMER;
        }
        happen(sim, &e);
    }
}
