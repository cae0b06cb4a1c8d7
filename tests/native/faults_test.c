/*
 * faults_test.c: ends at the wrong moment: shutdowns, forks, failures while a frame is half in; and wrong requests.
 *
 * Where the moment matters, engines are driven by hand, or a link is played by the test itself.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../native/engine.h"
#include "world.h"

static cl_operation *submit_sum(world *w, int32_t rank, uint64_t key, int32_t *data, uint64_t count, int32_t gated)
{
    cl_operation *operation;
    cl_request request = sum_request(w, rank, key, data, count);
    request.plan = w->exchange[rank] == NULL ? w->ring[rank] : w->exchange[rank];
    request.gated = gated;
    CHECK(cl_submit(w->engines[rank], &request, &operation) == CL_OK);
    return operation;
}

static void check_status(cl_operation *operation, int expected)
{
    const char *text;
    int32_t peer;
    int status = cl_operation_status(operation, &text, &peer);
    if (status != expected)
        fprintf(stderr, "status %d instead of %d: %s\n", status, expected, text);
    CHECK(status == expected);
    cl_operation_release(operation);
}

/* ---- shutdown ------------------------------------------------------------------------------------------------ */

/* A peer that reads nothing has no room for the goodbye. When it reads again, it must not wait for ever. */
static void test_shutdown_with_full_ring(void)
{
    static int32_t data[2][50000];
    cl_settings settings = tiny_settings();
    world w = shm_links(2, &settings);
    cl_operation *here = submit_sum(&w, 0, 1, data[0], 50000, 0), *there = submit_sum(&w, 1, 1, data[1], 50000, 0);
    for (int i = 0; i < 3; i++) { /* both have posted, and data is on its way */
        cl_engine_progress(w.engines[0]);
        cl_engine_progress(w.engines[1]);
    }
    cl_engine_progress(w.engines[0]);
    CHECK(cl_engine_pending(w.engines[0]) > 0);
    CHECK(cl_engine_shutdown(w.engines[0], 20) == CL_OK);
    check_status(here, CL_SHUTDOWN);
    for (int i = 0; i < 100; i++)
        cl_engine_progress(w.engines[1]);
    check_status(there, CL_PEER_LOST);
    free_world(&w);
}

/* What the shut-down engine used to write to may be somebody else's file by now. */
static void test_submit_after_shutdown_writes_nowhere(void)
{
    cl_settings settings = ordinary_settings();
    world w = tcp_world(2, &settings);
    int32_t data = 0;
    int reused[16];
    CHECK(cl_engine_shutdown(w.engines[0], 100) == CL_OK);
    for (int i = 0; i < 16; i++)
        CHECK((reused[i] = memfd_create("reused", MFD_CLOEXEC)) >= 0);
    check_status(submit_sum(&w, 0, 1, &data, 1, 0), CL_SHUTDOWN);
    for (int i = 0; i < 16; i++) {
        CHECK(lseek(reused[i], 0, SEEK_END) == 0);
        close(reused[i]);
    }
    free_world(&w);
}

static void *shut_down(void *engine)
{
    CHECK(cl_engine_shutdown(engine, 100) == CL_OK);
    return NULL;
}

static void test_two_shutdowns_at_once(void)
{
    cl_settings settings = ordinary_settings();
    world w = shm_world(3, &settings);
    int32_t data[3] = {0};
    cl_operation *operation = submit_sum(&w, 0, 1, data, 3, 0);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, shut_down, w.engines[i % 2]) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    cl_operation *late = submit_sum(&w, 0, 2, data, 3, 1);
    CHECK(cl_operation_ready(late, 0, 1) == CL_OK);
    CHECK(cl_operation_done(operation));
    cl_operation_release(operation);
    check_status(late, CL_SHUTDOWN);
    free_world(&w);
}

/* ---- fork ---------------------------------------------------------------------------------------------------- */

static void live_as_a_child(world *w, cl_operation *gated)
{
    cl_engine *engine = w->engines[0];
    cl_operation *operation;
    cl_request request = sum_request(w, 0, 77, NULL, 0);
    const char *text;
    int32_t peer;
    cl_stats stats;
    for (int32_t r = 0; r < w->size; r++)
        cl_engine_forked(w->engines[r]);
    CHECK(cl_submit(engine, &request, &operation) == CL_FORKED);
    CHECK(cl_operation_wait(gated, 1000) == CL_FORKED);
    CHECK(cl_operation_ready(gated, 0, 1) == CL_FORKED);
    (void)cl_engine_health(engine, &text, &peer);
    cl_engine_stats(engine, &stats);
    CHECK(cl_engine_shutdown(engine, 1000) == CL_FORKED);
    cl_operation_release(gated);
}

/* A child may call what it likes: it gets an answer, and the parent goes on, whether the child still lives or not. */
static void test_fork(world (*make)(int32_t, const cl_settings *))
{
    cl_settings settings = ordinary_settings();
    world w = make(2, &settings);
    int32_t data[2][10] = {{0}};
    int pipes[2], child_status;
    cl_operation *here = submit_sum(&w, 0, 1, data[0], 10, 1), *there = submit_sum(&w, 1, 1, data[1], 10, 0);
    CHECK(pipe2(pipes, O_CLOEXEC) == 0);
    pid_t child = fork();
    if (child == 0) {
        char byte;
        close(pipes[1]);
        live_as_a_child(&w, here);
        CHECK(read(pipes[0], &byte, 1) == 0); /* until the parent is done */
        _exit(0);
    }
    close(pipes[0]);
    CHECK(cl_operation_ready(here, 0, 1) == CL_OK);
    wait_for(here, CL_OK);
    wait_for(there, CL_OK);
    cl_operation_release(here);
    cl_operation_release(there);
    free_world(&w);
    close(pipes[1]);
    CHECK(waitpid(child, &child_status, 0) == child && WIFEXITED(child_status) && WEXITSTATUS(child_status) == 0);
}

/* Who shuts down does not wait, for all that it may linger, until a dead rank has read its last words. */
static void test_death_of_a_peer_while_leaving(void)
{
    enum { COUNT = 400000, LINGER_MS = 50000 };
    cl_settings settings = tiny_settings();
    world w = {.size = 2};
    int memfds[2], doorbells[2];
    pid_t child = fork(); /* the other rank's process, as far as its pidfd says */
    if (child == 0)
        for (;;)
            pause();
    for (int32_t r = 0; r < 2; r++) {
        CHECK(cl_engine_new(r, 2, &settings, &w.engines[r]) == CL_OK);
        CHECK(cl_shm_create(w.engines[r], 1, &memfds[r], &doorbells[r]) == CL_OK);
    }
    int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    CHECK(cl_shm_attach(w.engines[0], 1, dup(memfds[1]), dup(doorbells[1]), pidfd, 0, 0) == CL_OK);
    CHECK(cl_shm_attach(w.engines[1], 0, dup(memfds[0]), dup(doorbells[0]), -1, 0, 0) == CL_OK);
    plan_world(&w);
    int32_t *data[2] = {calloc(COUNT, sizeof(int32_t)), calloc(COUNT, sizeof(int32_t))};
    cl_operation *operations[2];
    for (int32_t r = 0; r < 2; r++)
        operations[r] = submit_sum(&w, r, 1, data[r], COUNT, 0);
    for (int round = 0; pidfd >= 0 && cl_engine_pending(w.engines[0]) == 0; round++) {
        CHECK(round < 100);
        cl_engine_progress(w.engines[1]);
        cl_engine_progress(w.engines[0]);
    }
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
    double begin_s = cl_engine_now(w.engines[0]);
    CHECK(cl_engine_shutdown(w.engines[0], LINGER_MS) == CL_OK);
    CHECK(cl_engine_now(w.engines[0]) - begin_s < 0.5e-3 * LINGER_MS);
    for (int32_t r = 0; r < 2; r++) {
        CHECK(cl_engine_shutdown(w.engines[r], 0) == CL_OK && cl_operation_done(operations[r]));
        cl_operation_release(operations[r]);
        free(data[r]);
    }
    free_world(&w);
}

/* ---- a link played by the test ------------------------------------------------------------------------------- */

typedef struct {
    cl_link base;
    cl_frame sent[64];
    int nsent;
    uint64_t forgotten; /* a bit per key */
} played;

static int played_send(cl_link *link, const cl_frame *frame, const void *payload)
{
    played *p = (played *)link;
    (void)payload;
    CHECK(p->nsent < 64);
    p->sent[p->nsent++] = *frame;
    return CL_OK;
}

static int played_progress(cl_link *link)
{
    (void)link;
    return 0;
}

static void played_forget(cl_link *link, uint64_t key)
{
    ((played *)link)->forgotten |= UINT64_C(1) << key % 64;
}

static size_t played_pending(const cl_link *link)
{
    (void)link;
    return 0;
}

static void played_close(cl_link *link)
{
    (void)link;
}

static const cl_transport played_transport = {
    .name = "played", .send = played_send, .progress = played_progress, .forget = played_forget,
    .pending = played_pending, .close = played_close, .forked = played_close,
};

typedef struct {
    world w;
    cl_engine *engine;
    played link;
} scene;

/* Rank 0 of two, whose peer is the test. */
static void set_scene(scene *s, uint64_t eager_nbytes)
{
    cl_settings settings = ordinary_settings();
    settings.eager_nbytes = eager_nbytes;
    *s = (scene){.w.size = 2, .link.base.transport = &played_transport};
    plan_world(&s->w);
    CHECK(cl_engine_new(0, 2, &settings, &s->engine) == CL_OK);
    s->w.engines[0] = s->engine;
    cl_engine_attach(s->engine, 1, &s->link.base);
}

static void clear_scene(scene *s)
{
    cl_engine_free(s->engine);
    free_plans(&s->w);
}

static void begin(scene *s, const cl_frame *frame)
{
    (void)cl_engine_sink.begin(s->engine, &s->link.base, frame);
}

static void end(scene *s, const cl_frame *frame, const void *payload)
{
    if (frame->nbytes > 0)
        cl_engine_sink.piece(s->engine, &s->link.base, frame, 0, payload, frame->nbytes);
    cl_engine_sink.end(s->engine, &s->link.base, frame);
    cl_engine_flush(s->engine);
}

static int count_sent(const scene *s, uint8_t type, uint64_t arg)
{
    int count = 0;
    for (int i = 0; i < s->link.nsent; i++)
        count += s->link.sent[i].type == type && s->link.sent[i].arg == arg;
    return count;
}

/* Its payload must neither be kept for ever nor keep the sender's budget. */
static void test_failure_while_a_frame_is_half_in(void)
{
    static uint8_t payload[1 << 16];
    int32_t data[4] = {0};
    scene s;
    set_scene(&s, 1 << 20);
    cl_frame frame = {.key = 5, .type = CL_FRAME_DATA, .flags = CL_FLAG_EAGER, .nbytes = 40000};
    begin(&s, &frame); /* not posted here yet: it is kept */
    cl_operation *operation = submit_sum(&s.w, 0, 5, data, 4, 0);
    cl_engine_flush(s.engine);
    cl_control_fail_everywhere(operation, CL_SYSTEM, 0, "the test says so");
    end(&s, &frame, payload);
    CHECK(s.engine->early.count == 0);
    CHECK(count_sent(&s, CL_FRAME_CREDIT, 40000) == 1);
    check_status(operation, CL_SYSTEM);
    clear_scene(&s);
}

/* Sends that were never begun give their budget back; what came early for a failed operation does, too. */
static void test_failure_returns_budget(void)
{
    static uint8_t payload[1 << 16];
    int32_t data[100] = {0}, more[100] = {0};
    scene s;
    set_scene(&s, 1 << 20);
    s.engine->settings.inflight_nbytes = 1;
    cl_operation *first = submit_sum(&s.w, 0, 5, data, 100, 0), *second = submit_sum(&s.w, 0, 6, more, 100, 0);
    cl_engine_flush(s.engine); /* the first is on the link, the second waits for it */
    CHECK(s.engine->peers[1].ready.count == 1);
    uint64_t used = s.engine->peers[1].eager_used;
    cl_control_fail_everywhere(second, CL_SYSTEM, 0, "the test says so");
    CHECK(s.engine->peers[1].eager_used == used / 2);
    cl_frame frame = {.key = 7, .type = CL_FRAME_DATA, .flags = CL_FLAG_EAGER, .nbytes = 40000};
    begin(&s, &frame);
    end(&s, &frame, payload);
    CHECK(s.engine->early.count == 1);
    cl_early_drop(s.engine, 7);
    cl_engine_flush(s.engine);
    CHECK(s.engine->early.count == 0 && count_sent(&s, CL_FRAME_CREDIT, 40000) == 1);
    cl_control_fail_everywhere(first, CL_SYSTEM, 0, "the test says so");
    CHECK(s.link.forgotten & 1 << 5); /* its payload was on the link */
    check_status(first, CL_SYSTEM);
    check_status(second, CL_SYSTEM);
    clear_scene(&s);
}

/* An eager message whose sender takes it back while it comes in. */
static void test_revoked_message_returns_budget(void)
{
    static uint8_t payload[1 << 16];
    scene s;
    set_scene(&s, 1 << 20);
    cl_frame frame = {.key = 5, .type = CL_FRAME_DATA, .flags = CL_FLAG_EAGER, .nbytes = 40000};
    begin(&s, &frame);
    cl_engine_sink.piece(s.engine, &s.link.base, &frame, 0, payload, frame.nbytes);
    cl_engine_sink.revoked(s.engine, &s.link.base, &frame);
    cl_engine_flush(s.engine);
    CHECK(s.engine->early.count == 0 && s.engine->peers[1].keeping == NULL);
    CHECK(count_sent(&s, CL_FRAME_CREDIT, 40000) == 1);
    clear_scene(&s);
}

/* Granted data for an operation that failed long ago, among thousands: no fault of the peer. */
static void test_very_late_data(void)
{
    static uint8_t payload[64];
    int32_t data[16] = {0};
    scene s;
    set_scene(&s, 0);
    for (uint64_t key = 1; key <= 2 * CL_FAILED_KEYS; key++)
        cl_engine_failed_key(s.engine, key);
    cl_frame late = {.key = 1, .type = CL_FRAME_DATA, .nbytes = 64};
    begin(&s, &late);
    end(&s, &late, payload);
    CHECK(s.engine->health == CL_OK);
    /* But data that nobody granted is. */
    cl_operation *operation = submit_sum(&s.w, 0, 9999, data, 16, 0);
    cl_engine_flush(s.engine);
    cl_frame wrong = {.key = 9999, .type = CL_FRAME_DATA, .nbytes = 64, .step = 7, .meta = operation->meta};
    begin(&s, &wrong);
    end(&s, &wrong, payload);
    check_status(operation, CL_PEER_LOST);
    clear_scene(&s);
}

/* An eager message that has no place in the plan fails its operation instead of being kept while it waits for ever. */
static void test_eager_message_without_a_place(void)
{
    static uint8_t payload[64];
    int32_t data[16] = {0};
    scene s;
    set_scene(&s, 1 << 20);
    cl_operation *operation = submit_sum(&s.w, 0, 3, data, 16, 0);
    cl_engine_flush(s.engine);
    cl_frame wrong = {.key = 3, .type = CL_FRAME_DATA, .flags = CL_FLAG_EAGER, .nbytes = 64, .step = 7,
                      .meta = operation->meta};
    begin(&s, &wrong);
    end(&s, &wrong, payload);
    check_status(operation, CL_SYSTEM);
    CHECK(count_sent(&s, CL_FRAME_FAIL, CL_SYSTEM) == 1);
    clear_scene(&s);
}

/* ---- requests ------------------------------------------------------------------------------------------------ */

static int refused(world *w, const cl_request *request)
{
    cl_operation *operation;
    int status = cl_submit(w->engines[0], request, &operation);
    if (status == CL_OK)
        cl_operation_release(operation);
    return status == CL_INVALID;
}

/* Whatever would make the engine read or write past somebody's memory is refused at the door. */
static void test_wrong_requests(void)
{
    int32_t data[8] = {0}, members[2] = {0, 1}, strangers[2] = {0, 2};
    uint64_t parts[3] = {0, 4, 9}, backward[3] = {4, 0, 8}, one = 9, two[2] = {4, 5};
    cl_settings settings = ordinary_settings();
    world w = shm_world(2, &settings);
    cl_request sum = sum_request(&w, 0, 1, data, 8), wrong = sum;
    wrong.output = NULL;
    CHECK(refused(&w, &wrong));
    wrong = sum, wrong.input = NULL;
    CHECK(refused(&w, &wrong));
    wrong = sum, wrong.input = wrong.output = NULL; /* timing only, and no simulation */
    CHECK(refused(&w, &wrong));
    wrong = sum, wrong.plan = w.ring[1]; /* its peer is this rank */
    CHECK(refused(&w, &wrong));
    cl_step far = {CL_SEND, 7, 0, 1};
    CHECK(cl_plan_new(&far, 1, 1, 0, &wrong.plan) == CL_OK);
    CHECK(refused(&w, &wrong));
    cl_plan_free(wrong.plan);
    wrong = sum, wrong.kind = CL_REDUCESCATTER, wrong.plan = w.scatter[0], wrong.parts = parts;
    CHECK(refused(&w, &wrong));
    wrong.parts = backward;
    CHECK(refused(&w, &wrong));
    wrong = sum, wrong.kind = CL_ALLGATHER, wrong.plan = w.gather[0], wrong.members = members, wrong.nmembers = 2;
    wrong.splits = &one, wrong.nsplits = 1;
    CHECK(refused(&w, &wrong));
    one = 8, wrong.members = strangers;
    CHECK(refused(&w, &wrong));
    wrong.members = members, wrong.my_part = 1;
    CHECK(refused(&w, &wrong));
    wrong = sum, wrong.kind = CL_ALLTOALL, wrong.plan = w.shuffle[0], wrong.members = members, wrong.nmembers = 2;
    wrong.splits = two, wrong.nsplits = 2;
    CHECK(refused(&w, &wrong));
    wrong = sum, wrong.count = UINT64_MAX / 2;
    CHECK(refused(&w, &wrong));
    free_world(&w);
}

/* A frame counts its bytes in 32 bits: a step that is longer fails on every rank, and says what to do. */
static void test_steps_of_4_gib(void)
{
    const cl_sim_link link = {1e-6, 1e-10, 0};
    const int32_t hosts[2] = {0, 0};
    cl_settings settings = ordinary_settings();
    cl_sim *sim;
    world w = {.size = 2};
    plan_world(&w);
    CHECK(cl_sim_new(2, hosts, &link, &link, &settings, &sim) == CL_OK);
    for (uint64_t key = 1; key <= 2; key++) {
        cl_operation *operations[2];
        int32_t rank;
        uint64_t token;
        for (int32_t r = 0; r < 2; r++) {
            cl_request request = sum_request(&w, r, key, NULL, UINT64_C(1) << 31);
            request.plan = w.exchange[r];
            request.segment_count = key == 1 ? 0 : 1 << 24;
            CHECK(cl_submit(cl_sim_engine(sim, r), &request, &operations[r]) == CL_OK);
        }
        while (cl_sim_next(sim, &rank, &token) != CL_SIM_IDLE)
            ;
        for (int32_t r = 0; r < 2; r++)
            check_status(operations[r], key == 1 ? CL_INVALID : CL_OK);
    }
    cl_sim_free(sim);
    free_plans(&w);
}

/* A gated operation without peers, whose gates open before the engine has seen it, ends once. */
static void test_alone_and_gated(void)
{
    cl_settings settings = ordinary_settings();
    world w = {.size = 1};
    plan_world(&w);
    CHECK(cl_engine_new(0, 1, &settings, &w.engines[0]) == CL_OK);
    int32_t data[10] = {0};
    cl_operation *operation = submit_sum(&w, 0, 1, data, 10, 1);
    CHECK(cl_operation_ready(operation, 0, 1) == CL_OK);
    cl_engine_flush(w.engines[0]);
    CHECK(w.engines[0]->stats.operations == 1 && atomic_load(&w.engines[0]->unfinished) == 0);
    check_status(operation, CL_OK);
    free_world(&w);
}

/* Nobody leaves a barrier before everybody has come, also ranks that share no link of the plan: 2 and 5 of 6. */
static void test_barrier(void)
{
    const cl_sim_link link = {1e-6, 1e-10, 0};
    const int32_t hosts[6] = {0};
    cl_settings settings = ordinary_settings();
    cl_sim *sim;
    cl_operation *operations[6];
    cl_plan *plans[6];
    int32_t rank;
    uint64_t token;
    CHECK(cl_sim_new(6, hosts, &link, &link, &settings, &sim) == CL_OK);
    for (int32_t r = 0; r < 6; r++) {
        cl_step steps[6] = {{0}};
        size_t count = 0;
        for (int32_t distance = 1; distance < 6; distance *= 2) {
            steps[count++] = (cl_step){CL_SEND, (r + distance) % 6, 0, 1};
            steps[count++] = (cl_step){CL_RECV_REDUCE, (r + 6 - distance) % 6, 0, 1};
        }
        CHECK(cl_plan_new(steps, count, 1, 0, &plans[r]) == CL_OK);
        cl_request request = {.key = 1, .text = "barrier", .kind = CL_BARRIER, .plan = plans[r], .prescale = 1,
                              .postscale = 1};
        if (r == 5) /* the last to come: rank 2 has no link with it */
            CHECK(cl_sim_next(sim, &rank, &token) == CL_SIM_IDLE);
        CHECK(cl_submit(cl_sim_engine(sim, r), &request, &operations[r]) == CL_OK);
    }
    while (cl_sim_next(sim, &rank, &token) != CL_SIM_IDLE)
        ;
    for (int32_t r = 0; r < 6; r++) {
        check_status(operations[r], CL_OK);
        cl_plan_free(plans[r]);
    }
    cl_sim_free(sim);
}

static void test_fork_shm(void)
{
    test_fork(shm_world);
}

static void test_fork_tcp(void)
{
    test_fork(tcp_world);
}

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    {"shutdown with a full ring", test_shutdown_with_full_ring},
    {"submit after shutdown", test_submit_after_shutdown_writes_nowhere},
    {"two shutdowns at once", test_two_shutdowns_at_once},
    {"fork, shm", test_fork_shm},
    {"fork, tcp", test_fork_tcp},
    {"failure while a frame is half in", test_failure_while_a_frame_is_half_in},
    {"failure returns budget", test_failure_returns_budget},
    {"death of a peer while leaving", test_death_of_a_peer_while_leaving},
    {"revoked message returns budget", test_revoked_message_returns_budget},
    {"very late data", test_very_late_data},
    {"an eager message without a place", test_eager_message_without_a_place},
    {"wrong requests", test_wrong_requests},
    {"steps of 4 GiB", test_steps_of_4_gib},
    {"alone and gated", test_alone_and_gated},
    {"barrier", test_barrier},
};

int main(void)
{
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        fprintf(stderr, "%s\n", tests[i].name);
        tests[i].run();
    }
    puts("all tests of faults passed");
    return 0;
}
