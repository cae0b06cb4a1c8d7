/*
 * mpi_calls.c: calls of an MPI library by address, in the binary interface that it has.
 *
 * Handles are ints in MPICH's interface (Intel MPI's, and most vendors'), and pointers in Open MPI's and in MPI 5's
 * standard one; that and the size of a status is all that differs in the calls made here. No status is looked into.
 */
#define _GNU_SOURCE
#include "mpi_calls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Isend, Issend and Irecv have one shape. */
typedef int (*post_with_int)(const void *, int, int, int, int, int, void *);
typedef int (*post_with_pointer)(const void *, int, void *, int, int, void *, void *);
typedef int (*abort_with_int)(int, int);
typedef int (*abort_with_pointer)(void *, int);
typedef int (*testsome_function)(int, void *, int *, int *, void *);
typedef int (*test_function)(void *, int *, void *);
typedef int (*cancel_function)(void *);
typedef int (*test_cancelled_function)(const void *, int *);
typedef int (*error_string_function)(int, char *, int *);

static void *pointer(uint64_t handle)
{
    return (void *)(uintptr_t)handle;
}

static void note(cl_mpi_calls *calls, int error)
{
    if (calls->error == 0)
        calls->error = error;
}

double cl_mpi_now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int cl_mpi_calls_open(cl_mpi_calls *calls, const cl_mpi_library *library, size_t most)
{
    if (library->handle_nbytes != sizeof(int) && library->handle_nbytes != sizeof(void *))
        return CL_INVALID;
    *calls = (cl_mpi_calls){.library = *library};
    calls->watched = calloc(most, sizeof *calls->watched);
    calls->packed = calloc(most, library->handle_nbytes);
    calls->statuses = calloc(most, library->status_nbytes);
    calls->indices = calloc(most, sizeof(int));
    if (calls->watched != NULL && calls->packed != NULL && calls->statuses != NULL && calls->indices != NULL)
        return CL_OK;
    cl_mpi_calls_close(calls);
    return CL_NO_MEMORY;
}

void cl_mpi_calls_close(cl_mpi_calls *calls)
{
    free(calls->watched);
    free(calls->packed);
    free(calls->statuses);
    free(calls->indices);
}

void cl_mpi_post(cl_mpi_calls *calls, cl_mpi_function function, const void *data, size_t nbytes, int rank, int tag,
                 cl_mpi_request *request)
{
    const cl_mpi_library *library = &calls->library;
    int error;
    if (library->handle_nbytes == sizeof(int))
        error = ((post_with_int)function)(data, (int)nbytes, (int)library->byte, rank, tag, (int)library->communicator,
                                          &request->handle);
    else
        error = ((post_with_pointer)function)(data, (int)nbytes, pointer(library->byte), rank, tag,
                                              pointer(library->communicator), &request->handle);
    request->active = error == 0;
    request->done = false;
    note(calls, error);
}

void cl_mpi_watch(cl_mpi_calls *calls, cl_mpi_request *request)
{
    const size_t nbytes = calls->library.handle_nbytes;
    if (!request->active || request->done)
        return;
    memcpy(calls->packed + (size_t)calls->nwatched * nbytes, &request->handle, nbytes);
    calls->watched[calls->nwatched++] = request;
}

void cl_mpi_look(cl_mpi_calls *calls)
{
    const int count = calls->nwatched;
    int ended = 0;
    calls->nwatched = 0;
    if (count == 0 || calls->error != 0)
        return;
    const testsome_function testsome = (testsome_function)calls->library.testsome;
    note(calls, testsome(count, calls->packed, &ended, calls->indices, calls->statuses));
    for (int i = 0; i < ended && calls->error == 0; i++) /* MPI_UNDEFINED is negative */
        calls->watched[calls->indices[i]]->done = true;
}

bool cl_mpi_test(cl_mpi_calls *calls, cl_mpi_request *request)
{
    int flag = 0;
    if (!request->active || request->done || calls->error != 0)
        return true;
    note(calls, ((test_function)calls->library.test)(&request->handle, &flag, calls->statuses));
    request->done = flag != 0;
    return request->done || calls->error != 0;
}

static void end_job(const cl_mpi_calls *calls)
{
    const cl_mpi_library *library = &calls->library;
    fputs("commlib: a rank does not answer, and MPI holds memory of this one that is needed: the job ends\n", stderr);
    if (library->handle_nbytes == sizeof(int))
        ((abort_with_int)library->abort)((int)library->communicator, 1);
    else
        ((abort_with_pointer)library->abort)(pointer(library->communicator), 1);
    abort(); /* where MPI's returns */
}

void cl_mpi_wait(cl_mpi_calls *calls, cl_mpi_request *request, double longest_s)
{
    const double end_s = cl_mpi_now_s() + longest_s;
    while (!cl_mpi_test(calls, request))
        if (cl_mpi_now_s() >= end_s)
            end_job(calls);
}

void cl_mpi_begin_cancel(cl_mpi_calls *calls, cl_mpi_request *request)
{
    if (request->active && !request->done && calls->error == 0)
        note(calls, ((cancel_function)calls->library.cancel)(&request->handle));
}

bool cl_mpi_cancel(cl_mpi_calls *calls, cl_mpi_request *request, double longest_s)
{
    int cancelled = 0;
    if (!request->active || request->done || calls->error != 0)
        return false;
    cl_mpi_begin_cancel(calls, request);
    cl_mpi_wait(calls, request, longest_s);
    if (calls->error == 0) /* the status of the last test is the first */
        note(calls, ((test_cancelled_function)calls->library.test_cancelled)(calls->statuses, &cancelled));
    return cancelled != 0;
}

void cl_mpi_error_text(const cl_mpi_calls *calls, char text[CL_MPI_ERROR_NBYTES])
{
    int length = 0;
    text[0] = 0;
    ((error_string_function)calls->library.error_string)(calls->error, text, &length);
}
