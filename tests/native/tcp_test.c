/*
 * tcp_test.c: what only tcp does: heartbeats, silence, broken peers. One end is a link, the other a bare socket.
 *
 * The clock is a number handed to tick(), so no test waits for time to pass.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport_conformance.h"

enum { HEARTBEAT = 255, TINY_NBYTES = 4096 };

static const cl_settings settings = {.heartbeat_ms = 1000, .lost_ms = 4000};

typedef struct {
    cl_link *link;
    int bare; /* the other end */
    int begun, ended, sent, lost;
    size_t piece_nbytes;
    uint64_t last_key;
    char reason[128];
    uint8_t *place; /* what begin() gives */
} fixture;

static void *on_begin(void *owner, cl_link *link, const cl_frame *frame)
{
    fixture *f = owner;
    (void)link;
    f->begun++;
    f->last_key = frame->key;
    return f->place;
}

static void on_piece(void *owner, cl_link *link, const cl_frame *frame, size_t offset, const void *data, size_t nbytes)
{
    (void)link, (void)frame, (void)offset, (void)data;
    ((fixture *)owner)->piece_nbytes += nbytes;
}

static void on_end(void *owner, cl_link *link, const cl_frame *frame)
{
    (void)link, (void)frame;
    ((fixture *)owner)->ended++;
}

static void on_sent(void *owner, cl_link *link, const cl_frame *frame)
{
    (void)link, (void)frame;
    ((fixture *)owner)->sent++;
}

static void on_lost(void *owner, cl_link *link, const char *reason)
{
    fixture *f = owner;
    (void)link;
    f->lost++;
    snprintf(f->reason, sizeof f->reason, "%s", reason);
}

static const cl_sink sink = {on_begin, on_piece, on_end, NULL, on_sent, on_lost};

static int tiny_socket(void)
{
    const int nbytes = TINY_NBYTES, made = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(made, SOL_SOCKET, SO_SNDBUF, &nbytes, sizeof nbytes);
    setsockopt(made, SOL_SOCKET, SO_RCVBUF, &nbytes, sizeof nbytes);
    return made;
}

static void set_up(fixture *f)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    const int on = 1, listener = tiny_socket();
    *f = (fixture){.bare = tiny_socket()};
    setsockopt(f->bare, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    const bool connected = bind(listener, (struct sockaddr *)&address, sizeof address) == 0 &&
                           getsockname(listener, (struct sockaddr *)&address, &length) == 0 && listen(listener, 1) == 0 &&
                           connect(f->bare, (struct sockaddr *)&address, sizeof address) == 0;
    EXPECT(connected, "no loopback connection");
    EXPECT(cl_tcp_link_new(accept(listener, NULL, NULL), &settings, &f->link) == CL_OK, "no link");
    close(listener);
    f->link->sink = &sink;
    f->link->owner = f;
    cl_tcp_transport.tick(f->link, 1e6); /* clocks do not begin at 0 */
}

static void tear_down(fixture *f)
{
    if (f->link != NULL)
        cl_tcp_transport.close(f->link);
    if (f->bare >= 0)
        close(f->bare);
}

static void say(const fixture *f, const void *bytes, size_t nbytes)
{
    EXPECT(send(f->bare, bytes, nbytes, MSG_NOSIGNAL) == (ssize_t)nbytes, "the bare end cannot write");
}

static void progress_all(fixture *f)
{
    while (cl_tcp_transport.progress(f->link) > 0)
        ;
}

/* Heartbeats that the bare end has received; EXPECTs nothing else to be there. */
static int heartbeats(const fixture *f)
{
    cl_frame frame;
    int count = 0;
    while (recv(f->bare, &frame, sizeof frame, MSG_DONTWAIT) == (ssize_t)sizeof frame) {
        EXPECT(frame.type == HEARTBEAT && frame.nbytes == 0, "a frame of type %d", frame.type);
        count++;
    }
    return count;
}

/* ---- time ---------------------------------------------------------------------------------------------------- */

static void an_idle_link_says_that_it_lives(fixture *f)
{
    cl_tcp_transport.tick(f->link, 1e6 + 0.5);
    EXPECT(heartbeats(f) == 0, "a heartbeat too early");
    cl_tcp_transport.tick(f->link, 1e6 + 1.0);
    cl_tcp_transport.tick(f->link, 1e6 + 1.5);
    EXPECT(heartbeats(f) == 1, "one heartbeat after a second");
    EXPECT(cl_tcp_transport.pending(f->link) == 0 && f->sent == 0, "the heartbeat is told or left behind");
}

static void a_busy_link_needs_no_heartbeat(fixture *f)
{
    const cl_frame frame = {.type = 1};
    char bytes[64];
    for (int i = 1; i <= 4; i++) {
        EXPECT(cl_tcp_transport.send(f->link, &frame, NULL) == CL_OK, "send");
        progress_all(f);
        cl_tcp_transport.tick(f->link, 1e6 + 0.75 * i);
        EXPECT(recv(f->bare, bytes, sizeof bytes, MSG_DONTWAIT) == 64 && bytes[8] == 1, "the frame itself");
    }
    EXPECT(heartbeats(f) == 0, "a heartbeat between frames");
}

static void a_silent_peer_is_lost_once(fixture *f)
{
    for (int i = 1; i <= 6; i++)
        cl_tcp_transport.tick(f->link, 1e6 + 0.5 * i);
    EXPECT(f->lost == 0, "lost too early: %s", f->reason);
    cl_tcp_transport.tick(f->link, 1e6 + 3.6); /* a heartbeat before it is due: the next tick could come too late */
    cl_tcp_transport.tick(f->link, 1e6 + 9);
    progress_all(f);
    EXPECT(f->lost == 1 && strcmp(f->reason, "silent for 3.6 s") == 0, "lost %d times: %s", f->lost, f->reason);
    EXPECT(cl_tcp_transport.send(f->link, &(cl_frame){.type = 1}, NULL) == CL_PEER_LOST, "a lost link takes frames");
}

static void heartbeats_keep_a_peer_and_are_not_shown(fixture *f)
{
    const cl_frame frames[] = {{.type = HEARTBEAT}, {.type = 1}};
    for (int i = 1; i <= 10; i++) {
        say(f, frames, i < 10 ? sizeof frames[0] : sizeof frames);
        progress_all(f);
        cl_tcp_transport.tick(f->link, 1e6 + 3.0 * i);
    }
    EXPECT(f->lost == 0, "lost in spite of heartbeats: %s", f->reason);
    EXPECT(f->begun == 1 && f->ended == 1, "%d frames shown", f->begun);
}

/* After SIGSTOP and SIGCONT of this process, say. */
static void unread_words_are_no_silence(fixture *f)
{
    const cl_frame frame = {.type = 1, .key = 7};
    say(f, &frame, sizeof frame);
    cl_tcp_transport.tick(f->link, 1e6 + 100);
    EXPECT(f->lost == 0, "lost with words unread: %s", f->reason);
    progress_all(f);
    cl_tcp_transport.tick(f->link, 1e6 + 101);
    EXPECT(f->lost == 0 && f->ended == 1, "lost with words read: %s", f->reason);
}

/* ---- what comes in ------------------------------------------------------------------------------------------- */

static void a_heartbeat_with_payload_is_a_protocol_error(fixture *f)
{
    const cl_frame frame = {.type = HEARTBEAT, .nbytes = 1};
    say(f, &frame, sizeof frame);
    progress_all(f);
    EXPECT(f->lost == 1 && strcmp(f->reason, "protocol error") == 0, "lost %d times: %s", f->lost, f->reason);
}

static void a_stream_may_come_byte_by_byte(fixture *f)
{
    uint8_t place[200], stream[3 * 64 + 200] = {0};
    const cl_frame frame = {.type = 1, .nbytes = 200}, heartbeat = {.type = HEARTBEAT}, last = {.type = 2, .key = 9};
    memcpy(stream, &frame, 64);
    for (int i = 0; i < 200; i++)
        stream[64 + i] = (uint8_t)i;
    memcpy(stream + 264, &heartbeat, 64);
    memcpy(stream + 328, &last, 64);
    f->place = place;
    for (size_t i = 0; i < sizeof stream; i++) {
        say(f, stream + i, 1);
        progress_all(f);
        EXPECT(f->ended == (i >= 263) + (i == sizeof stream - 1), "%d frames after %zu bytes", f->ended, i + 1);
    }
    EXPECT(memcmp(place, stream + 64, 200) == 0 && f->piece_nbytes == 200 && f->last_key == 9, "the payload");
}

static void an_absurd_length_is_streamed(fixture *f)
{
    const cl_frame frame = {.type = 1, .nbytes = UINT32_MAX};
    const uint8_t bytes[1024] = {0};
    say(f, &frame, sizeof frame);
    for (int i = 0; i < 1000; i++) {
        say(f, bytes, sizeof bytes);
        progress_all(f);
    }
    close(f->bare);
    f->bare = -1;
    progress_all(f);
    EXPECT(f->piece_nbytes == 1000 * sizeof bytes && f->ended == 0, "%zu bytes", f->piece_nbytes);
    EXPECT(strcmp(f->reason, "connection closed in the middle of a message") == 0, "%s", f->reason);
}

/* ---- ends ---------------------------------------------------------------------------------------------------- */

static void a_quiet_end_is_told(fixture *f)
{
    close(f->bare);
    f->bare = -1;
    progress_all(f);
    EXPECT(f->lost == 1 && strcmp(f->reason, "connection closed") == 0, "lost %d times: %s", f->lost, f->reason);
}

static void reset(fixture *f)
{
    const struct linger at_once = {.l_onoff = 1, .l_linger = 0};
    setsockopt(f->bare, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(f->bare);
    f->bare = -1;
}

static void a_reset_is_told(fixture *f)
{
    reset(f);
    progress_all(f);
    EXPECT(f->lost == 1 && strcmp(f->reason, "connection reset by peer") == 0, "lost %d times: %s", f->lost, f->reason);
}

/* Our write fails first, but what the peer had said is worth more: it may be a goodbye. */
static void words_before_a_reset_are_heard(fixture *f)
{
    const cl_frame frame = {.type = 1};
    say(f, &frame, sizeof frame);
    say(f, &frame, sizeof frame);
    reset(f);
    EXPECT(cl_tcp_transport.send(f->link, &frame, NULL) == CL_OK, "send");
    progress_all(f);
    EXPECT(f->ended == 2 && f->lost == 1, "%d frames, then lost %d times: %s", f->ended, f->lost, f->reason);
}

/* The first write draws a reset, the second finds no reader: without MSG_NOSIGNAL it would end the program. */
static void a_write_to_nobody_is_no_signal(fixture *f)
{
    close(f->bare);
    f->bare = -1;
    for (int i = 1; i <= 2; i++) {
        EXPECT(cl_tcp_transport.send(f->link, &(cl_frame){.type = 1}, NULL) == CL_OK, "send");
        cl_tcp_transport.tick(f->link, 1e6 + 0.1 * i); /* writes, and does not read */
    }
    progress_all(f);
    EXPECT(f->lost == 1, "lost %d times: %s", f->lost, f->reason);
}

/* The kernel still holds our last words, and words of the peer lie unread: a plain close would reset both away. */
static void a_close_keeps_its_last_words(fixture *f)
{
    static const uint8_t payload[1 << 20];
    const cl_frame frame = {.type = 1, .nbytes = sizeof payload};
    char bytes[4096];
    size_t got = 0;
    EXPECT(cl_tcp_transport.send(f->link, &frame, payload) == CL_OK, "send");
    progress_all(f);
    const size_t given = sizeof frame + sizeof payload - cl_tcp_transport.pending(f->link);
    say(f, &frame, sizeof frame);
    cl_tcp_transport.close(f->link);
    f->link = NULL;
    for (ssize_t some = 1; some > 0; got += (size_t)some) {
        some = recv(f->bare, bytes, sizeof bytes, 0);
        EXPECT(some >= 0, "the last words end in: %s", strerror(errno));
    }
    EXPECT(got == given, "%zu of %zu bytes came", got, given);
}

/* ---- arguments ----------------------------------------------------------------------------------------------- */

static void wrong_arguments_are_refused(fixture *f)
{
    const cl_frame reserved = {.type = HEARTBEAT}, without = {.type = 1, .nbytes = 1};
    cl_link *link = NULL;
    EXPECT(cl_tcp_transport.send(f->link, &reserved, NULL) == CL_INVALID, "the reserved type is taken");
    EXPECT(cl_tcp_transport.send(f->link, &without, NULL) == CL_INVALID, "a payload without memory is taken");
    EXPECT(cl_tcp_link_new(-1, &settings, &link) == CL_INVALID && link == NULL, "a link over no socket");
    const int closed = dup(f->bare);
    close(closed);
    EXPECT(cl_tcp_link_new(closed, &settings, &link) == CL_SYSTEM && link == NULL, "a link over a closed socket");
}

static void the_socket_is_set_up(fixture *f)
{
    uint32_t events;
    const int descriptor = cl_tcp_transport.pollfd(f->link, &events);
    int no_delay = 0, keep_alive = 0;
    socklen_t length = sizeof(int);
    getsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &no_delay, &length);
    getsockopt(descriptor, SOL_SOCKET, SO_KEEPALIVE, &keep_alive, &length);
    EXPECT(no_delay && keep_alive, "TCP_NODELAY %d, SO_KEEPALIVE %d", no_delay, keep_alive);
    EXPECT(fcntl(descriptor, F_GETFD) == FD_CLOEXEC, "programs that we start inherit the socket");
}

static int unsent(double inflight_nbytes, double most_nbytes, double bytes_per_s, double delay_s)
{
    const cl_settings bounds = {.inflight_nbytes = (uint64_t)inflight_nbytes, .inflight_most_nbytes = (uint64_t)most_nbytes};
    return cl_tcp_unsent_nbytes(&bounds, bytes_per_s, delay_s);
}

static void what_the_kernel_holds_follows_the_link(fixture *f)
{
    uint32_t events;
    const int descriptor = cl_tcp_transport.pollfd(f->link, &events);
    int held = 0;
    socklen_t length = sizeof held;
    EXPECT(unsent(32768, 4e6, 0, 0) == 65536, "nothing known: %d", unsent(32768, 4e6, 0, 0));
    EXPECT(unsent(32768, 4e6, 125e6, 50e-6) == 65536, "1 Gbit/s x 50 us: %d", unsent(32768, 4e6, 125e6, 50e-6));
    EXPECT(unsent(32768, 4e6, 125e6, 2e-3) == 250000, "1 Gbit/s x 2 ms: %d", unsent(32768, 4e6, 125e6, 2e-3));
    EXPECT(unsent(32768, 4e6, 1.25e9, 2e-3) == 2500000, "10 Gbit/s x 2 ms: %d", unsent(32768, 4e6, 1.25e9, 2e-3));
    EXPECT(unsent(32768, 4e6, 1.25e9, 1.0) == 4000000, "beyond the bound: %d", unsent(32768, 4e6, 1.25e9, 1.0));
    EXPECT(unsent(32768, 0, 1.25e9, 1.0) == 65536, "nothing derived: %d", unsent(32768, 0, 1.25e9, 1.0));
    EXPECT(unsent(1, 0, 0, 0) == 4096, "absurdly little: %d", unsent(1, 0, 0, 0));
    EXPECT(unsent(1e18, 0, 0, 0) == INT_MAX, "absurdly much: %d", unsent(1e18, 0, 0, 0));
    EXPECT(getsockopt(descriptor, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &held, &length) == 0 && held == 4096, "held: %d", held);
}

static void only_a_full_link_asks_for_room(fixture *f)
{
    uint32_t events = 0;
    cl_tcp_transport.pollfd(f->link, &events);
    EXPECT(events == (EPOLLIN | EPOLLRDHUP), "idle: events %x", events);
    const cl_frame frame = {.type = 1};
    while (cl_tcp_transport.pending(f->link) == 0) {
        EXPECT(cl_tcp_transport.send(f->link, &frame, NULL) == CL_OK, "send");
        EXPECT(cl_tcp_transport.arm(f->link) == CL_AGAIN, "asleep with a frame never tried");
        cl_tcp_transport.progress(f->link);
    }
    EXPECT(cl_tcp_transport.arm(f->link) == CL_OK, "a full link must not sleep");
    cl_tcp_transport.pollfd(f->link, &events);
    EXPECT(events == (EPOLLIN | EPOLLRDHUP | EPOLLOUT), "full: events %x", events);
}

static const struct {
    const char *name;
    void (*run)(fixture *f);
} cases[] = {
    {"an idle link says that it lives", an_idle_link_says_that_it_lives},
    {"a busy link needs no heartbeat", a_busy_link_needs_no_heartbeat},
    {"a silent peer is lost once", a_silent_peer_is_lost_once},
    {"heartbeats keep a peer and are not shown", heartbeats_keep_a_peer_and_are_not_shown},
    {"unread words are no silence", unread_words_are_no_silence},
    {"a heartbeat with payload is a protocol error", a_heartbeat_with_payload_is_a_protocol_error},
    {"a stream may come byte by byte", a_stream_may_come_byte_by_byte},
    {"an absurd length is streamed", an_absurd_length_is_streamed},
    {"a quiet end is told", a_quiet_end_is_told},
    {"a reset is told", a_reset_is_told},
    {"words before a reset are heard", words_before_a_reset_are_heard},
    {"a write to nobody is no signal", a_write_to_nobody_is_no_signal},
    {"a close keeps its last words", a_close_keeps_its_last_words},
    {"wrong arguments are refused", wrong_arguments_are_refused},
    {"the socket is set up", the_socket_is_set_up},
    {"what the kernel holds follows the link", what_the_kernel_holds_follows_the_link},
    {"only a full link asks for room", only_a_full_link_asks_for_room},
};

int main(void)
{
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        fixture f;
        printf("%s\n", cases[i].name);
        fflush(stdout);
        set_up(&f);
        cases[i].run(&f);
        tear_down(&f);
    }
    return 0;
}
