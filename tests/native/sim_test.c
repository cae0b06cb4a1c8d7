/*
 * sim_test.c: random operations over the simulated network: budgets, times, mismatches, deaths and goodbyes are random.
 *
 * One seed is one run. Whatever happens, every operation of every living rank ends exactly once, with the right result
 * or with an error that may be expected, and no budget is lost on the way. Memory is freed the moment an operation
 * ends, so that the address sanitizer sees who touches it later.
 */
#include <string.h>

#include "../../native/engine.h"
#include "world.h"

enum { MOST_OPERATIONS = 24, MOST_COUNT = 3000 };

typedef enum {
    SUM_RING, SUM_EXCHANGE, SUM_HALVING, SUM_DIRECT, BROADCAST, GATHER, SCATTER, STRAIGHT, SHUFFLE, EXCHANGE, FORMS
} task_form;

/* One operation, as all ranks know it. */
typedef struct {
    task_form form;
    uint64_t count, segment_count;
    int32_t odd_rank; /* who submits something else; -1: nobody */
    int odd_field;
} task;

/* One rank's part in it. */
typedef struct {
    cl_operation *operation;
    int32_t *input, *output; /* may be the same */
    uint64_t count, splits[MAX_RANKS], parts[MAX_RANKS + 1];
    bool submitted, gated, kept_in_place;
    int times_done, status;
} part;

typedef struct {
    uint64_t random;
    world w;
    cl_sim *sim;
    cl_settings settings;
    uint32_t ntasks;
    task tasks[MOST_OPERATIONS];
    part parts[MAX_RANKS][MOST_OPERATIONS];
    bool dead[MAX_RANKS], left[MAX_RANKS], faults, leaves;
    bool unheard; /* some mismatch does not reach every rank before it is done */
    int32_t members[MAX_RANKS];
} run;

enum { ACT_SUBMIT, ACT_OPEN, ACT_KILL, ACT_LEAVE };

/* Else a rank may be done, rightly, before it could hear that others disagree. */
static bool everybody_needs_everybody(const task *t)
{
    return t->count > 0 && t->form != SCATTER && t->form != STRAIGHT;
}

static uint64_t pick(run *r, uint64_t below)
{
    return next_random(&r->random) % below;
}

static uint64_t pick_of(run *r, const uint64_t *values, size_t count)
{
    return values[pick(r, count)];
}

/* What rank `rank` contributes at place i of an operation. */
static int32_t value_of(uint32_t number, int32_t rank, uint64_t i)
{
    return (int32_t)(number * 1000003 + (uint32_t)rank * 7919 + (uint32_t)i * 31 + 1);
}

static int32_t sum_of(uint32_t number, int32_t size, uint64_t i)
{
    uint32_t sum = 0;
    for (int32_t rank = 0; rank < size; rank++)
        sum += (uint32_t)value_of(number, rank, i);
    return (int32_t)sum;
}

/* All-gather and all-to-all: what rank `from` gives rank `to`; zero now and then. */
static uint64_t share_of(const run *r, uint32_t number, int32_t from, int32_t to)
{
    uint64_t mixed = (uint64_t)(from + 1) * 2654435761u + (uint64_t)(to + 1) * 40503u + number * 97u;
    return mixed % 3 == 0 ? 0 : mixed % (r->tasks[number].count / 4 + 2);
}

/* ---- submitting ---------------------------------------------------------------------------------------------- */

static cl_plan *plan_of(run *r, task_form form, int32_t rank)
{
    cl_plan **plans[FORMS] = {
        [SUM_RING] = r->w.ring, [SUM_EXCHANGE] = r->w.exchange, [SUM_HALVING] = r->w.halving,
        [SUM_DIRECT] = r->w.direct, [BROADCAST] = r->w.from_zero, [GATHER] = r->w.gather,
        [SCATTER] = r->w.scatter, [STRAIGHT] = r->w.straight, [SHUFFLE] = r->w.shuffle,
    };
    return plans[form] == NULL ? NULL : plans[form][rank];
}

static int32_t *new_input(uint32_t number, int32_t rank, uint64_t count)
{
    int32_t *data = malloc((count + 1) * sizeof(int32_t));
    for (uint64_t i = 0; i < count; i++)
        data[i] = value_of(number, rank, i);
    return data;
}

static void fill_sizes(run *r, uint32_t number, int32_t rank, cl_request *request)
{
    part *p = &r->parts[rank][number];
    const task *t = &r->tasks[number];
    p->count = t->count;
    if (t->form == GATHER) {
        p->count = p->splits[0] = share_of(r, number, rank, 0);
        request->nsplits = 1;
    } else if (t->form == SHUFFLE) {
        p->count = 0;
        for (int32_t to = 0; to < r->w.size; to++)
            p->count += p->splits[to] = share_of(r, number, rank, to);
        request->nsplits = r->w.size;
    } else if (t->form == SCATTER || t->form == STRAIGHT) {
        for (int32_t to = 0; to < r->w.size; to++) /* uneven, and empty now and then */
            p->parts[to + 1] = to + 1 == r->w.size ? t->count : t->count * (uint64_t)(to | 1) / (uint64_t)r->w.size;
        request->parts = p->parts;
    } else if (t->form == EXCHANGE) {
        p->count = share_of(r, number, rank, 1);
    }
    if (request->nsplits > 0)
        request->splits = p->splits;
}

/* One rank asks for something else; not all kinds look at every field. */
static void make_odd(const task *t, cl_request *request)
{
    request->text = "the odd one";
    if (t->odd_field == 0 && (t->form <= BROADCAST))
        request->count -= request->count > 0 ? 1 : 0, request->shape_hash = 1;
    else if (t->odd_field == 1)
        request->root = 5;
    else
        request->shape_hash = 99;
}

static void submit(run *r, int32_t rank, uint32_t number)
{
    static const int32_t kinds[FORMS] = {CL_ALLREDUCE, CL_ALLREDUCE, CL_ALLREDUCE, CL_ALLREDUCE, CL_BROADCAST,
                                         CL_ALLGATHER, CL_REDUCESCATTER, CL_REDUCESCATTER, CL_ALLTOALL, CL_EXCHANGE};
    const task *t = &r->tasks[number];
    part *p = &r->parts[rank][number];
    cl_request request = {.key = number + 1, .text = "the usual one", .kind = kinds[t->form], .dtype = CL_INT32,
                          .priority = (int64_t)pick(r, 4), .prescale = 1, .postscale = 1, .my_part = rank,
                          .plan = plan_of(r, t->form, rank), .segment_count = t->segment_count};
    bool exchanges = t->form == BROADCAST || t->form == GATHER || t->form == SHUFFLE || t->form == EXCHANGE;
    if (exchanges)
        request.members = r->members, request.nmembers = r->w.size;
    fill_sizes(r, number, rank, &request);
    bool alone = t->form == GATHER || t->form == SHUFFLE || t->form == EXCHANGE;
    p->input = new_input(number, rank, p->count);
    p->kept_in_place = t->form == BROADCAST || pick(r, 2);
    p->output = t->form > BROADCAST ? NULL : p->kept_in_place ? p->input : calloc(p->count + 1, sizeof(int32_t));
    request.input = p->input;
    request.output = p->output;
    request.count = p->count;
    request.gated = p->gated = !alone && pick(r, 4) == 0;
    if (t->form == EXCHANGE) {
        request.dtype = CL_UINT8;
        request.count = p->count * sizeof(int32_t);
    }
    if (t->odd_rank == rank)
        make_odd(t, &request);
    CHECK(cl_submit(cl_sim_engine(r->sim, rank), &request, &p->operation) == CL_OK);
    p->submitted = true;
}

/* ---- results ------------------------------------------------------------------------------------------------- */

static void check_gathered(const run *r, uint32_t number, int32_t rank, const int32_t *data, uint64_t count,
                           const uint64_t *counts)
{
    task_form form = r->tasks[number].form;
    uint64_t at = 0;
    for (int32_t from = 0; from < r->w.size; from++) {
        uint64_t share = share_of(r, number, from, form == GATHER ? 0 : form == EXCHANGE ? 1 : rank), skipped = 0;
        for (int32_t to = 0; form == SHUFFLE && to < rank; to++)
            skipped += share_of(r, number, from, to);
        CHECK(counts[from] == share * (form == EXCHANGE ? sizeof(int32_t) : 1));
        for (uint64_t i = 0; i < share; i++)
            CHECK(data[at++] == value_of(number, from, skipped + i));
    }
    CHECK(at * (form == EXCHANGE ? sizeof(int32_t) : 1) == count);
}

static void check_result(run *r, uint32_t number, int32_t rank)
{
    part *p = &r->parts[rank][number];
    task_form form = r->tasks[number].form;
    void *result;
    uint64_t count;
    const uint64_t *counts;
    CHECK(cl_operation_result(p->operation, &result, &count, &counts) == CL_OK);
    if (form == GATHER || form == SHUFFLE || form == EXCHANGE) {
        check_gathered(r, number, rank, result, count, counts);
    } else if (form == SCATTER || form == STRAIGHT) {
        CHECK(count == p->parts[rank + 1] - p->parts[rank]);
        for (uint64_t i = 0; i < count; i++)
            CHECK(((int32_t *)result)[i] == sum_of(number, r->w.size, p->parts[rank] + i));
    } else {
        for (uint64_t i = 0; i < p->count; i++)
            CHECK(p->output[i] == (form == BROADCAST ? value_of(number, 0, i) : sum_of(number, r->w.size, i)));
    }
}

static void free_memory(part *p)
{
    if (p->output != p->input)
        free(p->output);
    free(p->input);
    p->input = p->output = NULL;
}

static void on_done(run *r, int32_t rank, uint32_t number)
{
    part *p = &r->parts[rank][number];
    const char *text;
    int32_t peer;
    p->times_done++;
    CHECK(p->submitted && p->times_done == 1 && cl_operation_done(p->operation));
    p->status = cl_operation_status(p->operation, &text, &peer);
    if (p->status == CL_OK)
        check_result(r, number, rank);
    if (p->status == CL_MISMATCH)
        CHECK(strstr(text, "the usual one") != NULL && strstr(text, "the odd one") != NULL);
    cl_operation_release(p->operation);
    p->operation = NULL;
    free_memory(p);
}

/* ---- a run --------------------------------------------------------------------------------------------------- */

static void at_random_time(run *r, int32_t rank, int act, uint32_t number, uint32_t segment)
{
    double at_s = cl_sim_now(r->sim) + 1e-7 * (double)pick(r, 20000);
    uint64_t token = (uint64_t)act << 48 | (uint64_t)number << 24 | segment;
    CHECK(cl_sim_timer(r->sim, rank, at_s, token) == CL_OK);
}

static void act(run *r, int32_t rank, uint64_t token)
{
    uint32_t number = token >> 24 & 0xffffff, segment = token & 0xffffff;
    if (r->dead[rank])
        return;
    part *p = &r->parts[rank][number];
    switch (token >> 48) {
    case ACT_SUBMIT:
        submit(r, rank, number);
        for (uint32_t s = 0; p->gated && s < p->operation->nsegments; s++)
            at_random_time(r, rank, ACT_OPEN, number, s);
        break;
    case ACT_OPEN:
        if (p->operation != NULL)
            CHECK(cl_operation_ready(p->operation, segment, segment + 1) == CL_OK);
        break;
    case ACT_KILL:
        r->dead[rank] = true;
        CHECK(cl_sim_kill(r->sim, rank) == CL_OK);
        break;
    default:
        r->left[rank] = true;
        CHECK(cl_engine_shutdown(cl_sim_engine(r->sim, rank), 0) == CL_OK);
    }
}

static void make_tasks(run *r)
{
    static const uint64_t segment_counts[] = {0, 0, 64, 200, 1024};
    bool power_of_two = (r->w.size & (r->w.size - 1)) == 0;
    bool mismatches = pick(r, 3) == 0;
    r->ntasks = 1 + (uint32_t)pick(r, MOST_OPERATIONS);
    for (uint32_t n = 0; n < r->ntasks; n++) {
        task *t = &r->tasks[n];
        do
            t->form = (task_form)pick(r, FORMS);
        while (!power_of_two && (t->form == SUM_EXCHANGE || t->form == SUM_HALVING));
        t->count = pick(r, 3) == 0 ? pick(r, 8) : pick(r, MOST_COUNT);
        t->segment_count = pick_of(r, segment_counts, 5);
        t->odd_rank = mismatches && r->w.size > 1 && pick(r, 4) == 0 ? (int32_t)pick(r, (uint64_t)r->w.size) : -1;
        t->odd_field = (int)pick(r, 3);
        r->unheard |= t->odd_rank >= 0 && !everybody_needs_everybody(t);
    }
}

static void make_world_of(run *r)
{
    static const uint64_t eager[] = {0, 64, 1000, 20000}, budgets[] = {1, 600, 5000, 1 << 20};
    static const uint64_t inflight[] = {1, 3000, 1 << 20};
    cl_sim_link inside = {1e-6 * (double)(1 + pick(r, 50)), 1e-10 * (double)pick(r, 20), 1e-10 * (double)pick(r, 2)};
    cl_sim_link between = {1e-6 * (double)(1 + pick(r, 300)), 1e-9 * (double)pick(r, 50), 1e-9 * (double)pick(r, 2)};
    int32_t hosts[MAX_RANKS];
    r->settings = ordinary_settings();
    r->settings.eager_nbytes = pick_of(r, eager, 4);
    r->settings.eager_budget_nbytes = pick_of(r, budgets, 4);
    r->settings.inflight_nbytes = pick_of(r, inflight, 3);
    r->settings.lost_ms = 1 + (uint32_t)pick(r, 4);
    r->w.size = 1 + (int32_t)pick(r, MAX_RANKS);
    for (int32_t rank = 0; rank < r->w.size; rank++) {
        hosts[rank] = (int32_t)pick(r, 3);
        r->members[rank] = rank;
    }
    cl_sim_network network = {.size = r->w.size, .hosts = hosts, .inside = inside, .between = between, .seed = pick(r, 1000)};
    network.shares_port = (int32_t)pick(r, 2);
    network.jitter_s = pick(r, 2) * 1e-6 * (double)pick(r, 500);
    network.switch_beta_s_per_byte = pick(r, 2) * 1e-9 * (double)pick(r, 50);
    CHECK(cl_sim_new_on(&network, &r->settings, &r->sim) == CL_OK);
    plan_world(&r->w);
}

static void schedule(run *r)
{
    bool kills = pick(r, 4) == 0;
    r->leaves = !kills && pick(r, 4) == 0;
    r->faults = kills || r->leaves;
    for (int32_t rank = 0; rank < r->w.size; rank++)
        for (uint32_t n = 0; n < r->ntasks; n++)
            at_random_time(r, rank, ACT_SUBMIT, n, 0);
    for (uint64_t k = kills ? 1 + pick(r, 2) : 0; k > 0; k--)
        at_random_time(r, (int32_t)pick(r, (uint64_t)r->w.size), ACT_KILL, 0, 0);
    if (r->leaves)
        at_random_time(r, (int32_t)pick(r, (uint64_t)r->w.size), ACT_LEAVE, 0, 0);
}

static void play(run *r)
{
    int32_t rank;
    uint64_t token;
    for (;;) {
        int event = cl_sim_next(r->sim, &rank, &token);
        if (event == CL_SIM_IDLE)
            return;
        if (event == CL_SIM_TIMER)
            act(r, rank, token);
        else if (!r->dead[rank])
            on_done(r, rank, (uint32_t)token - 1);
        /* Who has nothing left to do may leave at once: others may still be on their way to the same end. */
        if (r->leaves && event == CL_SIM_DONE && !r->left[rank] && pick(r, 30) == 0) {
            bool busy = false;
            for (uint32_t n = 0; n < r->ntasks; n++)
                busy |= r->parts[rank][n].times_done == 0;
            if (!busy)
                act(r, rank, (uint64_t)ACT_LEAVE << 48);
        }
    }
}

/* ---- what must be true at the end ---------------------------------------------------------------------------- */

static void check_statuses(const run *r, uint32_t number)
{
    const task *t = &r->tasks[number];
    bool everybody_else_well = true, somebody_left_early = false;
    for (int32_t rank = 0; rank < r->w.size; rank++) {
        const part *p = &r->parts[rank][number];
        if (r->dead[rank])
            continue;
        CHECK(p->times_done == 1); /* else it hangs */
        somebody_left_early |= p->status == CL_SHUTDOWN;
        everybody_else_well &= p->status == CL_OK;
        if (!r->faults && t->odd_rank < 0)
            CHECK(p->status == CL_OK);
        else if (t->odd_rank >= 0 && everybody_needs_everybody(t))
            CHECK(r->faults ? p->status != CL_OK : p->status == CL_MISMATCH);
        CHECK(p->status == CL_OK || p->status == CL_MISMATCH || p->status == CL_PEER_LOST ||
              p->status == CL_PEER_LEFT || p->status == CL_SHUTDOWN);
    }
    /* Who leaves after its own part is done disturbs nobody. */
    if (r->leaves && t->odd_rank < 0 && !somebody_left_early)
        CHECK(everybody_else_well);
}

/* Nothing is left over: no message kept, no budget lost. */
static void check_engines(const run *r)
{
    for (int32_t a = 0; a < r->w.size; a++) {
        const cl_engine *engine = cl_sim_engine(r->sim, a);
        CHECK(r->dead[a] || atomic_load(&engine->unfinished) == 0);
        CHECK(r->faults || r->unheard || engine->early.count == 0);
        for (int32_t b = 0; b < r->w.size; b++) {
            const cl_peer *there = &engine->peers[b], *here = &cl_sim_engine(r->sim, b)->peers[a];
            if (r->dead[a] || r->dead[b] || r->left[a] || r->left[b] || engine->health != CL_OK)
                continue;
            CHECK(there->posted_nbytes == 0 && there->ready.count == 0);
            CHECK(there->told.first == NULL && there->leaving.first == NULL && there->keeping == NULL);
            CHECK(r->faults || there->eager_used == here->eager_returnable);
        }
    }
}

static void free_run(run *r)
{
    cl_sim_free(r->sim);
    for (int32_t rank = 0; rank < r->w.size; rank++)
        for (uint32_t n = 0; n < r->ntasks; n++) {
            cl_operation_release(r->parts[rank][n].operation);
            free_memory(&r->parts[rank][n]);
        }
    free_plans(&r->w);
    free(r);
}

static void run_seed(uint64_t seed)
{
    run *r = calloc(1, sizeof(run));
    r->random = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
    for (int i = 0; i < 8; i++)
        next_random(&r->random);
    make_world_of(r);
    make_tasks(r);
    schedule(r);
    play(r);
    for (uint32_t n = 0; n < r->ntasks; n++)
        check_statuses(r, n);
    check_engines(r);
    free_run(r);
}

int main(int argc, char **argv)
{
    uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, count = argc > 2 ? strtoull(argv[2], NULL, 10) : 1000;
    for (uint64_t seed = first; seed < first + count; seed++) {
        fprintf(stderr, "seed %llu\n", (unsigned long long)seed); /* the last one printed is the one that fails */
        run_seed(seed);
    }
    printf("\nall simulated runs passed\n");
    return 0;
}
