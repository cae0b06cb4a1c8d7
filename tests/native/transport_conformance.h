/*
 * transport_conformance.h: what every transport must do, as one suite over a pair of connected links.
 *
 * A transport is put under the suite by a factory and one line in the table of transports_test.c. The suite knows only
 * transport.h; it stops the program at the first thing that is wrong.
 */
#ifndef TRANSPORT_CONFORMANCE_H
#define TRANSPORT_CONFORMANCE_H

#include <stdbool.h>
#include <stdint.h>

#include "transport.h"

typedef struct {
    cl_link *links[2]; /* the suite sets sink, owner and peer, and closes them */
    void *context;     /* the factory's own */
} transport_pair;

/* What a transport has, and so is held to. */
enum {
    IS_REAL = 1,     /* it moves by progress(), fills up, sleeps and wakes; else by somebody's clock, in advance() */
    TELLS_CLOSE = 2, /* a link notices that its peer is closed; else somebody else does */
};

typedef struct {
    const char *name;
    int traits;
    void (*open)(transport_pair *pair, const cl_settings *settings);
    /* After both links are closed, or NULL. */
    void (*clean_up)(transport_pair *pair);
    /* A descriptor that is rung for an armed link without one of its own, made ready to ring, or NULL. */
    int (*doorbell)(transport_pair *pair, int side);
    /* Lets time pass, for what is not real. */
    void (*advance)(transport_pair *pair);
} transport_factory;

/* Prints what it runs; returns only if all is well. Same seed, same run (but for the kernel's timing). */
void conformance_run(const transport_factory *factory, uint64_t seed);

uint64_t next_random(uint64_t *state);

/* Prints place and text, and ends the program with failure, unless `condition` holds. */
#define EXPECT(condition, ...) expect((condition), __FILE__, __LINE__, __VA_ARGS__)
__attribute__((format(printf, 4, 5))) void expect(bool condition, const char *file, int line, const char *format, ...);

#endif
