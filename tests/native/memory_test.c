/*
 * memory_test.c: every allocation of the engine fails once, one after the other.
 *
 * Linked with --wrap for malloc, calloc, realloc and free. Ranks are driven by hand, or by the simulation, so that the
 * n-th allocation is the same in every run. Whatever fails: nothing crashes, every operation of every rank ends (with the
 * right result if it ends well), and what was allocated is freed.
 */
#include <string.h>

#include "../../native/engine.h"
#include "world.h"

enum { RANKS = 3, KINDS = 8, COUNT = 700, ROUNDS = 30000 };

void *__real_malloc(size_t nbytes);
void *__real_calloc(size_t count, size_t nbytes);
void *__real_realloc(void *old, size_t nbytes);
void __real_free(void *memory);
void *__wrap_malloc(size_t nbytes);
void *__wrap_calloc(size_t count, size_t nbytes);
void *__wrap_realloc(void *old, size_t nbytes);
void __wrap_free(void *memory);

static struct {
    bool on;
    int64_t count, fail_at, live;
    bool for_good; /* from then on all fail, as far as the run goes */
} allocations;

static bool fails(void)
{
    if (!allocations.on)
        return false;
    allocations.count++;
    return allocations.for_good ? allocations.count >= allocations.fail_at : allocations.count == allocations.fail_at;
}

static void *counted(void *memory)
{
    allocations.live += memory != NULL;
    return memory;
}

void *__wrap_malloc(size_t nbytes)
{
    return fails() ? NULL : counted(__real_malloc(nbytes));
}

void *__wrap_calloc(size_t count, size_t nbytes)
{
    return fails() ? NULL : counted(__real_calloc(count, nbytes));
}

void *__wrap_realloc(void *old, size_t nbytes)
{
    if (fails())
        return NULL;
    return old == NULL ? counted(__real_malloc(nbytes)) : __real_realloc(old, nbytes);
}

void __wrap_free(void *memory)
{
    allocations.live -= memory != NULL;
    __real_free(memory);
}

/* ---- the operations ------------------------------------------------------------------------------------------ */

typedef struct {
    world w;
    cl_sim *sim; /* NULL: driven by hand */
    cl_operation *operations[RANKS][KINDS];
    int32_t data[RANKS][KINDS][COUNT];
    uint64_t splits[RANKS][MAX_RANKS];
} run;

static const int32_t members[RANKS] = {0, 1, 2};

/* Number 6 differs on rank 2; number 7 is gated and in segments. */
static cl_request request_of(run *r, int32_t rank, int number)
{
    static const int32_t kinds[KINDS] = {CL_ALLREDUCE, CL_BROADCAST, CL_ALLGATHER, CL_REDUCESCATTER, CL_ALLTOALL,
                                         CL_EXCHANGE, CL_ALLREDUCE, CL_ALLREDUCE};
    cl_plan *plans[KINDS] = {r->w.ring[rank], r->w.from_zero[rank], r->w.gather[rank], r->w.scatter[rank],
                             r->w.shuffle[rank], NULL, r->w.direct[rank], r->w.ring[rank]};
    static const uint64_t parts[RANKS + 1] = {0, 100, 400, COUNT};
    int32_t *data = r->data[rank][number];
    cl_request request = sum_request(&r->w, rank, (uint64_t)number + 1, data, number % 2 == 0 ? 40 : COUNT);
    request.kind = kinds[number];
    request.plan = plans[number];
    request.my_part = rank;
    request.root = 0;
    if (number == 1 || number == 2 || number == 4 || number == 5)
        request.members = members, request.nmembers = RANKS;
    for (int32_t to = 0; to < RANKS; to++)
        r->splits[rank][to] = 10;
    if (number == 2 || number == 4) {
        request.splits = r->splits[rank];
        request.nsplits = number == 2 ? 1 : RANKS;
        request.count = 10 * (uint64_t)request.nsplits;
    }
    if (number == 5)
        request.dtype = CL_UINT8;
    if (number == 3)
        request.parts = parts;
    if (number == 6)
        request.count += rank == 2;
    if (number == 7)
        request.gated = 1, request.segment_count = 128;
    return request;
}

/* A submission that fails is an error that the caller sees; who tries again must be heard. */
static void submit_all(run *r)
{
    for (int number = 0; number < KINDS; number++)
        for (int32_t rank = 0; rank < RANKS; rank++) {
            for (int i = 0; i < COUNT; i++)
                r->data[rank][number][i] = i + 1;
            cl_request request = request_of(r, rank, number);
            cl_operation **operation = &r->operations[rank][number];
            int status = cl_submit(r->w.engines[rank], &request, operation);
            CHECK(status == CL_OK || status == CL_NO_MEMORY);
            if (status == CL_NO_MEMORY) {
                bool for_good = allocations.for_good;
                allocations.on = !for_good;
                CHECK(cl_submit(r->w.engines[rank], &request, operation) == CL_OK);
                allocations.on = true;
            }
            if (request.gated)
                CHECK(cl_operation_ready(*operation, 0, (*operation)->nsegments) == CL_OK);
        }
}

static bool all_done(const run *r)
{
    for (int number = 0; number < KINDS; number++)
        for (int32_t rank = 0; rank < RANKS; rank++)
            if (!cl_operation_done(r->operations[rank][number]))
                return false;
    return true;
}

static void check_values(const run *r, int32_t rank, int number)
{
    const int32_t *data = r->data[rank][number];
    for (int i = 0; i < COUNT && (number == 0 || number == 7); i++)
        CHECK(data[i] == (number == 0 && i >= 40 ? i + 1 : RANKS * (i + 1)));
    void *result;
    uint64_t count;
    const uint64_t *counts;
    CHECK(cl_operation_result(r->operations[rank][number], &result, &count, &counts) == CL_OK);
    for (uint64_t i = 0; number == 2 && i < count; i++)
        CHECK(((int32_t *)result)[i] == (int32_t)(i % 10) + 1);
    CHECK(number != 2 || count == 10 * RANKS);
}

static void check_ends(run *r)
{
    for (int number = 0; number < KINDS; number++)
        for (int32_t rank = 0; rank < RANKS; rank++) {
            const char *text;
            int32_t peer;
            int status = cl_operation_status(r->operations[rank][number], &text, &peer);
            CHECK(status == CL_OK || status == CL_NO_MEMORY || status == CL_MISMATCH || status == CL_PEER_LOST);
            CHECK(number != 6 || status != CL_OK);
            if (status == CL_OK)
                check_values(r, rank, number);
        }
}

/* ---- worlds -------------------------------------------------------------------------------------------------- */

/* False: there was no memory to begin with, or for the simulation itself. */
static bool live_in_sim(run *r)
{
    const cl_sim_link link = {1e-6, 1e-9, 1e-10};
    static const int32_t hosts[RANKS] = {0};
    cl_settings settings = tiny_settings();
    int32_t rank;
    uint64_t token;
    allocations.on = true;
    int event = CL_SIM_NO_MEMORY;
    if (cl_sim_new(RANKS, hosts, &link, &link, &settings, &r->sim) != CL_OK)
        return false;
    for (int32_t i = 0; i < RANKS; i++)
        r->w.engines[i] = cl_sim_engine(r->sim, i);
    submit_all(r);
    do
        event = cl_sim_next(r->sim, &rank, &token);
    while (event != CL_SIM_IDLE && event != CL_SIM_NO_MEMORY);
    return event == CL_SIM_IDLE;
}

static bool live_by_hand(run *r, world (*make)(int32_t, const cl_settings *))
{
    cl_settings settings = tiny_settings();
    free_plans(&r->w);
    r->w = make(RANKS, &settings);
    allocations.on = true;
    submit_all(r);
    for (int round = 0; round < ROUNDS && !all_done(r); round++)
        for (int32_t rank = 0; rank < RANKS; rank++)
            cl_engine_progress(r->w.engines[rank]);
    return true;
}

static bool live_over_shm(run *r)
{
    return live_by_hand(r, shm_links);
}

static bool live_over_tcp(run *r)
{
    return live_by_hand(r, tcp_links);
}

static const struct {
    const char *name;
    bool (*live)(run *r);
} worlds[] = {{"sim", live_in_sim}, {"shm", live_over_shm}, {"tcp", live_over_tcp}};

/* True if the run had as many allocations as that. */
static bool live_once(bool (*live)(run *r), int64_t fail_at, bool for_good)
{
    int64_t live_before = allocations.live;
    run *r = calloc(1, sizeof(run));
    r->w.size = RANKS;
    plan_world(&r->w);
    allocations.count = 0;
    allocations.fail_at = fail_at;
    allocations.for_good = for_good;
    bool lived = live(r);
    bool reached = allocations.count >= fail_at;
    if (lived) {
        CHECK(all_done(r)); /* else it hangs */
        check_ends(r);
    }
    if (r->sim != NULL)
        cl_sim_free(r->sim);
    for (int32_t rank = 0; r->sim == NULL && rank < RANKS; rank++)
        cl_engine_free(r->w.engines[rank]);
    allocations.on = false;
    for (int number = 0; number < KINDS; number++)
        for (int32_t rank = 0; rank < RANKS; rank++)
            cl_operation_release(r->operations[rank][number]);
    free_plans(&r->w);
    free(r);
    CHECK(allocations.live == live_before);
    return reached;
}

static void test_plans(void)
{
    static const cl_step steps[] = {{CL_SEND, 1, 0, 1}, {CL_RECV_REDUCE, 1, 1, 2}, {CL_SEND, 1, 1, 2}, {CL_RECV, 2, 0, 1}};
    int64_t live_before = allocations.live;
    int status = CL_NO_MEMORY;
    for (int64_t fail_at = 1; status != CL_OK; fail_at++) {
        cl_plan *plan;
        allocations.on = true;
        allocations.count = 0;
        allocations.fail_at = fail_at;
        status = cl_plan_new(steps, 4, 2, 0, &plan);
        allocations.on = false;
        CHECK(status == CL_OK || status == CL_NO_MEMORY);
        if (status == CL_OK)
            cl_plan_free(plan);
        CHECK(allocations.live == live_before);
    }
}

int main(void)
{
    test_plans();
    for (size_t k = 0; k < sizeof worlds / sizeof worlds[0]; k++)
        for (int for_good = 0; for_good < 2; for_good++) {
            int64_t fail_at = 1;
            fprintf(stderr, "%s, %s\n", worlds[k].name, for_good ? "nothing works from then on" : "one fails");
            while (live_once(worlds[k].live, fail_at, for_good))
                fprintf(stderr, "allocation %lld\n", (long long)fail_at++);
        }
    puts("all tests of memory passed");
    return 0;
}
