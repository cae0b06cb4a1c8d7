/*
 * tcp.c: a link over one connected stream socket.
 *
 * Frames go out from a bounded queue, headers and payloads of several frames in one system call. What comes in goes
 * straight to the place that the sink gives, or through one staging buffer. Knows the transport contract and nothing of
 * engines; time is only what tick() says. An error is remembered where it is met, and told to the sink as the last deed
 * of progress or tick: lost() may close the link.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/tcp.h> /* of its tcp_info, that of <netinet/tcp.h> lacks the end */
#include <netinet/in.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "transport.h"

enum {
    HEARTBEAT = 255,              /* a frame type reserved for transports: it says "alive", and no sink sees it */
    QUEUE_FRAMES = 64,            /* more would only hide from the engine what is urgent */
    WRITE_VECTORS = 2 * 16,       /* headers and payloads of one system call */
    STAGING_NBYTES = 256 * 1024,  /* stays in the second-level cache until it is reduced */
    CALLS_PER_PROGRESS = 4,       /* reads, and writes: other links must have their turn */
    UNSENT_BURSTS = 2,            /* of inflight_nbytes, held by the kernel at least: one offload's 64 KiB by default */
    UNSENT_LEAST_NBYTES = 4096,   /* less would cost more system calls than it could hasten anything */
    PIECE_NBYTES = 64,            /* pieces are multiples of it */
    REASON_NBYTES = 96
};

typedef struct {
    cl_frame frame;
    const uint8_t *payload;
    uint8_t *copy; /* owned; the rest of a forgotten frame's payload, which `payload` then points into */
} tcp_outgoing;

typedef struct {
    cl_frame frame;
    bool active;     /* the header has come, the end has not */
    uint8_t *place;  /* where begin() wants the payload, or NULL */
    size_t received; /* payload bytes that have left the staging buffer */
    size_t told;     /* payload bytes handed over; behind `received` by less than a piece, and only in a place */
} tcp_incoming;

typedef struct {
    cl_link link; /* first: a cl_link is cast to it */
    int socket;
    double heartbeat_s, lost_s;

    tcp_outgoing queue[QUEUE_FRAMES]; /* a ring */
    size_t first, count;
    size_t written; /* bytes of the first frame, header included, that the kernel has */
    size_t pending; /* bytes of all queued frames that it has not */
    bool full;      /* the kernel took less than it was offered */

    tcp_incoming incoming;
    uint8_t *staging;
    size_t start, end; /* of the bytes in staging not yet understood */

    cl_settings settings;
    double bytes_per_s; /* the bandwidth that was seen last, or 0 */
    int unsent_nbytes;  /* what TCP_NOTSENT_LOWAT is */

    bool sent_lately, received_lately; /* since the last tick */
    bool ticked;
    double last_sent_s, last_received_s;

    int write_error; /* errno; told when all that the peer had said before is read */
    bool failed;     /* `reason` waits to be told; nothing is moved any more */
    bool over;       /* lost() was told */
    char reason[REASON_NBYTES];
} tcp_link;

static tcp_link *tcp_of(cl_link *link)
{
    return (tcp_link *)link;
}

/* ---- failure ------------------------------------------------------------------------------------------------ */

/* The first reason stays: what follows it is mostly its consequence. */
__attribute__((format(printf, 2, 3))) static void fail(tcp_link *tcp, const char *format, ...)
{
    if (tcp->failed)
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(tcp->reason, sizeof tcp->reason, format, arguments);
    va_end(arguments);
    tcp->reason[0] = (char)tolower((unsigned char)tcp->reason[0]); /* it continues a sentence */
    tcp->failed = true;
}

static void fail_with(tcp_link *tcp, int error)
{
    errno = error;
    fail(tcp, "%m"); /* strerror, for threads */
}

/*
 * Must be the caller's last deed: the sink may close the link. The engine keeps it until its own end, so the peer, if it
 * lives, is told now: it must not wait for the rest of what we were saying.
 */
static void tell_lost(tcp_link *tcp)
{
    tcp->over = true;
    (void)shutdown(tcp->socket, SHUT_RDWR);
    tcp->link.sink->lost(tcp->link.owner, &tcp->link, tcp->reason);
}

/* ---- sending ------------------------------------------------------------------------------------------------ */

static tcp_outgoing *queued(tcp_link *tcp, size_t position)
{
    return &tcp->queue[(tcp->first + position) % QUEUE_FRAMES];
}

static size_t frame_nbytes(const cl_frame *frame)
{
    return sizeof *frame + frame->nbytes;
}

/* Of the first `nbytes` of a frame on the wire, those in its header. */
static size_t in_header(size_t nbytes)
{
    return nbytes < sizeof(cl_frame) ? nbytes : sizeof(cl_frame);
}

static void enqueue(tcp_link *tcp, const cl_frame *frame, const void *payload)
{
    tcp_outgoing *outgoing = queued(tcp, tcp->count++);
    *outgoing = (tcp_outgoing){.frame = *frame, .payload = payload};
    tcp->pending += frame_nbytes(frame);
}

static int tcp_send(cl_link *link, const cl_frame *frame, const void *payload)
{
    tcp_link *tcp = tcp_of(link);
    if (frame->type == HEARTBEAT || (frame->nbytes > 0 && payload == NULL))
        return CL_INVALID;
    if (tcp->over)
        return CL_PEER_LOST;
    if (tcp->failed || tcp->count == QUEUE_FRAMES)
        return CL_AGAIN;
    enqueue(tcp, frame, payload);
    return CL_OK;
}

/* sendmsg reads through a pointer that its type lets it write through. */
static struct iovec vector_of(const uint8_t *from, size_t nbytes)
{
    struct iovec vector = {.iov_len = nbytes};
    memcpy(&vector.iov_base, &from, sizeof from);
    return vector;
}

static int gather(tcp_link *tcp, struct iovec *vectors)
{
    int nvectors = 0;
    size_t skip = tcp->written;
    for (size_t i = 0; i < tcp->count && nvectors + 2 <= WRITE_VECTORS; i++) {
        tcp_outgoing *outgoing = queued(tcp, i);
        uint8_t *header = (uint8_t *)&outgoing->frame;
        const size_t header_skip = in_header(skip), payload_skip = skip - header_skip;
        if (header_skip < sizeof(cl_frame))
            vectors[nvectors++] = (struct iovec){header + header_skip, sizeof(cl_frame) - header_skip};
        if (payload_skip < outgoing->frame.nbytes)
            vectors[nvectors++] = vector_of(outgoing->payload + payload_skip, outgoing->frame.nbytes - payload_skip);
        skip = 0;
    }
    return nvectors;
}

/* Takes `nbytes` that the kernel has accepted off the queue. Returns how many frames they completed. */
static int advance(tcp_link *tcp, size_t nbytes)
{
    int completed = 0;
    tcp->pending -= nbytes;
    tcp->written += nbytes;
    while (tcp->count > 0 && tcp->written >= frame_nbytes(&queued(tcp, 0)->frame)) {
        const tcp_outgoing done = *queued(tcp, 0);
        tcp->written -= frame_nbytes(&done.frame);
        tcp->first = (tcp->first + 1) % QUEUE_FRAMES;
        tcp->count--;
        completed++;
        if (done.copy != NULL)
            free(done.copy);
        else if (done.frame.nbytes > 0)
            tcp->link.sink->sent(tcp->link.owner, &tcp->link, &done.frame);
    }
    return completed;
}

static int write_queued(tcp_link *tcp)
{
    int events = 0;
    tcp->full = false;
    for (int calls = 0; calls < CALLS_PER_PROGRESS && tcp->count > 0 && !tcp->full && !tcp->write_error; calls++) {
        struct iovec vectors[WRITE_VECTORS];
        struct msghdr message = {.msg_iov = vectors, .msg_iovlen = (size_t)gather(tcp, vectors)};
        size_t offered = 0;
        for (size_t i = 0; i < message.msg_iovlen; i++)
            offered += vectors[i].iov_len;
        const ssize_t sent = sendmsg(tcp->socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            tcp->full = errno == EAGAIN || errno == EWOULDBLOCK;
            if (!tcp->full && errno != EINTR)
                tcp->write_error = errno;
            continue;
        }
        tcp->full = (size_t)sent < offered;
        tcp->sent_lately = true;
        events += 1 + advance(tcp, (size_t)sent);
    }
    return events;
}

/* ---- receiving ---------------------------------------------------------------------------------------------- */

static bool in_place(const tcp_link *tcp)
{
    return tcp->incoming.active && tcp->incoming.place != NULL;
}

/* Reads a header from staging. Returns the number of sink calls, or -1 if there is no whole header. */
static int begin_frame(tcp_link *tcp)
{
    tcp_incoming *incoming = &tcp->incoming;
    if (tcp->end - tcp->start < sizeof(cl_frame))
        return -1;
    *incoming = (tcp_incoming){0};
    memcpy(&incoming->frame, tcp->staging + tcp->start, sizeof(cl_frame));
    tcp->start += sizeof(cl_frame);
    if (incoming->frame.type == HEARTBEAT) {
        if (incoming->frame.nbytes > 0)
            fail(tcp, "protocol error");
        return 0;
    }
    incoming->active = true;
    incoming->place = tcp->link.sink->begin(tcp->link.owner, &tcp->link, &incoming->frame);
    return 1;
}

/* Hands over payload that is already in its place, in whole pieces. */
static int tell_placed(tcp_link *tcp)
{
    tcp_incoming *incoming = &tcp->incoming;
    const bool complete = incoming->received == incoming->frame.nbytes;
    const size_t told = complete ? incoming->received : incoming->received / PIECE_NBYTES * PIECE_NBYTES;
    const size_t offset = incoming->told;
    if (told == offset)
        return 0;
    incoming->told = told;
    const uint8_t *piece = incoming->place + offset;
    tcp->link.sink->piece(tcp->link.owner, &tcp->link, &incoming->frame, offset, piece, told - offset);
    return 1;
}

/* Moves payload out of staging: to its place, or as a piece. Returns the number of sink calls. */
static int take_staged(tcp_link *tcp)
{
    tcp_incoming *incoming = &tcp->incoming;
    const size_t wanted = incoming->frame.nbytes - incoming->received, staged = tcp->end - tcp->start;
    const uint8_t *from = tcp->staging + tcp->start;
    size_t nbytes = staged < wanted ? staged : wanted;
    if (incoming->place != NULL) {
        memcpy(incoming->place + incoming->received, from, nbytes);
        tcp->start += nbytes;
        incoming->received += nbytes;
        return tell_placed(tcp);
    }
    if (nbytes < wanted)
        nbytes = nbytes / PIECE_NBYTES * PIECE_NBYTES;
    if (nbytes == 0)
        return 0;
    const size_t offset = incoming->received;
    tcp->start += nbytes;
    incoming->received = incoming->told = offset + nbytes;
    tcp->link.sink->piece(tcp->link.owner, &tcp->link, &incoming->frame, offset, from, nbytes);
    return 1;
}

/* Understands what has been read. What stays in staging is less than a header or a piece. */
static int take_in(tcp_link *tcp)
{
    tcp_incoming *incoming = &tcp->incoming;
    int events = 0;
    while (!tcp->failed) {
        const int begun = incoming->active ? 0 : begin_frame(tcp);
        if (begun < 0)
            break;
        events += begun;
        if (!incoming->active)
            continue; /* a heartbeat */
        events += take_staged(tcp);
        if (incoming->received < incoming->frame.nbytes)
            break;
        incoming->active = false;
        tcp->link.sink->end(tcp->link.owner, &tcp->link, &incoming->frame);
        events++;
    }
    return events;
}

/* One read: first the rest of a placed payload, then whatever follows it. */
static ssize_t read_some(tcp_link *tcp, size_t *wanted)
{
    tcp_incoming *incoming = &tcp->incoming;
    struct iovec vectors[2];
    struct msghdr message = {.msg_iov = vectors};
    const size_t rest = tcp->end - tcp->start;
    const size_t placed = in_place(tcp) ? incoming->frame.nbytes - incoming->received : 0;
    memmove(tcp->staging, tcp->staging + tcp->start, rest);
    tcp->start = 0;
    tcp->end = rest;
    if (placed > 0)
        vectors[message.msg_iovlen++] = (struct iovec){incoming->place + incoming->received, placed};
    vectors[message.msg_iovlen++] = (struct iovec){tcp->staging + rest, STAGING_NBYTES - rest};
    *wanted = placed + STAGING_NBYTES - rest;
    const ssize_t got = recvmsg(tcp->socket, &message, MSG_DONTWAIT);
    if (got <= 0)
        return got;
    const size_t into_place = (size_t)got < placed ? (size_t)got : placed;
    incoming->received += into_place;
    tcp->end += (size_t)got - into_place;
    return got;
}

/* A read that gave nothing, for now or for ever. Our own error is told after all that the peer had said. */
static void read_nothing(tcp_link *tcp, ssize_t got, int error)
{
    const bool inside = tcp->incoming.active || tcp->end > 0;
    if (got == 0)
        fail(tcp, "connection closed%s", inside ? " in the middle of a message" : "");
    else if (error != EAGAIN && error != EWOULDBLOCK)
        fail_with(tcp, error);
    else if (tcp->write_error)
        fail_with(tcp, tcp->write_error);
}

static int receive(tcp_link *tcp)
{
    int events = 0;
    for (int calls = 0; calls < CALLS_PER_PROGRESS && !tcp->failed; calls++) {
        size_t wanted;
        const ssize_t got = read_some(tcp, &wanted);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            read_nothing(tcp, got, errno);
            break;
        }
        tcp->received_lately = true;
        events += 1 + take_in(tcp);
        if ((size_t)got < wanted)
            break;
    }
    return events;
}

static int tcp_progress(cl_link *link)
{
    tcp_link *tcp = tcp_of(link);
    if (tcp->over)
        return 0;
    int events = tcp->failed ? 0 : write_queued(tcp);
    if (!tcp->failed)
        events += receive(tcp);
    if (!tcp->failed)
        return events;
    tell_lost(tcp);
    return events + 1;
}

/* ---- sleeping ----------------------------------------------------------------------------------------------- */

static int tcp_arm(cl_link *link)
{
    const tcp_link *tcp = tcp_of(link);
    const bool can_write = tcp->count > 0 && !tcp->full;
    return !tcp->over && (tcp->failed || tcp->write_error || can_write) ? CL_AGAIN : CL_OK;
}

static void tcp_disarm(cl_link *link)
{
    (void)link; /* epoll looks at the socket itself */
}

static int tcp_pollfd(cl_link *link, uint32_t *events)
{
    const tcp_link *tcp = tcp_of(link);
    *events = EPOLLIN | EPOLLRDHUP | (tcp->count > 0 ? (uint32_t)EPOLLOUT : 0);
    return tcp->socket;
}

/* ---- forgetting --------------------------------------------------------------------------------------------- */

/* From here on only the copy is read, at the same offsets; the first `gone` bytes are with the kernel already. */
static void keep_copy(tcp_link *tcp, tcp_outgoing *outgoing, size_t gone)
{
    outgoing->copy = malloc(outgoing->frame.nbytes);
    if (outgoing->copy == NULL) {
        fail(tcp, "out of memory for the rest of a message"); /* nothing is written any more, so nothing is read */
        return;
    }
    memcpy(outgoing->copy + gone, outgoing->payload + gone, outgoing->frame.nbytes - gone);
    outgoing->payload = outgoing->copy;
}

static void forget_place(tcp_link *tcp)
{
    tcp_incoming *incoming = &tcp->incoming;
    const size_t rest = incoming->received - incoming->told;
    if (rest > 0) { /* less than a piece; staging is empty while a placed payload is incomplete */
        memcpy(tcp->staging, incoming->place + incoming->told, rest);
        tcp->start = 0;
        tcp->end = rest;
    }
    incoming->received = incoming->told;
    incoming->place = NULL;
}

static void tcp_forget(cl_link *link, uint64_t key)
{
    tcp_link *tcp = tcp_of(link);
    for (size_t i = 0; i < tcp->count; i++) {
        tcp_outgoing *outgoing = queued(tcp, i);
        const size_t nbytes = outgoing->frame.nbytes, gone = i == 0 ? tcp->written - in_header(tcp->written) : 0;
        if (outgoing->frame.key == key && nbytes > 0 && outgoing->copy == NULL)
            keep_copy(tcp, outgoing, gone < nbytes ? gone : nbytes); /* inside sent(), `written` runs ahead */
    }
    if (in_place(tcp) && tcp->incoming.frame.key == key)
        forget_place(tcp);
}

/* ---- how much the kernel holds ------------------------------------------------------------------------------- */

/*
 * What the kernel has taken and not sent goes before anything more urgent, so it is to be little; but a window's
 * acknowledgements may come at once, and then that much must be there, or the wire is idle until this thread wakes.
 */
int cl_tcp_unsent_nbytes(const cl_settings *settings, double bytes_per_s, double delay_s)
{
    double least = UNSENT_BURSTS * (double)settings->inflight_nbytes, most = (double)settings->inflight_most_nbytes;
    double wanted = bytes_per_s * delay_s;
    if (wanted > most)
        wanted = most;
    if (wanted < least)
        wanted = least;
    if (wanted < UNSENT_LEAST_NBYTES)
        return UNSENT_LEAST_NBYTES;
    return wanted > INT_MAX ? INT_MAX : (int)wanted;
}

static void hold_unsent(tcp_link *tcp, int nbytes)
{
    if (nbytes == tcp->unsent_nbytes)
        return;
    tcp->unsent_nbytes = nbytes;
    (void)setsockopt(tcp->socket, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &nbytes, sizeof nbytes); /* a socketpair has none */
}

/* Where we and not the network were the limit, a rate says only that the link carries at least so much. */
static void measure(tcp_link *tcp)
{
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    if (getsockopt(tcp->socket, IPPROTO_TCP, TCP_INFO, &info, &length) != 0 ||
        length < offsetof(struct tcp_info, tcpi_delivery_rate) + sizeof info.tcpi_delivery_rate)
        return; /* no TCP, or a kernel older than 4.9 */
    const double rate = (double)info.tcpi_delivery_rate;
    if (rate > tcp->bytes_per_s || (rate > 0 && !info.tcpi_delivery_rate_app_limited))
        tcp->bytes_per_s = rate;
    const double delay_s = info.tcpi_min_rtt == UINT32_MAX ? 0 : 1e-6 * info.tcpi_min_rtt;
    hold_unsent(tcp, cl_tcp_unsent_nbytes(&tcp->settings, tcp->bytes_per_s, delay_s));
}

/* ---- time --------------------------------------------------------------------------------------------------- */

/* This process may have been stopped itself, while the peer's words came in: then the silence is ours. */
static bool has_unread(const tcp_link *tcp)
{
    uint8_t byte;
    return recv(tcp->socket, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0;
}

static void note_activity(tcp_link *tcp, double now_s)
{
    if (!tcp->ticked || tcp->sent_lately)
        tcp->last_sent_s = now_s;
    if (!tcp->ticked || tcp->received_lately)
        tcp->last_received_s = now_s;
    tcp->ticked = true;
    tcp->sent_lately = tcp->received_lately = false;
}

static void tcp_tick(cl_link *link, double now_s)
{
    tcp_link *tcp = tcp_of(link);
    if (tcp->over)
        return;
    note_activity(tcp, now_s);
    const double silent_s = now_s - tcp->last_received_s;
    if (silent_s + tcp->heartbeat_s > tcp->lost_s && !has_unread(tcp)) /* the next tick could come too late */
        fail(tcp, "silent for %.1f s", silent_s);
    if (tcp->failed) {
        tell_lost(tcp);
        return;
    }
    if (now_s - tcp->last_sent_s >= tcp->heartbeat_s && tcp->count == 0)
        enqueue(tcp, &(cl_frame){.type = HEARTBEAT}, NULL);
    measure(tcp);
    write_queued(tcp);
}

/* ---- ends --------------------------------------------------------------------------------------------------- */

static size_t tcp_pending(const cl_link *link)
{
    return ((const tcp_link *)link)->pending;
}

/*
 * Unread bytes would turn the close into a reset, which may overtake our last words: they are read away. The shutdown
 * reaches the peer even where a forked child still holds the socket.
 */
static void hang_up(tcp_link *tcp)
{
    shutdown(tcp->socket, SHUT_WR);
    for (int calls = 0; calls < CALLS_PER_PROGRESS; calls++)
        if (recv(tcp->socket, tcp->staging, STAGING_NBYTES, MSG_DONTWAIT) <= 0)
            break;
    close(tcp->socket);
}

static void tcp_close(cl_link *link)
{
    tcp_link *tcp = tcp_of(link);
    if (tcp->socket >= 0)
        hang_up(tcp);
    for (size_t i = 0; i < tcp->count; i++)
        free(queued(tcp, i)->copy);
    free(tcp->staging);
    free(tcp);
}

static void tcp_forked(cl_link *link)
{
    tcp_link *tcp = tcp_of(link);
    close(tcp->socket);
    tcp->socket = -1;
}

const cl_transport cl_tcp_transport = {
    .name = "tcp",
    .edges = true,
    .send = tcp_send,
    .progress = tcp_progress,
    .arm = tcp_arm,
    .disarm = tcp_disarm,
    .pollfd = tcp_pollfd,
    .forget = tcp_forget,
    .pending = tcp_pending,
    .close = tcp_close,
    .forked = tcp_forked,
    .tick = tcp_tick,
};

static int seconds_in(uint32_t ms)
{
    return ms < 1000 ? 1 : (int)(ms / 1000);
}

/*
 * Small frames go at once; and the kernel notices a host that vanished by itself, in lost_ms, also while nobody gives this
 * engine the processor: by bytes that are not acknowledged, or by three probes where there are none. A socketpair needs
 * none of these.
 */
static int prepare_socket(int socket, uint32_t lost_ms)
{
    const int on = 1, probes = 3, every_s = seconds_in(lost_ms / 4);
    const unsigned unacknowledged_ms = lost_ms;
    if (socket < 0)
        return CL_INVALID;
    if (fcntl(socket, F_SETFD, FD_CLOEXEC) != 0)
        return CL_SYSTEM;
    (void)setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(socket, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(socket, IPPROTO_TCP, TCP_KEEPIDLE, &every_s, sizeof every_s);
    (void)setsockopt(socket, IPPROTO_TCP, TCP_KEEPINTVL, &every_s, sizeof every_s);
    (void)setsockopt(socket, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    (void)setsockopt(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacknowledged_ms, sizeof unacknowledged_ms);
    return CL_OK;
}

int cl_tcp_link_new(int socket, const cl_settings *settings, cl_link **link)
{
    tcp_link *tcp = calloc(1, sizeof *tcp);
    uint8_t *staging = malloc(STAGING_NBYTES);
    int status = prepare_socket(socket, settings->lost_ms);
    if (status == CL_OK && (tcp == NULL || staging == NULL))
        status = CL_NO_MEMORY;
    if (status != CL_OK) {
        free(staging);
        free(tcp);
        if (socket >= 0)
            close(socket);
        return status;
    }
    tcp->link.transport = &cl_tcp_transport;
    tcp->socket = socket;
    tcp->staging = staging;
    tcp->heartbeat_s = 1e-3 * settings->heartbeat_ms;
    tcp->lost_s = 1e-3 * settings->lost_ms;
    tcp->settings = *settings;
    hold_unsent(tcp, cl_tcp_unsent_nbytes(settings, 0, 0));
    *link = &tcp->link;
    return CL_OK;
}
