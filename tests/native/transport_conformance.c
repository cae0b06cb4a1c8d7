/*
 * transport_conformance.c: see transport_conformance.h.
 *
 * Both ends know every frame beforehand: header and payload are functions of (seed, sender, index). Memory that the
 * transport must no longer touch is freed at once, so that the address sanitizer sees what a comparison would miss.
 */
#include "transport_conformance.h"

#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_FRAMES = 400, KEYS = 5, LARGE_NBYTES = 1 << 20, STUCK_MS = 5000 };

static const cl_settings settings = {
    .eager_nbytes = 4096, .eager_budget_nbytes = 1 << 20, .inflight_nbytes = 1 << 20,
    .heartbeat_ms = 1000, .lost_ms = 4000, .shm_ring_nbytes = 1 << 16,
};

typedef struct {
    uint8_t *payload; /* owned while the transport may read it, else NULL */
    uint64_t key;
    bool sent, forgotten;
} outgoing_record;

typedef struct side {
    cl_link *link;
    int number;
    uint64_t seed, random;
    uint32_t nframes, sizes_up_to;

    outgoing_record outgoing[MAX_FRAMES];
    uint32_t offered; /* frames that send() took */
    bool forget_in_sent;

    uint32_t received; /* frames that have ended */
    bool inside;       /* a frame has begun */
    uint8_t *place, *assembled;
    size_t arrived;
    uint32_t forget_one_in; /* a place is given up after one in so many pieces; 0: never */
    bool always_place;

    int lost;
    char reason[128];
} side;

typedef struct {
    transport_pair pair;
    const transport_factory *factory;
    side sides[2];
} world;

uint64_t next_random(uint64_t *state) /* splitmix64 */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void expect(bool condition, const char *file, int line, const char *format, ...)
{
    if (condition)
        return;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

/* ---- the frames that everybody knows ------------------------------------------------------------------------ */

static cl_frame frame_of(uint64_t seed, int sender, uint32_t index, uint32_t sizes_up_to)
{
    static const uint32_t size_classes[] = {0, 130, 130, 8192, 8192, 70000, LARGE_NBYTES};
    uint64_t random = seed ^ ((uint64_t)sender << 32 | index);
    const uint32_t choice = (uint32_t)(next_random(&random) % (sizeof size_classes / sizeof size_classes[0]));
    uint32_t limit = size_classes[choice] < sizes_up_to ? size_classes[choice] : sizes_up_to;
    cl_frame frame = {.arg = next_random(&random), .meta = {.count = next_random(&random)}};
    frame.key = 100 * (uint64_t)sender + next_random(&random) % KEYS;
    frame.type = (uint8_t)(100 + next_random(&random) % 100); /* neither the engine's nor a transport's own */
    frame.flags = next_random(&random) % 2 ? CL_FRAME_LENDS : 0;
    frame.segment = (uint32_t)next_random(&random);
    frame.nbytes = (uint32_t)(next_random(&random) % (limit + 1));
    frame.token = index;
    return frame;
}

static uint8_t *payload_of(uint64_t seed, int sender, uint32_t index, size_t nbytes)
{
    uint64_t random = ~seed ^ ((uint64_t)sender << 32 | index);
    uint8_t *payload = malloc(nbytes + 8);
    EXPECT(payload != NULL, "no memory for the test");
    for (size_t i = 0; i < nbytes; i += 8) {
        const uint64_t word = next_random(&random);
        memcpy(payload + i, &word, 8);
    }
    return payload;
}

static uint64_t a_key(const side *sender, uint64_t *random)
{
    return 100 * (uint64_t)sender->number + next_random(random) % KEYS;
}

/* ---- the sink ------------------------------------------------------------------------------------------------ */

static void check_alive(const side *s)
{
    EXPECT(s->lost == 0, "a sink call after lost(\"%s\")", s->reason);
}

static void *on_begin(void *owner, cl_link *link, const cl_frame *frame)
{
    side *s = owner;
    const cl_frame expected = frame_of(s->seed, 1 - s->number, s->received, s->sizes_up_to);
    check_alive(s);
    EXPECT(link == s->link, "begin() with another link");
    EXPECT(!s->inside, "begin() inside a frame");
    EXPECT(memcmp(frame, &expected, sizeof expected) == 0, "frame %u has another header", s->received);
    s->inside = true;
    s->arrived = 0;
    s->assembled = malloc(frame->nbytes + 1);
    s->place = s->always_place || next_random(&s->random) % 2 ? malloc(frame->nbytes + 1) : NULL;
    return s->place;
}

static void give_up_place(side *s, const cl_frame *frame)
{
    s->link->transport->forget(s->link, frame->key);
    free(s->place);
    s->place = NULL;
}

static void on_piece(void *owner, cl_link *link, const cl_frame *frame, size_t offset, const void *data, size_t nbytes)
{
    side *s = owner;
    const uint8_t *from = data;
    (void)link;
    check_alive(s);
    EXPECT(s->inside && nbytes > 0, "an empty piece, or one outside of a frame");
    EXPECT(offset == s->arrived && offset + nbytes <= frame->nbytes, "a piece at %zu instead of %zu", offset, s->arrived);
    EXPECT(nbytes % 64 == 0 || offset + nbytes == frame->nbytes, "a piece of %zu bytes in the middle", nbytes);
    if (s->place != NULL && from >= s->place && from < s->place + frame->nbytes)
        EXPECT(from == s->place + offset, "a piece at the wrong place");
    memcpy(s->assembled + offset, from, nbytes);
    s->arrived += nbytes;
    if (s->place != NULL && s->forget_one_in > 0 && next_random(&s->random) % s->forget_one_in == 0)
        give_up_place(s, frame);
}

static void on_end(void *owner, cl_link *link, const cl_frame *frame)
{
    side *s = owner;
    uint8_t *expected = payload_of(s->seed, 1 - s->number, s->received, frame->nbytes);
    (void)link;
    check_alive(s);
    EXPECT(s->inside && s->arrived == frame->nbytes, "end() after %zu of %u bytes", s->arrived, frame->nbytes);
    EXPECT(memcmp(s->assembled, expected, frame->nbytes) == 0, "frame %u has another payload", s->received);
    free(expected);
    free(s->assembled);
    free(s->place);
    s->assembled = s->place = NULL;
    s->inside = false;
    s->received++;
}

static void on_revoked(void *owner, cl_link *link, const cl_frame *frame)
{
    (void)link, (void)frame;
    EXPECT(false, "frame %u is revoked: its payload was the transport's own by then", ((side *)owner)->received);
}

static void forget_outgoing(side *s, uint64_t key);

static void on_sent(void *owner, cl_link *link, const cl_frame *frame)
{
    side *s = owner;
    outgoing_record *record = &s->outgoing[frame->token];
    (void)link;
    check_alive(s);
    EXPECT(frame->token <= s->offered && frame->nbytes > 0, "sent() for a frame without payload or never offered");
    EXPECT(!record->sent && !record->forgotten, "sent() twice, or for a forgotten frame");
    record->sent = true;
    free(record->payload);
    record->payload = NULL;
    if (s->forget_in_sent)
        forget_outgoing(s, a_key(s, &s->random));
}

static void on_lost(void *owner, cl_link *link, const char *reason)
{
    side *s = owner;
    (void)link;
    check_alive(s);
    s->lost++;
    snprintf(s->reason, sizeof s->reason, "%s", reason);
    EXPECT(s->reason[0] != 0, "lost() without a reason");
}

static const cl_sink sink = {on_begin, on_piece, on_end, on_revoked, on_sent, on_lost};

/* ---- driving ------------------------------------------------------------------------------------------------- */

static void open_world(world *w, const transport_factory *factory, uint64_t seed, uint32_t nframes, uint32_t sizes_up_to)
{
    memset(w, 0, sizeof *w);
    w->factory = factory;
    factory->open(&w->pair, &settings);
    for (int i = 0; i < 2; i++) {
        w->sides[i] = (side){.link = w->pair.links[i], .number = i, .seed = seed, .random = seed + (uint64_t)i};
        w->sides[i].nframes = nframes;
        w->sides[i].sizes_up_to = sizes_up_to;
        w->pair.links[i]->sink = &sink;
        w->pair.links[i]->owner = &w->sides[i];
        w->pair.links[i]->peer = 1 - i;
    }
}

static void close_side(side *s)
{
    if (s->link != NULL)
        s->link->transport->close(s->link);
    s->link = NULL;
    for (uint32_t i = 0; i < s->offered; i++)
        free(s->outgoing[i].payload);
    s->offered = 0;
    free(s->place);
    free(s->assembled);
    s->place = s->assembled = NULL;
}

static void close_world(world *w)
{
    close_side(&w->sides[0]);
    close_side(&w->sides[1]);
    if (w->factory->clean_up != NULL)
        w->factory->clean_up(&w->pair);
}

static int progress(side *s)
{
    return s->link == NULL ? 0 : s->link->transport->progress(s->link);
}

/* Offers the next frame. True if it was taken. */
static bool offer(side *s)
{
    const uint32_t index = s->offered;
    if (index == s->nframes)
        return false;
    const cl_frame frame = frame_of(s->seed, s->number, index, s->sizes_up_to);
    outgoing_record *record = &s->outgoing[index];
    *record = (outgoing_record){.payload = payload_of(s->seed, s->number, index, frame.nbytes), .key = frame.key};
    const int status = s->link->transport->send(s->link, &frame, record->payload);
    EXPECT(status == CL_OK || status == CL_AGAIN, "send() returned %d", status);
    if (status == CL_AGAIN || frame.nbytes == 0) {
        free(record->payload);
        record->payload = NULL;
    }
    s->offered += status == CL_OK;
    return status == CL_OK;
}

/* From here on the payloads of this key are not the transport's to read. */
static void forget_outgoing(side *s, uint64_t key)
{
    s->link->transport->forget(s->link, key);
    for (uint32_t i = 0; i < s->offered; i++) {
        outgoing_record *record = &s->outgoing[i];
        if (record->key != key || record->payload == NULL)
            continue;
        record->forgotten = true;
        free(record->payload);
        record->payload = NULL;
    }
}

static bool finished(const world *w)
{
    return w->sides[0].received == w->sides[1].nframes && w->sides[1].received == w->sides[0].nframes;
}

/* What a link would sleep on: its own descriptor, or the doorbell. */
static struct pollfd sleeping_place(world *w, side *s)
{
    uint32_t events = 0;
    int descriptor = s->link->transport->pollfd(s->link, &events);
    if (descriptor < 0 && w->factory->doorbell != NULL)
        return (struct pollfd){w->factory->doorbell(&w->pair, s->number), POLLIN, 0};
    return (struct pollfd){descriptor, (short)events, 0}; /* EPOLLIN, EPOLLOUT and POLLIN, POLLOUT are the same bits */
}

/* Falls asleep, unless arm() forbids it. False: nothing ends the sleep. */
static bool wakes_up(world *w, side *s)
{
    struct pollfd place = sleeping_place(w, s);
    bool awake = s->link->transport->arm(s->link) != CL_OK || poll(&place, 1, STUCK_MS) > 0;
    s->link->transport->disarm(s->link);
    return awake;
}

/* Nothing moved: both sides fall asleep, unless arm() forbids it, and something must wake one of them. */
static void sleep_both(world *w)
{
    if (w->factory->advance != NULL) {
        w->factory->advance(&w->pair);
        return;
    }
    struct pollfd places[2] = {sleeping_place(w, &w->sides[0]), sleeping_place(w, &w->sides[1])};
    bool quiet = true;
    for (int i = 0; i < 2; i++) {
        quiet &= w->sides[i].link->transport->arm(w->sides[i].link) == CL_OK;
        places[i] = sleeping_place(w, &w->sides[i]);
    }
    if (quiet)
        EXPECT(poll(places, 2, STUCK_MS) > 0, "both sides sleep for ever (%u and %u frames received)",
               w->sides[0].received, w->sides[1].received);
    for (int i = 0; i < 2; i++)
        w->sides[i].link->transport->disarm(w->sides[i].link);
}

/* Moves everything that is left, both ways. */
static void finish(world *w)
{
    while (!finished(w)) {
        int events = 0;
        for (int i = 0; i < 2; i++)
            events += offer(&w->sides[i]) + progress(&w->sides[i]);
        if (events == 0 && !finished(w))
            sleep_both(w);
    }
    for (int i = 0; i < 2; i++) {
        while (progress(&w->sides[i]) > 0)
            ;
        EXPECT(w->sides[i].link->transport->pending(w->sides[i].link) == 0, "all is received, and something is pending");
        EXPECT(w->sides[i].lost == 0, "lost(\"%s\")", w->sides[i].reason);
        for (uint32_t f = 0; f < w->sides[i].offered; f++)
            EXPECT(w->sides[i].outgoing[f].payload == NULL, "no sent() for frame %u", f);
    }
}

/* ---- the properties ------------------------------------------------------------------------------------------ */

static void all_frames_arrive_in_order(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, 200, LARGE_NBYTES);
    finish(&w);
    close_world(&w);
}

static void random_order_of_calls_and_forgetting(const transport_factory *factory, uint64_t seed)
{
    world w;
    uint64_t random = seed;
    open_world(&w, factory, seed, 200, LARGE_NBYTES);
    w.sides[0].forget_one_in = w.sides[1].forget_one_in = 3;
    w.sides[1].forget_in_sent = true;
    for (int i = 0; i < 2000; i++) {
        side *s = &w.sides[next_random(&random) % 2];
        const uint64_t choice = next_random(&random) % 16;
        if (choice == 0)
            forget_outgoing(s, a_key(s, &random));
        else if (choice < 8)
            offer(s);
        else
            progress(s);
    }
    finish(&w);
    close_world(&w);
}

static void full_link_refuses_and_recovers(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, MAX_FRAMES, LARGE_NBYTES);
    side *s = &w.sides[0];
    while (offer(s) || progress(s) > 0)
        ;
    EXPECT(s->offered < s->nframes, "a link that nobody reads takes everything");
    EXPECT(s->link->transport->pending(s->link) > 0, "frames were refused, and nothing is pending");
    EXPECT(!offer(s), "a full link took a frame");
    for (uint64_t key = 0; key < KEYS; key++)
        forget_outgoing(s, key);
    finish(&w);
    close_world(&w);
}

static void room_wakes_a_full_link(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, MAX_FRAMES, LARGE_NBYTES);
    side *full = &w.sides[0], *reader = &w.sides[1];
    while (offer(full) || progress(full) > 0)
        ;
    EXPECT(full->link->transport->arm(full->link) == CL_OK, "a full link must not sleep");
    struct pollfd place = sleeping_place(&w, full);
    EXPECT(full->link->transport->arm(full->link) == CL_OK, "a full link must not sleep");
    while (progress(reader) > 0)
        ;
    EXPECT(poll(&place, 1, STUCK_MS) > 0, "room wakes nobody");
    full->link->transport->disarm(full->link);
    finish(&w);
    close_world(&w);
}

/* Small frames at once come many to a read; a place is given up in the middle, at every offset. */
static void places_given_up(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, MAX_FRAMES, 70000);
    for (int i = 0; i < 2; i++) {
        w.sides[i].always_place = true;
        w.sides[i].forget_one_in = 1;
    }
    finish(&w);
    close_world(&w);
}

static void a_place_given_up_between_calls(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, MAX_FRAMES, LARGE_NBYTES);
    w.sides[1].always_place = true;
    while (w.sides[0].received + w.sides[1].received < 100) {
        side *receiver = &w.sides[1];
        const int events = offer(&w.sides[0]) + progress(&w.sides[0]) + progress(receiver);
        if (receiver->inside && receiver->place != NULL) {
            const cl_frame frame = frame_of(seed, 0, receiver->received, LARGE_NBYTES);
            give_up_place(receiver, &frame);
        }
        if (events == 0)
            sleep_both(&w);
    }
    finish(&w);
    close_world(&w);
}

static void last_words_come_before_the_loss(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, 20, 8192);
    side *leaving = &w.sides[0], *staying = &w.sides[1];
    while (leaving->offered < leaving->nframes || leaving->link->transport->pending(leaving->link) > 0) {
        offer(leaving);
        progress(leaving);
        if (next_random(&leaving->random) % 2)
            progress(staying);
    }
    for (int i = 0; i < 10; i++)
        offer(staying); /* words that nobody reads must not turn the end into a reset */
    staying->link->transport->progress(staying->link);
    close_side(leaving);
    const bool tells_close = factory->traits & TELLS_CLOSE;
    while (progress(staying) > 0 || (tells_close && staying->lost == 0))
        if (tells_close)
            EXPECT(staying->lost > 0 || wakes_up(&w, staying), "the end of the peer wakes nobody");
    EXPECT(staying->received == leaving->nframes, "%u of %u last words came", staying->received, leaving->nframes);
    EXPECT(staying->lost == tells_close, "lost() %d times", staying->lost);
    EXPECT(progress(staying) == 0, "a lost link moves on");
    close_world(&w);
}

static void a_break_inside_a_frame_is_a_loss(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, MAX_FRAMES, LARGE_NBYTES);
    while (offer(&w.sides[0]) || progress(&w.sides[0]) > 0)
        ;
    close_side(&w.sides[0]);
    while (w.sides[1].lost == 0)
        EXPECT(progress(&w.sides[1]) > 0 || wakes_up(&w, &w.sides[1]), "the break is not noticed");
    EXPECT(w.sides[1].link->transport->arm(w.sides[1].link) == CL_OK, "a lost link cannot sleep");
    close_world(&w);
}

static void an_idle_link_sleeps_until_something_comes(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, 20, 8192);
    for (int i = 0; i < 20; i++) {
        side *sender = &w.sides[i % 2], *sleeper = &w.sides[1 - i % 2];
        while (progress(sleeper) + progress(sender) > 0)
            ;
        EXPECT(sleeper->link->transport->arm(sleeper->link) == CL_OK, "an idle link must not sleep");
        struct pollfd place = sleeping_place(&w, sleeper);
        EXPECT(sleeper->link->transport->arm(sleeper->link) == CL_OK, "an idle link must not sleep");
        EXPECT(poll(&place, 1, 0) == 0 || factory->doorbell != NULL, "an idle link is ready");
        EXPECT(offer(sender), "an idle link refuses a frame");
        progress(sender);
        EXPECT(poll(&place, 1, STUCK_MS) > 0, "an arrival wakes nobody");
        sleeper->link->transport->disarm(sleeper->link);
    }
    finish(&w);
    close_world(&w);
}

static void a_forked_child_disturbs_nothing(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, 100, 70000);
    for (int i = 0; i < 40; i++)
        (void)(offer(&w.sides[i % 2]) || progress(&w.sides[i % 2]));
    const pid_t child = fork();
    EXPECT(child >= 0, "fork failed");
    if (child == 0) {
        for (int i = 0; i < 2; i++)
            w.sides[i].link->transport->forked(w.sides[i].link);
        _exit(0);
    }
    EXPECT(waitpid(child, NULL, 0) == child, "the child is lost");
    finish(&w);
    close_world(&w);
}

/* Such as a worker of a data loader, which knows nothing of links and lives on. */
static void a_child_with_the_descriptors_hides_no_close(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, 0, 0);
    const pid_t child = fork();
    EXPECT(child >= 0, "fork failed");
    if (child == 0) {
        pause();
        _exit(0);
    }
    struct pollfd place = sleeping_place(&w, &w.sides[1]);
    EXPECT(w.sides[1].link->transport->arm(w.sides[1].link) == CL_OK, "an idle link must not keep awake");
    close_side(&w.sides[0]);
    const bool woken = poll(&place, 1, STUCK_MS) > 0;
    progress(&w.sides[1]);
    kill(child, SIGKILL);
    EXPECT(waitpid(child, NULL, 0) == child, "the child is lost");
    EXPECT(woken && w.sides[1].lost == 1, "a child that holds the descriptors hides the close");
    close_world(&w);
}

static void a_closed_link_owns_nothing(const transport_factory *factory, uint64_t seed)
{
    world w;
    open_world(&w, factory, seed, MAX_FRAMES, LARGE_NBYTES);
    for (int i = 0; i < 2; i++)
        while (offer(&w.sides[i]))
            ;
    forget_outgoing(&w.sides[0], 1);
    progress(&w.sides[0]);
    progress(&w.sides[1]);
    close_world(&w); /* the leak sanitizer looks */
}

static const struct {
    const char *name;
    int needs; /* traits */
    void (*run)(const transport_factory *factory, uint64_t seed);
} properties[] = {
    {"all frames arrive in order", 0, all_frames_arrive_in_order},
    {"random order of calls, and forgetting", 0, random_order_of_calls_and_forgetting},
    {"a full link refuses and recovers", IS_REAL, full_link_refuses_and_recovers},
    {"room wakes a full link", IS_REAL, room_wakes_a_full_link},
    {"places given up inside pieces", 0, places_given_up},
    {"a place given up between calls", 0, a_place_given_up_between_calls},
    {"last words come before the loss", IS_REAL, last_words_come_before_the_loss},
    {"a break inside a frame is a loss", TELLS_CLOSE, a_break_inside_a_frame_is_a_loss},
    {"an idle link sleeps until something comes", IS_REAL, an_idle_link_sleeps_until_something_comes},
    {"a forked child disturbs nothing", IS_REAL, a_forked_child_disturbs_nothing},
    {"a child with the descriptors hides no close", TELLS_CLOSE, a_child_with_the_descriptors_hides_no_close},
    {"a closed link owns nothing", 0, a_closed_link_owns_nothing},
};

void conformance_run(const transport_factory *factory, uint64_t seed)
{
    for (size_t i = 0; i < sizeof properties / sizeof properties[0]; i++) {
        const bool applies = (factory->traits & properties[i].needs) == properties[i].needs;
        printf("%s, seed %llu: %s%s\n", factory->name, (unsigned long long)seed, properties[i].name,
               applies ? "" : " (does not apply)");
        fflush(stdout);
        if (applies)
            properties[i].run(factory, seed + i);
    }
}
