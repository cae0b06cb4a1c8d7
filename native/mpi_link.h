/*
 * mpi_link.h: one MPI library and the links over it, as the engine makes and ends them.
 */
#ifndef CL_MPI_LINK_H
#define CL_MPI_LINK_H

#include "transport.h"

typedef struct cl_mpi cl_mpi;

/* For at most `npeers` links. Returns CL_INVALID for handles of no known size, CL_NO_MEMORY, CL_SYSTEM. */
int cl_mpi_new(const cl_mpi_library *library, int32_t npeers, const cl_settings *settings, cl_mpi **mpi);
/*
 * A link to a rank of the communicator. `out` and `in` keep links of one process to itself apart (0 and 1; 1 and 0); 0
 * and 0 between processes. It is freed by cl_mpi_free; closing it only takes it from its owner.
 */
int cl_mpi_link_new(cl_mpi *mpi, int rank, int out, int in, cl_link **link);
/*
 * After all links are closed: waits at most `linger_ms` for the peers' last words, takes back what is posted, frees all.
 * Returns CL_AGAIN if something is left in the communicator: it must not be used again, nor freed.
 */
int cl_mpi_free(cl_mpi *mpi, int32_t linger_ms);

#endif
