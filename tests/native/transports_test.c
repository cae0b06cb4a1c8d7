/*
 * transports_test.c: the table of transports under the conformance suite.
 *
 * Usage: transports_test NAME [SEED], or without a name to list the table.
 */
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine.h"
#include "transport_conformance.h"

enum { TINY_NBYTES = 4096 };

static void open_links(transport_pair *pair, const int sockets[2], const cl_settings *settings)
{
    for (int i = 0; i < 2; i++)
        EXPECT(cl_tcp_link_new(sockets[i], settings, &pair->links[i]) == CL_OK, "no link over a connected socket");
}

static void shrink_buffers(int socket)
{
    const int nbytes = TINY_NBYTES;
    setsockopt(socket, SOL_SOCKET, SO_SNDBUF, &nbytes, sizeof nbytes);
    setsockopt(socket, SOL_SOCKET, SO_RCVBUF, &nbytes, sizeof nbytes);
}

static void connect_loopback(int sockets[2], bool tiny)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    sockets[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (tiny) { /* before the connection, since the window is agreed on there */
        shrink_buffers(listener);
        shrink_buffers(sockets[0]);
    }
    const bool connected = bind(listener, (struct sockaddr *)&address, sizeof address) == 0 &&
                           getsockname(listener, (struct sockaddr *)&address, &length) == 0 && listen(listener, 1) == 0 &&
                           connect(sockets[0], (struct sockaddr *)&address, sizeof address) == 0;
    EXPECT(connected, "no loopback connection");
    sockets[1] = accept(listener, NULL, NULL);
    EXPECT(sockets[1] >= 0, "accept failed");
    close(listener);
}

static void open_tcp(transport_pair *pair, const cl_settings *settings)
{
    int sockets[2];
    connect_loopback(sockets, false);
    open_links(pair, sockets, settings);
}

static void open_tcp_tiny(transport_pair *pair, const cl_settings *settings)
{
    int sockets[2];
    connect_loopback(sockets, true);
    open_links(pair, sockets, settings);
}

static void open_socketpair(transport_pair *pair, const cl_settings *settings)
{
    int sockets[2];
    EXPECT(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0, "no socketpair");
    open_links(pair, sockets, settings);
}

/* Two engines that are never started: they own the memory, and lend us the links that attaching made. */
static void open_shm(transport_pair *pair, const cl_settings *settings)
{
    cl_engine **engines = calloc(2, sizeof(cl_engine *));
    int memfds[2], doorbells[2];
    EXPECT(engines != NULL, "no memory for the test");
    for (int32_t i = 0; i < 2; i++) {
        EXPECT(cl_engine_new(i, 2, settings, &engines[i]) == CL_OK, "no engine");
        EXPECT(cl_shm_create(engines[i], 1, &memfds[i], &doorbells[i]) == CL_OK, "no shared memory");
    }
    for (int32_t i = 0; i < 2; i++) {
        const int32_t peer = 1 - i;
        const int status = cl_shm_attach(engines[i], peer, dup(memfds[peer]), dup(doorbells[peer]), -1, 0, 0);
        EXPECT(status == CL_OK, "shared memory cannot be attached");
        pair->links[i] = engines[i]->peers[peer].link;
        engines[i]->peers[peer].link = NULL;
    }
    pair->context = engines;
}

static void open_shm_tiny(transport_pair *pair, const cl_settings *settings)
{
    cl_settings tiny = *settings;
    tiny.shm_ring_nbytes = TINY_NBYTES;
    open_shm(pair, &tiny);
}

static void clean_up_shm(transport_pair *pair)
{
    cl_engine **engines = pair->context;
    for (int i = 0; i < 2; i++) {
        cl_engine_shutdown(engines[i], 0);
        cl_engine_free(engines[i]);
    }
    free(engines);
}

/* Says that this side sleeps, as the engine's thread does, and takes away what rang before. */
static int shm_doorbell(transport_pair *pair, int side)
{
    cl_engine **engines = pair->context;
    atomic_int *sleeping;
    uint64_t rings;
    int doorbell = -1;
    EXPECT(cl_shm_doorbell(engines[side], &sleeping, &doorbell), "no doorbell");
    while (read(doorbell, &rings, sizeof rings) > 0)
        ;
    atomic_store(sleeping, 1);
    return doorbell;
}

/* The simulator owns its links as long as it lives; time passes up to a timer of ours. */
static void open_sim(transport_pair *pair, const cl_settings *settings)
{
    const cl_sim_link network = {.alpha_s = 1e-5, .beta_s_per_byte = 1e-9};
    const int32_t hosts[2] = {0, 1};
    cl_sim *sim = NULL;
    EXPECT(cl_sim_new(2, hosts, &network, &network, settings, &sim) == CL_OK, "no simulation");
    for (int32_t i = 0; i < 2; i++)
        pair->links[i] = cl_sim_engine(sim, i)->peers[1 - i].link;
    pair->context = sim;
}

static void clean_up_sim(transport_pair *pair)
{
    cl_sim_free(pair->context);
}

static void advance_sim(transport_pair *pair)
{
    int32_t rank;
    uint64_t token;
    EXPECT(cl_sim_timer(pair->context, 0, cl_sim_now(pair->context) + 1e-4, 0) == CL_OK, "no timer");
    EXPECT(cl_sim_next(pair->context, &rank, &token) == CL_SIM_TIMER, "the timer did not fire");
}

static const transport_factory transports[] = {
    {"shm", IS_REAL | TELLS_CLOSE, open_shm, clean_up_shm, shm_doorbell, NULL},
    {"shm-tiny-ring", IS_REAL | TELLS_CLOSE, open_shm_tiny, clean_up_shm, shm_doorbell, NULL},
    {"tcp", IS_REAL | TELLS_CLOSE, open_tcp, NULL, NULL, NULL},
    {"tcp-tiny-buffers", IS_REAL | TELLS_CLOSE, open_tcp_tiny, NULL, NULL, NULL},
    {"tcp-over-socketpair", IS_REAL | TELLS_CLOSE, open_socketpair, NULL, NULL, NULL},
    {"sim", 0, open_sim, clean_up_sim, NULL, advance_sim},
};

int main(int argc, char **argv)
{
    const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    bool found = false;
    for (size_t i = 0; i < sizeof transports / sizeof transports[0]; i++) {
        if (argc < 2)
            printf("%s\n", transports[i].name);
        else if (strcmp(argv[1], transports[i].name) == 0) {
            conformance_run(&transports[i], seed);
            found = true;
        }
    }
    return argc < 2 || found ? 0 : 2;
}
