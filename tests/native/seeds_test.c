/*
 * seeds_test.c: random operations on a random cluster with random faults; one seed is one run, to the last bit.
 *
 * Whatever happens: every operation of every living rank ends exactly once, with the reference's result bit for bit or with
 * an error that names who is to blame; all survivors learn of a loss within settings.lost_ms; what is urgent goes first;
 * windows and budgets are kept, and given back; nothing waits for ever. Every fourth seed runs over the network of
 * native/sim.c, the others in a storm (storm.h).
 *
 * argv: first seed, how many (0: until stopped), and "trace" to be told all that happens.
 */
#include <math.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storm.h"
#include "tasks.h"

enum { LONGEST_SEED_S = 100, MOST_TICKETS = 1024, TRACE_LINES = 40 };

typedef enum { SUBMIT = 1, OPEN, RELEASE, RETURN, KILL, CUT, PAUSE, LEAVE, CLOSE, MUST_KNOW } act_kind;

typedef struct {
    program p;
    storm *storm; /* or */
    cl_sim *sim;
    uint64_t random;
    cl_settings settings;
    FILE *trace;
    uint64_t seed;
    bool dead[MAX_RANKS], left[MAX_RANKS], suspect[MAX_RANKS], slept[MAX_RANKS];
    double slept_until_s[MAX_RANKS], close_s[MAX_RANKS];
    bool faults, leaves;
    bool unheard; /* some mismatch need not reach every rank before it is done */
    cl_ticket tickets[MAX_RANKS][MOST_TICKETS];
    uint32_t ntickets[MAX_RANKS];
    bool returned[MAX_RANKS][MOST_TICKETS];
} run;

static uint64_t pick(run *r, uint64_t below)
{
    return next_random(&r->random) % below;
}

static uint64_t pick_of(run *r, const uint64_t *values, size_t count)
{
    return values[pick(r, count)];
}

static void broken(const run *r, int32_t rank, int64_t number, const char *what)
{
    fprintf(stderr, "seed %llu", (unsigned long long)r->seed);
    if (rank >= 0)
        fprintf(stderr, ", rank %d", rank);
    if (number >= 0)
        fprintf(stderr, ", key %d (%s)", (int)number + 1, tasks_name(r->p.tasks[number].form));
    fprintf(stderr, ": %s\n", what);
    abort();
}

#define MUST(condition, rank, number, what) \
    do {                                    \
        if (!(condition))                   \
            broken(r, rank, number, what);  \
    } while (0)

/* ---- the network, the one or the other ------------------------------------------------------------------------ */

static cl_engine *engine_of(const run *r, int32_t rank)
{
    return r->storm != NULL ? storm_engine(r->storm, rank) : cl_sim_engine(r->sim, rank);
}

static double now_s(const run *r)
{
    return r->storm != NULL ? storm_now(r->storm) : cl_sim_now(r->sim);
}

static void plan_act(run *r, int32_t rank, double at_s, act_kind kind, uint32_t number, uint32_t detail)
{
    uint64_t token = (uint64_t)kind << 48 | (uint64_t)number << 24 | detail;
    if (r->storm != NULL)
        storm_timer(r->storm, rank, at_s, token);
    else
        CHECK(cl_sim_timer(r->sim, rank, at_s, token) == CL_OK);
}

static void plan_soon(run *r, int32_t rank, act_kind kind, uint32_t number, uint32_t detail)
{
    plan_act(r, rank, now_s(r) + 1e-7 * (double)pick(r, 20000), kind, number, detail);
}

static storm_event next(run *r, storm_news *news)
{
    if (r->storm != NULL)
        return storm_next(r->storm, news);
    int event = cl_sim_next(r->sim, &news->rank, &news->key);
    if (event != CL_SIM_DONE)
        return event == CL_SIM_IDLE ? STORM_IDLE : STORM_TIMER;
    const part *mine = &r->p.parts[news->rank][news->key - 1];
    const char *text;
    if (r->dead[news->rank])
        return next(r, news);
    news->status = cl_operation_status(mine->operation, &text, &news->blamed);
    snprintf(news->text, sizeof news->text, "%s", text);
    return STORM_DONE;
}

/* ---- a run: what is drawn ------------------------------------------------------------------------------------- */

static void draw_settings(run *r)
{
    static const uint64_t eager[] = {0, 64, 1000, 20000}, budgets[] = {1, 600, 5000, 1 << 20};
    static const uint64_t inflight[] = {1, 3000, 1 << 20};
    r->settings = ordinary_settings();
    r->settings.eager_nbytes = pick_of(r, eager, 4);
    r->settings.eager_budget_nbytes = pick_of(r, budgets, 4);
    r->settings.inflight_nbytes = pick_of(r, inflight, 3);
    r->settings.heartbeat_ms = 1 + (uint32_t)pick(r, 4);
    r->settings.lost_ms = 4 * r->settings.heartbeat_ms;
}

static void make_sim(run *r)
{
    int32_t hosts[MAX_RANKS];
    for (int32_t rank = 0; rank < r->p.size; rank++)
        hosts[rank] = (int32_t)pick(r, 3);
    cl_sim_network network = {.size = r->p.size, .hosts = hosts, .seed = pick(r, 1000), .shares_port = (int32_t)pick(r, 2)};
    network.inside = (cl_sim_link){1e-6 * (double)(1 + pick(r, 50)), 1e-10 * (double)pick(r, 20), 1e-10 * (double)pick(r, 2)};
    network.between = (cl_sim_link){1e-6 * (double)(1 + pick(r, 300)), 1e-9 * (double)pick(r, 50), 1e-9 * (double)pick(r, 2)};
    network.jitter_s = (double)pick(r, 2) * 1e-6 * (double)pick(r, 500);
    network.switch_beta_s_per_byte = (double)pick(r, 2) * 1e-9 * (double)pick(r, 50);
    CHECK(cl_sim_new_on(&network, &r->settings, &r->sim) == CL_OK);
}

static void make_storm(run *r)
{
    static const uint64_t windows[] = {0, 500, 5000, 1 << 20}, refusals[] = {0, 0, 10, 100};
    storm_weather weather = {.size = r->p.size, .seed = next_random(&r->random), .trace = r->trace};
    weather.latency_s = 1e-6 * (double)(1 + pick(r, 20));
    weather.late_s = 1e-6 * (double)pick(r, 100);
    weather.slow_s = 1e-6 * (double)pick(r, 20);
    weather.refuses = (uint32_t)pick_of(r, refusals, 4);
    weather.shares = (uint32_t)pick(r, 257);
    weather.window_nbytes = pick_of(r, windows, 4);
    weather.by_edges = pick(r, 2);
    r->storm = storm_new(&weather, &r->settings);
}

static int32_t pick_rank(run *r)
{
    return (int32_t)pick(r, (uint64_t)r->p.size);
}

/* Of a storm's faults, none, one, or a few at once; of the simulation's, deaths or a goodbye. */
static void plan_faults(run *r)
{
    static const act_kind all[] = {KILL, CUT, PAUSE, LEAVE};
    if (pick(r, 2) == 0)
        return;
    for (uint64_t count = 1 + pick(r, 5) / 3; count > 0; count--) {
        act_kind kind = all[pick(r, 4)];
        if (r->sim != NULL)
            kind = r->leaves || (!r->faults && pick(r, 2)) ? LEAVE : KILL;
        int32_t rank = pick_rank(r), other = pick_rank(r);
        bool short_pause = kind == PAUSE && pick(r, 2);
        if (kind == CUT && rank == other)
            continue;
        plan_soon(r, rank, kind, (uint32_t)other, short_pause);
        r->leaves |= kind == LEAVE;
        r->faults |= !short_pause;
    }
}

static void plan_run(run *r)
{
    for (uint32_t n = 0; n < r->p.ntasks; n++) {
        task *t = &r->p.tasks[n];
        r->unheard |= t->odd_rank >= 0 && !tasks_need_everybody(t);
        if (r->sim != NULL && t->form == TICKET)
            t->form = EXCHANGE, t->dtype = CL_UINT8; /* nobody there says when tickets have come */
        for (int32_t m = 0; m < t->nmembers; m++)
            plan_soon(r, t->members[m], SUBMIT, n, 0);
    }
    plan_faults(r);
}

/* ---- a run: what happens -------------------------------------------------------------------------------------- */

static void submit(run *r, int32_t rank, uint32_t number)
{
    part *mine = &r->p.parts[rank][number];
    tasks_submit(&r->p, engine_of(r, rank), rank, number, &r->random);
    for (uint32_t s = 0; mine->gated && s < mine->nsegments; s++)
        plan_soon(r, rank, OPEN, number, s);
    if (r->storm != NULL && !mine->gated && pick(r, 6) == 0)
        plan_soon(r, rank, RELEASE, number, 0); /* the caller gives up waiting, and forgets it */
}

static double learning_s(const run *r)
{
    return 1e-3 * (r->settings.lost_ms + r->settings.heartbeat_ms) + storm_word_s(r->storm);
}

/* Of a cut, both ends are to blame. */
static void lose(run *r, int32_t rank, int32_t other)
{
    r->suspect[rank] = r->suspect[other] = true;
    if (r->storm != NULL)
        plan_act(r, rank, now_s(r) + learning_s(r), MUST_KNOW, (uint32_t)other, 0);
}

static void kill_rank(run *r, int32_t rank)
{
    if (r->dead[rank])
        return;
    r->dead[rank] = true;
    if (r->storm != NULL)
        storm_kill(r->storm, rank, pick(r, 2));
    else
        CHECK(cl_sim_kill(r->sim, rank) == CL_OK);
    lose(r, rank, rank);
}

static void pause_rank(run *r, int32_t rank, bool shortly)
{
    double lost_s = 1e-3 * r->settings.lost_ms;
    double until_s = now_s(r) + (shortly ? 0.25 : 1.5 + 1e-3 * (double)pick(r, 1000)) * lost_s;
    if (r->dead[rank] || r->slept_until_s[rank] > 0)
        return;
    storm_pause(r->storm, rank, until_s);
    r->slept_until_s[rank] = until_s;
    if (!shortly) {
        lose(r, rank, rank);
        r->slept[rank] = true;
    }
}

static void leave(run *r, int32_t rank)
{
    r->left[rank] = true;
    if (r->sim != NULL) {
        CHECK(cl_engine_shutdown(engine_of(r, rank), 0) == CL_OK);
        return;
    }
    cl_engine_leave(engine_of(r, rank));
    r->close_s[rank] = now_s(r) + 1e-3 * r->settings.heartbeat_ms;
    plan_soon(r, rank, CLOSE, 0, 0);
}

/* As cl_engine_shutdown: what is said last is waited for, but not for ever. */
static void close_rank(run *r, int32_t rank)
{
    bool unsaid = cl_engine_pending(engine_of(r, rank)) > 0;
    if (unsaid && now_s(r) < r->close_s[rank]) {
        plan_soon(r, rank, CLOSE, 0, 0);
        return;
    }
    if (unsaid)
        lose(r, rank, rank);
    CHECK(cl_engine_shutdown(engine_of(r, rank), 0) == CL_OK);
}

static bool is_asleep(const run *r, int32_t rank)
{
    return now_s(r) < r->slept_until_s[rank];
}

/* The configured time after a fault: who lives, is awake and has not left knows that somebody was lost. */
static void must_know(run *r, int32_t victim, int32_t other)
{
    for (int32_t rank = 0; rank < r->p.size && !r->left[victim] && !r->left[other]; rank++) {
        bool woke_lately = now_s(r) < r->slept_until_s[rank] + learning_s(r);
        if ((rank == victim && rank == other) || r->dead[rank] || r->left[rank] || woke_lately)
            continue;
        MUST(engine_of(r, rank)->health == CL_PEER_LOST, rank, -1, "it has not learnt in time that a rank was lost");
    }
}

static void take_tickets(run *r, int32_t rank)
{
    cl_ticket ticket;
    while (cl_ticket_next(engine_of(r, rank), 0, &ticket) == CL_OK) {
        uint32_t n = r->ntickets[rank]++, number = (uint32_t)ticket.key - 1;
        const task *t = &r->p.tasks[number];
        CHECK(n < MOST_TICKETS);
        r->tickets[rank][n] = ticket;
        uint64_t size = t->segment_count == 0 ? t->count : t->segment_count;
        uint64_t first = ticket.segment * size, left = t->count - first;
        MUST(first <= t->count && ticket.first == first && ticket.count == (left < size ? left : size), rank, number,
             "a ticket is for other elements");
        MUST(ticket.nsplits == (uint64_t)t->nmembers, rank, number, "a ticket knows another number of splits");
        for (int32_t m = 0; m < t->nmembers; m++)
            MUST(ticket.splits[m] == (uint64_t)m + number, rank, number, "a ticket has other splits");
        plan_soon(r, rank, RETURN, n, 0);
    }
}

static void act(run *r, int32_t rank, uint64_t token)
{
    uint32_t number = token >> 24 & 0xffffff, detail = token & 0xffffff;
    act_kind kind = (act_kind)(token >> 48);
    part *mine = &r->p.parts[rank][number % MOST_TASKS];
    if (kind == MUST_KNOW) {
        must_know(r, rank, (int32_t)number);
        return;
    }
    if (r->trace != NULL && kind != SUBMIT)
        fprintf(r->trace, "%11.7f rank %d: act %d, %u, %u\n", now_s(r), rank, kind, number, detail);
    if (r->dead[rank])
        return;
    if (is_asleep(r, rank)) {
        plan_act(r, rank, r->slept_until_s[rank], kind, number, detail);
        return;
    }
    switch (kind) {
    case SUBMIT: submit(r, rank, number); break;
    case OPEN:
        if (mine->operation != NULL)
            CHECK(cl_operation_ready(mine->operation, detail, detail + 1) == CL_OK);
        break;
    case RELEASE:
        cl_operation_release(mine->operation);
        mine->operation = NULL;
        break;
    case RETURN:
        cl_ticket_return(&r->tickets[rank][number]);
        r->returned[rank][number] = true;
        break;
    case KILL: kill_rank(r, rank); break;
    case CUT:
        storm_cut(r->storm, rank, (int32_t)number);
        lose(r, rank, (int32_t)number);
        break;
    case PAUSE: pause_rank(r, rank, detail); break;
    case LEAVE:
        if (!r->left[rank])
            leave(r, rank);
        break;
    default: close_rank(r, rank);
    }
}

static bool names(const char *text, int32_t rank)
{
    char name[16];
    snprintf(name, sizeof name, "rank %d", rank);
    return strstr(text, name) != NULL;
}

static void check_failure(const run *r, const storm_news *news, uint32_t number)
{
    const task *t = &r->p.tasks[number];
    int32_t rank = news->rank, blamed = news->blamed;
    bool is_rank = blamed >= 0 && blamed < r->p.size;
    switch (news->status) {
    case CL_MISMATCH:
        MUST(t->odd_rank >= 0, rank, number, "a mismatch where all submitted the same");
        MUST(strstr(news->text, "the usual one") != NULL && strstr(news->text, "the odd one") != NULL &&
             names(news->text, t->odd_rank), rank, number, "a mismatch that does not name both sides");
        break;
    case CL_PEER_LOST:
        MUST(is_rank && names(news->text, blamed), rank, number, "a loss that names nobody");
        MUST(r->suspect[blamed] || r->slept[rank], rank, number, "a rank is said to be lost that lives");
        break;
    case CL_PEER_LEFT:
        MUST(is_rank && r->left[blamed] && names(news->text, blamed), rank, number, "a rank is said to have left that has not");
        break;
    default: MUST(news->status == CL_SHUTDOWN && r->left[rank], rank, number, "it failed for no reason"); break;
    }
}

static void on_done(run *r, const storm_news *news)
{
    uint32_t number = (uint32_t)news->key - 1;
    part *mine = &r->p.parts[news->rank][number];
    if (r->trace != NULL)
        fprintf(r->trace, "%11.7f rank %d: key %d is done, status %d %s\n", now_s(r), news->rank, (int)news->key, news->status,
                news->text);
    MUST(mine->submitted && mine->times_done++ == 0, news->rank, number, "it ended more than once");
    mine->status = news->status;
    if (news->status == CL_OK) {
        const char *wrong = tasks_check(&r->p, news->rank, number);
        MUST(wrong == NULL, news->rank, number, wrong);
    } else {
        check_failure(r, news, number);
    }
    tasks_end(&r->p, news->rank, number);
}

/* Who has nothing left to do may leave at once: others may still be on their way to the same end. */
static void leave_if_done(run *r, int32_t rank)
{
    bool busy = false;
    for (uint32_t n = 0; n < r->p.ntasks; n++)
        busy |= tasks_member(&r->p.tasks[n], rank) >= 0 && r->p.parts[rank][n].times_done == 0;
    if (r->leaves && !busy && !r->left[rank] && pick(r, 3) == 0)
        leave(r, rank);
}

static void play(run *r)
{
    storm_news news;
    for (;;) {
        storm_event event = next(r, &news);
        if (r->storm != NULL && storm_complaint(r->storm) != NULL)
            broken(r, -1, -1, storm_complaint(r->storm));
        switch (event) {
        case STORM_IDLE: return;
        case STORM_TIMER: act(r, news.rank, news.key); break;
        case STORM_TICKETS: take_tickets(r, news.rank); break;
        case STORM_DONE:
            if (r->dead[news.rank])
                break;
            on_done(r, &news);
            leave_if_done(r, news.rank);
        }
    }
}

/* ---- what must be true at the end ---------------------------------------------------------------------------- */

static void check_statuses(const run *r, uint32_t number)
{
    const task *t = &r->p.tasks[number];
    bool everybody_else_well = true, somebody_left_early = false;
    for (int32_t m = 0; m < t->nmembers; m++) {
        int32_t rank = t->members[m];
        const part *mine = &r->p.parts[rank][number];
        if (r->dead[rank])
            continue;
        MUST(mine->times_done == 1, rank, number, "it never ended");
        somebody_left_early |= mine->status == CL_SHUTDOWN;
        everybody_else_well &= mine->status == CL_OK;
        if (!r->faults && t->odd_rank < 0)
            MUST(mine->status == CL_OK, rank, number, "it failed without any fault");
        else if (t->odd_rank >= 0 && tasks_need_everybody(t))
            MUST(r->faults ? mine->status != CL_OK : mine->status == CL_MISMATCH, rank, number, "it has not seen the mismatch");
    }
    bool only_goodbyes = r->leaves;
    for (int32_t rank = 0; rank < r->p.size; rank++)
        only_goodbyes &= !r->suspect[rank];
    if (only_goodbyes && t->odd_rank < 0 && !somebody_left_early) /* who leaves after his own part is done disturbs nobody */
        MUST(everybody_else_well, -1, number, "it failed although everybody who left had done his part");
}

/* All members that got two tickets got them in one order. */
static void check_tickets(const run *r)
{
    for (int32_t rank = 1; rank < r->p.size; rank++) {
        uint32_t at = 0;
        for (uint32_t n = 0; n < r->ntickets[rank] && !r->faults; n++, at++) {
            const cl_ticket *mine = &r->tickets[rank][n];
            while (at < r->ntickets[0] && (r->tickets[0][at].key != mine->key || r->tickets[0][at].segment != mine->segment))
                at++;
            MUST(at < r->ntickets[0], rank, (int64_t)mine->key - 1, "its tickets came in another order than rank 0's");
        }
    }
}

static void check_pair(const run *r, int32_t a, int32_t b)
{
    const cl_engine *engine = engine_of(r, a);
    const cl_peer *there = &engine->peers[b], *here = &engine_of(r, b)->peers[a];
    if (r->dead[b] || r->left[a] || r->left[b] || engine->health != CL_OK)
        return;
    MUST(there->posted_nbytes == 0 && there->ready.count == 0, a, -1, "data is left over");
    MUST(there->told.first == NULL && there->leaving.first == NULL && there->keeping == NULL, a, -1, "a frame is left over");
    MUST(there->eager_used == here->eager_returnable, a, -1, "eager budget was lost");
}

/* Nothing is left over: no message kept, no budget lost. */
static void check_engines(const run *r)
{
    for (int32_t a = 0; a < r->p.size; a++) {
        const cl_engine *engine = engine_of(r, a);
        if (r->dead[a])
            continue;
        MUST(atomic_load(&engine->unfinished) == 0, a, -1, "the engine counts operations that there are not");
        MUST(r->faults || r->unheard || engine->early.count == 0, a, -1, "a message that came early was never used");
        for (int32_t b = 0; b < r->p.size; b++)
            check_pair(r, a, b);
    }
}

static void free_run(run *r)
{
    for (int32_t rank = 0; rank < r->p.size; rank++)
        for (uint32_t n = 0; n < r->ntickets[rank]; n++)
            if (!r->returned[rank][n])
                cl_operation_release(r->tickets[rank][n].operation);
    if (r->storm != NULL)
        storm_free(r->storm);
    cl_sim_free(r->sim);
    tasks_free(&r->p);
    free(r);
}

static void run_seed(uint64_t seed, FILE *trace)
{
    run *r = calloc(1, sizeof(run));
    CHECK(r != NULL);
    r->seed = seed;
    r->trace = trace;
    r->random = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
    for (int i = 0; i < 8; i++)
        next_random(&r->random);
    r->p.random = next_random(&r->random);
    r->p.size = 1 + (int32_t)pick(r, MAX_RANKS);
    draw_settings(r);
    if (seed % 4 == 0)
        make_sim(r);
    else
        make_storm(r);
    tasks_draw(&r->p);
    plan_run(r);
    play(r);
    for (uint32_t n = 0; n < r->p.ntasks; n++)
        check_statuses(r, n);
    check_tickets(r);
    check_engines(r);
    free_run(r);
}

/* ---- many seeds ----------------------------------------------------------------------------------------------- */

/* In a process of its own, so that a seed that crashes or hangs can be named. Returns true if all went well. */
static bool run_seeds(uint64_t first, uint64_t count, FILE *trace, volatile uint64_t *at)
{
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (uint64_t seed = first; count == 0 || seed < first + count; seed++) {
            *at = seed;
            alarm(LONGEST_SEED_S);
            run_seed(seed, trace);
            if (count == 0 && (seed - first + 1) % 5000 == 0)
                fprintf(stderr, "%llu seeds passed\n", (unsigned long long)(seed - first + 1));
        }
        exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFSIGNALED(status) && WTERMSIG(status) != SIGABRT) /* who aborts has said why */
        fprintf(stderr, "seed %llu: %s\n", (unsigned long long)*at,
                WTERMSIG(status) == SIGALRM ? "it hangs" : strsignal(WTERMSIG(status)));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* The end of the trace of a seed that fails. */
static void show_trace(uint64_t seed, volatile uint64_t *at)
{
    static char lines[TRACE_LINES][512];
    FILE *trace = tmpfile();
    uint64_t n = 0;
    if (trace == NULL)
        return;
    setvbuf(trace, NULL, _IOLBF, 0);
    (void)run_seeds(seed, 1, trace, at);
    rewind(trace);
    while (fgets(lines[n % TRACE_LINES], sizeof lines[0], trace) != NULL)
        n++;
    for (uint64_t i = n > TRACE_LINES ? n - TRACE_LINES : 0; i < n; i++)
        fputs(lines[i % TRACE_LINES], stderr);
    fclose(trace);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, count = argc > 2 ? strtoull(argv[2], NULL, 10) : 1000;
    bool tells = argc > 3 && strcmp(argv[3], "trace") == 0;
    volatile uint64_t *at = mmap(NULL, sizeof *at, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    if (run_seeds(first, count, tells ? stderr : NULL, at)) {
        printf("seeds %llu to %llu passed\n", (unsigned long long)first, (unsigned long long)(first + count - 1));
        return 0;
    }
    uint64_t failed = *at;
    if (!tells) {
        fprintf(stderr, "\nthe same again, and how it ended:\n");
        show_trace(failed, at);
    }
    fprintf(stderr, "\nseed %llu failed; repeat it with: %s %llu 1 trace\n", (unsigned long long)failed, argv[0],
            (unsigned long long)failed);
    return 1;
}
