/*
 * mpi.c: a link over an MPI library's point-to-point messages.
 *
 * The library is met at run time: its functions come as addresses and its handles as numbers, so nothing here was built
 * for one library, and nothing needs one to be built. Between two ranks go, each with a tag of its own:
 *   messages  a frame, and its payload if that is short: into receives that are always posted;
 *   turns     an empty message from the receiver: one more piece's receive is posted;
 *   pieces    of longer payloads, straight from the sender's memory, each after its turn;
 *   goodbye   how many of the others there were.
 * So every piece finds its receive: what MPI holds of our memory ends by MPI's own progress, and can be
 * waited for.
 * A receiver posts pieces of the next frame before it may ask the sink where they belong; these pass through memory of
 * ours, so that the link never idles for the way there and back.
 * The n-th message of each half round is sent synchronously: no sender runs ahead of its receiver by more than a round.
 *
 * No descriptor tells of an arrival: the owner sleeps on a timer, longer the longer nothing has come.
 */
#define _GNU_SOURCE
#include "mpi_state.h"

#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define SPIN_S 100e-6       /* so long after the last event it is looked again at once */
#define BUSY_PAUSE_S 50e-6  /* the longest pause while something is on its way */
#define IDLE_PAUSE_S 2e-3   /* the longest pause: costs about 1 % of a core */
#define PAUSE_SHARE 0.25    /* of the time that nothing has come: what comes then waits little longer */

enum { WATCHED = 6 }; /* requests of a link that can be the next to end */

static mpi_link *mpi_of(cl_link *link)
{
    return (mpi_link *)link;
}

/* Looks at what is next to end in each order of each link. */
static void look(cl_mpi *mpi)
{
    mpi->looks++;
    for (mpi_link *l = mpi->links; l != NULL; l = l->next) {
        cl_mpi_watch(&mpi->calls, &l->in_requests[l->arrived % ROUND]);
        cl_mpi_watch(&mpi->calls, &l->out_requests[l->out_left % ROUND]);
        cl_mpi_watch(&mpi->calls, &l->turns_in[l->turns % AHEAD]);
        cl_mpi_watch(&mpi->calls, &l->piece_sends[l->left % AHEAD]);
        cl_mpi_watch(&mpi->calls, &l->pieces[l->taken % AHEAD].request);
        cl_mpi_watch(&mpi->calls, &l->last_in_request);
    }
    cl_mpi_look(&mpi->calls);
}

/* ---- failure ------------------------------------------------------------------------------------------------- */

void cl_mpi_fail(mpi_link *l, const char *reason)
{
    if (!l->failed)
        snprintf(l->reason, sizeof l->reason, "%s", reason);
    l->failed = true;
}

static void fail_with_error(mpi_link *l)
{
    char text[CL_MPI_ERROR_NBYTES], reason[REASON_NBYTES];
    cl_mpi_error_text(&l->mpi->calls, text);
    snprintf(reason, sizeof reason, "MPI reports an error: %.120s", text);
    cl_mpi_fail(l, reason);
}

/* Must be the caller's last deed: the sink may close the link. */
static void tell_lost(mpi_link *l)
{
    l->over = true;
    if (l->mpi->leader == l)
        l->mpi->leader = NULL; /* the next link that goes to sleep takes the timer */
    l->link.sink->lost(l->link.owner, &l->link, l->reason);
}

/* ---- sending ------------------------------------------------------------------------------------------------- */

static bool has_room(const mpi_link *l)
{
    return l->out_sent - l->out_left < ROUND && l->mpi->calls.error == 0;
}

static void send_message(mpi_link *l, const cl_frame *frame, const void *payload, size_t nbytes)
{
    const uint64_t index = l->out_sent % ROUND;
    mpi_message *message = &l->outbox[index];
    const bool synchronous = index % (ROUND / 2) == ROUND / 2 - 1;
    message->taken = l->taken;
    message->frame = *frame;
    if (nbytes > 0)
        memcpy(message->payload, payload, nbytes);
    const cl_mpi_library *library = &l->mpi->calls.library;
    cl_mpi_post(&l->mpi->calls, synchronous ? library->issend : library->isend, message,
                offsetof(mpi_message, payload) + nbytes, l->rank, l->out_tag + MESSAGE_TAG, &l->out_requests[index]);
    l->out_sent++;
    l->sent_lately = true;
    l->mpi->moved = true;
}

/* The last that is sent on this link, and no message: it must not wait for room. */
void cl_mpi_say_goodbye(mpi_link *l)
{
    if (l->parting)
        return;
    l->parting = true;
    l->last_out = (mpi_goodbye){.messages = l->out_sent, .pieces = l->given};
    cl_mpi_send_on(l, GOODBYE_TAG, &l->last_out, sizeof l->last_out, &l->last_out_request);
}

static mpi_large *large_at(mpi_link *l, uint64_t number)
{
    return &l->large[number % LARGE_FRAMES];
}

static int mpi_send(cl_link *link, const cl_frame *frame, const void *payload)
{
    mpi_link *l = mpi_of(link);
    if (frame->type == HEARTBEAT || (frame->nbytes > 0 && payload == NULL))
        return CL_INVALID;
    if (l->over)
        return CL_PEER_LOST;
    if (l->failed || l->parting || !has_room(l))
        return CL_AGAIN;
    if (frame->nbytes <= SHORT_NBYTES) {
        send_message(l, frame, payload, frame->nbytes);
        if (frame->nbytes > 0)
            link->sink->sent(link->owner, link, frame);
        return CL_OK;
    }
    if (l->large_taken - l->large_done == LARGE_FRAMES)
        return CL_AGAIN;
    *large_at(l, l->large_taken++) = (mpi_large){.frame = *frame, .payload = payload};
    send_message(l, frame, NULL, 0);
    return CL_OK;
}

/* A turn has come: the next piece goes. */
static void give_piece(mpi_link *l)
{
    mpi_large *large = large_at(l, l->large_fed);
    const uint64_t index = l->given % AHEAD;
    const size_t rest = large->frame.nbytes - large->given;
    const size_t nbytes = rest < PIECE_NBYTES ? rest : PIECE_NBYTES;
    cl_mpi_send_on(l, PIECE_TAG, large->payload + large->given, nbytes, &l->piece_sends[index]);
    l->piece_nbytes[index] = nbytes;
    large->given += nbytes;
    l->large_fed += large->given == large->frame.nbytes;
    l->given++;
    l->sent_lately = true;
}

static void piece_has_left(mpi_link *l)
{
    mpi_large *large = large_at(l, l->large_done);
    const uint64_t index = l->left++ % AHEAD;
    l->piece_sends[index].active = false;
    large->sent += l->piece_nbytes[index];
    if (large->sent < large->frame.nbytes)
        return;
    const mpi_large done = *large;
    l->large_done++;
    free(done.copy);
    if (!done.forgotten && !l->closed)
        l->link.sink->sent(l->link.owner, &l->link, &done.frame);
}

static int advance_sends(mpi_link *l)
{
    int events = 0;
    for (; cl_mpi_has_ended(&l->out_requests[l->out_left % ROUND]); l->out_left++, events++)
        l->out_requests[l->out_left % ROUND].active = false;
    for (; cl_mpi_has_ended(&l->piece_sends[l->left % AHEAD]); events++)
        piece_has_left(l);
    while (l->turns_in[l->turns % AHEAD].active && l->turns_in[l->turns % AHEAD].done && l->given - l->left < AHEAD &&
           l->large_fed < l->large_taken && !l->parting) {
        cl_mpi_request *turn = &l->turns_in[l->turns++ % AHEAD];
        cl_mpi_receive_on(l, TURN_TAG, NULL, 0, turn);
        give_piece(l);
        events++;
    }
    return events;
}

static int mpi_progress(cl_link *link)
{
    mpi_link *l = mpi_of(link);
    cl_mpi *mpi = l->mpi;
    if (l->over)
        return 0;
    if (l->seen_look == mpi->looks) /* one look serves all links of a round */
        look(mpi);
    l->seen_look = mpi->looks;
    int events = advance_sends(l) + cl_mpi_note_arrivals(l);
    events += cl_mpi_deliver(l);
    mpi->moved |= events > 0;
    if (mpi->calls.error != 0)
        fail_with_error(l);
    if (!l->failed)
        return events;
    tell_lost(l);
    return events + 1;
}

/* ---- sleeping ------------------------------------------------------------------------------------------------ */

static bool is_busy(const cl_mpi *mpi)
{
    for (const mpi_link *l = mpi->links; l != NULL; l = l->next)
        if (l->taken < l->posted || l->large_done < l->large_taken || l->out_left < l->out_sent)
            return true;
    return false;
}

static void set_timer(cl_mpi *mpi)
{
    const double now = cl_mpi_now_s();
    if (mpi->moved)
        mpi->idle_since_s = now;
    mpi->moved = false;
    const double idle_s = now - mpi->idle_since_s, longest_s = is_busy(mpi) ? BUSY_PAUSE_S : IDLE_PAUSE_S;
    double pause_s = idle_s < SPIN_S ? 0 : PAUSE_SHARE * idle_s;
    if (pause_s > longest_s)
        pause_s = longest_s;
    /* Also forgets that it rang; a time of 0 would switch it off. */
    const struct itimerspec when = {.it_value = {.tv_nsec = 1 + (long)(1e9 * pause_s)}};
    (void)timerfd_settime(mpi->timer, 0, &when, NULL);
}

static bool leads(mpi_link *l)
{
    if (l->mpi->leader == NULL && !l->over && !l->closed)
        l->mpi->leader = l;
    return l->mpi->leader == l;
}

static int mpi_arm(cl_link *link)
{
    mpi_link *l = mpi_of(link);
    if (l->over)
        return CL_OK;
    if (l->failed || l->mpi->calls.error != 0)
        return CL_AGAIN;
    if (leads(l))
        set_timer(l->mpi);
    return CL_OK;
}

static void mpi_disarm(cl_link *link)
{
    (void)link; /* the next arm() sets the timer anew */
}

static int mpi_pollfd(cl_link *link, uint32_t *events)
{
    mpi_link *l = mpi_of(link);
    *events = EPOLLIN;
    return leads(l) ? l->mpi->timer : -1;
}

/* ---- forgetting ---------------------------------------------------------------------------------------------- */

/* What MPI has got leaves first; the rest is copied. */
static void forget_large(mpi_link *l, mpi_large *large)
{
    large->forgotten = true;
    for (uint64_t p = l->left; p < l->given && large->given > large->sent; p++)
        cl_mpi_wait(&l->mpi->calls, &l->piece_sends[p % AHEAD], cl_mpi_longest_s(l));
    const size_t rest = large->frame.nbytes - large->given;
    if (rest == 0)
        return;
    large->copy = malloc(large->frame.nbytes);
    if (large->copy == NULL) {
        cl_mpi_fail(l, "out of memory for the rest of a message");
        cl_mpi_say_goodbye(l); /* no more is given to MPI */
        return;
    }
    memcpy(large->copy + large->given, large->payload + large->given, rest);
    large->payload = large->copy;
}

static void mpi_forget(cl_link *link, uint64_t key)
{
    mpi_link *l = mpi_of(link);
    for (uint64_t i = l->large_done; i < l->large_taken; i++) {
        mpi_large *large = large_at(l, i);
        if (large->frame.key == key && !large->forgotten)
            forget_large(l, large);
    }
    if (l->begun && l->place != NULL && l->frame.key == key)
        cl_mpi_forget_place(l);
}

/* ---- time ---------------------------------------------------------------------------------------------------- */

static void mpi_tick(cl_link *link, double time_s)
{
    mpi_link *l = mpi_of(link);
    if (l->over || l->failed)
        return;
    look(l->mpi); /* what came while this process itself was stopped is no silence */
    const bool piece_came = cl_mpi_has_ended(&l->pieces[l->taken % AHEAD].request);
    if (cl_mpi_note_arrivals(l) > 0 || l->received_lately || piece_came || !l->ticked)
        l->last_received_s = time_s;
    if (l->sent_lately || !l->ticked)
        l->last_sent_s = time_s;
    l->ticked = true;
    l->sent_lately = l->received_lately = false;
    if (time_s - l->last_received_s >= l->mpi->lost_s) {
        char reason[REASON_NBYTES];
        snprintf(reason, sizeof reason, "silent for %.1f s", time_s - l->last_received_s);
        cl_mpi_fail(l, reason);
        tell_lost(l);
    } else if (time_s - l->last_sent_s >= l->mpi->heartbeat_s && l->out_sent == l->out_left && !l->parting)
        send_message(l, &(cl_frame){.type = HEARTBEAT}, NULL, 0);
}

/* ---- ends ---------------------------------------------------------------------------------------------------- */

static size_t mpi_pending(const cl_link *link)
{
    const mpi_link *l = (const mpi_link *)link;
    size_t pending = (size_t)(l->out_sent - l->out_left);
    for (uint64_t i = l->large_done; i < l->large_taken; i++)
        pending += l->large[i % LARGE_FRAMES].frame.nbytes - l->large[i % LARGE_FRAMES].sent;
    return pending;
}

/* What MPI holds is ended by cl_mpi_free, for all links at once; memory of others is given up here. */
static void mpi_close(cl_link *link)
{
    mpi_link *l = mpi_of(link);
    l->closed = true;
    if (l->mpi->leader == l)
        l->mpi->leader = NULL;
    if (l->mpi->forked)
        return;
    if (l->begun && l->place != NULL)
        cl_mpi_forget_place(l);
    for (uint64_t i = l->large_done; i < l->large_taken; i++)
        if (large_at(l, i)->given > large_at(l, i)->sent)
            for (uint64_t p = l->left; p < l->given; p++)
                cl_mpi_wait(&l->mpi->calls, &l->piece_sends[p % AHEAD], cl_mpi_longest_s(l));
    cl_mpi_say_goodbye(l);
}

static void mpi_forked(cl_link *link)
{
    cl_mpi *mpi = mpi_of(link)->mpi;
    if (!mpi->forked)
        close(mpi->timer);
    mpi->forked = true;
}

/* After close: words are read away until the peer's last. True: nothing is on its way in either direction. */
static bool is_quiet(mpi_link *l)
{
    (void)advance_sends(l);
    (void)cl_mpi_note_arrivals(l);
    while (l->consumed < l->arrived)
        cl_mpi_consume(l);
    return cl_mpi_has_ended(&l->last_in_request) && l->consumed == l->last_in.messages && l->out_sent == l->out_left;
}

static bool all_are_quiet(cl_mpi *mpi)
{
    bool all = true;
    for (mpi_link *l = mpi->links; l != NULL; l = l->next)
        all &= is_quiet(l);
    return all;
}

/* A receive without a message ends at once when it is cancelled. */
static bool take_back(cl_mpi *mpi, cl_mpi_request *requests, size_t count, size_t stride, bool is_receive)
{
    bool all = true;
    for (size_t i = 0; i < count; i++) {
        cl_mpi_request *request = (cl_mpi_request *)((uint8_t *)requests + i * stride);
        if (is_receive)
            cl_mpi_begin_cancel(&mpi->calls, request);
        for (int looks = 0; looks < LAST_LOOKS && !cl_mpi_test(&mpi->calls, request); looks++)
            ;
        all &= cl_mpi_test(&mpi->calls, request);
    }
    return all && mpi->calls.error == 0;
}

/* False: MPI still holds memory of this link. */
static bool release(mpi_link *l)
{
    bool ended = take_back(l->mpi, l->in_requests, ROUND, sizeof(cl_mpi_request), true);
    ended &= take_back(l->mpi, l->turns_in, AHEAD, sizeof(cl_mpi_request), true);
    ended &= take_back(l->mpi, &l->pieces[0].request, AHEAD, sizeof(mpi_piece), true);
    ended &= take_back(l->mpi, &l->last_in_request, 1, sizeof(cl_mpi_request), true);
    ended &= take_back(l->mpi, &l->last_out_request, 1, sizeof(cl_mpi_request), false);
    ended &= take_back(l->mpi, l->turns_out, AHEAD, sizeof(cl_mpi_request), false);
    ended &= take_back(l->mpi, l->piece_sends, AHEAD, sizeof(cl_mpi_request), false);
    return ended & take_back(l->mpi, l->out_requests, ROUND, sizeof(cl_mpi_request), false);
}

static void free_link(mpi_link *l)
{
    for (uint64_t i = l->large_done; i < l->large_taken; i++)
        free(large_at(l, i)->copy);
    free(l->outbox);
    free(l->inbox);
    free(l->staging);
    free(l);
}

int cl_mpi_free(cl_mpi *mpi, int32_t linger_ms)
{
    const double end_s = cl_mpi_now_s() + 1e-3 * linger_ms;
    const struct timespec pause = {0, 20000};
    bool parted = false;
    if (mpi->forked)
        return CL_FORKED; /* the memory is a copy that ends with the process */
    look(mpi);
    while (!(parted = all_are_quiet(mpi)) && mpi->calls.error == 0 && cl_mpi_now_s() < end_s) {
        nanosleep(&pause, NULL);
        look(mpi);
    }
    for (mpi_link *l = mpi->links, *next; l != NULL; l = next) {
        next = l->next;
        if (release(l))
            free_link(l); /* else its memory is left to MPI */
        else
            parted = false;
    }
    close(mpi->timer);
    cl_mpi_calls_close(&mpi->calls);
    free(mpi);
    return parted ? CL_OK : CL_AGAIN;
}

const cl_transport cl_mpi_transport = {
    .name = "mpi",
    .send = mpi_send,
    .progress = mpi_progress,
    .arm = mpi_arm,
    .disarm = mpi_disarm,
    .pollfd = mpi_pollfd,
    .forget = mpi_forget,
    .pending = mpi_pending,
    .close = mpi_close,
    .forked = mpi_forked,
    .tick = mpi_tick,
};

/* ---- beginnings ---------------------------------------------------------------------------------------------- */

int cl_mpi_new(const cl_mpi_library *library, int32_t npeers, const cl_settings *settings, cl_mpi **out)
{
    cl_mpi *mpi = calloc(1, sizeof *mpi);
    if (mpi == NULL)
        return CL_NO_MEMORY;
    mpi->heartbeat_s = 1e-3 * settings->heartbeat_ms;
    mpi->lost_s = 1e-3 * settings->lost_ms;
    mpi->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int status = mpi->timer < 0 ? CL_SYSTEM : cl_mpi_calls_open(&mpi->calls, library, (size_t)npeers * WATCHED);
    if (status == CL_OK) {
        *out = mpi;
        return CL_OK;
    }
    if (mpi->timer >= 0)
        close(mpi->timer);
    free(mpi);
    return status;
}

int cl_mpi_link_new(cl_mpi *mpi, int rank, int out, int in, cl_link **link)
{
    mpi_link *l = calloc(1, sizeof *l);
    if (l == NULL)
        return CL_NO_MEMORY;
    l->outbox = malloc(ROUND * sizeof(mpi_message));
    l->inbox = malloc(ROUND * sizeof(mpi_message));
    l->staging = malloc((size_t)AHEAD * PIECE_NBYTES);
    if (l->outbox == NULL || l->inbox == NULL || l->staging == NULL) {
        free_link(l);
        return CL_NO_MEMORY;
    }
    l->link.transport = &cl_mpi_transport;
    l->link.window_nbytes = WINDOW_NBYTES;
    l->mpi = mpi;
    l->rank = rank;
    l->out_tag = out * TAGS;
    l->in_tag = in * TAGS;
    l->seen_look = mpi->looks;
    l->next = mpi->links;
    mpi->links = l;
    for (uint64_t i = 0; i < ROUND; i++)
        cl_mpi_post_inbox(l, i);
    for (size_t i = 0; i < AHEAD; i++)
        cl_mpi_receive_on(l, TURN_TAG, NULL, 0, &l->turns_in[i]);
    cl_mpi_receive_on(l, GOODBYE_TAG, &l->last_in, sizeof l->last_in, &l->last_in_request);
    *link = &l->link;
    return mpi->calls.error == 0 ? CL_OK : CL_SYSTEM;
}
