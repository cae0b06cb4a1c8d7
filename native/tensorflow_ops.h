/*
 * tensorflow_ops.h: what tensorflow_ops.cc and frameworks/tensorflow/native.py say to each other. Python's side mirrors these
 * structs with ctypes; both come out of one wheel, and `commlib_tensorflow_version` says so.
 */
#ifndef CL_TENSORFLOW_OPS_H
#define CL_TENSORFLOW_OPS_H

#include "commlib.h"

enum { CL_TENSORFLOW_VERSION = 2, CL_TENSORFLOW_TEXT_NBYTES = 1024, CL_TENSORFLOW_REQUEST_TEXT_NBYTES = 256 };

/* One execution of an op, as Python sees it. It lives until `land` has returned. */
typedef struct {
    void *token;           /* what a queue tells of this call */
    const char *call;      /* the op's attribute: JSON */
    int32_t dtype;         /* a cl_dtype; -1: the op has no input */
    int32_t ndims;         /* of input 0, */
    const int64_t *dims;
    void *data;            /* which Python may read until `land` */
    const int64_t *splits; /* input 1, of int64; NULL: there is none */
    int64_t nsplits;
    int32_t status, peer;  /* written by Python when it answers CL_TENSORFLOW_FAILED */
    char text[CL_TENSORFLOW_TEXT_NBYTES];
} cl_tensorflow_call;

/* An all-reduce that C submits again and again. */
typedef struct {
    uint64_t base;       /* the n-th use of the name has the key base + n * stride, */
    uint64_t stride;
    int32_t is_named;    /* and may not begin before the one before is done: */
    char busy[CL_TENSORFLOW_TEXT_NBYTES]; /* what is said if it does */
    char text[CL_TENSORFLOW_REQUEST_TEXT_NBYTES];
    cl_request request;  /* all but key, input and output; the last, as Python writes it without knowing it */
} cl_tensorflow_description;

enum {
    CL_TENSORFLOW_BEGUN = 0, /* a queue will tell of its end, and then it will be landed */
    CL_TENSORFLOW_DONE,      /* its outputs were written */
    CL_TENSORFLOW_FAILED     /* status, peer and text say why */
};

/* Python's functions, each called with the GIL. */
typedef struct {
    /* Makes the default communicator's session known, by commlib_tensorflow_open. */
    int (*attach)(cl_tensorflow_call *call);
    int (*describe)(cl_tensorflow_call *call, cl_tensorflow_description *description);
    int (*begin)(cl_tensorflow_call *call);
    int (*land)(cl_tensorflow_call *call);
} cl_tensorflow_callbacks;

#endif
