/*
 * tensorflow_ops.cc: collectives as asynchronous ops of TensorFlow, on its C ABI: one binary for many versions of it.
 *
 * The table of the ops, their registration when TensorFlow loads the library, and the functions that Python calls.
 * tensorflow_calls.cc runs them.
 */
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstring>

#include "tensorflow_calls.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace commlib;

namespace {

/* ---- what TensorFlow is told of the ops ------------------------------------------------------------------------------ */

void shape_as_input(TF_ShapeInferenceContext *context, TF_Status *status)
{
    TF_ShapeHandle *shape = TF_NewShapeHandle();
    TF_ShapeInferenceContextGetInput(context, 0, shape, status);
    if (TF_GetCode(status) == TF_OK)
        TF_ShapeInferenceContextSetOutput(context, 0, shape, status);
    TF_DeleteShapeHandle(shape);
}

void shape_of_scalar(TF_ShapeInferenceContext *context, TF_Status *status)
{
    TF_ShapeHandle *shape = TF_ShapeInferenceContextScalar(context);
    TF_ShapeInferenceContextSetOutput(context, 0, shape, status);
    TF_DeleteShapeHandle(shape);
}

void shape_unknown(TF_ShapeInferenceContext *context, TF_Status *status)
{
    TF_ShapeInferenceContextSetUnknownShape(context, status);
}

void shape_none(TF_ShapeInferenceContext *, TF_Status *)
{
}

template <Role role>
void *create(TF_OpKernelConstruction *construction)
{
    Status status;
    int32_t list_size = 0, nbytes = 0;
    Kernel *kernel = new Kernel;
    kernel->role = role;
    TF_OpKernelConstruction_GetAttrSize(construction, "call", &list_size, &nbytes, status);
    if (status.well()) {
        kernel->call.resize(nbytes > 0 ? (size_t)nbytes : 0);
        TF_OpKernelConstruction_GetAttrString(construction, "call", &kernel->call[0], kernel->call.size(), status);
    }
    if (!status.well())
        TF_OpKernelConstruction_Failure(construction, status);
    return kernel;
}

void destroy(void *kernel)
{
    delete static_cast<Kernel *>(kernel);
}

const char *const TYPE_ATTRIBUTE = "T: {float, bfloat16, half, double, int32, int64, uint8, int8, int16, bool}";

struct Op {
    const char *name;
    const char *inputs[2], *outputs[2];
    void (*shape)(TF_ShapeInferenceContext *, TF_Status *);
    void *(*create)(TF_OpKernelConstruction *);
    void (*compute)(void *, TF_OpKernelContext *, TF_AsyncOpKernelDoneCallback *);
};

const Op OPS[] = {
    {"CommlibAllreduce", {"tensor: T"}, {"reduced: T"}, shape_as_input, create<Role::direct>, compute},
    {"CommlibBegin", {"tensor: T"}, {"lent: T"}, shape_as_input, create<Role::begins>, compute}, /* `lent` is not to be read */
    {"CommlibFinish", {}, {"reduced: T"}, shape_unknown, create<Role::finishes>, compute},
    {"CommlibAdasum", {"tensor: T"}, {"reduced: T"}, shape_as_input, create<Role::by_python>, compute},
    {"CommlibBroadcast", {"tensor: T"}, {"told: T"}, shape_as_input, create<Role::by_python>, compute},
    {"CommlibAllgather", {"tensor: T"}, {"gathered: T"}, shape_unknown, create<Role::by_python>, compute},
    {"CommlibReducescatter", {"tensor: T"}, {"share: T"}, shape_unknown, create<Role::by_python>, compute},
    {"CommlibAlltoall", {"tensor: T", "splits: int64"}, {"received: T", "received_splits: int64"}, shape_unknown,
     create<Role::by_python>, compute},
    {"CommlibCheck", {"tensor: T"}, {"checked: T"}, shape_as_input, create<Role::by_python>, compute},
    {"CommlibBarrier", {}, {}, shape_none, create<Role::by_python>, compute},
    {"CommlibNumber", {}, {"number: int32"}, shape_of_scalar, create<Role::by_python>, compute},
    {"CommlibSelfTest", {"tensor: T"}, {"same: T"}, shape_as_input, create<Role::by_python>, compute_self_test},
};

void complain(const Op &op, const Status &status)
{
    fprintf(stderr, "commlib: TensorFlow refuses the op %s: %s\n", op.name, status.text());
}

void register_op(const Op &op)
{
    Status status;
    TF_OpDefinitionBuilder *builder = TF_NewOpDefinitionBuilder(op.name);
    for (const char *input : op.inputs)
        if (input != nullptr)
            TF_OpDefinitionBuilderAddInput(builder, input);
    for (const char *output : op.outputs)
        if (output != nullptr)
            TF_OpDefinitionBuilderAddOutput(builder, output);
    if (op.outputs[0] != nullptr && strstr(op.outputs[0], ": T") != nullptr)
        TF_OpDefinitionBuilderAddAttr(builder, TYPE_ATTRIBUTE);
    TF_OpDefinitionBuilderAddAttr(builder, "call: string");
    TF_OpDefinitionBuilderSetIsStateful(builder, true); /* what is not is folded, merged and pruned */
    TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, op.shape);
    TF_RegisterOpDefinition(builder, status);
    if (!status.well()) {
        complain(op, status);
        return;
    }
    TF_KernelBuilder *kernel = TF_NewAsyncKernelBuilder(op.name, "CPU", op.create, op.compute, destroy);
    TF_RegisterKernelBuilder(op.name, kernel, status);
    if (!status.well())
        complain(op, status);
}

/* When TensorFlow loads this library. */
__attribute__((constructor)) void register_all()
{
    for (const Op &op : OPS)
        register_op(op);
}

} /* namespace */

/* ---- what Python calls ----------------------------------------------------------------------------------------------- */

/* The version of tensorflow_ops.h, and the sizes of its structs as Python knows them: they must be the same there. */
EXPORTED void commlib_tensorflow_version(uint64_t *version, uint64_t *call_nbytes, uint64_t *description_nbytes)
{
    *version = CL_TENSORFLOW_VERSION;
    *call_nbytes = sizeof(cl_tensorflow_call);
    *description_nbytes = offsetof(cl_tensorflow_description, request);
}

EXPORTED void commlib_tensorflow_install(const cl_tensorflow_callbacks *callbacks)
{
    library().callbacks = *callbacks;
}

/* From here on kernels use this engine. Returns a cl_status; CL_INVALID: the engine is of another version. */
EXPORTED int commlib_tensorflow_open(const cl_functions *functions, cl_engine *engine, int direct, uint64_t first_use)
{
    Library &all = library();
    if (functions->version != CL_FUNCTIONS_VERSION || functions->nbytes != sizeof(cl_functions) + sizeof(cl_request))
        return CL_INVALID;
    std::lock_guard<std::mutex> lock(all.mutex);
    if (all.session.load() != nullptr)
        return CL_OK; /* another kernel was first */
    if (all.queue == nullptr) {
        all.functions = functions;
        cl_queue *queue;
        if (functions->queue_new(&queue) != CL_OK)
            return CL_NO_MEMORY;
        all.queue = queue;
        if (!start_landing())
            return CL_SYSTEM;
    }
    Session *session = new Session;
    session->number = ++all.nsessions;
    session->functions = functions;
    session->engine = engine;
    session->direct.store(direct);
    session->first_use = first_use;
    all.session.store(session);
    return CL_OK;
}

EXPORTED void *commlib_tensorflow_queue(void)
{
    return library().queue;
}

/* Whether C may submit by itself, and from which number uses of names are counted: all anew, if that is another one. */
EXPORTED void commlib_tensorflow_direct(int direct, uint64_t first_use)
{
    User user;
    if (user.session == nullptr)
        return;
    std::lock_guard<std::mutex> lock(user.session->mutex);
    user.session->direct.store(direct);
    if (first_use == user.session->first_use)
        return;
    user.session->first_use = first_use;
    for (auto &name : user.session->names)
        name.second->uses.store(first_use);
}

namespace {
Session *closed; /* between close and drain, which one thread calls */
}

/* Before the engine is shut down: returns when no kernel submits any more. Called without the GIL. */
EXPORTED void commlib_tensorflow_close(void)
{
    closed = library().session.exchange(nullptr);
    while (closed != nullptr && library().users.load() > 0)
        usleep(PAUSE_US);
}

/* After it: TensorFlow has been told of every end. Returns 0 if that took longer than `timeout_ms`. Without the GIL, too. */
EXPORTED int commlib_tensorflow_drain(int timeout_ms)
{
    for (int64_t left_us = 1000 * (int64_t)timeout_ms; library().outstanding.load() > 0; left_us -= PAUSE_US) {
        if (left_us <= 0)
            return 0; /* the session stays, as somebody still uses it */
        usleep(PAUSE_US);
    }
    delete closed;
    closed = nullptr;
    return 1;
}

/* Forgets what was begun and not finished: after a step that failed half way. */
EXPORTED void commlib_tensorflow_drop(void)
{
    User user;
    if (user.session != nullptr)
        drop_pending(user.session);
}

EXPORTED void commlib_tensorflow_ending(void)
{
    library().ending.store(1);
}

/* Memory for an output of a call, of its type and this shape; NULL: there is none. */
EXPORTED void *commlib_tensorflow_output(cl_tensorflow_call *base, int index, const int64_t *dims, int ndims)
{
    Call *call = static_cast<Call *>(base);
    TF_DataType theirs = TF_ExpectedOutputDataType(call->context, index);
    const Dtype *dtype = dtype_of(theirs);
    size_t nbytes = dtype == nullptr ? 0 : dtype->nbytes;
    for (int i = 0; i < ndims; i++)
        nbytes *= (size_t)dims[i];
    Status status;
    TF_Tensor *tensor = TF_AllocateOutput(call->context, index, theirs, dims, ndims, nbytes, status);
    if (!status.well() || tensor == nullptr)
        return nullptr;
    static char nothing;
    void *data = TF_TensorData(tensor);
    if (call->kernel->role == Role::begins)
        call->output = tensor; /* it will be another op's */
    else
        TF_DeleteTensor(tensor); /* the context holds it */
    return data == nullptr ? &nothing : data;
}

/* Takes a name for a call that Python submits, until it ends. Returns 0 if the name is in flight, however that was submitted. */
EXPORTED int commlib_tensorflow_claim(cl_tensorflow_call *base, uint64_t key)
{
    Call *call = static_cast<Call *>(base);
    Session *session = library().session.load(); /* kept by `compute`, in which Python is called */
    Name *name = session == nullptr ? nullptr : name_of(session, key);
    if (name == nullptr || name->in_flight.exchange(true))
        return session == nullptr;
    call->name = name;
    return 1;
}

/* The latest failure whose text is part of a message. Returns its status, 0 if there is none. */
EXPORTED int commlib_tensorflow_failure(const char *message, int32_t *peer, char *text, size_t nbytes)
{
    Library &all = library();
    std::lock_guard<std::mutex> lock(all.mutex);
    for (unsigned back = 1; back <= KEPT_FAILURES && back <= all.nfailures; back++) {
        const Failure &failure = all.failures[(all.nfailures - back) % KEPT_FAILURES];
        if (!failure.text.empty() && strstr(message, failure.text.c_str()) != nullptr) {
            *peer = failure.peer;
            snprintf(text, nbytes, "%s", failure.text.c_str());
            return failure.status;
        }
    }
    return CL_OK;
}
