/*
 * control.c: the control plane's part in the engine: members telling each other small things, and failures telling all.
 *
 * An exchange is a gather to members[0] and a broadcast back, along a tree of fan-out 8. Each entry on the way up carries
 * its member's metadata, so the root sees every disagreement before a byte of data has moved.
 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

/* 64 ranks are two hops from the root, 512 three, and no node waits for more than 8 others. */
enum { FANOUT = 8 };

/* Of all members together; more than all machines have memory for. */
#define MOST_SPLITS (UINT64_C(1) << 60)

typedef struct {
    int32_t index;
    uint32_t nbytes, text_nbytes;
    cl_meta meta;
} entry_header;

static int32_t parent_of(int32_t index)
{
    return (index - 1) / FANOUT;
}

static int32_t children_of(const cl_operation *operation, int32_t *first)
{
    *first = operation->exchange->my_index * FANOUT + 1;
    int32_t left = operation->request.nmembers - *first;
    return left < 0 ? 0 : left < FANOUT ? left : FANOUT;
}

static bool is_root(const cl_operation *operation)
{
    return operation->exchange->my_index == 0;
}

static void tell(cl_operation *operation, int32_t member, uint8_t type, const uint8_t *data, size_t nbytes)
{
    cl_frame frame = {.key = operation->request.key, .type = type, .nbytes = (uint32_t)nbytes, .meta = operation->meta};
    cl_engine_tell(operation->engine, operation->request.members[member], &frame, data);
}

static int append(cl_entry *to, const void *data, size_t nbytes)
{
    bool fits = nbytes < UINT32_MAX - to->nbytes; /* into one frame */
    uint8_t *grown = fits ? realloc(to->data, (size_t)to->nbytes + nbytes + 1) : NULL;
    if (grown == NULL)
        return CL_NO_MEMORY;
    if (nbytes > 0)
        memcpy(grown + to->nbytes, data, nbytes);
    to->data = grown;
    to->nbytes += (uint32_t)nbytes;
    return CL_OK;
}

static void out_of_memory(cl_operation *operation)
{
    cl_control_fail_everywhere(operation, CL_NO_MEMORY, operation->engine->rank, "out of memory while exchanging sizes");
}

static void malformed(cl_operation *operation)
{
    cl_control_fail_everywhere(operation, CL_SYSTEM, operation->engine->rank, "a malformed exchange came in");
}

/*
 * Memory is laid out by what members told each other: every entry is there, sums stay within 64 bits, and nobody says of this
 * rank what it did not say itself.
 */
static bool is_sound(const cl_operation *operation)
{
    const cl_request *r = &operation->request;
    const cl_exchange *exchange = operation->exchange;
    bool lays_out = r->kind == CL_ALLGATHER || r->kind == CL_ALLTOALL;
    uint64_t total = 0;
    for (uint32_t m = 0; m < exchange->nentries; m++) {
        if (exchange->entries[m].data == NULL)
            return false;
        for (int32_t i = 0; lays_out && i < r->nsplits; i++) {
            uint64_t split;
            memcpy(&split, exchange->entries[m].data + (size_t)i * sizeof split, sizeof split);
            if (split > MOST_SPLITS - total)
                return false;
            total += split;
        }
    }
    const cl_entry *own = &exchange->entries[exchange->my_index];
    return !lays_out || memcmp(own->data, r->splits, own->nbytes) == 0;
}

static void finish(cl_operation *operation)
{
    operation->exchange->finished = true;
    if (atomic_load_explicit(&operation->done, memory_order_relaxed))
        return; /* it failed while telling the others */
    if (!is_sound(operation)) {
        malformed(operation);
        return;
    }
    cl_operation_start(operation);
    cl_engine_replay(operation->engine, operation);
}

void cl_exchange_tell_children(cl_operation *operation, const cl_frame *frame, const void *payload)
{
    int32_t first, count = children_of(operation, &first);
    for (int32_t child = first; child < first + count; child++)
        cl_engine_tell(operation->engine, operation->request.members[child], frame, payload);
}

static void tell_children(cl_operation *operation, const uint8_t *data, size_t nbytes)
{
    cl_frame frame = {.key = operation->request.key, .type = CL_FRAME_EXCHANGE_DOWN, .nbytes = (uint32_t)nbytes,
                      .meta = operation->meta};
    cl_exchange_tell_children(operation, &frame, data);
}

/* Down goes, per member, the number of bytes and the bytes. */
static void send_down(cl_operation *operation)
{
    cl_exchange *exchange = operation->exchange;
    cl_entry all = {0};
    int status = CL_OK;
    for (uint32_t m = 0; m < exchange->nentries && status == CL_OK; m++) {
        status = append(&all, &exchange->entries[m].nbytes, sizeof(uint32_t));
        if (status == CL_OK)
            status = append(&all, exchange->entries[m].data, exchange->entries[m].nbytes);
    }
    if (status == CL_OK)
        tell_children(operation, all.data, all.nbytes);
    free(all.data);
    if (status == CL_OK)
        finish(operation);
    else
        out_of_memory(operation);
}

static void go_on_if_complete(cl_operation *operation)
{
    cl_exchange *exchange = operation->exchange;
    if (exchange->awaited > 0)
        return;
    if (is_root(operation))
        send_down(operation);
    else
        tell(operation, parent_of(exchange->my_index), CL_FRAME_EXCHANGE_UP, exchange->up.data, exchange->up.nbytes);
}

static void disagree(cl_operation *operation, int32_t rank_a, const char *text_a, int32_t rank_b, const char *text_b)
{
    char text[CL_ERROR_NBYTES];
    bool swap = rank_b < rank_a;
    snprintf(text, sizeof text, "ranks disagree: rank %d submitted %s, but rank %d submitted %s; submit the same on every rank",
             swap ? rank_b : rank_a, swap ? text_b : text_a, swap ? rank_a : rank_b, swap ? text_a : text_b);
    cl_control_fail_everywhere(operation, CL_MISMATCH, rank_b, text);
}

/* Splits are as many as ours; raw bytes may be any. */
static bool is_entry_of(const cl_operation *operation, size_t nbytes)
{
    const cl_request *r = &operation->request;
    return r->kind == CL_EXCHANGE || r->kind == CL_TICKET || nbytes == (size_t)r->nsplits * sizeof(uint64_t);
}

/* At the root: takes one entry if it agrees with ours. Returns false if the operation has failed. */
static bool take_entry(cl_operation *operation, const entry_header *header, const uint8_t *data)
{
    if (memcmp(&header->meta, &operation->meta, sizeof(cl_meta)) != 0) {
        char theirs[CL_TEXT_NBYTES];
        uint32_t length = header->text_nbytes < sizeof theirs ? header->text_nbytes : sizeof theirs - 1;
        snprintf(theirs, sizeof theirs, "%.*s", (int)length, (const char *)data + header->nbytes);
        disagree(operation, operation->engine->rank, operation->request.text, operation->request.members[header->index], theirs);
        return false;
    }
    cl_entry *entry = &operation->exchange->entries[header->index];
    if (entry->data != NULL || !is_entry_of(operation, header->nbytes)) {
        malformed(operation);
        return false;
    }
    if (append(entry, data, header->nbytes) != CL_OK) {
        out_of_memory(operation);
        return false;
    }
    return true;
}

static bool take_entries(cl_operation *operation, const uint8_t *data, size_t nbytes)
{
    while (nbytes > 0) {
        entry_header header;
        bool sound = nbytes >= sizeof header;
        if (sound)
            memcpy(&header, data, sizeof header);
        size_t length = sound ? sizeof header + (size_t)header.nbytes + header.text_nbytes : 0;
        if (!sound || length > nbytes || header.index < 0 || header.index >= operation->request.nmembers) {
            malformed(operation);
            return false;
        }
        if (!take_entry(operation, &header, data + sizeof header))
            return false;
        data += length;
        nbytes -= length;
    }
    return true;
}

/* Notes that a child's subtree has come. False if it is no child, or came before. */
static bool note_child(cl_operation *operation, int32_t peer)
{
    int32_t first, count = children_of(operation, &first);
    for (int32_t child = first; child < first + count; child++)
        if (operation->request.members[child] == peer && !operation->exchange->came[child - first])
            return operation->exchange->came[child - first] = true;
    return false;
}

void cl_exchange_on_up(cl_operation *operation, int32_t peer, const uint8_t *data, size_t nbytes)
{
    cl_exchange *exchange = operation->exchange;
    if (exchange == NULL || !note_child(operation, peer))
        return;
    if (is_root(operation)) {
        if (!take_entries(operation, data, nbytes))
            return;
    } else if (append(&exchange->up, data, nbytes) != CL_OK) {
        out_of_memory(operation);
        return;
    }
    exchange->awaited--;
    go_on_if_complete(operation);
}

void cl_exchange_on_down(cl_operation *operation, const uint8_t *data, size_t nbytes)
{
    cl_exchange *exchange = operation->exchange;
    if (exchange == NULL || exchange->finished || is_root(operation))
        return;
    tell_children(operation, data, nbytes);
    for (uint32_t m = 0; m < exchange->nentries; m++) {
        uint32_t length = 0;
        if (nbytes >= sizeof length)
            memcpy(&length, data, sizeof length);
        if (nbytes < sizeof length || nbytes - sizeof length < length || !is_entry_of(operation, length)) {
            malformed(operation);
            return;
        }
        exchange->entries[m].nbytes = 0;
        if (append(&exchange->entries[m], data + sizeof length, length) != CL_OK) {
            out_of_memory(operation);
            return;
        }
        data += sizeof length + length;
        nbytes -= sizeof length + length;
    }
    finish(operation);
}

static int enter_own(cl_operation *operation)
{
    const cl_request *r = &operation->request;
    cl_exchange *exchange = operation->exchange;
    bool raw = r->kind == CL_EXCHANGE;
    const void *data = raw ? r->input : (const void *)r->splits;
    size_t nbytes = raw ? (size_t)r->count : (size_t)r->nsplits * sizeof(uint64_t);
    entry_header header = {exchange->my_index, (uint32_t)nbytes, (uint32_t)strlen(operation->request.text), operation->meta};
    if (is_root(operation))
        return append(&exchange->entries[0], data, nbytes);
    CL_TRY(append(&exchange->up, &header, sizeof header));
    CL_TRY(append(&exchange->up, data, nbytes));
    return append(&exchange->up, operation->request.text, header.text_nbytes);
}

static int make_exchange(cl_operation *operation)
{
    const cl_request *r = &operation->request;
    operation->exchange = calloc(1, sizeof(cl_exchange));
    if (operation->exchange == NULL)
        return CL_NO_MEMORY;
    operation->exchange->my_index = r->my_part;
    operation->exchange->entries = calloc((size_t)r->nmembers, sizeof(cl_entry));
    if (operation->exchange->entries == NULL)
        return CL_NO_MEMORY;
    operation->exchange->nentries = (uint32_t)r->nmembers;
    int32_t first;
    operation->exchange->awaited = (uint32_t)children_of(operation, &first);
    return enter_own(operation);
}

void cl_exchange_start(cl_operation *operation)
{
    if (make_exchange(operation) == CL_OK)
        go_on_if_complete(operation);
    else
        out_of_memory(operation);
}

bool cl_exchange_awaits(const cl_operation *operation, int32_t peer)
{
    const cl_exchange *exchange = operation->exchange;
    if (!is_root(operation) && operation->request.members[parent_of(exchange->my_index)] == peer)
        return true;
    int32_t first, count = children_of(operation, &first);
    for (int32_t child = first; exchange->awaited > 0 && child < first + count; child++)
        if (operation->request.members[child] == peer && !exchange->came[child - first])
            return true;
    return false;
}

void cl_exchange_free(cl_operation *operation)
{
    cl_exchange *exchange = operation->exchange;
    if (exchange == NULL)
        return;
    for (uint32_t m = 0; m < exchange->nentries; m++)
        free(exchange->entries[m].data);
    free(exchange->entries);
    free(exchange->up.data);
    free(exchange);
    operation->exchange = NULL;
}

/* ---- failures ------------------------------------------------------------------------------------------------ */

void cl_control_mismatch(cl_operation *operation, int32_t peer)
{
    cl_frame frame = {.key = operation->request.key, .type = CL_FRAME_MISMATCH};
    frame.nbytes = (uint32_t)strlen(operation->request.text);
    cl_engine_tell(operation->engine, peer, &frame, operation->request.text);
}

/* The peer has seen that we differ and told us what it submitted: now both sides are known here. */
void cl_control_on_mismatch(cl_operation *operation, int32_t peer, const char *text)
{
    disagree(operation, operation->engine->rank, operation->request.text, peer, text);
}

void cl_control_fail_everywhere(cl_operation *operation, int status, int32_t blamed, const char *text)
{
    if (atomic_load_explicit(&operation->done, memory_order_relaxed))
        return;
    cl_frame frame = {.key = operation->request.key, .type = CL_FRAME_FAIL, .step = (uint32_t)blamed, .arg = (uint64_t)status};
    frame.flags = CL_FRAME_WAKES; /* who has not submitted it is to know before he does */
    frame.nbytes = (uint32_t)strlen(text);
    cl_operation_hold(operation); /* without memory to tell it, the engine is lost and fails it before we do */
    cl_engine_tell_listeners(operation, &frame, text);
    cl_operation_fail(operation, status, blamed, text);
    cl_operation_release(operation);
}
