/*
 * fuzz.h: an engine with operations of all kinds, whose peers say whatever the fuzzer's bytes mean.
 *
 * A target (fuzz_tcp.c, fuzz_shm.c) has links of one kind and puts what is said on them; fuzz.c has the engine, and makes frames
 * of the bytes: such as the engine could have got itself, with any field changed. libFuzzer calls LLVMFuzzerTestOneInput; without
 * it, fuzz_main.c does.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include "../../native/engine.h"
#include "tasks.h"

enum { FUZZ_RANKS = 4, FUZZ_PAYLOAD_NBYTES = 1 << 14 };

/* The rest of the input; past its end there are zeros. */
typedef struct {
    const uint8_t *at, *end;
} fuzz_bytes;

typedef struct {
    program p;
    int32_t rank; /* whose engine it is; the others are mad */
    cl_settings settings;
    cl_engine *engine;
    double now_s;
    uint64_t random;
    fuzz_bytes bytes;
    cl_meta metas[MOST_TASKS]; /* what all ranks but the odd one submit */
    cl_ticket tickets[8];
    uint32_t ntickets;
    uint8_t payload[FUZZ_PAYLOAD_NBYTES];
} fuzz;

typedef struct {
    /* Links the engine to all of its peers. */
    void (*link)(fuzz *f);
    /* A peer says a frame and `nbytes` of payload, which may be fewer than the frame promises. */
    void (*say)(fuzz *f, int32_t peer, const cl_frame *frame, const void *payload, size_t nbytes);
    /* A peer does what only such links know. */
    void (*act)(fuzz *f, int32_t peer);
    /* A peer hangs up. */
    void (*hang_up)(fuzz *f, int32_t peer);
    /* After the engine is gone. */
    void (*end)(fuzz *f);
} fuzz_links;

uint8_t fuzz_byte(fuzz_bytes *bytes);
/* Mostly small; now and then 64 bits of any kind. */
uint64_t fuzz_number(fuzz_bytes *bytes);
/* One run: what is submitted, what peers say, and how it ends. */
void fuzz_run(const fuzz_links *links, const uint8_t *data, size_t nbytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

#endif
