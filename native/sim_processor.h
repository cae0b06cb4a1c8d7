/* sim_processor.h: processors of a simulation: cores that ranks share, busy for a while with every message. */
#ifndef CL_SIM_PROCESSOR_H
#define CL_SIM_PROCESSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "commlib.h"

typedef struct {
    double *free_s;      /* per core: when it has done all that it was given; those of one processor side by side */
    int32_t *processor;  /* per rank */
    int32_t cores;       /* of each processor; 0: messages take no processor time */
    double message_s, byte_s;
} cl_processors;

/* Returns CL_NO_MEMORY, CL_INVALID, or CL_OK. */
int cl_processors_init(cl_processors *p, const cl_sim_network *network);
void cl_processors_free(cl_processors *p);
/* True if messages keep a processor busy at all. */
bool cl_processors_cost(const cl_processors *p);
/* The rank takes up a message at start_s, and does more with it. Returns when it has: on the core that is free first. */
double cl_processors_take(cl_processors *p, int32_t rank, double start_s, double more_s);
/* The rank's system moves so many bytes through its network, from start_s on, beside all else. */
double cl_processors_move(cl_processors *p, int32_t rank, double start_s, uint32_t nbytes);

#endif
