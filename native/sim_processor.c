/*
 * sim_processor.c: processors of a simulation. Each serves what it is given in the order in which it is given, on the core that is
 * free first.
 */
#include <math.h>
#include <stdlib.h>

#include "sim_processor.h"

int cl_processors_init(cl_processors *p, const cl_sim_network *network)
{
    int32_t most = 0;
    *p = (cl_processors){.cores = network->cores, .message_s = network->message_s, .byte_s = network->busy_s_per_byte};
    if (p->cores < 0 || network->hosts_per_processor < 0 || !(p->message_s >= 0) || !(p->byte_s >= 0))
        return CL_INVALID;
    if (p->cores == 0)
        return CL_OK;
    int32_t hosts = network->hosts_per_processor == 0 ? 1 : network->hosts_per_processor;
    p->processor = calloc((size_t)network->size, sizeof(int32_t));
    for (int32_t r = 0; p->processor != NULL && r < network->size; r++) {
        p->processor[r] = network->hosts[r] / hosts;
        most = p->processor[r] > most ? p->processor[r] : most;
    }
    p->free_s = calloc((size_t)(most + 1) * (size_t)p->cores, sizeof(double));
    return p->processor == NULL || p->free_s == NULL ? CL_NO_MEMORY : CL_OK;
}

void cl_processors_free(cl_processors *p)
{
    free(p->processor);
    free(p->free_s);
}

bool cl_processors_cost(const cl_processors *p)
{
    return p->cores > 0 && p->message_s > 0;
}

static double work(cl_processors *p, int32_t rank, double start_s, double busy_s)
{
    double *cores = &p->free_s[(size_t)p->processor[rank] * (size_t)p->cores], *first = cores;
    for (int32_t c = 1; c < p->cores; c++)
        if (cores[c] < *first)
            first = &cores[c];
    return *first = fmax(start_s, *first) + busy_s;
}

double cl_processors_take(cl_processors *p, int32_t rank, double start_s, double more_s)
{
    return p->cores == 0 ? start_s + more_s : work(p, rank, start_s, p->message_s + more_s);
}

double cl_processors_move(cl_processors *p, int32_t rank, double start_s, uint32_t nbytes)
{
    return p->cores == 0 || nbytes == 0 ? start_s : work(p, rank, start_s, nbytes * p->byte_s);
}
