/*
 * stall.c: who waits for whom: operations that some rank has not submitted, found by asking, told to people, failed in the end.
 *
 * Nobody asks while all is well. A rank whose operation has waited for too long asks all its members; what is answered is
 * exact, as no rank can finish an operation before all have submitted it: a member that knows the key as posted or done has
 * submitted it, and if one is done with it, all have. Of several that ask at once the lowest rank reports.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "lock.h"

/* Reports that nobody has fetched; more would say the same of further operations. */
enum { MOST_REPORTS = 64 };

/* Four looks per limit: an operation is reported by a quarter of it late at most. */
enum { LOOKS_PER_LIMIT = 4 };

enum { OTHERS_NBYTES = 320 };

typedef enum {
    ANSWER_NONE = 0, /* asked, and silent so far */
    ANSWER_ABSENT,   /* has not submitted it */
    ANSWER_SUBMITTED,
    ANSWER_DONE,     /* it is over there, well or not */
    ANSWER_END
} answer;

struct cl_stall {
    double next_report_s;   /* not before: this rank reported it, or another did */
    double report_after_s;  /* the time between reports, which doubles: logs are not flooded */
    double shutdown_s;      /* when to fail it, if some have not submitted it then */
    double asked_s;
    bool asking;            /* answers are awaited */
    bool all_came;          /* it is only slow */
    uint32_t awaited;
    uint32_t nothers;       /* of `others`: whose words have been added */
    char others[OTHERS_NBYTES]; /* what absent members wait for, in words */
    uint8_t answers[];      /* per member */
};

static int32_t count_members(const cl_operation *operation)
{
    const cl_request *r = &operation->request;
    return r->listeners != NULL ? r->nlisteners : r->members != NULL ? r->nmembers : operation->engine->size;
}

static int32_t member(const cl_operation *operation, int32_t index)
{
    const cl_request *r = &operation->request;
    return r->listeners != NULL ? r->listeners[index] : r->members != NULL ? r->members[index] : index;
}

static double shortest_limit_s(const cl_settings *s)
{
    if (s->stall_warning_s == 0 || s->stall_shutdown_s == 0)
        return s->stall_warning_s + s->stall_shutdown_s;
    return s->stall_warning_s < s->stall_shutdown_s ? s->stall_warning_s : s->stall_shutdown_s;
}

double cl_stall_period_s(const cl_engine *engine)
{
    return engine->size == 1 ? 0 : shortest_limit_s(&engine->settings) / LOOKS_PER_LIMIT;
}

/* ---- reports ------------------------------------------------------------------------------------------------- */

static void report(cl_engine *engine, const char *text)
{
    cl_stalls *stalls = &engine->stalls;
    if (atomic_load_explicit(&stalls->nreports, memory_order_relaxed) >= MOST_REPORTS)
        return;
    cl_report *new = malloc(sizeof(cl_report)); /* without memory there are worse things to tell */
    if (new == NULL)
        return;
    snprintf(new->text, sizeof new->text, "%s", text);
    atomic_fetch_add(&stalls->nreports, 1);
    new->next = atomic_load_explicit(&stalls->reports, memory_order_relaxed);
    while (!atomic_compare_exchange_weak(&stalls->reports, &new->next, new))
        ;
    cl_futex_wake(&stalls->events);
}

static cl_report *oldest_report(cl_stalls *stalls)
{
    if (stalls->taken == NULL) { /* newest first: turned round */
        cl_report *newest = atomic_exchange(&stalls->reports, NULL);
        while (newest != NULL) {
            cl_report *next = newest->next;
            newest->next = stalls->taken;
            stalls->taken = newest;
            newest = next;
        }
    }
    cl_report *first = stalls->taken;
    if (first != NULL) {
        stalls->taken = first->next;
        atomic_fetch_sub(&stalls->nreports, 1);
    }
    return first;
}

int cl_stall_next(cl_engine *engine, int32_t timeout_ms, char *text, uint32_t nbytes)
{
    cl_stalls *stalls = &engine->stalls;
    double deadline_s = cl_engine_now(engine) + 1e-3 * timeout_ms;
    for (;;) {
        int seen = atomic_load(&stalls->events);
        cl_report *first = oldest_report(stalls);
        if (first != NULL) {
            snprintf(text, nbytes, "%s", first->text);
            free(first);
            return CL_OK;
        }
        int closed = atomic_load(&stalls->closed);
        double left_s = deadline_s - cl_engine_now(engine);
        if (closed != CL_OK || left_s <= 0)
            return closed != CL_OK ? closed : CL_AGAIN;
        cl_futex_wait(&stalls->events, seen, left_s);
    }
}

void cl_stall_close(cl_engine *engine, int status)
{
    atomic_store(&engine->stalls.closed, status);
    cl_futex_wake(&engine->stalls.events);
}

void cl_stall_free(cl_engine *engine)
{
    for (cl_report *first; (first = oldest_report(&engine->stalls)) != NULL;)
        free(first);
}

/* ---- words --------------------------------------------------------------------------------------------------- */

typedef struct {
    char *text;
    size_t nbytes, used;
} words;

__attribute__((format(printf, 2, 3))) static void say(words *to, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(to->text + to->used, to->nbytes - to->used, format, arguments);
    va_end(arguments);
    size_t left = to->nbytes - to->used - 1;
    to->used += length < 0 ? 0 : (size_t)length < left ? (size_t)length : left;
}

static bool gave(const cl_operation *operation, int32_t index, answer from, answer to)
{
    return operation->stall->answers[index] >= from && operation->stall->answers[index] <= to;
}

/* "rank 2", "ranks 0-5, 7": members with an answer in [from, to]. Members of groups may stand in any order. */
static void say_ranks(words *to, const cl_operation *operation, answer from, answer until)
{
    int32_t count = count_members(operation), given = 0;
    for (int32_t i = 0; i < count; i++)
        given += gave(operation, i, from, until);
    say(to, given == 1 ? "rank" : "ranks");
    for (int32_t i = 0, said = 0; i < count; i++) {
        if (!gave(operation, i, from, until))
            continue;
        int32_t end = i;
        while (end + 1 < count && gave(operation, end + 1, from, until) && member(operation, end + 1) == member(operation, end) + 1)
            end++;
        say(to, said++ == 0 ? " %d" : ", %d", member(operation, i));
        if (end > i)
            say(to, end == i + 1 ? ", %d" : "-%d", member(operation, end));
        i = end;
    }
}

static uint32_t count_of(const cl_operation *operation, answer wanted)
{
    uint32_t count = 0;
    for (int32_t i = 0; i < count_members(operation); i++)
        count += operation->stall->answers[i] == wanted;
    return count;
}

/* Who is missing, who is not, and what the missing do instead. */
static void describe(words *to, const cl_operation *operation, double age_s)
{
    uint32_t absent = count_of(operation, ANSWER_ABSENT), silent = count_of(operation, ANSWER_NONE);
    say_ranks(to, operation, ANSWER_SUBMITTED, ANSWER_DONE);
    say(to, " submitted it (rank %d %.3g s ago)", operation->engine->rank, age_s);
    if (absent > 0) {
        say(to, ", but ");
        say_ranks(to, operation, ANSWER_ABSENT, ANSWER_ABSENT);
        say(to, " did not");
    }
    if (silent > 0) {
        say(to, absent > 0 ? ", and " : ", but ");
        say_ranks(to, operation, ANSWER_NONE, ANSWER_NONE);
        say(to, silent > 1 ? " do not answer (stopped, or swapping?)" : " does not answer (stopped, or swapping?)");
    }
    say(to, "%s", operation->stall->others);
}

static void warn(cl_operation *operation, double age_s, bool is_missing)
{
    char text[CL_REPORT_NBYTES];
    words to = {text, sizeof text, 0};
    if (is_missing) {
        say(&to, "%s waits: ", operation->request.text);
        describe(&to, operation, age_s);
        say(&to, ". Every rank must submit the same operations");
    } else {
        say(&to, "%s has been under way for %.3g s: all its ranks have submitted it, and its bytes are still to arrive",
            operation->request.text, age_s);
    }
    report(operation->engine, text);
}

static void give_up(cl_operation *operation, double age_s)
{
    char text[CL_ERROR_NBYTES];
    words to = {text, sizeof text, 0};
    int32_t missing = 0;
    while (gave(operation, missing, ANSWER_SUBMITTED, ANSWER_DONE))
        missing++;
    describe(&to, operation, age_s);
    say(&to, "; stall_shutdown_s is %g", operation->engine->settings.stall_shutdown_s);
    cl_control_fail_everywhere(operation, CL_STALLED, member(operation, missing), text);
}

/* ---- asking -------------------------------------------------------------------------------------------------- */

/* All have answered, or have had the time to. May fail the operation. */
static void judge(cl_operation *operation, double now_s)
{
    cl_stall *stall = operation->stall;
    const cl_settings *settings = &operation->engine->settings;
    double age_s = now_s - operation->submitted_s;
    bool is_missing = count_of(operation, ANSWER_DONE) == 0 &&
                      count_of(operation, ANSWER_ABSENT) + count_of(operation, ANSWER_NONE) > 0;
    stall->asking = false;
    stall->all_came = !is_missing;
    if (now_s >= stall->next_report_s) {
        warn(operation, age_s, is_missing);
        stall->next_report_s = now_s + stall->report_after_s;
        stall->report_after_s *= 2;
    }
    if (now_s < stall->shutdown_s)
        return;
    stall->shutdown_s = now_s + settings->stall_shutdown_s;
    if (is_missing)
        give_up(operation, age_s);
}

static double limit_after(double limit_s)
{
    return limit_s > 0 ? limit_s : CL_NEVER_S;
}

static int make_stall(cl_operation *operation)
{
    const cl_settings *settings = &operation->engine->settings;
    if (operation->stall != NULL)
        return CL_OK;
    cl_stall *stall = operation->stall = calloc(1, sizeof(cl_stall) + (size_t)count_members(operation));
    if (stall == NULL)
        return CL_NO_MEMORY;
    stall->report_after_s = limit_after(settings->stall_warning_s);
    stall->next_report_s = operation->submitted_s + stall->report_after_s;
    stall->shutdown_s = operation->submitted_s + limit_after(settings->stall_shutdown_s);
    return CL_OK;
}

static void ask(cl_operation *operation, double now_s)
{
    cl_engine *engine = operation->engine;
    cl_stall *stall = operation->stall;
    int32_t count = count_members(operation);
    stall->asking = true;
    stall->asked_s = now_s;
    stall->awaited = stall->nothers = 0;
    stall->others[0] = 0;
    memset(stall->answers, ANSWER_NONE, (size_t)count);
    cl_frame frame = {.key = operation->request.key, .type = CL_FRAME_QUERY, .flags = CL_FRAME_WAKES};
    for (int32_t i = 0; i < count; i++) {
        int32_t rank = member(operation, i);
        if (rank == engine->rank)
            stall->answers[i] = ANSWER_SUBMITTED;
        else if (engine->peers[rank].link != NULL && !engine->peers[rank].lost) {
            stall->awaited++;
            cl_engine_tell(engine, rank, &frame, NULL);
        }
    }
    if (stall->awaited == 0)
        judge(operation, now_s);
}

/* When this operation is to be looked at next. */
static double due_s(const cl_operation *operation)
{
    const cl_settings *settings = &operation->engine->settings;
    const cl_stall *stall = operation->stall;
    if (stall == NULL)
        return operation->submitted_s + shortest_limit_s(settings);
    if (stall->asking)
        return stall->asked_s + cl_stall_period_s(operation->engine);
    return stall->next_report_s < stall->shutdown_s ? stall->next_report_s : stall->shutdown_s;
}

double cl_stall_due_s(const cl_engine *engine)
{
    double first_s = CL_NEVER_S;
    bool looks = cl_stall_period_s(engine) > 0 && engine->health == CL_OK && !engine->leaving;
    for (const cl_operation *operation = engine->first; looks && operation != NULL; operation = operation->next) {
        bool ends = operation->stall == NULL || operation->stall->asking ||
                    (engine->settings.stall_shutdown_s > 0 && !operation->stall->all_came);
        if (ends && due_s(operation) < first_s)
            first_s = due_s(operation);
    }
    return first_s;
}

static bool is_over(const cl_operation *operation)
{
    return atomic_load_explicit(&operation->done, memory_order_relaxed);
}

void cl_stall_look(cl_engine *engine, double now_s)
{
    if (cl_stall_period_s(engine) <= 0 || engine->leaving)
        return;
    for (cl_operation *operation = engine->first, *next; operation != NULL && engine->health == CL_OK; operation = next) {
        cl_operation_hold(operation);
        if (now_s >= due_s(operation) && make_stall(operation) == CL_OK)
            (operation->stall->asking ? judge : ask)(operation, now_s);
        /* Failing one may have ended others: the rest is looked at the next time. */
        next = is_over(operation) ? NULL : operation->next;
        cl_operation_release(operation);
    }
}

/* ---- what peers say ------------------------------------------------------------------------------------------ */

static answer answer_to(const cl_engine *engine, uint64_t key, const cl_operation *operation)
{
    if (operation != NULL)
        return ANSWER_SUBMITTED;
    if (cl_table_get(&engine->failed, key) != NULL)
        return ANSWER_DONE;
    for (uint32_t i = 0; i < CL_DONE_KEYS; i++)
        if (engine->done_keys[i] == key)
            return ANSWER_DONE;
    return ANSWER_ABSENT;
}

/* What this rank itself has waited for longest. */
static const cl_operation *oldest(const cl_engine *engine, uint64_t *count)
{
    const cl_operation *last = engine->first;
    *count = 0;
    for (const cl_operation *operation = engine->first; operation != NULL; operation = operation->next) {
        (*count)++;
        if (operation->sequence < last->sequence)
            last = operation;
    }
    return last;
}

void cl_stall_on_query(cl_engine *engine, int32_t peer, const cl_frame *frame)
{
    cl_operation *operation = cl_engine_find(engine, frame->key);
    cl_frame reply = {.key = frame->key, .type = CL_FRAME_ANSWER, .flags = CL_FRAME_WAKES};
    reply.step = (uint32_t)answer_to(engine, frame->key, operation);
    const cl_operation *waits_for = reply.step == ANSWER_ABSENT ? oldest(engine, &reply.arg) : NULL;
    if (waits_for != NULL)
        reply.nbytes = (uint32_t)strlen(waits_for->request.text);
    cl_engine_tell(engine, peer, &reply, waits_for != NULL ? waits_for->request.text : NULL);
    bool mine = operation != NULL && operation->stall != NULL && operation->stall->asking && engine->rank < peer;
    if (operation == NULL || mine || make_stall(operation) != CL_OK)
        return;
    double quiet_s = cl_engine_now(engine) + operation->stall->report_after_s; /* it is the peer's to report */
    if (operation->stall->next_report_s < quiet_s)
        operation->stall->next_report_s = quiet_s;
}

static void note_others(cl_operation *operation, int32_t peer, const char *text, uint64_t count)
{
    cl_stall *stall = operation->stall;
    words to = {stall->others, sizeof stall->others, strlen(stall->others)};
    if (stall->nothers++ >= 2)
        return; /* two say enough: a report is to be read */
    if (text == NULL)
        say(&to, "; rank %d waits for nothing", peer);
    else
        say(&to, count > 1 ? "; rank %d waits for %s and %llu more" : "; rank %d waits for %s", peer, text,
            (unsigned long long)count - 1);
}

void cl_stall_on_answer(cl_engine *engine, int32_t peer, const cl_frame *frame, const char *text)
{
    cl_operation *operation = cl_engine_find(engine, frame->key);
    if (operation == NULL || operation->stall == NULL || !operation->stall->asking || frame->step >= ANSWER_END)
        return;
    cl_stall *stall = operation->stall;
    for (int32_t i = 0; i < count_members(operation); i++) {
        if (member(operation, i) != peer || stall->answers[i] != ANSWER_NONE || frame->step == ANSWER_NONE)
            continue;
        stall->answers[i] = (uint8_t)frame->step;
        if (frame->step == ANSWER_ABSENT)
            note_others(operation, peer, text, frame->arg);
        if (--stall->awaited > 0)
            return;
        cl_operation_hold(operation);
        judge(operation, cl_engine_now(engine));
        cl_operation_release(operation);
        return;
    }
}
