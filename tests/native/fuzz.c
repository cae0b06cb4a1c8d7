/*
 * fuzz.c: what the bytes of a fuzzer mean to an engine: operations to submit, frames that come in, time that passes.
 *
 * Whatever comes, the engine must stay in its own memory (build it with the sanitizers), must not wait, and once its peers have
 * hung up every operation must be done, with a status that there is and a rank to blame that there is.
 */
#include "fuzz.h"

#include <string.h>

enum { ROUNDS_PER_ACTION = 4, MOST_ROUNDS_AT_END = 10000, TEXT_NBYTES = 8, MOST_PROMISED_NBYTES = 1 << 17 };

/* A promise of gigabytes finds no memory, as it may on any machine; the sanitizer's own bookkeeping of it would take a second. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1:max_allocation_size_mb=64";
}

uint8_t fuzz_byte(fuzz_bytes *bytes)
{
    return bytes->at < bytes->end ? *bytes->at++ : 0;
}

uint64_t fuzz_number(fuzz_bytes *bytes)
{
    static const uint64_t absurd[] = {UINT16_MAX, INT32_MAX, UINT32_MAX, INT64_MAX, UINT64_MAX, UINT64_C(1) << 40,
                                      UINT64_MAX / 8, UINT64_MAX - 7};
    uint8_t first = fuzz_byte(bytes);
    uint64_t number = 0;
    if (first < 224)
        return first;
    if (first < 240)
        return absurd[first % 8];
    for (int i = 0; i < (first < 250 ? 2 : 8); i++)
        number = number << 8 | fuzz_byte(bytes);
    return number;
}

static double fuzz_clock(void *f)
{
    return ((fuzz *)f)->now_s;
}

/* ---- what is submitted ---------------------------------------------------------------------------------------- */

static bool takes_part(const fuzz *f, uint32_t number)
{
    return tasks_member(&f->p.tasks[number], f->rank) >= 0;
}

/* Its metadata is known once an engine has made it: one of a peer that submits the same, and has no links. */
static void learn_metas(fuzz *f)
{
    cl_engine *engines[FUZZ_RANKS] = {NULL};
    for (uint32_t n = 0; n < f->p.ntasks; n++) {
        const task *t = &f->p.tasks[n];
        int32_t other = t->members[t->nmembers - 1] == f->rank ? t->members[0] : t->members[t->nmembers - 1];
        if (other == f->rank)
            continue;
        if (engines[other] == NULL)
            CHECK(cl_engine_new(other, f->p.size, &f->settings, &engines[other]) == CL_OK);
        tasks_submit(&f->p, engines[other], other, n, &f->random);
        f->metas[n] = f->p.parts[other][n].operation->meta;
    }
    for (int32_t r = 0; r < f->p.size; r++)
        if (engines[r] != NULL)
            cl_engine_free(engines[r]);
}

static void submit(fuzz *f, uint32_t number)
{
    if (takes_part(f, number) && !f->p.parts[f->rank][number].submitted)
        tasks_submit(&f->p, f->engine, f->rank, number, &f->random);
}

static void begin(fuzz *f, const uint8_t *data, size_t nbytes)
{
    *f = (fuzz){.bytes = {data, data + nbytes}};
    uint8_t kind = fuzz_byte(&f->bytes);
    f->random = 1 + fuzz_byte(&f->bytes);
    for (int i = 0; i < 8; i++)
        next_random(&f->random);
    f->p.random = next_random(&f->random);
    f->p.size = 2 + kind % (FUZZ_RANKS - 1);
    f->rank = kind / 4 % f->p.size;
    f->settings = kind & 32 ? tiny_settings() : ordinary_settings();
    f->settings.lost_ms = 4; /* of real time, where a writer in shared memory is waited for */
    f->settings.heartbeat_ms = 1;
    f->settings.stall_warning_s = kind & 64 ? 1 : 0;
    f->settings.stall_shutdown_s = kind & 64 ? 3 : 0;
    tasks_draw(&f->p);
    learn_metas(f);
    CHECK(cl_engine_new(f->rank, f->p.size, &f->settings, &f->engine) == CL_OK);
    f->engine->clock = fuzz_clock;
    f->engine->clock_argument = f;
    for (uint32_t n = 0; kind & 128 && n < f->p.ntasks; n++)
        submit(f, n);
}

/* ---- what peers say ------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *data;
    size_t nbytes;
} written;

static void put(written *to, const void *data, size_t nbytes)
{
    size_t left = FUZZ_PAYLOAD_NBYTES - to->nbytes;
    nbytes = nbytes < left ? nbytes : left;
    memcpy(to->data + to->nbytes, data, nbytes);
    to->nbytes += nbytes;
}

/* How many sizes a member tells the others; mostly as many as it should. */
static uint32_t count_splits(fuzz *f, uint32_t number)
{
    const task *t = &f->p.tasks[number];
    uint8_t choice = fuzz_byte(&f->bytes);
    return choice >= 224 ? choice % 6 : t->form == SHUFFLE ? (uint32_t)t->nmembers : t->form == GATHER || t->form == TICKET;
}

/* Entries of an exchange on their way up, as control.c packs them. */
static void put_entries(fuzz *f, uint32_t number, written *to)
{
    for (int left = 1 + fuzz_byte(&f->bytes) % 4; left > 0; left--) {
        struct {
            int32_t index;
            uint32_t nbytes, text_nbytes;
            cl_meta meta;
        } header = {.index = fuzz_byte(&f->bytes), .meta = f->metas[number]};
        size_t at = to->nbytes, first = at + sizeof header;
        header.index = header.index < 240 ? header.index % (FUZZ_RANKS + 1) : (int32_t)fuzz_number(&f->bytes);
        if (fuzz_byte(&f->bytes) % 16 == 15)
            ((uint8_t *)&header.meta)[fuzz_byte(&f->bytes) % sizeof header.meta] ^= 1;
        put(to, &header, sizeof header);
        for (uint32_t splits = count_splits(f, number); splits > 0; splits--) {
            uint64_t split = fuzz_number(&f->bytes);
            put(to, &split, sizeof split);
        }
        header.nbytes = to->nbytes > first ? (uint32_t)(to->nbytes - first) : 0;
        if (fuzz_byte(&f->bytes) >= 240) { /* it says something else */
            header.nbytes = (uint32_t)fuzz_number(&f->bytes);
            header.text_nbytes = (uint32_t)fuzz_number(&f->bytes);
        }
        if (first <= to->nbytes)
            memcpy(to->data + at, &header, sizeof header);
    }
}

/* All entries on their way down: a length and the bytes of each member. */
static void put_all_entries(fuzz *f, uint32_t number, written *to)
{
    int32_t members = f->p.tasks[number].nmembers + fuzz_byte(&f->bytes) % 8 / 7;
    for (int32_t m = 0; m < members; m++) {
        uint32_t splits = count_splits(f, number), nbytes = splits * 8;
        if (fuzz_byte(&f->bytes) >= 240)
            nbytes = (uint32_t)fuzz_number(&f->bytes);
        put(to, &nbytes, sizeof nbytes);
        for (; splits > 0; splits--) {
            uint64_t split = fuzz_number(&f->bytes);
            put(to, &split, sizeof split);
        }
    }
}

/* An operation that a rank which has joined is told of, as join.c packs it. */
static void put_announcement(fuzz *f, uint32_t number, written *to)
{
    const task *t = &f->p.tasks[number];
    int32_t words[4] = {(int32_t)fuzz_number(&f->bytes), t->dtype, t->reduction, (int32_t)fuzz_number(&f->bytes)};
    uint64_t numbers[6] = {fuzz_number(&f->bytes), 0, 0, 0, fuzz_number(&f->bytes), fuzz_number(&f->bytes)};
    int32_t members[FUZZ_RANKS] = {0};
    uint32_t tail[4] = {0, (uint32_t)fuzz_byte(&f->bytes) % (FUZZ_RANKS + 1), TEXT_NBYTES, 0};
    for (uint32_t m = 0; m < tail[1] && m < FUZZ_RANKS; m++)
        members[m] = (int32_t)fuzz_number(&f->bytes);
    if (fuzz_byte(&f->bytes) % 8 == 7)
        tail[fuzz_byte(&f->bytes) % 4] = (uint32_t)fuzz_number(&f->bytes);
    put(to, words, sizeof words);
    put(to, numbers, sizeof numbers);
    put(to, tail, sizeof tail);
    put(to, members, tail[1] % (FUZZ_RANKS + 1) * sizeof members[0]);
    put(to, "a text..", TEXT_NBYTES);
}

static void put_bytes(fuzz *f, uint32_t number, written *to)
{
    (void)number;
    for (int left = fuzz_byte(&f->bytes); left > 0; left--) {
        uint8_t byte = fuzz_byte(&f->bytes);
        put(to, &byte, 1);
    }
}

/* As long as a step's payload may be; what it says does not matter. */
static void put_data(fuzz *f, uint32_t number, written *to)
{
    static const uint8_t zeros[FUZZ_PAYLOAD_NBYTES];
    size_t width = cl_dtype_nbytes(f->p.tasks[number].dtype), count = fuzz_number(&f->bytes);
    put(to, zeros, count > FUZZ_PAYLOAD_NBYTES ? f->p.tasks[number].count * width : count * width);
}

/* What step the receiver wants next, and how long it is: else nearly nothing would ever be right. */
static bool is_wanted(const fuzz *f, int32_t peer, uint32_t number, cl_frame *frame, uint8_t choice)
{
    const cl_operation *operation = f->p.parts[f->rank][number].operation;
    const cl_plan *plan = operation == NULL ? NULL : operation->plan;
    for (uint32_t i = 0; plan != NULL && i < plan->nsteps && operation->started; i++) {
        uint64_t first, count;
        if (plan->steps[i].peer != peer || plan->steps[i].kind == CL_SEND || i < choice % plan->nsteps)
            continue;
        frame->segment = choice % operation->nsegments;
        frame->step = plan->pair_index[i];
        cl_chunks_of(operation, frame->segment, &plan->steps[i], &first, &count);
        frame->nbytes = (uint32_t)(count * cl_dtype_nbytes(operation->request.dtype));
        return frame->nbytes <= FUZZ_PAYLOAD_NBYTES;
    }
    return false;
}

static void say(const fuzz_links *links, fuzz *f, int32_t peer)
{
    static void (*const puts[])(fuzz *, uint32_t, written *) = {put_bytes, put_entries, put_all_entries, put_announcement,
                                                                put_data};
    static const uint8_t likely[CL_FRAME_BYE + 1] = {
        [CL_FRAME_EXCHANGE_UP] = 1, [CL_FRAME_EXCHANGE_DOWN] = 2, [CL_FRAME_ANNOUNCE] = 3, [CL_FRAME_DATA] = 4};
    uint8_t how = fuzz_byte(&f->bytes);
    uint32_t number = fuzz_byte(&f->bytes) % f->p.ntasks;
    cl_frame frame = {.key = number + 1, .type = fuzz_byte(&f->bytes), .flags = fuzz_byte(&f->bytes), .meta = f->metas[number]};
    written text = {f->payload, 0};
    if (frame.type < 240)
        frame.type = 1 + frame.type % CL_FRAME_BYE;
    if (frame.flags < 240)
        frame.flags &= CL_FLAG_EAGER | CL_FLAG_WANT | CL_FRAME_LENDS;
    bool wanted = frame.type == CL_FRAME_DATA && how & 1 && is_wanted(f, peer, number, &frame, fuzz_byte(&f->bytes));
    if (wanted) {
        memset(f->payload, 0, text.nbytes = frame.nbytes);
    } else {
        frame.segment = (uint32_t)fuzz_number(&f->bytes);
        frame.step = (uint32_t)fuzz_number(&f->bytes);
        frame.arg = fuzz_number(&f->bytes);
        puts[frame.type > CL_FRAME_BYE || how & 2 ? fuzz_byte(&f->bytes) % 5 : likely[frame.type]](f, number, &text);
        frame.nbytes = (uint32_t)text.nbytes;
    }
    if ((how & 6) == 6)
        frame.key = fuzz_number(&f->bytes);
    if (how & 8)
        ((uint8_t *)&frame.meta)[fuzz_byte(&f->bytes) % sizeof frame.meta] ^= 1;
    if ((how & 0x18) == 0x18) /* a promise that is not kept; a long one makes the sanitizers slow */
        frame.nbytes = (uint32_t)(fuzz_number(&f->bytes) % (how & 32 ? UINT32_MAX : MOST_PROMISED_NBYTES));
    links->say(f, peer, &frame, text.data, text.nbytes);
}

/* ---- what the engine's own caller does ------------------------------------------------------------------------- */

static void open_gate(fuzz *f, uint32_t number)
{
    const part *mine = &f->p.parts[f->rank][number];
    uint32_t segment = fuzz_byte(&f->bytes);
    if (mine->operation != NULL && mine->gated && segment < mine->nsegments)
        CHECK(cl_operation_ready(mine->operation, segment, segment + 1) == CL_OK);
}

static void take_tickets(fuzz *f)
{
    while (f->ntickets < 8 && cl_ticket_next(f->engine, 0, &f->tickets[f->ntickets]) == CL_OK) {
        const cl_ticket *ticket = &f->tickets[f->ntickets++];
        uint64_t sum = 0; /* all of them are there to be read */
        for (uint64_t i = 0; i < ticket->nsplits; i++)
            sum += ticket->splits[i];
        CHECK(ticket->nsplits <= f->p.size * 64u + (sum & 1));
    }
}

static void return_ticket(fuzz *f)
{
    if (f->ntickets > 0)
        cl_ticket_return(&f->tickets[--f->ntickets]);
}

/* Joins, and does with what it is told what the library does: refuses, or looks at it and lets it be. */
static void join(fuzz *f)
{
    cl_announced *told = NULL;
    int32_t last;
    (void)cl_join(f->engine);
    for (int left = 4; left > 0 && cl_join_next(f->engine, 0, &told, &last) == CL_OK; left--) {
        if (told == NULL) {
            (void)cl_join_end(f->engine);
            return;
        }
        CHECK(strlen(told->request.text) < FUZZ_PAYLOAD_NBYTES && told->from >= 0 && told->from < f->p.size);
        if (fuzz_byte(&f->bytes) & 1)
            CHECK(cl_join_refuse(f->engine, told, "no") != CL_INVALID);
        cl_announced_free(told);
    }
}

static void hear_stalls(fuzz *f)
{
    char text[CL_REPORT_NBYTES];
    f->now_s += 0.25 * (1 + fuzz_byte(&f->bytes) % 16);
    cl_stall_look(f->engine, f->now_s);
    (void)cl_stall_next(f->engine, 0, text, sizeof text);
}

static void progress(fuzz *f, int rounds)
{
    while (rounds-- > 0 && cl_engine_progress(f->engine) > 0)
        ;
}

static bool is_over(const fuzz *f, uint32_t number)
{
    const part *mine = &f->p.parts[f->rank][number];
    return mine->operation == NULL || cl_operation_done(mine->operation);
}

/* The caller's memory is his again, and is gone. */
static void end_task(fuzz *f, uint32_t number)
{
    part *mine = &f->p.parts[f->rank][number];
    const char *text;
    int32_t blamed;
    if (mine->operation == NULL || mine->times_done > 0)
        return;
    int status = cl_operation_status(mine->operation, &text, &blamed);
    CHECK(status != CL_AGAIN && status >= 0 && status < CL_STATUS_END && text != NULL && blamed >= -1 && blamed < f->p.size);
    if (status == CL_OK) { /* what it says it has can be read */
        void *result;
        uint64_t count;
        const uint64_t *counts;
        CHECK(cl_operation_result(mine->operation, &result, &count, &counts) == CL_OK);
        volatile uint8_t sum = 0;
        for (size_t i = 0; result != NULL && i < count * cl_dtype_nbytes(f->p.tasks[number].dtype); i++)
            sum = (uint8_t)(sum + ((const uint8_t *)result)[i]);
    }
    mine->times_done = 1;
    tasks_end(&f->p, f->rank, number);
}

static void end_tasks(fuzz *f)
{
    for (uint32_t n = 0; n < f->p.ntasks; n++)
        if (is_over(f, n))
            end_task(f, n);
}

/* ---- a run ---------------------------------------------------------------------------------------------------- */

static void act(const fuzz_links *links, fuzz *f)
{
    uint8_t action = fuzz_byte(&f->bytes);
    uint32_t number = action / 16 % f->p.ntasks;
    int32_t peer = (f->rank + 1 + action / 16 % (f->p.size - 1)) % f->p.size;
    switch (action % 16) {
    case 0: submit(f, fuzz_byte(&f->bytes) % f->p.ntasks); break;
    case 1: open_gate(f, number); break;
    case 2: take_tickets(f); break;
    case 3: return_ticket(f); break;
    case 4: hear_stalls(f); break;
    case 5: join(f); break;
    case 6: end_tasks(f); break;
    case 7:
        f->now_s += 1e-3;
        cl_engine_tick(f->engine);
        break;
    case 8:
        if (action >= 0xe0)
            links->hang_up(f, peer);
        break;
    case 9:
    case 10: links->act(f, peer); break;
    default: say(links, f, peer);
    }
    if (action < 0xf0)
        progress(f, ROUNDS_PER_ACTION);
}

static void end(const fuzz_links *links, fuzz *f)
{
    for (int32_t peer = 0; peer < f->p.size; peer++)
        if (peer != f->rank)
            links->hang_up(f, peer);
    progress(f, MOST_ROUNDS_AT_END);
    for (uint32_t n = 0; n < f->p.ntasks; n++) {
        bool alone = f->p.tasks[n].nmembers == 1; /* it may wait for its own gates */
        CHECK(is_over(f, n) || alone || f->p.tasks[n].form == TICKET);
    }
    CHECK(cl_engine_shutdown(f->engine, 0) == CL_OK);
    while (f->ntickets > 0)
        return_ticket(f);
    end_tasks(f);
    cl_engine_free(f->engine);
    tasks_free(&f->p);
    links->end(f);
}

void fuzz_run(const fuzz_links *links, const uint8_t *data, size_t nbytes)
{
    static fuzz f;
    begin(&f, data, nbytes);
    links->link(&f);
    while (f.bytes.at < f.bytes.end)
        act(links, &f);
    end(links, &f);
}
