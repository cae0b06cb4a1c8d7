/* status.c: one sentence per status, for messages that have no better text. */
#include "commlib.h"

static const char *const texts[CL_STATUS_END] = {
    [CL_OK] = "all is well",
    [CL_AGAIN] = "not now: try again later",
    [CL_INVALID] = "an argument is wrong",
    [CL_NO_MEMORY] = "out of memory",
    [CL_SYSTEM] = "a system call failed",
    [CL_MISMATCH] = "the ranks submitted different things",
    [CL_PEER_LOST] = "a rank was lost",
    [CL_PEER_LEFT] = "a rank has shut down",
    [CL_SHUTDOWN] = "this communicator was shut down",
    [CL_JOINED] = "a rank has joined",
    [CL_STALLED] = "a rank did not submit the operation in time",
    [CL_FORKED] = "this is a forked child, which has no part in its parent's communicator",
};

const char *cl_status_text(int status)
{
    return status < 0 || status >= CL_STATUS_END ? "an unknown status" : texts[status];
}
