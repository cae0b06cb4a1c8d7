/*
 * storm.c: the virtual clock of a storm, ranks that run when something wakes them, and faults. storm_end.c moves the bytes.
 */
#include "storm.h"

#include <math.h>
#include <string.h>

#include "storm_end.h"

uint64_t storm_pick(storm *s, uint64_t below)
{
    return next_random(&s->random) % below;
}

double storm_pick_s(storm *s, double most_s)
{
    return most_s * (double)storm_pick(s, 1 << 20) / (1 << 20);
}

void storm_add(storm *s, double at_s, int kind, int32_t rank, uint64_t token)
{
    CHECK(cl_events_add(&s->events, (cl_event){.at_s = at_s, .kind = (cl_event_kind)kind, .rank = rank, .token = token}) == CL_OK);
}

void storm_later(end *e, double most_s, int kind)
{
    storm_add(e->storm, e->storm->now_s + storm_pick_s(e->storm, most_s), kind, e->rank, (uint64_t)e->base.peer);
}

/* ---- ranks run when they are woken ---------------------------------------------------------------------------- */

static void wake_rank(storm *s, int32_t rank)
{
    if (s->scheduled[rank] || s->dead[rank])
        return;
    s->scheduled[rank] = true;
    storm_add(s, fmax(s->now_s + storm_pick_s(s, s->weather.slow_s), s->paused_until_s[rank]), RUN, rank, 0);
}

static void wake_engine(cl_engine *engine)
{
    wake_rank(engine->driver, engine->rank);
}

/* An event of a link, as epoll would tell it. */
void storm_wake_for(end *e)
{
    cl_engine *engine = e->storm->engines[e->rank];
    atomic_store(&engine->peers[e->base.peer].awake, true);
    wake_rank(e->storm, e->rank);
}

static double storm_clock(void *s)
{
    return ((storm *)s)->now_s;
}

static void on_done(cl_engine *engine, cl_operation *operation)
{
    storm *s = engine->driver;
    if (s->nnews == s->capacity) {
        s->capacity = s->capacity == 0 ? 64 : 2 * s->capacity;
        CHECK((s->news = realloc(s->news, s->capacity * sizeof(storm_news))) != NULL);
    }
    storm_news *news = &s->news[s->nnews++];
    news->rank = engine->rank;
    news->key = operation->request.key;
    news->status = operation->status;
    news->blamed = operation->blamed;
    snprintf(news->text, sizeof news->text, "%s", operation->error == NULL ? "" : operation->error);
}

/* ---- making --------------------------------------------------------------------------------------------------- */

static void make_end(storm *s, int32_t rank, int32_t peer)
{
    end *e = s->ends[rank][peer] = calloc(1, sizeof(end));
    CHECK(e != NULL);
    e->base.transport = &storm_transport;
    e->storm = s;
    e->rank = rank;
    cl_engine_attach(s->engines[rank], peer, &e->base);
    s->engines[rank]->peers[peer].watched = s->weather.by_edges;
}

storm *storm_new(const storm_weather *weather, const cl_settings *settings)
{
    storm *s = calloc(1, sizeof(storm));
    CHECK(s != NULL);
    *s = (storm){.weather = *weather, .settings = *settings, .random = weather->seed * UINT64_C(0x9E3779B97F4A7C15) + 1};
    for (int32_t r = 0; r < weather->size; r++) {
        CHECK(cl_engine_new(r, weather->size, settings, &s->engines[r]) == CL_OK);
        s->engines[r]->clock = storm_clock;
        s->engines[r]->clock_argument = s;
        s->engines[r]->on_done = on_done;
        s->engines[r]->wake = wake_engine;
        s->engines[r]->driver = s;
        storm_add(s, storm_pick_s(s, 1e-3 * settings->heartbeat_ms), TICK, r, 0);
    }
    for (int32_t a = 0; a < weather->size; a++)
        for (int32_t b = 0; b < a; b++) {
            make_end(s, a, b);
            make_end(s, b, a);
            s->ends[a][b]->remote = s->ends[b][a];
            s->ends[b][a]->remote = s->ends[a][b];
            s->ends[a][b]->shared = s->ends[b][a]->shared = storm_pick(s, 256) < weather->shares;
        }
    return s;
}

void storm_free(storm *s)
{
    for (int32_t r = 0; r < s->weather.size; r++)
        cl_engine_free(s->engines[r]);
    for (int32_t a = 0; a < s->weather.size; a++)
        for (int32_t b = 0; b < s->weather.size; b++)
            storm_free_end(s->ends[a][b]);
    cl_events_free(&s->events);
    free(s->news);
    free(s);
}

cl_engine *storm_engine(storm *s, int32_t rank)
{
    return s->engines[rank];
}

double storm_now(const storm *s)
{
    return s->now_s;
}

const char *storm_complaint(const storm *s)
{
    return s->complaint;
}

void storm_timer(storm *s, int32_t rank, double at_s, uint64_t token)
{
    storm_add(s, at_s, EVENT_TIMER, rank, token);
}

/* ---- faults --------------------------------------------------------------------------------------------------- */

void storm_kill(storm *s, int32_t rank, bool silently)
{
    s->dead[rank] = true;
    for (int32_t r = 0; r < s->weather.size; r++)
        if (r != rank && !silently && !s->ends[rank][r]->closed)
            storm_close_out(s->ends[rank][r]); /* what was taken arrives, maybe half a frame; then the end */
}

void storm_cut(storm *s, int32_t a, int32_t b)
{
    end *ends[] = {s->ends[a][b], s->ends[b][a]};
    for (int i = 0; i < 2; i++) {
        double heard_s = ends[i]->heard_s;
        ends[i]->cut = true;
        storm_drop_arriving(ends[i]);
        ends[i]->heard_s = heard_s;
        if (storm_pick(s, 2))
            storm_later(ends[i], 1e-3 * s->settings.lost_ms, BREAK);
    }
}

void storm_pause(storm *s, int32_t rank, double until_s)
{
    s->paused_until_s[rank] = fmax(until_s, s->paused_until_s[rank]);
}

/* A frame waits for what was posted before it, piece by piece, and for ranks that take their time to run. */
double storm_word_s(const storm *s)
{
    const storm_weather *w = &s->weather;
    double pieces = 2.0 * PIECES_PER_FRAME * (double)(w->window_nbytes / LINE + 2);
    return 20 * (w->latency_s + w->late_s + w->slow_s) + pieces * (w->latency_s + w->slow_s);
}

/* ---- running -------------------------------------------------------------------------------------------------- */

static int kind_of(const cl_event *e)
{
    return (int)e->kind;
}

static bool has_tickets(const cl_engine *engine)
{
    return atomic_load(&engine->tickets.granted) != NULL || engine->tickets.taken != NULL;
}

/* False: it is dead, or stopped and will run later. */
static bool runs(storm *s, const cl_event *e)
{
    if (s->dead[e->rank])
        return false;
    if (s->now_s >= s->paused_until_s[e->rank])
        return true;
    storm_add(s, s->paused_until_s[e->rank], kind_of(e), e->rank, e->token);
    return false;
}

static void on_run(storm *s, int32_t rank)
{
    s->scheduled[rank] = false;
    if (cl_engine_progress(s->engines[rank]) > 0)
        wake_rank(s, rank);
}

static void happen(storm *s, const cl_event *e)
{
    end *there = kind_of(e) == RUN || kind_of(e) == TICK ? NULL : s->ends[e->rank][e->token];
    if (there != NULL && (there->closed || there->over))
        return;
    switch (kind_of(e)) {
    case RUN: on_run(s, e->rank); return;
    case TICK:
        cl_engine_tick(s->engines[e->rank]);
        storm_add(s, s->now_s + 1e-3 * s->settings.heartbeat_ms, TICK, e->rank, 0);
        return;
    case TAKE: storm_take(there); return;
    case ROOM:
        there->refused = false;
        there->room = true;
        break;
    case BREAK: there->broken = "its connection broke"; break;
    default:
        storm_take_heartbeats(there);
        if (!storm_has_come(there))
            return;
    }
    storm_wake_for(there);
}

static bool is_lively(const storm *s, const cl_event *e)
{
    if (kind_of(e) == TICK)
        return false;
    const end *there = kind_of(e) == ARRIVE ? s->ends[e->rank][e->token] : NULL;
    return there == NULL || (there->in_first != NULL && there->in_first->kind != HEARTBEAT);
}

/* Two silences may follow each other: of a rank, and of one that waited for it to wake up. */
static bool nothing_will_happen(const storm *s)
{
    return s->now_s - s->lively_s > 4e-3 * s->settings.lost_ms + storm_word_s(s);
}

storm_event storm_next(storm *s, storm_news *news)
{
    for (;;) {
        if (s->first_news < s->nnews) {
            *news = s->news[s->first_news++];
            if (s->first_news == s->nnews)
                s->first_news = s->nnews = 0;
            return STORM_DONE;
        }
        if (s->events.count == 0 || nothing_will_happen(s))
            return STORM_IDLE;
        cl_event e = cl_events_take(&s->events);
        s->now_s = e.at_s;
        if (is_lively(s, &e))
            s->lively_s = s->now_s;
        if (e.kind == EVENT_TIMER) {
            news->rank = e.rank;
            news->key = e.token;
            return STORM_TIMER;
        }
        if (kind_of(&e) != ARRIVE && !runs(s, &e))
            continue;
        if (kind_of(&e) == ARRIVE && s->dead[e.rank])
            continue;
        happen(s, &e);
        if (kind_of(&e) == RUN && has_tickets(s->engines[e.rank])) {
            news->rank = e.rank;
            return STORM_TICKETS;
        }
    }
}
