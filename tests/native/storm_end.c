/*
 * storm_end.c: the transport of a storm. Frames that the engine gave wait in a queue; their bytes are taken from the caller's
 * memory piece by piece, as packets, each on its way for a time of its own, and handed over when the rank next runs.
 *
 * Heartbeats are the network's own business and wake no engine, so that they hide no lost wake-up.
 */
#include <math.h>
#include <string.h>

#include "storm_end.h"

enum { PACKETS_PER_PROGRESS = 3 };

static void complain(storm *s, const char *what)
{
    if (s->complaint == NULL)
        s->complaint = what;
}

static void trace_frame(const end *e, const char *what, const cl_frame *f)
{
    static const char *const names[CL_FRAME_BYE + 1] = {
        "?", [CL_FRAME_POST] = "post", [CL_FRAME_GRANT] = "grant", [CL_FRAME_DATA] = "data", [CL_FRAME_CREDIT] = "credit",
        [CL_FRAME_EXCHANGE_UP] = "up", [CL_FRAME_EXCHANGE_DOWN] = "down", [CL_FRAME_TICKET] = "ticket", [CL_FRAME_JOIN] = "join",
        [CL_FRAME_ANNOUNCE] = "announce", [CL_FRAME_QUERY] = "query", [CL_FRAME_ANSWER] = "answer",
        [CL_FRAME_MISMATCH] = "mismatch", [CL_FRAME_FAIL] = "fail", [CL_FRAME_LOST] = "lost", [CL_FRAME_BYE] = "bye"};
    if (e->storm->weather.trace == NULL)
        return;
    fprintf(e->storm->weather.trace, "%11.7f rank %d %s rank %d: %s key %d segment %u step %u arg %llu, %u bytes%s%s%s\n",
            e->storm->now_s, e->rank, what, e->base.peer, names[f->type <= CL_FRAME_BYE ? f->type : 0], (int)f->key,
            f->segment, f->step, f->type == CL_FRAME_DATA ? 0 : (unsigned long long)f->arg, f->nbytes,
            f->type == CL_FRAME_DATA && f->flags & CL_FLAG_EAGER ? ", eager" : "",
            f->type == CL_FRAME_POST && f->flags & CL_FLAG_WANT ? ", wants grants" : "",
            f->flags & CL_FRAME_LENDS ? ", lends" : "");
}

/* ---- what goes out -------------------------------------------------------------------------------------------- */

static void put_on_the_way(end *e, packet *p)
{
    storm *s = e->storm;
    end *to = e->remote;
    double arrive_s = s->now_s + s->weather.latency_s + storm_pick_s(s, s->weather.late_s);
    e->last_arrival_s = p->at_s = fmax(arrive_s, e->last_arrival_s);
    if (e->cut || to->closed || to->over || s->dead[to->rank]) {
        free(p);
        return;
    }
    p->next = NULL;
    *(to->in_last == NULL ? &to->in_first : &to->in_last->next) = p;
    to->in_last = p;
    storm_add(s, p->at_s, ARRIVE, to->rank, (uint64_t)e->rank);
}

static packet *new_packet(int kind, const cl_frame *frame, const uint8_t *bytes, size_t nbytes)
{
    packet *p = calloc(1, sizeof(packet) + nbytes);
    CHECK(p != NULL);
    p->kind = kind;
    p->nbytes = nbytes;
    if (frame != NULL)
        p->frame = *frame;
    if (nbytes > 0)
        memcpy(p->bytes, bytes, nbytes);
    return p;
}

static void drop_first(end *e)
{
    outgoing *done = e->first;
    e->first = done->next;
    if (e->first == NULL)
        e->last = NULL;
    free(done->copy);
    free(done);
}

/* The next piece leaves; with the last one the payload is the engine's again. */
static void take_piece(end *e, size_t most)
{
    outgoing *o = e->first;
    size_t left = o->frame.nbytes - o->taken, piece = left < most ? left : most;
    if (left > 0 && !o->begun && storm_pick(e->storm, 4) == 0)
        piece = 0; /* the header alone */
    packet *p = new_packet(PIECE, &o->frame, o->payload == NULL ? NULL : o->payload + o->taken, piece);
    p->begins = !o->begun;
    p->offset = o->taken;
    o->begun = true;
    o->taken += piece;
    put_on_the_way(e, p);
    if (o->taken < o->frame.nbytes)
        return;
    cl_frame frame = o->frame;
    bool tells = frame.nbytes > 0 && !o->forgotten;
    drop_first(e);
    if (tells)
        e->base.sink->sent(e->base.owner, &e->base, &frame);
}

static void schedule_take(end *e)
{
    if (e->taking || e->first == NULL)
        return;
    e->taking = true;
    storm_later(e, e->storm->weather.latency_s, TAKE);
}

void storm_take(end *e)
{
    e->taking = false;
    if (e->first == NULL || e->closed || e->over || e->storm->dead[e->rank])
        return;
    size_t part = (e->first->frame.nbytes / PIECES_PER_FRAME / LINE + 1) * LINE;
    take_piece(e, part * (1 + storm_pick(e->storm, PIECES_PER_FRAME)));
    schedule_take(e);
    storm_wake_for(e); /* the socket has room, or sent() has made some */
}

static bool is_in_order(const end *e, const cl_frame *frame)
{
    const cl_engine *engine = e->base.owner;
    const cl_peer *peer = &engine->peers[e->base.peer];
    const cl_operation *sent = (const cl_operation *)(uintptr_t)frame->token;
    for (size_t i = 0; i < peer->ready.count; i++)
        if (peer->ready.entries[i].priority < sent->request.priority)
            return false;
    return peer->told.first == NULL; /* the engine's own frames go before all data */
}

/* What the engine owes the network, and everybody else, with every frame that it sends. */
static void check_sent(const end *e, const cl_frame *frame)
{
    const cl_engine *engine = e->base.owner;
    const cl_peer *peer = &engine->peers[e->base.peer];
    if (frame->type != CL_FRAME_DATA)
        return;
    if (!is_in_order(e, frame))
        complain(e->storm, "data was sent before something more urgent that might have gone");
    if (peer->posted_nbytes > frame->nbytes && peer->posted_nbytes > engine->settings.inflight_nbytes)
        complain(e->storm, "more is in flight than settings.inflight_nbytes");
    if (peer->eager_used > engine->settings.eager_budget_nbytes)
        complain(e->storm, "more eager bytes are on their way than settings.eager_budget_nbytes");
}

static bool is_kept_there(const end *e, const void *payload)
{
    for (const reference *r = e->remote->references; r != NULL; r = r->next)
        if (r->kept && r->data == payload)
            return true;
    return false;
}

/* The payload stays where it is; staged ones are free at once, others when the receipt is back. */
static void send_reference(end *e, const cl_frame *frame, const void *payload, bool staged)
{
    reference *r = calloc(1, sizeof(reference));
    CHECK(r != NULL);
    r->frame = *frame;
    r->data = (uint8_t *)(uintptr_t)payload;
    if (staged) {
        CHECK((r->data = r->stage = malloc(frame->nbytes)) != NULL);
        memcpy(r->stage, payload, frame->nbytes);
    }
    r->next = e->references;
    e->references = r;
    packet *p = new_packet(LENT, frame, NULL, 0);
    p->reference = r;
    put_on_the_way(e, p);
    if (staged)
        e->base.sink->sent(e->base.owner, &e->base, frame);
}

static bool refuse(end *e)
{
    e->refused = true;
    if (e->window_nbytes == 0)
        storm_later(e, e->storm->weather.late_s, ROOM);
    return true;
}

static bool is_refused(end *e, const cl_frame *frame, bool answers)
{
    storm *s = e->storm;
    if (e->window_nbytes > 0 && e->window_nbytes + LINE + frame->nbytes > s->weather.window_nbytes)
        return refuse(e);
    if (answers && e->first != NULL)
        return refuse(e); /* it goes by reference, after all bytes that are still to be taken */
    return storm_pick(s, 256) < s->weather.refuses ? refuse(e) : false;
}

static int storm_send(cl_link *base, const cl_frame *frame, const void *payload)
{
    end *e = (end *)base;
    if (e->over || e->broken)
        return CL_PEER_LOST;
    bool carries = e->shared && frame->nbytes > 0 && frame->type == CL_FRAME_DATA;
    bool answers = carries && is_kept_there(e, payload);
    if (is_refused(e, frame, answers))
        return CL_AGAIN;
    trace_frame(e, "->", frame);
    check_sent(e, frame);
    e->window_nbytes += LINE + frame->nbytes;
    bool lends = frame->flags & CL_FRAME_LENDS; /* the others too may go by reference, but are not written to */
    if (answers || (carries && e->first == NULL && storm_pick(e->storm, 4) < (lends ? 3 : 1))) {
        send_reference(e, frame, payload, lends && !answers && storm_pick(e->storm, 2));
        return CL_OK;
    }
    outgoing *o = calloc(1, sizeof(outgoing));
    CHECK(o != NULL);
    o->frame = *frame;
    o->payload = payload;
    *(e->last == NULL ? &e->first : &e->last->next) = o;
    e->last = o;
    if (e->first == o && storm_pick(e->storm, 3) == 0) { /* all at once, and sent() before we return */
        while (e->first != NULL)
            take_piece(e, SIZE_MAX);
        return CL_OK;
    }
    schedule_take(e);
    return CL_OK;
}

/* ---- what comes in -------------------------------------------------------------------------------------------- */

static void give_back_window(end *e, size_t nbytes)
{
    end *from = e->remote;
    from->window_nbytes -= nbytes;
    if (from->refused && !from->closed)
        storm_add(e->storm, e->storm->now_s + e->storm->weather.latency_s, ROOM, from->rank, (uint64_t)e->rank);
}

static void begin(end *e, const cl_frame *frame)
{
    trace_frame(e, "<-", frame);
    e->receiving = true;
    e->in_frame = *frame;
    e->place = e->base.sink->begin(e->base.owner, &e->base, frame);
}

static void finish(end *e, bool whole)
{
    cl_frame frame = e->in_frame;
    e->receiving = false;
    e->place = NULL;
    give_back_window(e, LINE + frame.nbytes);
    (whole ? e->base.sink->end : e->base.sink->revoked)(e->base.owner, &e->base, &frame);
}

static void take_in_piece(end *e, packet *p)
{
    if (p->begins)
        begin(e, &p->frame);
    if (p->nbytes > 0) {
        uint8_t *at = p->bytes;
        if (e->place != NULL)
            at = memcpy(e->place + p->offset, p->bytes, p->nbytes);
        e->base.sink->piece(e->base.owner, &e->base, &p->frame, p->offset, at, p->nbytes);
    }
    if (p->offset + p->nbytes == p->frame.nbytes)
        finish(e, true);
}

static void take_in_lent(end *e, packet *p)
{
    reference *r = p->reference;
    bool was_revoked = r->forgotten && r->stage == NULL;
    begin(e, &p->frame);
    e->place = NULL;
    if (!was_revoked) {
        e->base.lent = p->frame.flags & CL_FRAME_LENDS ? CL_LENT : CL_NOT_LENT;
        e->base.sink->piece(e->base.owner, &e->base, &p->frame, 0, r->data, p->frame.nbytes);
        r->kept = e->base.lent == CL_LENT_KEPT;
        e->base.lent = CL_NOT_LENT;
    }
    r->read = true;
    packet *receipt = new_packet(RECEIPT, &p->frame, NULL, 0);
    receipt->reference = r;
    put_on_the_way(e, receipt);
    finish(e, !was_revoked);
}

static void take_in_receipt(end *e, packet *p)
{
    reference *r = p->reference;
    if (!r->forgotten && r->stage == NULL) {
        r->forgotten = true; /* told once */
        e->base.sink->sent(e->base.owner, &e->base, &r->frame);
    }
}

bool storm_has_come(const end *e)
{
    return e->in_first != NULL && e->in_first->at_s <= e->storm->now_s;
}

static packet *take_packet(end *e)
{
    packet *p = e->in_first;
    e->in_first = p->next;
    if (e->in_first == NULL)
        e->in_last = NULL;
    e->heard_s = e->storm->now_s;
    return p;
}

void storm_take_heartbeats(end *e)
{
    while (storm_has_come(e) && e->in_first->kind == HEARTBEAT)
        free(take_packet(e));
}

static void tell_lost(end *e)
{
    const char *reason = e->broken;
    e->over = true;
    e->broken = NULL;
    if (e->storm->weather.trace != NULL)
        fprintf(e->storm->weather.trace, "%11.7f rank %d loses rank %d: %s\n", e->storm->now_s, e->rank, e->base.peer, reason);
    e->base.sink->lost(e->base.owner, &e->base, reason);
}

static int storm_progress(cl_link *base)
{
    end *e = (end *)base;
    int events = e->room;
    e->room = false;
    for (int i = 0; i < PACKETS_PER_PROGRESS && !e->over && storm_has_come(e); i++) {
        packet *p = take_packet(e);
        if (p->kind == PIECE)
            take_in_piece(e, p);
        else if (p->kind == LENT)
            take_in_lent(e, p);
        else if (p->kind == RECEIPT)
            take_in_receipt(e, p);
        else if (p->kind == END)
            e->broken = "its connection was closed";
        free(p);
        events++;
    }
    if (e->broken != NULL && !e->over && !storm_has_come(e)) {
        tell_lost(e);
        events++;
    }
    return events;
}

/* ---- the rest of the contract --------------------------------------------------------------------------------- */

static int storm_arm(cl_link *base)
{
    (void)base;
    return CL_OK;
}

static void storm_disarm(cl_link *base)
{
    (void)base;
}

static int storm_pollfd(cl_link *base, uint32_t *events)
{
    (void)base;
    *events = 0;
    return -1;
}

static void forget_outgoing(outgoing *o)
{
    if (o->forgotten || o->frame.nbytes == 0)
        return;
    CHECK((o->copy = malloc(o->frame.nbytes)) != NULL);
    memcpy(o->copy, o->payload, o->frame.nbytes);
    o->payload = o->copy;
    o->forgotten = true;
}

static void storm_forget(cl_link *base, uint64_t key)
{
    end *e = (end *)base;
    for (outgoing *o = e->first; o != NULL; o = o->next)
        if (o->frame.key == key)
            forget_outgoing(o);
    for (reference *r = e->references; r != NULL; r = r->next)
        if (r->frame.key == key)
            r->forgotten = true;
    if (e->receiving && e->in_frame.key == key)
        e->place = NULL;
}

static size_t storm_pending(const cl_link *base)
{
    const end *e = (const end *)base;
    size_t pending = 0;
    for (const outgoing *o = e->first; o != NULL; o = o->next)
        pending += LINE + o->frame.nbytes - o->taken;
    return pending;
}

void storm_close_out(end *e)
{
    while (e->first != NULL)
        drop_first(e);
    put_on_the_way(e, new_packet(END, NULL, NULL, 0));
}

static void storm_close(cl_link *base)
{
    end *e = (end *)base;
    storm_close_out(e);
    e->closed = true;
}

/* Silence is lost_ms, and a tick may be one heartbeat late. */
static void storm_tick(cl_link *base, double now_s)
{
    end *e = (end *)base;
    const cl_settings *settings = &e->storm->settings;
    if (e->over)
        return;
    storm_take_heartbeats(e);
    if (now_s - e->heard_s + 1e-3 * settings->heartbeat_ms > 1e-3 * settings->lost_ms && !storm_has_come(e) && e->broken == NULL)
        e->broken = "it was silent";
    if (e->broken != NULL)
        storm_wake_for(e);
    if (e->first == NULL)
        put_on_the_way(e, new_packet(HEARTBEAT, NULL, NULL, 0));
}

const cl_transport storm_transport = {
    .name = "storm", .edges = true, .send = storm_send, .progress = storm_progress, .arm = storm_arm,
    .disarm = storm_disarm, .pollfd = storm_pollfd, .forget = storm_forget, .pending = storm_pending, .close = storm_close,
    .forked = storm_disarm, .tick = storm_tick,
};

/* ---- the end -------------------------------------------------------------------------------------------------- */

void storm_drop_arriving(end *e)
{
    while (e->in_first != NULL)
        free(take_packet(e));
}

void storm_free_end(end *e)
{
    while (e != NULL && e->in_first != NULL)
        free(take_packet(e));
    while (e != NULL && e->first != NULL)
        drop_first(e);
    while (e != NULL && e->references != NULL) {
        reference *next = e->references->next;
        free(e->references->stage);
        free(e->references);
        e->references = next;
    }
    free(e);
}

