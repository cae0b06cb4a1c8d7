/* fuzz_tcp.c: the peers of an engine write anything at all on their sockets. */
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"

enum { NOISE_NBYTES = 256 };

static int wires[FUZZ_RANKS];

static void tcp_link(fuzz *f)
{
    for (int32_t peer = 0; peer < f->p.size; peer++) {
        int pair[2] = {-1, -1};
        if (peer != f->rank) {
            CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            CHECK(cl_tcp_attach(f->engine, peer, pair[0]) == CL_OK);
        }
        wires[peer] = pair[1];
    }
}

static void send_bytes(int32_t peer, const void *bytes, size_t nbytes)
{
    (void)!send(wires[peer], bytes, nbytes, MSG_DONTWAIT | MSG_NOSIGNAL); /* it may have hung up, or read nothing */
}

static void tcp_say(fuzz *f, int32_t peer, const cl_frame *frame, const void *payload, size_t nbytes)
{
    (void)f;
    send_bytes(peer, frame, sizeof *frame);
    send_bytes(peer, payload, nbytes);
}

/* Listens, or says what is no frame. */
static void tcp_act(fuzz *f, int32_t peer)
{
    static uint8_t heard[1 << 16];
    uint8_t noise[NOISE_NBYTES], length = fuzz_byte(&f->bytes);
    (void)!recv(wires[peer], heard, sizeof heard, MSG_DONTWAIT);
    for (int i = 0; i < length; i++)
        noise[i] = fuzz_byte(&f->bytes);
    send_bytes(peer, noise, length);
}

static void tcp_hang_up(fuzz *f, int32_t peer)
{
    (void)f;
    shutdown(wires[peer], SHUT_RDWR);
}

static void tcp_end(fuzz *f)
{
    for (int32_t peer = 0; peer < FUZZ_RANKS; peer++)
        if (wires[peer] >= 0 && peer != f->rank && peer < f->p.size)
            close(wires[peer]);
}

static const fuzz_links links = {tcp_link, tcp_say, tcp_act, tcp_hang_up, tcp_end};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    fuzz_run(&links, data, nbytes);
    return 0;
}
