/*
 * mpi_calls.h: an MPI library met at run time, as the few calls that mpi.c makes. Nothing of its headers is needed.
 */
#ifndef CL_MPI_CALLS_H
#define CL_MPI_CALLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "commlib.h"

enum { CL_MPI_ERROR_NBYTES = 1024 }; /* no library has longer texts (MPI_MAX_ERROR_STRING: 256, 512, 1024) */

/* One of MPI's requests: 4 or 8 bytes of it are the library's. */
typedef struct {
    uint64_t handle;
    bool active; /* posted, and its end not yet dealt with */
    bool done;
} cl_mpi_request;

typedef struct {
    cl_mpi_library library;
    int error; /* the first that MPI reported: nothing is called any more */
    cl_mpi_request **watched;
    int nwatched;
    uint8_t *packed, *statuses;
    int *indices;
} cl_mpi_calls;

/* For at most `most` watched requests. Returns CL_INVALID for handles of no known size, CL_NO_MEMORY. */
int cl_mpi_calls_open(cl_mpi_calls *calls, const cl_mpi_library *library, size_t most);
void cl_mpi_calls_close(cl_mpi_calls *calls);

/* `function` is isend, issend or irecv of the library. */
void cl_mpi_post(cl_mpi_calls *calls, cl_mpi_function function, const void *data, size_t nbytes, int rank, int tag,
                 cl_mpi_request *request);
/* Puts an active request among those that the next look is for. */
void cl_mpi_watch(cl_mpi_calls *calls, cl_mpi_request *request);
/* Lets MPI work, and marks those that have ended. */
void cl_mpi_look(cl_mpi_calls *calls);
/* True when the request has ended, or was none. */
bool cl_mpi_test(cl_mpi_calls *calls, cl_mpi_request *request);
/*
 * Waits for a request whose partner is posted: its bytes are on their way, and need nobody's decision. A peer that is
 * dead or stopped for longer than `longest_s` leaves memory in MPI's hands that its owner is about to use again: the job
 * ends.
 */
void cl_mpi_wait(cl_mpi_calls *calls, cl_mpi_request *request, double longest_s);
/* Asks for a posted receive back; a test tells its end. */
void cl_mpi_begin_cancel(cl_mpi_calls *calls, cl_mpi_request *request);
/* The same, and waits. True: it was taken back; false: its message came. */
bool cl_mpi_cancel(cl_mpi_calls *calls, cl_mpi_request *request, double longest_s);
/* The error in words. */
void cl_mpi_error_text(const cl_mpi_calls *calls, char text[CL_MPI_ERROR_NBYTES]);
double cl_mpi_now_s(void);

#endif
