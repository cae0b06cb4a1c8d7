/*
 * stall_test.c: operations that the last rank never submits: who is told what, and how they end; over links, and simulated.
 *
 * Nothing here depends on how long anything takes: what waits, waits for ever, until a limit ends it.
 */
#include <string.h>
#include <unistd.h>

#include "world.h"

enum { COMMON = 7, OTHER = 9, LATER = 11 };

static void take_report(cl_engine *engine, char *text, size_t nbytes)
{
    int status;
    do
        status = cl_stall_next(engine, 100, text, (uint32_t)nbytes);
    while (status == CL_AGAIN);
    CHECK(status == CL_OK);
}

static cl_operation *submit(const world *w, int32_t rank, uint64_t key, const char *text, int32_t *data)
{
    cl_operation *operation;
    cl_request request = sum_request(w, rank, key, data, 5);
    request.text = text;
    CHECK(cl_submit(w->engines[rank], &request, &operation) == CL_OK);
    return operation;
}

static void check_failed(cl_operation *operation, int32_t blamed, const char *words)
{
    const char *text;
    int32_t peer;
    wait_for(operation, CL_STALLED);
    cl_operation_status(operation, &text, &peer);
    if (peer != blamed || strstr(text, words) == NULL)
        fprintf(stderr, "rank %d, %s\n", peer, text);
    CHECK(peer == blamed && strstr(text, words) != NULL);
    cl_operation_release(operation);
}

/* Every rank hears of every other directly, so all that they said before has come, too. */
static void meet(const world *w, uint64_t key)
{
    int32_t data[MAX_RANKS][5] = {{0}};
    cl_operation *operations[MAX_RANKS];
    for (int32_t r = 0; r < w->size; r++) {
        cl_request request = sum_request(w, r, key, data[r], 5);
        request.plan = w->direct[r];
        CHECK(cl_submit(w->engines[r], &request, &operations[r]) == CL_OK);
    }
    for (int32_t r = 0; r < w->size; r++) {
        wait_for(operations[r], CL_OK);
        cl_operation_release(operations[r]);
    }
}

/* The last rank submits something else: both fail, on all ranks, also on who submits later; then all is well again. */
static void test_failure(world *w)
{
    int32_t last = w->size - 1, data[MAX_RANKS][5] = {{0}};
    cl_operation *operations[MAX_RANKS];
    for (int32_t r = 0; r < last; r++)
        operations[r] = submit(w, r, COMMON, "allreduce 'common'", data[r]);
    operations[last] = submit(w, last, OTHER, "allreduce 'other'", data[last]);
    char missing[64], report[1024];
    snprintf(missing, sizeof missing, "but rank %d did not", last);
    for (int32_t r = 0; r < last; r++)
        check_failed(operations[r], last, missing);
    static const char *const others[] = {"but rank 0 did not", "but ranks 0, 1 did not", "but ranks 0-2 did not"};
    check_failed(operations[last], 0, others[last - 1]);
    meet(w, LATER);
    check_failed(submit(w, last, COMMON, "allreduce 'common'", data[last]), last, missing);
    check_failed(submit(w, 0, OTHER, "allreduce 'other'", data[0]), 0, "submitted it");
    take_report(w->engines[last], report, sizeof report);
    CHECK(strstr(report, "allreduce 'other' waits: ") == report);
    meet(w, LATER + 1);
}

/* No limit: a warning, by one of those that wait at least, and then it comes after all. */
static void test_warning(world *w)
{
    int32_t last = w->size - 1, data[MAX_RANKS][5] = {{0}}, more[MAX_RANKS][5] = {{0}};
    cl_operation *operations[MAX_RANKS];
    char report[1024];
    for (int32_t r = 0; r < last; r++)
        operations[r] = submit(w, r, COMMON, "allreduce 'common'", data[r]);
    operations[last] = submit(w, last, OTHER, "allreduce 'other'", data[last]);
    char missing[128];
    snprintf(missing, sizeof missing, "but rank %d did not; rank %d waits for allreduce 'other'", last, last);
    for (int32_t r = 0, told = 0; !told; r = (r + 1) % last) { /* the first report may have come between two submissions */
        int status = cl_stall_next(w->engines[r], 20, report, sizeof report);
        CHECK(status == CL_OK || status == CL_AGAIN);
        CHECK(status == CL_AGAIN || strstr(report, "allreduce 'common' waits: ") == report);
        told = status == CL_OK && strstr(report, missing) != NULL;
    }
    cl_operation *first[MAX_RANKS];
    for (int32_t r = 0; r < w->size; r++) {
        first[r] = operations[r];
        operations[r] = submit(w, r, r == last ? COMMON : OTHER, r == last ? "allreduce 'common'" : "allreduce 'other'", more[r]);
    }
    for (int32_t r = 0; r < w->size; r++) {
        wait_for(first[r], CL_OK);
        wait_for(operations[r], CL_OK);
        cl_operation_release(first[r]);
        cl_operation_release(operations[r]);
    }
}

/* ---- simulated ----------------------------------------------------------------------------------------------- */

static void test_simulated(int32_t size, double shutdown_s)
{
    int32_t hosts[MAX_RANKS], rank, data[5];
    cl_sim_link link = {.alpha_s = 20e-6, .beta_s_per_byte = 8e-10};
    cl_settings settings = ordinary_settings();
    settings.stall_warning_s = 60;
    settings.stall_shutdown_s = shutdown_s;
    cl_sim *sim;
    world w = {.size = size};
    for (int32_t r = 0; r < size; r++)
        hosts[r] = r;
    CHECK(cl_sim_new(size, hosts, &link, &link, &settings, &sim) == CL_OK);
    for (int32_t r = 0; r < size; r++)
        w.engines[r] = cl_sim_engine(sim, r);
    plan_world(&w);
    for (int32_t r = 0; r < size - 1; r++)
        cl_operation_release(submit(&w, r, COMMON, "allreduce 'common'", data));
    uint64_t token;
    int32_t ndone = 0;
    while (cl_sim_next(sim, &rank, &token) != CL_SIM_IDLE)
        ndone++;
    CHECK(ndone == (shutdown_s > 0 ? size - 1 : 0));
    CHECK(shutdown_s > 0 ? cl_sim_now(sim) >= shutdown_s && cl_sim_now(sim) < shutdown_s + 1 : cl_sim_now(sim) < 61);
    char report[1024];
    for (int32_t r = 0; r < size; r++)
        CHECK(cl_stall_next(w.engines[r], 0, report, sizeof report) == (r == 0 ? CL_OK : CL_AGAIN)); /* the lowest alone */
    free_plans(&w);
    cl_sim_free(sim);
}

int main(void)
{
    static const make_world worlds[] = {shm_world, tcp_world};
    cl_settings failing = ordinary_settings(), warning = ordinary_settings();
    failing.stall_warning_s = 0.1;
    failing.stall_shutdown_s = 1;
    warning.stall_warning_s = 0.1;
    for (int32_t size = 2; size <= 4; size++) {
        test_simulated(size, 0);
        test_simulated(size, 90);
        for (size_t m = 0; m < sizeof worlds / sizeof worlds[0]; m++) {
            fprintf(stderr, "%s, %d ranks\n", m == 0 ? "shm" : "tcp", size);
            world w = worlds[m](size, &failing);
            test_failure(&w);
            free_world(&w);
            w = worlds[m](size, &warning);
            test_warning(&w);
            free_world(&w);
        }
    }
    puts("all stall tests passed");
    return 0;
}
