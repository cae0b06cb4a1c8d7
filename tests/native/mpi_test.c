/*
 * mpi_test.c: the mpi transport under the conformance suite, over the MPI library that this is linked with.
 *
 * One process is both sides: it sends to itself, and tags keep the directions apart. Usage: mpi_test [SEED].
 */
#include <mpi.h>
#include <stdlib.h>
#include <string.h>

#include "mpi_link.h"
#include "transport_conformance.h"

enum { LINGER_MS = 2000 };

typedef struct {
    MPI_Comm communicator;
    cl_mpi *sides[2];
} two_sides;

static uint64_t handle_of(const void *handle, size_t nbytes)
{
    uint64_t number = 0;
    memcpy(&number, handle, nbytes); /* little-endian */
    return number;
}

static void open_mpi(transport_pair *pair, const cl_settings *settings)
{
    two_sides *two = calloc(1, sizeof *two);
    MPI_Datatype byte = MPI_BYTE;
    EXPECT(two != NULL, "no memory for the test");
    MPI_Comm_dup(MPI_COMM_SELF, &two->communicator);
    MPI_Comm_set_errhandler(two->communicator, MPI_ERRORS_RETURN);
    const cl_mpi_library library = {
        .isend = (cl_mpi_function)MPI_Isend, .issend = (cl_mpi_function)MPI_Issend, .irecv = (cl_mpi_function)MPI_Irecv,
        .testsome = (cl_mpi_function)MPI_Testsome, .test = (cl_mpi_function)MPI_Test,
        .cancel = (cl_mpi_function)MPI_Cancel, .test_cancelled = (cl_mpi_function)MPI_Test_cancelled,
        .error_string = (cl_mpi_function)MPI_Error_string, .abort = (cl_mpi_function)MPI_Abort,
        .communicator = handle_of(&two->communicator, sizeof(MPI_Comm)), .byte = handle_of(&byte, sizeof byte),
        .handle_nbytes = sizeof(MPI_Request), .status_nbytes = sizeof(MPI_Status),
    };
    for (int i = 0; i < 2; i++) {
        EXPECT(cl_mpi_new(&library, 1, settings, &two->sides[i]) == CL_OK, "no library");
        EXPECT(cl_mpi_link_new(two->sides[i], 0, i, 1 - i, &pair->links[i]) == CL_OK, "no link");
    }
    pair->context = two;
}

static void clean_up_mpi(transport_pair *pair)
{
    two_sides *two = pair->context;
    /* The first may still have to hear from the second, which is this process: it leaves at once, and nothing is lost. */
    const int first = cl_mpi_free(two->sides[0], 0), second = cl_mpi_free(two->sides[1], LINGER_MS);
    if (first == CL_OK && second == CL_OK)
        MPI_Comm_free(&two->communicator);
    free(two);
}

/* The timer may ring before anything has come. */
static int no_doorbell(transport_pair *pair, int side)
{
    (void)pair;
    (void)side;
    return -1;
}

static const transport_factory mpi = {"mpi", IS_REAL | TELLS_CLOSE, open_mpi, clean_up_mpi, no_doorbell, NULL};

int main(int argc, char **argv)
{
    int granted;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &granted);
    EXPECT(granted >= MPI_THREAD_SERIALIZED, "this MPI library knows no threads");
    conformance_run(&mpi, argc > 1 ? strtoull(argv[1], NULL, 0) : 1);
    MPI_Finalize();
    return 0;
}
