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

static const transport_factory transports[] = {
    {"tcp", true, open_tcp, NULL, NULL},
    {"tcp-tiny-buffers", true, open_tcp_tiny, NULL, NULL},
    {"tcp-over-socketpair", true, open_socketpair, NULL, NULL},
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
