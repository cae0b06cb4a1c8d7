/*
 * processes_test.c: the random operations of tasks.h over real links, shm and tcp, between 2 to 4 processes that run at their own
 * speed: orders and moments of submission, gates and given-up waits are random; ranks are stopped for a while, or killed.
 *
 * What a seed draws is the same in every run, how it is interleaved is not. All must end well or say why, and name who is to blame.
 * argv: first seed, how many.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tasks.h"

enum { MOST_PROCESSES = 4, LONGEST_SEED_S = 60, LINGER_MS = 5000 };

typedef enum { NOTHING, STOP, KILL, FAULTS } fault;

/* What all processes of a seed see. */
typedef struct {
    atomic_int linked;
    atomic_bool came[MOST_PROCESSES][MOST_TASKS];
    atomic_bool over[MOST_PROCESSES]; /* has nothing left to do */
} news;

typedef struct {
    program p;
    uint64_t seed, random;
    cl_settings settings;
    bool over_tcp, leaves_early;
    fault fault;
    int32_t victim;
    int pairs[MOST_PROCESSES][MOST_PROCESSES]; /* [a][b]: a's end of a connection with b */
    news *board;
    int32_t rank;
    cl_engine *engine;
} scene;

static uint64_t pick(scene *s, uint64_t below)
{
    return next_random(&s->random) % below;
}

static void wrong(scene *s, int64_t number, const char *what)
{
    fprintf(stderr, "seed %llu, rank %d, key %d (%s): %s\n", (unsigned long long)s->seed, s->rank, (int)number + 1,
            number < 0 ? "none" : tasks_name(s->p.tasks[number].form), what);
    abort();
}

/* ---- links ---------------------------------------------------------------------------------------------------- */

static void draw_pairs(scene *s)
{
    for (int32_t a = 0; a < s->p.size; a++)
        for (int32_t b = 0; b < a; b++) {
            int pair[2];
            if (s->over_tcp)
                tcp_pair(pair);
            else
                CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
            s->pairs[a][b] = pair[0];
            s->pairs[b][a] = pair[1];
        }
}

static void close_pairs(scene *s, bool mine_too)
{
    for (int32_t a = 0; a < s->p.size; a++)
        for (int32_t b = 0; b < s->p.size; b++)
            if (a != b && (a != s->rank || mine_too))
                close(s->pairs[a][b]);
}

typedef struct {
    pid_t pid;
    int descriptors[2];
} introduction;

static void introduce(int sock, int memfd, int doorbell)
{
    introduction mine = {.pid = getpid()};
    int descriptors[2] = {memfd, doorbell};
    char control[CMSG_SPACE(sizeof descriptors)] = {0};
    struct iovec piece = {&mine, sizeof mine};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof descriptors);
    memcpy(CMSG_DATA(header), descriptors, sizeof descriptors);
    CHECK(sendmsg(sock, &message, 0) == sizeof mine);
}

static introduction hear(int sock)
{
    introduction theirs;
    char control[CMSG_SPACE(sizeof theirs.descriptors)] = {0};
    struct iovec piece = {&theirs, sizeof theirs};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    CHECK(recvmsg(sock, &message, MSG_CMSG_CLOEXEC) == sizeof theirs && CMSG_FIRSTHDR(&message) != NULL);
    memcpy(theirs.descriptors, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof theirs.descriptors);
    return theirs;
}

static void link_shm(scene *s)
{
    int memfd, doorbell;
    int32_t me = s->rank;
    CHECK(cl_shm_create(s->engine, s->p.size - 1, &memfd, &doorbell) == CL_OK);
    for (int32_t peer = 0; peer < s->p.size; peer++)
        if (peer != me)
            introduce(s->pairs[me][peer], memfd, doorbell);
    for (int32_t peer = 0; peer < s->p.size; peer++) {
        if (peer == me)
            continue;
        introduction theirs = hear(s->pairs[me][peer]);
        int pidfd = (int)syscall(SYS_pidfd_open, theirs.pid, 0);
        CHECK(pidfd >= 0);
        CHECK(cl_shm_attach(s->engine, peer, theirs.descriptors[0], theirs.descriptors[1], pidfd, me - (me > peer),
                            peer - (peer > me)) == CL_OK);
        close(s->pairs[me][peer]);
    }
}

static void link_all(scene *s)
{
    CHECK(cl_engine_new(s->rank, s->p.size, &s->settings, &s->engine) == CL_OK);
    for (int32_t peer = 0; s->over_tcp && peer < s->p.size; peer++)
        if (peer != s->rank)
            CHECK(cl_tcp_attach(s->engine, peer, s->pairs[s->rank][peer]) == CL_OK);
    if (!s->over_tcp)
        link_shm(s);
    CHECK(cl_engine_start(s->engine) == CL_OK);
    atomic_fetch_add(&s->board->linked, 1);
}

/* ---- one rank ------------------------------------------------------------------------------------------------- */

static void rest(scene *s)
{
    if (pick(s, 3) == 0)
        usleep((useconds_t)pick(s, 200));
}

static bool is_mine(const scene *s, uint32_t number)
{
    return tasks_member(&s->p.tasks[number], s->rank) >= 0;
}

static void submit_all(scene *s)
{
    uint32_t order[MOST_TASKS], n = s->p.ntasks;
    for (uint32_t i = 0; i < n; i++) { /* a random order of its own */
        uint32_t j = (uint32_t)pick(s, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (!is_mine(s, order[i]))
            continue;
        rest(s);
        atomic_store(&s->board->came[s->rank][order[i]], true);
        tasks_submit(&s->p, s->engine, s->rank, order[i], &s->random);
        if (pick(s, 3) == 0)
            (void)cl_operation_wait(s->p.parts[s->rank][order[i]].operation, (int32_t)pick(s, 2)); /* and given up */
    }
}

static void open_gates(scene *s)
{
    for (uint32_t n = 0; n < s->p.ntasks; n++) {
        const part *mine = &s->p.parts[s->rank][n];
        for (uint32_t i = 0, first = (uint32_t)pick(s, 1000); mine->gated && i < mine->nsegments; i++) {
            uint32_t segment = (first + i) % mine->nsegments;
            rest(s);
            CHECK(cl_operation_ready(mine->operation, segment, segment + 1) == CL_OK);
        }
    }
}

static void check_failure(scene *s, uint32_t number, int status, const char *text, int32_t blamed)
{
    const task *t = &s->p.tasks[number];
    char name[16];
    snprintf(name, sizeof name, "rank %d", blamed);
    if (status == CL_MISMATCH) {
        if (t->odd_rank < 0 || strstr(text, "the usual one") == NULL || strstr(text, "the odd one") == NULL)
            wrong(s, number, "a mismatch where there is none, or that does not name both sides");
    } else if (status == CL_PEER_LOST) {
        if (s->fault != KILL || blamed != s->victim || strstr(text, name) == NULL)
            wrong(s, number, text);
    } else {
        wrong(s, number, text);
    }
}

static void finish(scene *s, uint32_t number)
{
    const task *t = &s->p.tasks[number];
    part *mine = &s->p.parts[s->rank][number];
    const char *text;
    int32_t blamed;
    int status;
    while ((status = cl_operation_wait(mine->operation, (int32_t)pick(s, 20))) == CL_AGAIN)
        ;
    CHECK(cl_operation_status(mine->operation, &text, &blamed) == status);
    for (int32_t m = 0; m < t->nmembers; m++) /* what others have done is on the board */
        s->p.parts[t->members[m]][number].submitted = atomic_load(&s->board->came[t->members[m]][number]);
    if (status == CL_OK) {
        const char *complaint = tasks_check(&s->p, s->rank, number);
        if (complaint != NULL)
            wrong(s, number, complaint);
        if (t->odd_rank >= 0 && tasks_need_everybody(t))
            wrong(s, number, "it has not seen the mismatch");
    } else {
        check_failure(s, number, status, text, blamed);
    }
    tasks_end(&s->p, s->rank, number);
}

static bool all_are_over(const scene *s)
{
    for (int32_t r = 0; r < s->p.size; r++)
        if (!atomic_load(&s->board->over[r]) && !(s->fault == KILL && r == s->victim))
            return false;
    return true;
}

static void live(scene *s)
{
    cl_stats stats;
    uint64_t mine = 0;
    alarm(LONGEST_SEED_S);
    close_pairs(s, false);
    s->random += (uint64_t)s->rank * 7919 + 1;
    link_all(s);
    while (atomic_load(&s->board->linked) < s->p.size)
        usleep(50);
    submit_all(s);
    open_gates(s);
    for (uint32_t n = 0; n < s->p.ntasks; n++)
        if (is_mine(s, n)) {
            finish(s, n);
            mine++;
        }
    cl_engine_stats(s->engine, &stats);
    if (stats.operations != mine)
        wrong(s, -1, "operations have ended more than once, or never");
    atomic_store(&s->board->over[s->rank], true);
    while (!s->leaves_early && !all_are_over(s))
        usleep(50);
    CHECK(cl_engine_shutdown(s->engine, LINGER_MS) == CL_OK);
    cl_engine_free(s->engine);
    tasks_free(&s->p);
    free(s);
    exit(0);
}

/* ---- all of them ---------------------------------------------------------------------------------------------- */

static scene *draw_scene(uint64_t seed, news *board)
{
    scene *s = calloc(1, sizeof(scene));
    CHECK(s != NULL);
    memset(board, 0, sizeof *board);
    *s = (scene){.seed = seed, .random = seed * UINT64_C(0x9E3779B97F4A7C15) + 1, .board = board, .rank = -1};
    for (int i = 0; i < 8; i++)
        next_random(&s->random);
    s->p.random = next_random(&s->random);
    s->p.size = 2 + (int32_t)pick(s, MOST_PROCESSES - 1);
    s->settings = pick(s, 2) ? ordinary_settings() : tiny_settings();
    s->over_tcp = pick(s, 2);
    s->fault = (fault)pick(s, FAULTS);
    s->victim = (int32_t)pick(s, (uint64_t)s->p.size);
    s->leaves_early = s->fault != KILL && pick(s, 2);
    tasks_draw(&s->p);
    for (uint32_t n = 0; n < s->p.ntasks; n++)
        if (s->p.tasks[n].form == TICKET) /* they have a test of their own: ticket_test.c */
            s->p.tasks[n].form = EXCHANGE, s->p.tasks[n].dtype = CL_UINT8;
    return s;
}

static void do_harm(scene *s, const pid_t *pids)
{
    while (atomic_load(&s->board->linked) < s->p.size)
        usleep(50);
    usleep((useconds_t)pick(s, 3000));
    if (s->fault == KILL)
        CHECK(kill(pids[s->victim], SIGKILL) == 0);
    if (s->fault != STOP)
        return;
    CHECK(kill(pids[s->victim], SIGSTOP) == 0);
    usleep((useconds_t)pick(s, 20000));
    CHECK(kill(pids[s->victim], SIGCONT) == 0);
}

static bool ended_well(const scene *s, int32_t rank, int status)
{
    if (s->fault == KILL && rank == s->victim)
        return WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL : WEXITSTATUS(status) == 0;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void run_seed(uint64_t seed, news *board)
{
    scene *s = draw_scene(seed, board);
    pid_t pids[MOST_PROCESSES];
    bool well = true;
    draw_pairs(s);
    for (s->rank = 0; s->rank < s->p.size; s->rank++) {
        CHECK((pids[s->rank] = fork()) >= 0);
        if (pids[s->rank] == 0)
            live(s);
    }
    s->rank = -1;
    close_pairs(s, true);
    do_harm(s, pids);
    for (int32_t r = 0; r < s->p.size; r++) {
        int status;
        CHECK(waitpid(pids[r], &status, 0) == pids[r]);
        if (!ended_well(s, r, status)) {
            fprintf(stderr, "seed %llu: rank %d of %d over %s ended with %x\n", (unsigned long long)seed, r, s->p.size,
                    s->over_tcp ? "tcp" : "shm", status);
            well = false;
        }
    }
    tasks_free(&s->p);
    free(s);
    CHECK(well);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, count = argc > 2 ? strtoull(argv[2], NULL, 10) : 100;
    news *board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(board != MAP_FAILED);
    for (uint64_t seed = first; seed < first + count; seed++)
        run_seed(seed, board);
    printf("%llu seeds between processes passed\n", (unsigned long long)count);
    return 0;
}
