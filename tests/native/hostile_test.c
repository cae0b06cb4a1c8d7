/*
 * hostile_test.c: an engine whose peer has gone mad, or is another program that knows the secret: what comes over its tcp link is
 * made of frames that the engine itself could have got, with fields changed at random, and of noise.
 *
 * Whatever comes, the engine must stay in its own memory (run this under the sanitizers), must not report success for what did
 * not happen, and once the link is closed every operation must be done. argv: the first seed and how many.
 */
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../native/engine.h"
#include "world.h"

enum { COUNT = 3000, OPERATIONS = 5, FRAMES = 24, TEMPLATES = 64, PAYLOAD_NBYTES = 1 << 15, DONE_TRIES = 1000 };

typedef struct {
    world w; /* two ranks; only rank 0 has an engine */
    int wire;
    uint64_t random;
    cl_frame templates[TEMPLATES]; /* what the engine has said itself: true keys and metadata */
    size_t ntemplates;
    cl_operation *operations[OPERATIONS];
    int32_t data[OPERATIONS][COUNT];
} madness;

static uint64_t pick(madness *m, uint64_t below)
{
    return next_random(&m->random) % below;
}

/* Mostly small, sometimes a little off what is right, sometimes absurd. */
static uint64_t absurd(madness *m, uint64_t right)
{
    const uint64_t choices[] = {right, right, right + 1, right - 1, pick(m, 4), pick(m, 1 << 16), 0, UINT32_MAX,
                                UINT64_MAX, next_random(&m->random)};
    return choices[pick(m, sizeof choices / sizeof choices[0])];
}

static void begin(madness *m, uint64_t seed)
{
    const cl_settings settings = ordinary_settings();
    int pair[2];
    *m = (madness){.w = {.size = 2}, .random = seed * 2654435761u + 1};
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(cl_engine_new(0, 2, &settings, &m->w.engines[0]) == CL_OK);
    CHECK(cl_tcp_attach(m->w.engines[0], 1, pair[0]) == CL_OK);
    m->wire = pair[1];
    plan_world(&m->w);
}

/* Sums of every size class, an exchange, an all-gather: all that has a handler of its own. */
static void submit_all(madness *m)
{
    static const int32_t members[] = {0, 1};
    static const uint64_t counts[] = {7, 900, COUNT, COUNT};
    for (int i = 0; i < OPERATIONS; i++) {
        cl_request request = sum_request(&m->w, 0, 100 + (uint64_t)i, m->data[i], counts[i % 4]);
        request.segment_count = i == 3 ? 1000 : 0;
        if (i == OPERATIONS - 1)
            request = (cl_request){.key = 100 + (uint64_t)i, .text = "exchange", .kind = CL_EXCHANGE, .dtype = CL_UINT8,
                                   .root = -1, .prescale = 1, .postscale = 1, .input = m->data[i], .count = 100,
                                   .members = members, .nmembers = 2};
        CHECK(cl_submit(m->w.engines[0], &request, &m->operations[i]) == CL_OK);
    }
}

static void progress(madness *m)
{
    for (int i = 0; i < 8 && cl_engine_progress(m->w.engines[0]) > 0; i++)
        ;
}

/* Keeps headers that the engine sent; payloads are passed by. */
static void listen_to_it(madness *m)
{
    static uint8_t heard[1 << 18];
    const ssize_t got = recv(m->wire, heard, sizeof heard, MSG_DONTWAIT);
    for (size_t at = 0; got > 0 && at + sizeof(cl_frame) <= (size_t)got;) {
        cl_frame frame;
        memcpy(&frame, heard + at, sizeof frame);
        at += sizeof frame + frame.nbytes;
        if (m->ntemplates < TEMPLATES)
            m->templates[m->ntemplates++] = frame;
    }
}

static cl_frame made_up(madness *m)
{
    cl_frame frame = {0};
    if (m->ntemplates > 0)
        frame = m->templates[pick(m, m->ntemplates)];
    if (pick(m, 4) == 0)
        frame.key = 100 + pick(m, OPERATIONS + 2);
    if (pick(m, 2) == 0)
        frame.type = (uint8_t)(pick(m, 8) == 0 ? pick(m, 256) : 1 + pick(m, CL_FRAME_BYE));
    if (pick(m, 2) == 0)
        frame.flags = (uint8_t)pick(m, 4);
    if (pick(m, 2) == 0)
        frame.segment = (uint32_t)absurd(m, frame.segment);
    if (pick(m, 2) == 0)
        frame.step = (uint32_t)absurd(m, frame.step);
    if (pick(m, 2) == 0)
        frame.arg = absurd(m, frame.arg);
    if (pick(m, 8) == 0)
        ((uint8_t *)&frame.meta)[pick(m, sizeof frame.meta)] ^= (uint8_t)(1 + pick(m, 255));
    const uint64_t nbytes = pick(m, 2) == 0 ? frame.nbytes : absurd(m, pick(m, PAYLOAD_NBYTES));
    frame.nbytes = (uint32_t)(pick(m, 16) == 0 ? nbytes : nbytes % PAYLOAD_NBYTES); /* one in 16 may promise what never comes */
    return frame;
}

static void say(madness *m, const void *bytes, size_t nbytes)
{
    (void)!send(m->wire, bytes, nbytes, MSG_DONTWAIT | MSG_NOSIGNAL); /* it may have hung up */
}

static void go_mad(madness *m)
{
    static uint8_t payload[PAYLOAD_NBYTES];
    for (int i = 0; i < FRAMES; i++) {
        listen_to_it(m);
        const cl_frame frame = made_up(m);
        const size_t whole = frame.nbytes < PAYLOAD_NBYTES ? frame.nbytes : PAYLOAD_NBYTES;
        for (size_t j = 0; j < whole; j += 4)
            memcpy(payload + j, &(uint32_t){(uint32_t)absurd(m, 8)}, whole - j < 4 ? whole - j : 4);
        say(m, &frame, pick(m, 32) == 0 ? pick(m, sizeof frame) : sizeof frame);
        say(m, payload, pick(m, 8) == 0 ? pick(m, whole + 1) : whole);
        progress(m);
    }
}

/*
 * The link is closed: whatever was believed, nobody waits any more, and a failure names a rank that there is.
 * Returns how many operations had failed by a frame before that, and not by the loss of the peer.
 */
static int end(madness *m)
{
    int failed = 0;
    close(m->wire);
    for (int i = 0; i < DONE_TRIES && cl_engine_progress(m->w.engines[0]) > 0; i++)
        ;
    for (int i = 0; i < OPERATIONS; i++) {
        const char *text;
        int32_t peer;
        CHECK(cl_operation_done(m->operations[i]));
        const int status = cl_operation_status(m->operations[i], &text, &peer);
        CHECK(status != CL_AGAIN && status < CL_STATUS_END && text != NULL && peer >= -1 && peer < 2);
        failed += status != CL_OK && status != CL_PEER_LOST;
        cl_operation_release(m->operations[i]);
    }
    free_world(&m->w);
    return failed;
}

int main(int argc, char **argv)
{
    const uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, count = argc > 2 ? strtoull(argv[2], NULL, 10) : 300;
    static madness m;
    uint64_t failed = 0;
    for (uint64_t seed = first; seed < first + count; seed++) {
        fprintf(stderr, "\rseed %llu", (unsigned long long)seed);
        begin(&m, seed);
        submit_all(&m);
        progress(&m);
        go_mad(&m);
        failed += (uint64_t)end(&m);
    }
    CHECK(failed > count / 4); /* else the frames do not reach what they shall test */
    printf("\nhostile_test passed: %llu operations failed\n", (unsigned long long)failed);
    return 0;
}
