/*
 * mpi_receive.c: what comes in over a link of mpi.c: messages into their round, pieces of payloads to their places.
 *
 * Frames are handed over one after the other; pieces are posted further ahead, as soon as the message that announces
 * them has come.
 */
#include <string.h>

#include "mpi_state.h"

/* ---- receiving ----------------------------------------------------------------------------------------------- */

void cl_mpi_post_inbox(mpi_link *l, uint64_t number)
{
    const uint64_t index = number % ROUND;
    cl_mpi_receive_on(l, MESSAGE_TAG, &l->inbox[index], sizeof(mpi_message), &l->in_requests[index]);
}

int cl_mpi_note_arrivals(mpi_link *l)
{
    int events = 0;
    for (; cl_mpi_has_ended(&l->in_requests[l->arrived % ROUND]); l->arrived++, events++)
        l->in_requests[l->arrived % ROUND].active = false;
    l->received_lately |= events > 0;
    return events;
}

static uint8_t *staging_of(const mpi_link *l, uint64_t number)
{
    return l->staging + number % AHEAD * PIECE_NBYTES;
}

static void receive_piece(mpi_link *l, uint64_t number, uint8_t *to)
{
    mpi_piece *piece = &l->pieces[number % AHEAD];
    piece->from = to;
    cl_mpi_receive_on(l, PIECE_TAG, to, piece->nbytes, &piece->request);
}

/* Posts the next pieces of what was announced, also of frames that have not begun. */
static void post_pieces(mpi_link *l)
{
    while (l->posted - l->taken < AHEAD && l->mpi->calls.error == 0) {
        const cl_frame *frame = &l->inbox[l->cursor % ROUND].frame;
        if (l->cursor == l->arrived)
            return;
        if (frame->nbytes <= SHORT_NBYTES || l->cursor_offset == frame->nbytes) {
            l->cursor++;
            l->cursor_offset = 0;
            continue;
        }
        cl_mpi_request *turn = &l->turns_out[l->posted % AHEAD];
        if (!cl_mpi_test(&l->mpi->calls, turn))
            return; /* the word for the piece before has not left */
        mpi_piece *piece = &l->pieces[l->posted % AHEAD];
        const size_t rest = frame->nbytes - l->cursor_offset;
        piece->nbytes = rest < PIECE_NBYTES ? rest : PIECE_NBYTES;
        piece->placed = l->cursor == l->consumed && l->begun && l->place != NULL;
        receive_piece(l, l->posted, piece->placed ? l->place + l->cursor_offset : staging_of(l, l->posted));
        cl_mpi_send_on(l, TURN_TAG, NULL, 0, turn);
        l->cursor_offset += piece->nbytes;
        l->posted++;
    }
}

/* Hands over bytes of the frame that has begun; they lie at `from`, which may be in the place. */
static void hand_over(mpi_link *l, const uint8_t *from, size_t nbytes, bool placed)
{
    const size_t offset = l->told;
    if (l->place != NULL && !placed) {
        memcpy(l->place + offset, from, nbytes);
        from = l->place + offset;
    }
    l->told += nbytes;
    l->link.sink->piece(l->link.owner, &l->link, &l->frame, offset, from, nbytes);
}

static int take_pieces(mpi_link *l)
{
    int events = 0;
    while (l->told < l->frame.nbytes && cl_mpi_has_ended(&l->pieces[l->taken % AHEAD].request)) {
        mpi_piece *piece = &l->pieces[l->taken++ % AHEAD];
        piece->request.active = false;
        l->received_lately = true;
        hand_over(l, piece->from, piece->nbytes, piece->placed);
        events++;
    }
    return events;
}

void cl_mpi_consume(mpi_link *l)
{
    l->begun = false;
    if (l->cursor == l->consumed) {
        l->cursor++;
        l->cursor_offset = 0;
    }
    cl_mpi_post_inbox(l, l->consumed++);
}

/* The peer has closed its link, and what it still sent has been handed over, up to a frame that will never be whole. */
static bool has_parted(const mpi_link *l)
{
    if (!cl_mpi_has_ended(&l->last_in_request))
        return false;
    return l->consumed == l->last_in.messages || (l->begun && l->taken == l->last_in.pieces);
}

/* Hands over what has come, in order. */
int cl_mpi_deliver(mpi_link *l)
{
    int events = 0;
    while (l->consumed < l->arrived && !l->failed) {
        mpi_message *message = &l->inbox[l->consumed % ROUND];
        if (l->left < message->taken)
            break; /* the library will soon say so: what follows may build on it */
        if (message->frame.type == HEARTBEAT) {
            cl_mpi_consume(l);
            continue;
        }
        if (!l->begun) {
            l->frame = message->frame;
            l->begun = true;
            l->told = 0;
            l->place = l->link.sink->begin(l->link.owner, &l->link, &l->frame);
            events++;
        }
        if (l->frame.nbytes > SHORT_NBYTES)
            events += take_pieces(l);
        else if (l->frame.nbytes > 0)
            hand_over(l, message->payload, l->frame.nbytes, false);
        if (l->told < l->frame.nbytes)
            break;
        cl_mpi_consume(l);
        l->link.sink->end(l->link.owner, &l->link, &l->frame);
        events++;
    }
    if (has_parted(l)) {
        cl_mpi_say_goodbye(l); /* it reads on until then */
        cl_mpi_fail(l, "it closed its link");
    }
    post_pieces(l);
    return events;
}

/*
 * The posted pieces of the place are taken back, the last one first: a message takes the first receive that it finds.
 * Those that came are moved to our memory; the others are posted there, in order.
 */
void cl_mpi_forget_place(mpi_link *l)
{
    bool again[AHEAD] = {false};
    for (uint64_t p = l->posted; p-- > l->taken;) {
        mpi_piece *piece = &l->pieces[p % AHEAD];
        if (!piece->placed)
            continue;
        again[p % AHEAD] = cl_mpi_cancel(&l->mpi->calls, &piece->request, cl_mpi_longest_s(l));
        if (!again[p % AHEAD])
            memcpy(staging_of(l, p), piece->from, piece->nbytes);
    }
    for (uint64_t p = l->taken; p < l->posted; p++) {
        mpi_piece *piece = &l->pieces[p % AHEAD];
        if (again[p % AHEAD])
            receive_piece(l, p, staging_of(l, p));
        piece->from = staging_of(l, p);
        piece->placed = false;
    }
    l->place = NULL;
}
