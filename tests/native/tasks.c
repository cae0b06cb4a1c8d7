/*
 * tasks.c: the operations of tasks.h, and a reference for each that shares nothing with the engine but the plan's steps: what
 * the documentation says about segments, chunks and the order of additions, done on plain arrays, one rank after the other.
 */
#include "tasks.h"

#include "plain_reduce.h"

#include <stdio.h>
#include <string.h>

enum { ALIGNMENT = 64 /* chunks begin at multiples of so many elements of their segment */ };

static const struct {
    const char *name;
    int32_t kind;
    bool reduces, exchanges, powers_of_two;
} forms[FORMS] = {
    [SUM_RING] = {"ring all-reduce", CL_ALLREDUCE, true, false, false},
    [SUM_EXCHANGE] = {"doubling all-reduce", CL_ALLREDUCE, true, false, true},
    [SUM_HALVING] = {"halving all-reduce", CL_ALLREDUCE, true, false, true},
    [SUM_DIRECT] = {"direct all-reduce", CL_ALLREDUCE, true, false, false},
    [SCATTER] = {"ring reduce-scatter", CL_REDUCESCATTER, true, false, false},
    [STRAIGHT] = {"direct reduce-scatter", CL_REDUCESCATTER, true, false, false},
    [BROADCAST] = {"broadcast", CL_BROADCAST, false, true, false},
    [GATHER] = {"all-gather", CL_ALLGATHER, false, true, false},
    [SHUFFLE] = {"all-to-all", CL_ALLTOALL, false, true, false},
    [EXCHANGE] = {"exchange", CL_EXCHANGE, false, true, false},
    [BARRIER] = {"barrier", CL_BARRIER, false, false, false},
    [TICKET] = {"ticket", CL_TICKET, false, true, false},
};

const char *tasks_name(task_form form)
{
    return forms[form].name;
}

uint64_t tasks_pick(program *p, uint64_t below)
{
    return next_random(&p->random) % below;
}

int32_t tasks_member(const task *t, int32_t rank)
{
    for (int32_t m = 0; m < t->nmembers; m++)
        if (t->members[m] == rank)
            return m;
    return -1;
}

bool tasks_need_everybody(const task *t)
{
    return (t->count > 0 || t->form == BARRIER) && t->form != SCATTER && t->form != STRAIGHT;
}

/* ---- arithmetic, as plain as it can be ------------------------------------------------------------------------ */

#define REDUCE(name, type) reduce_##name(t->reduction, (type *)(void *)to, (const type *)(const void *)in, n)

static void reduce(const task *t, uint8_t *to, const uint8_t *in, size_t n)
{
    switch (t->dtype) {
    case CL_UINT8: REDUCE(uint8, uint8_t); break;
    case CL_INT8: REDUCE(int8, int8_t); break;
    case CL_INT16: REDUCE(int16, int16_t); break;
    case CL_INT32: REDUCE(int32, int32_t); break;
    case CL_INT64: REDUCE(int64, int64_t); break;
    case CL_BOOL: REDUCE(bool, uint8_t); break;
    case CL_BFLOAT16: REDUCE(bfloat16, uint16_t); break;
    case CL_FLOAT16: REDUCE(float16, uint16_t); break;
    case CL_FLOAT32: REDUCE(float32, float); break;
    default: REDUCE(float64, double);
    }
}

/* Of floats alone. */
static void scale(const task *t, uint8_t *data, size_t n, double factor)
{
    if (factor == 1.0)
        return;
    for (size_t i = 0; i < n; i++)
        if (t->dtype == CL_FLOAT32)
            ((float *)(void *)data)[i] *= (float)factor;
        else
            ((double *)(void *)data)[i] *= factor;
}

/* What rank `rank` contributes at place i: floats of all signs whose sums round. */
static void put_value(const task *t, uint32_t number, int32_t rank, uint64_t i, uint8_t *at)
{
    uint64_t bits = (number * UINT64_C(1000003) + (uint64_t)rank * 7919 + i * 31 + 1) * UINT64_C(0x9E3779B97F4A7C15);
    bits ^= bits >> 29;
    uint32_t low = (uint32_t)bits % 0x7fffffff & (t->reduction == CL_PRODUCT ? 3 : UINT32_MAX);
    double real = ((double)(bits >> 11) * 0x1p-53 - 0.5) * (t->reduction == CL_PRODUCT ? 2 : 100);
    float single = (float)real;
    switch (t->dtype) {
    case CL_UINT8:
    case CL_INT8: *at = (uint8_t)low; break;
    case CL_BOOL: *at = low & 1; break;
    case CL_INT16: memcpy(at, &(uint16_t){(uint16_t)low}, sizeof(uint16_t)); break;
    case CL_INT32: memcpy(at, &low, sizeof low); break;
    case CL_INT64: memcpy(at, &(uint64_t){low * UINT64_C(0x100000001)}, sizeof(uint64_t)); break;
    case CL_BFLOAT16: memcpy(at, &(uint16_t){to_bfloat16(single)}, sizeof(uint16_t)); break;
    case CL_FLOAT16: memcpy(at, &(uint16_t){to_float16(single)}, sizeof(uint16_t)); break;
    case CL_FLOAT32: memcpy(at, &single, sizeof single); break;
    default: memcpy(at, &real, sizeof real);
    }
}

static uint8_t *new_input(const task *t, uint32_t number, int32_t rank, uint64_t count)
{
    size_t width = cl_dtype_nbytes(t->dtype);
    uint8_t *data = malloc((count + 1) * width);
    CHECK(data != NULL);
    for (uint64_t i = 0; i < count; i++)
        put_value(t, number, rank, i, data + i * width);
    return data;
}

/* ---- plans, made once for each number of ranks ---------------------------------------------------------------- */

static cl_plan *barrier_plan(int32_t size, int32_t rank)
{
    cl_step steps[2 * MAX_RANKS] = {{0}};
    cl_plan *plan;
    size_t count = 0;
    for (int32_t distance = 1; distance < size; distance *= 2) {
        steps[count++] = (cl_step){CL_SEND, (rank + distance) % size, 0, 1};
        steps[count++] = (cl_step){CL_RECV_REDUCE, (rank + size - distance) % size, 0, 1};
    }
    CHECK(cl_plan_new(steps, count, 1, 0, &plan) == CL_OK);
    return plan;
}

static cl_plan *small_plan(const world *w, task_form form, int32_t member)
{
    cl_plan *const *plans[FORMS] = {
        [SUM_RING] = w->ring, [SUM_EXCHANGE] = w->exchange, [SUM_HALVING] = w->halving, [SUM_DIRECT] = w->direct,
        [BROADCAST] = w->from_zero, [GATHER] = w->gather, [SCATTER] = w->scatter, [STRAIGHT] = w->straight,
        [SHUFFLE] = w->shuffle,
    };
    return plans[form] == NULL ? NULL : plans[form][member];
}

/* The members' plan speaks of members; the engine's of ranks. */
static cl_plan *relabelled(const cl_plan *plan, const task *t)
{
    cl_step steps[8 * MAX_RANKS];
    cl_plan *made;
    CHECK(plan->nsteps <= 8 * MAX_RANKS);
    for (uint32_t i = 0; i < plan->nsteps; i++) {
        steps[i] = plan->steps[i];
        steps[i].peer = t->members[steps[i].peer];
    }
    CHECK(cl_plan_new(steps, plan->nsteps, plan->nchunks, plan->inputs, &made) == CL_OK);
    return made;
}

static void make_plans(task *t, const world *w)
{
    for (int32_t m = 0; m < t->nmembers; m++) {
        cl_plan *plan = t->form == BARRIER ? barrier_plan(t->nmembers, m) : small_plan(w, t->form, m);
        t->plans[m] = plan == NULL ? NULL : relabelled(plan, t);
        if (t->form == BARRIER)
            cl_plan_free(plan);
    }
}

/* ---- drawing -------------------------------------------------------------------------------------------------- */

/* Everybody, or a group; only tickets are everybody's always. */
static void draw_members(program *p, task *t)
{
    bool all = t->form == TICKET || tasks_pick(p, 3) > 0;
    for (int32_t r = 0; r < p->size; r++)
        if (all || tasks_pick(p, 3) > 0)
            t->members[t->nmembers++] = r;
    if (t->nmembers == 0)
        t->members[t->nmembers++] = (int32_t)tasks_pick(p, (uint64_t)p->size);
    for (int32_t r = t->nmembers; r > 1 && !all && tasks_pick(p, 2); r--) { /* in any order */
        int32_t other = (int32_t)tasks_pick(p, (uint64_t)r), swapped = t->members[other];
        t->members[other] = t->members[r - 1];
        t->members[r - 1] = swapped;
    }
}

static void draw_arithmetic(program *p, task *t)
{
    static const int32_t dtypes[] = {CL_INT32, CL_FLOAT32, CL_FLOAT32, CL_FLOAT64, CL_UINT8};
    t->dtype = t->form == EXCHANGE ? CL_UINT8 : t->form == BARRIER ? CL_INT32 : dtypes[tasks_pick(p, 5)];
    t->prescale = t->postscale = 1;
    if (!forms[t->form].reduces)
        return;
    t->reduction = tasks_pick(p, 3) > 0 ? CL_SUM : (int32_t)tasks_pick(p, CL_REDUCTION_END);
    bool scales = t->dtype == CL_FLOAT32 || t->dtype == CL_FLOAT64;
    t->prescale = scales && tasks_pick(p, 4) == 0 ? 0.3 : 1;
    t->postscale = scales && tasks_pick(p, 3) == 0 ? 1.0 / t->nmembers : 1;
}

/* Types of other widths, now and then, in place of what was drawn; none that is scaled, which the reference does not do to them. */
static void draw_other_type(const program *p, task *t)
{
    static const int32_t others[CL_DTYPE_END][4] = {
        [CL_INT32] = {CL_INT8, CL_INT16, CL_INT64, CL_INT64}, [CL_UINT8] = {CL_BOOL, CL_BOOL, CL_INT8, CL_BOOL},
        [CL_FLOAT32] = {CL_BFLOAT16, FLOAT16, CL_BFLOAT16, FLOAT16}, [CL_FLOAT64] = {CL_INT64, CL_INT64, FLOAT16, CL_BFLOAT16}};
    uint64_t choice = (p->random * UINT64_C(0x9E3779B97F4A7C15)) >> 60; /* the next draws are what they would have been */
    if (choice < 8 && t->prescale == 1 && t->postscale == 1 && t->form != EXCHANGE && t->form != BARRIER)
        t->dtype = others[t->dtype][choice % 4];
}

static void draw_task(program *p, task *t)
{
    static const uint64_t segment_counts[] = {0, 0, 64, 200, 1024};
    t->form = (task_form)tasks_pick(p, FORMS);
    draw_members(p, t);
    if (forms[t->form].powers_of_two && (t->nmembers & (t->nmembers - 1)) != 0)
        t->form = SUM_RING;
    draw_arithmetic(p, t);
    draw_other_type(p, t);
    uint64_t size = tasks_pick(p, 4);
    t->count = size == 0 ? tasks_pick(p, 8) : size < 3 ? tasks_pick(p, 600) : tasks_pick(p, MOST_COUNT);
    t->segment_count = segment_counts[tasks_pick(p, 5)];
    bool odd = p->mismatches && t->nmembers > 1 && t->form != BARRIER && tasks_pick(p, 4) == 0;
    t->odd_rank = odd ? t->members[tasks_pick(p, (uint64_t)t->nmembers)] : -1;
    t->odd_field = (int)tasks_pick(p, 3);
}

void tasks_draw(program *p)
{
    world worlds[MAX_RANKS + 1] = {{0}};
    p->mismatches = tasks_pick(p, 3) == 0;
    p->ntasks = 1 + (uint32_t)tasks_pick(p, MOST_TASKS);
    for (uint32_t n = 0; n < p->ntasks; n++) {
        task *t = &p->tasks[n];
        draw_task(p, t);
        world *w = &worlds[t->nmembers];
        if (w->size == 0) {
            w->size = t->nmembers;
            plan_world(w);
        }
        make_plans(t, w);
    }
    for (int32_t size = 1; size <= MAX_RANKS; size++)
        if (worlds[size].size > 0)
            free_plans(&worlds[size]);
}

enum { GARBAGE = 0xa5 };

/* Memory that its owner uses for something else: who still reads it reads garbage, in every run the same, and who still
 * writes it is found out when it is freed. With ASan it is freed at once, and that sees both. */
static void retire(part *mine, uint8_t *data)
{
#ifdef __SANITIZE_ADDRESS__
    (void)mine;
    free(data);
#else
    if (data == NULL)
        return;
    memset(data, GARBAGE, mine->nbytes);
    mine->retired[mine->retired[0] != NULL] = data;
#endif
}

static void free_retired(part *mine)
{
    for (int i = 0; i < 2; i++) {
        for (size_t n = 0; mine->retired[i] != NULL && n < mine->nbytes; n++)
            CHECK(mine->retired[i][n] == GARBAGE);
        free(mine->retired[i]);
        mine->retired[i] = NULL;
    }
}

void tasks_end(program *p, int32_t rank, uint32_t number)
{
    part *mine = &p->parts[rank][number];
    mine->nbytes = mine->count * cl_dtype_nbytes(p->tasks[number].dtype);
    if (mine->output != mine->input)
        retire(mine, mine->output);
    retire(mine, mine->input);
    mine->input = mine->output = NULL;
    cl_operation_release(mine->operation);
    mine->operation = NULL;
}

void tasks_free(program *p)
{
    for (uint32_t n = 0; n < p->ntasks; n++) {
        for (int32_t r = 0; r < p->size; r++) {
            tasks_end(p, r, n);
            free_retired(&p->parts[r][n]);
        }
        for (int32_t m = 0; m < p->tasks[n].nmembers; m++)
            cl_plan_free(p->tasks[n].plans[m]);
        free(p->tasks[n].reference);
    }
}

/* ---- submitting ----------------------------------------------------------------------------------------------- */

/* What member `from` gives member `to`; zero now and then. */
static uint64_t share_of(const task *t, uint32_t number, int32_t from, int32_t to)
{
    uint64_t mixed = (uint64_t)(from + 1) * 2654435761u + (uint64_t)(to + 1) * 40503u + number * 97u;
    return mixed % 3 == 0 ? 0 : mixed % (t->count / 4 + 2);
}

static void set_parts(const task *t, uint64_t *parts)
{
    uint64_t n = (uint64_t)t->nmembers; /* uneven, and empty now and then */
    for (uint64_t to = 0; to < n; to++)
        parts[to + 1] = to + 1 == n ? t->count : t->count * (to | 1) / n;
}

static void fill_sizes(const task *t, uint32_t number, int32_t me, part *mine, cl_request *request)
{
    mine->count = t->form == BARRIER ? 0 : t->count;
    if (t->form == GATHER) {
        mine->count = mine->splits[0] = share_of(t, number, me, 0);
        request->nsplits = 1;
    } else if (t->form == SHUFFLE) {
        mine->count = 0;
        for (int32_t to = 0; to < t->nmembers; to++)
            mine->count += mine->splits[to] = share_of(t, number, me, to);
        request->nsplits = t->nmembers;
    } else if (t->form == EXCHANGE) {
        mine->count = share_of(t, number, me, 1);
    } else if (t->form == TICKET) {
        mine->splits[0] = (uint64_t)me + number;
        request->nsplits = 1;
    } else if (t->form == SCATTER || t->form == STRAIGHT) {
        set_parts(t, mine->parts);
        request->parts = mine->parts;
    }
    request->splits = request->nsplits > 0 ? mine->splits : NULL;
    request->count = mine->count;
}

/* One rank asks for something else; not all kinds look at every field. */
static void make_odd(const task *t, cl_request *request)
{
    if (t->odd_field == 0 && forms[t->form].kind == CL_ALLREDUCE && request->count > 0)
        request->count--;
    else if (t->odd_field == 1)
        request->root = 5;
    else
        request->shape_hash = 99;
}

const char *tasks_text(const program *p, int32_t rank, uint32_t number)
{
    return p->tasks[number].odd_rank == rank ? "the odd one" : "the usual one";
}

void tasks_submit(program *p, cl_engine *engine, int32_t rank, uint32_t number, uint64_t *random)
{
    task *t = &p->tasks[number];
    part *mine = &p->parts[rank][number];
    int32_t me = tasks_member(t, rank);
    cl_request request = {.key = number + 1, .text = tasks_text(p, rank, number), .kind = forms[t->form].kind,
                          .dtype = t->dtype, .reduction = t->reduction, .prescale = t->prescale, .postscale = t->postscale,
                          .my_part = me, .plan = t->plans[me], .segment_count = t->segment_count};
    request.priority = mine->priority = (int64_t)(next_random(random) % 4);
    if (forms[t->form].exchanges)
        request.members = t->members, request.nmembers = t->nmembers;
    if (t->nmembers < p->size)
        request.listeners = t->members, request.nlisteners = t->nmembers;
    fill_sizes(t, number, me, mine, &request);
    bool in_place = forms[t->form].kind == CL_ALLREDUCE || t->form == BROADCAST;
    if (t->form != BARRIER && t->form != TICKET)
        mine->input = new_input(t, number, rank, mine->count);
    if (in_place)
        mine->output = t->form == BROADCAST || next_random(random) % 2
                           ? mine->input
                           : calloc(mine->count + 1, cl_dtype_nbytes(t->dtype));
    request.input = mine->input;
    request.output = mine->output;
    bool alone = t->form == GATHER || t->form == SHUFFLE || t->form == EXCHANGE || t->form == TICKET;
    request.gated = mine->gated = !alone && next_random(random) % 4 == 0;
    if (t->odd_rank == rank)
        make_odd(t, &request);
    CHECK(cl_submit(engine, &request, &mine->operation) == CL_OK);
    mine->submitted = true;
    mine->nsegments = mine->gated ? mine->operation->nsegments : 0; /* others are counted when their sizes are known */
}

/* ---- what must come of it ------------------------------------------------------------------------------------- */

static uint64_t border(uint64_t length, uint64_t chunk, uint64_t nchunks)
{
    return chunk == nchunks ? length : length * chunk / nchunks / ALIGNMENT * ALIGNMENT;
}

typedef struct {
    uint64_t first, end;
} range;

/* The elements of a step's chunks: in every segment the same share. Returns the number of ranges. */
static size_t ranges_of(const task *t, const cl_step *step, int32_t nchunks, const uint64_t *parts, range *ranges)
{
    if (t->form == SCATTER || t->form == STRAIGHT) {
        ranges[0] = (range){parts[step->first_chunk], parts[step->end_chunk]};
        return 1;
    }
    uint64_t size = t->segment_count == 0 || t->count == 0 ? t->count + 1 : t->segment_count;
    size_t n = 0;
    for (uint64_t start = 0; start < t->count; start += size) {
        uint64_t length = t->count - start < size ? t->count - start : size;
        ranges[n++] = (range){start + border(length, (uint64_t)step->first_chunk, (uint64_t)nchunks),
                              start + border(length, (uint64_t)step->end_chunk, (uint64_t)nchunks)};
    }
    return n;
}

/* What is on its way from one member to another, in order. */
typedef struct sent {
    struct sent *next;
    uint8_t *copy; /* of all elements: only the step's are looked at */
} sent;

typedef struct {
    const task *t;
    uint64_t parts[MAX_RANKS + 1];
    uint8_t *work[MAX_RANKS];
    uint32_t at[MAX_RANKS]; /* the member's next step */
    sent *first[MAX_RANKS][MAX_RANKS], *last[MAX_RANKS][MAX_RANKS];
} evaluation;

static void copy_ranges(const evaluation *e, const cl_step *step, int32_t nchunks, uint8_t *to, const uint8_t *from, bool reduces)
{
    range ranges[MOST_COUNT / 64 + 2];
    size_t width = cl_dtype_nbytes(e->t->dtype), n = ranges_of(e->t, step, nchunks, e->parts, ranges);
    for (size_t i = 0; i < n; i++) {
        uint64_t first = ranges[i].first * width, count = ranges[i].end - ranges[i].first;
        if (reduces)
            reduce(e->t, to + first, from + first, count);
        else
            memcpy(to + first, from + first, count * width);
    }
}

/* False: it waits for a message. */
static bool take_step(evaluation *e, int32_t member)
{
    const cl_plan *plan = e->t->plans[member];
    const cl_step *step = &plan->steps[e->at[member]];
    int32_t peer = tasks_member(e->t, step->peer);
    if (step->kind == CL_SEND) {
        sent *s = calloc(1, sizeof(sent));
        CHECK(s != NULL && (s->copy = malloc(e->t->count * cl_dtype_nbytes(e->t->dtype) + 1)) != NULL);
        copy_ranges(e, step, plan->nchunks, s->copy, e->work[member], false);
        *(e->first[member][peer] == NULL ? &e->first[member][peer] : &e->last[member][peer]->next) = s;
        e->last[member][peer] = s;
    } else {
        sent *s = e->first[peer][member];
        if (s == NULL)
            return false;
        e->first[peer][member] = s->next;
        copy_ranges(e, step, plan->nchunks, e->work[member], s->copy, step->kind == CL_RECV_REDUCE);
        free(s->copy);
        free(s);
    }
    e->at[member]++;
    return true;
}

static void take_all_steps(evaluation *e)
{
    for (bool moved = true; moved;) {
        moved = false;
        for (int32_t m = 0; m < e->t->nmembers; m++)
            while (e->at[m] < e->t->plans[m]->nsteps && take_step(e, m))
                moved = true;
    }
}

/* Of every part of the result, the member's that has it: all have the same, or only one has it. */
static void make_reference(task *t, uint32_t number)
{
    size_t nbytes = t->count * cl_dtype_nbytes(t->dtype);
    evaluation e = {.t = t};
    bool scatters = t->form == SCATTER || t->form == STRAIGHT;
    CHECK((t->reference = malloc(nbytes + 1)) != NULL);
    set_parts(t, e.parts);
    for (int32_t m = 0; m < t->nmembers; m++) {
        e.work[m] = new_input(t, number, t->members[m], t->count);
        scale(t, e.work[m], t->count, t->prescale);
    }
    take_all_steps(&e);
    for (int32_t m = 0; m < t->nmembers; m++) {
        cl_step own = {CL_RECV, 0, m, m + 1};
        CHECK(e.at[m] == t->plans[m]->nsteps);
        if (scatters)
            copy_ranges(&e, &own, t->nmembers, t->reference, e.work[m], false);
        else if (m == 0)
            memcpy(t->reference, e.work[m], nbytes);
        free(e.work[m]);
    }
    scale(t, t->reference, t->count, t->postscale);
}

static const char *check_reduced(task *t, uint32_t number, const part *mine, int32_t me)
{
    size_t width = cl_dtype_nbytes(t->dtype);
    uint64_t first = 0, count = t->count;
    const void *data = mine->output;
    if (t->reference == NULL)
        make_reference(t, number);
    if (forms[t->form].kind == CL_REDUCESCATTER) {
        void *result;
        const uint64_t *counts;
        if (mine->operation == NULL)
            return NULL;
        CHECK(cl_operation_result(mine->operation, &result, &count, &counts) == CL_OK);
        first = mine->parts[me];
        if (count != mine->parts[me + 1] - first)
            return "the part has another length";
        data = result;
    }
    return memcmp(data, t->reference + first * width, count * width) == 0 ? NULL : "the sum is not the reference's, bit for bit";
}

static const char *check_values(const task *t, uint32_t number, int32_t rank, uint64_t first, const uint8_t *data, uint64_t count)
{
    uint8_t expected[8];
    size_t width = cl_dtype_nbytes(t->dtype);
    for (uint64_t i = 0; i < count; i++) {
        put_value(t, number, rank, first + i, expected);
        if (memcmp(data + i * width, expected, width) != 0)
            return "an element is not what its rank sent";
    }
    return NULL;
}

static const char *check_gathered(const task *t, uint32_t number, int32_t me, const part *mine)
{
    uint64_t at = 0, count;
    const uint64_t *counts;
    void *result;
    if (mine->operation == NULL)
        return NULL;
    CHECK(cl_operation_result(mine->operation, &result, &count, &counts) == CL_OK);
    for (int32_t from = 0; from < t->nmembers; from++) {
        uint64_t skipped = 0, share = share_of(t, number, from, t->form == GATHER ? 0 : t->form == EXCHANGE ? 1 : me);
        for (int32_t to = 0; t->form == SHUFFLE && to < me; to++)
            skipped += share_of(t, number, from, to);
        if (counts[from] != share || at + share > count)
            return "a member's share has another length";
        const char *wrong = check_values(t, number, t->members[from], skipped,
                                         (const uint8_t *)result + at * cl_dtype_nbytes(t->dtype), share);
        if (wrong != NULL)
            return wrong;
        at += share;
    }
    return at == count ? NULL : "the result has another length";
}

/* As far as one process knows what the others did. */
static const char *check_barrier(const program *p, uint32_t number)
{
    const task *t = &p->tasks[number];
    for (int32_t m = 0; m < t->nmembers; m++)
        if (!p->parts[t->members[m]][number].submitted)
            return "a barrier opened before everybody had come";
    return NULL;
}

const char *tasks_check(program *p, int32_t rank, uint32_t number)
{
    task *t = &p->tasks[number];
    const part *mine = &p->parts[rank][number];
    int32_t me = tasks_member(t, rank);
    if (forms[t->form].reduces)
        return check_reduced(t, number, mine, me);
    if (t->form == BROADCAST)
        return check_values(t, number, t->members[0], 0, mine->output, t->count);
    if (t->form == BARRIER)
        return check_barrier(p, number);
    return t->form == TICKET ? NULL : check_gathered(t, number, me, mine);
}
