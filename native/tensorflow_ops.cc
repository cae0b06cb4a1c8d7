/*
 * tensorflow_ops.cc: collectives as asynchronous ops of TensorFlow, on its C ABI: one binary for many versions of it.
 *
 * A kernel submits and returns; one thread of this library takes finished operations off a queue and tells TensorFlow, so
 * nothing of TensorFlow runs on the engine's threads, and nothing of the engine below TensorFlow's. An all-reduce goes from
 * kernel to engine without Python, once Python has described it; every other kind is begun and landed by Python
 * (frameworks/tensorflow/native.py), which also sees all-reduces while a timeline is recorded or another backend moves the bytes.
 *
 * This file knows no name, no reduction and no process set: those are in the op's attribute `call`, which Python wrote and reads.
 * The library object is the one global here, as TensorFlow makes kernels without asking for whom.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "tensorflow_abi.h"
extern "C" {
#include "tensorflow_ops.h"
}

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using Done = std::function<void()>; /* what TensorFlow's callback is; the self-test looks whether it still is */

/* ---- what lives as long as the process, and what as long as a communicator ------------------------------------------ */

struct Name {
    std::atomic<uint64_t> uses{0};
    std::atomic<bool> in_flight{false};
};

struct Session {
    uint64_t number;
    const cl_functions *functions;
    cl_engine *engine;
    std::atomic<int> direct{1}; /* 0: Python must see every operation */
    std::mutex mutex;
    std::unordered_map<uint64_t, std::unique_ptr<Name>> names; /* by base key */
};

struct Failure {
    int32_t status = CL_OK, peer = -1;
    std::string text;
};

enum { KEPT_FAILURES = 32, QUEUE_MS = 60000, PAUSE_US = 200 };

struct Library {
    cl_tensorflow_callbacks callbacks{};
    std::atomic<Session *> session{nullptr};
    std::atomic<int> users{0};           /* kernels that use the session or call Python just now */
    std::atomic<int64_t> outstanding{0}; /* executions that TensorFlow has not been told the end of */
    const cl_functions *functions = nullptr;
    cl_queue *queue = nullptr;
    uint64_t nsessions = 0;
    std::atomic<int> ending{0}; /* the interpreter ends: Python is not called for new sessions any more */
    std::mutex mutex;           /* of what follows */
    Failure failures[KEPT_FAILURES]; /* the latest, for who wants more than their text */
    unsigned nfailures = 0;
};

Library &library()
{
    static Library *one = new Library; /* never freed: threads of TensorFlow's may outlive main */
    return *one;
}

/* The session, kept from being closed for the time of a call. */
class User {
public:
    User()
    {
        library().users.fetch_add(1);
        look();
    }
    ~User() { library().users.fetch_sub(1); }
    void look() { session = library().session.load(); }
    Session *session;
};

/* ---- tables ------------------------------------------------------------------------------------------------------ */

struct Dtype {
    TF_DataType theirs;
    int32_t ours;
    size_t nbytes;
};

const Dtype DTYPES[] = {
    {TF_FLOAT, CL_FLOAT32, 4}, {TF_BFLOAT16, CL_BFLOAT16, 2}, {TF_HALF, CL_FLOAT16, 2}, {TF_DOUBLE, CL_FLOAT64, 8},
    {TF_INT32, CL_INT32, 4},   {TF_INT64, CL_INT64, 8},       {TF_UINT8, CL_UINT8, 1},  {TF_INT8, CL_INT8, 1},
    {TF_INT16, CL_INT16, 2},   {TF_BOOL, CL_BOOL, 1},
};
const char *const TYPE_ATTRIBUTE = "T: {float, bfloat16, half, double, int32, int64, uint8, int8, int16, bool}";

const Dtype *dtype_of(TF_DataType theirs)
{
    for (const Dtype &dtype : DTYPES)
        if (dtype.theirs == theirs)
            return &dtype;
    return nullptr;
}

/* TensorFlow's word for a status; which exception it becomes, where Python does not translate it. */
TF_Code code_of(int32_t status)
{
    static const TF_Code codes[CL_STATUS_END] = {
        TF_OK,                  TF_INTERNAL,    TF_INVALID_ARGUMENT, TF_RESOURCE_EXHAUSTED, TF_INTERNAL,
        TF_FAILED_PRECONDITION, TF_UNAVAILABLE, TF_UNAVAILABLE,      TF_ABORTED,            TF_ABORTED,
    };
    return status > CL_OK && status < CL_STATUS_END ? codes[status] : TF_INTERNAL;
}

class Status {
public:
    Status() : status(TF_NewStatus()) {}
    ~Status() { TF_DeleteStatus(status); }
    Status(const Status &) = delete;
    Status &operator=(const Status &) = delete;
    operator TF_Status *() { return status; }
    bool well() const { return TF_GetCode(status) == TF_OK; }
    const char *text() const { return TF_Message(status); }

private:
    TF_Status *status;
};

/* ---- kernels and their executions -------------------------------------------------------------------------------- */

struct Description {
    cl_tensorflow_description it;
    Name *name;
    uint64_t session;
    int32_t dtype;
    std::vector<int64_t> dims;
};

struct Kernel {
    std::string call;
    bool is_direct; /* C may submit it */
    std::mutex mutex;
    std::shared_ptr<Description> last;
};

/* One execution. Whoever ends it deletes it. */
struct Call : cl_tensorflow_call {
    Call(Kernel *its_kernel, TF_OpKernelContext *its_context, TF_AsyncOpKernelDoneCallback *callback)
        : kernel(its_kernel), context(its_context),
          done(*reinterpret_cast<Done *>(callback)) /* theirs dies when compute returns */
    {
        call = kernel->call.c_str();
        dtype = peer = -1;
        ndims = 0;
        dims = splits = nullptr;
        data = nullptr;
        nsplits = 0;
        status = CL_OK;
        text[0] = '\0';
        library().outstanding.fetch_add(1);
    }
    ~Call()
    {
        for (TF_Tensor *tensor : {input, splits_input, output})
            if (tensor != nullptr)
                TF_DeleteTensor(tensor);
    }

    Kernel *kernel;
    TF_OpKernelContext *context;
    Done done;
    TF_Tensor *input = nullptr, *splits_input = nullptr, *output = nullptr;
    cl_operation *operation = nullptr; /* of a direct one */
    Name *name = nullptr;              /* ditto, if it has one */
    std::vector<int64_t> shape;
};

void remember(int32_t status, int32_t peer, const char *text)
{
    Library &all = library();
    std::lock_guard<std::mutex> lock(all.mutex);
    Failure &failure = all.failures[all.nfailures++ % KEPT_FAILURES];
    failure.status = status;
    failure.peer = peer;
    failure.text = text;
}

void end(Call *call)
{
    if (call->name != nullptr)
        call->name->in_flight.store(false);
    Done done = std::move(call->done);
    delete call;
    done();
    library().outstanding.fetch_sub(1);
}

void end_failed(Call *call, int32_t status, int32_t peer, const char *text)
{
    remember(status, peer, text);
    Status theirs;
    TF_SetStatus(theirs, code_of(status), text);
    TF_OpKernelContext_Failure(call->context, theirs);
    end(call);
}

/* TensorFlow refused something. */
void end_refused(Call *call, const Status &status)
{
    end_failed(call, CL_SYSTEM, -1, status.text());
}

void end_answered(Call *call, int answer)
{
    if (answer == CL_TENSORFLOW_FAILED)
        end_failed(call, call->status, call->peer, call->text);
    else if (answer == CL_TENSORFLOW_DONE)
        end(call);
}

bool read_inputs(Call *call)
{
    Status status;
    int ninputs = TF_NumInputs(call->context);
    if (ninputs > 0)
        TF_GetInput(call->context, 0, &call->input, status);
    if (ninputs > 1 && status.well())
        TF_GetInput(call->context, 1, &call->splits_input, status);
    const Dtype *dtype = status.well() && call->input != nullptr ? dtype_of(TF_TensorType(call->input)) : nullptr;
    if (!status.well() || (ninputs > 0 && dtype == nullptr)) {
        end_refused(call, status);
        return false;
    }
    if (ninputs == 0)
        return true;
    call->dtype = dtype->ours;
    call->ndims = TF_NumDims(call->input);
    call->shape.resize((size_t)call->ndims);
    for (int i = 0; i < call->ndims; i++)
        call->shape[(size_t)i] = TF_Dim(call->input, i);
    call->dims = call->shape.data();
    call->data = TF_TensorData(call->input);
    if (call->splits_input != nullptr) {
        call->splits = static_cast<const int64_t *>(TF_TensorData(call->splits_input));
        call->nsplits = TF_TensorElementCount(call->splits_input);
    }
    return true;
}

/* ---- the direct way ---------------------------------------------------------------------------------------------- */

Name *name_of(Session *session, uint64_t base)
{
    std::lock_guard<std::mutex> lock(session->mutex);
    std::unique_ptr<Name> &name = session->names[base];
    if (name == nullptr)
        name.reset(new Name);
    return name.get();
}

/* What Python said of this kernel and shape; null: it failed, and the call has ended. */
std::shared_ptr<Description> description_of(Session *session, Call *call)
{
    Kernel *kernel = call->kernel;
    std::lock_guard<std::mutex> lock(kernel->mutex);
    const Description *last = kernel->last.get();
    if (last != nullptr && last->session == session->number && last->dtype == call->dtype && last->dims == call->shape)
        return kernel->last;
    return nullptr;
}

std::shared_ptr<Description> describe(Session *session, Call *call)
{
    std::shared_ptr<Description> fresh(new Description);
    int answer = library().callbacks.describe(call, &fresh->it);
    if (answer != CL_TENSORFLOW_BEGUN) {
        end_answered(call, answer);
        return nullptr;
    }
    fresh->name = name_of(session, fresh->it.base);
    fresh->session = session->number;
    fresh->dtype = call->dtype;
    fresh->dims = call->shape;
    std::lock_guard<std::mutex> lock(call->kernel->mutex);
    call->kernel->last = fresh;
    return fresh;
}

/* Memory for the result: the input's own, where nobody else needs it. */
bool make_output(Call *call, void **source, void **target)
{
    static char nothing; /* where tensors without elements are */
    Status status;
    int forwarded = -1;
    const int candidate = 0;
    TF_DeleteTensor(call->input); /* or it would be one that somebody else needs */
    call->input = nullptr;
    call->output = TF_ForwardInputOrAllocateOutput(call->context, &candidate, 1, 0, call->dims, call->ndims, &forwarded, status);
    if (status.well() && forwarded != 0)
        TF_GetInput(call->context, 0, &call->input, status);
    if (!status.well()) {
        end_refused(call, status);
        return false;
    }
    *target = TF_TensorData(call->output);
    *source = forwarded == 0 ? *target : TF_TensorData(call->input);
    if (*target == nullptr || *source == nullptr)
        *source = *target = &nothing;
    return true;
}

void land_directly(Call *call)
{
    const cl_functions *functions = library().functions;
    cl_operation *operation = call->operation;
    const char *text;
    int32_t peer;
    int status = functions->status(operation, &text, &peer);
    if (status == CL_OK)
        end(call);
    else
        end_failed(call, status, peer, *text != '\0' ? text : functions->status_text(status));
    functions->release(operation); /* and its text */
}

void submit_directly(Session *session, Call *call)
{
    std::shared_ptr<Description> description = description_of(session, call);
    if (description == nullptr && (description = describe(session, call)) == nullptr)
        return;
    Name *name = description->name;
    if (description->it.is_named) {
        if (name->in_flight.exchange(true)) {
            end_failed(call, CL_INVALID, -1, description->it.busy);
            return;
        }
        call->name = name;
    }
    void *source, *target;
    if (!make_output(call, &source, &target))
        return;
    uint64_t key = description->it.base + name->uses.fetch_add(1) * description->it.stride;
    cl_operation *operation;
    int status = session->functions->submit_at(session->engine, &description->it.request, key, source, target, &operation);
    if (status != CL_OK) {
        end_failed(call, status, -1, session->functions->status_text(status));
        return;
    }
    call->operation = operation; /* before anybody can take it */
    const char *text;
    int32_t peer;
    if (session->functions->status(operation, &text, &peer) == CL_AGAIN)
        session->functions->tell(operation, library().queue, call);
    else
        land_directly(call); /* done already: no change of threads */
}

/* ---- compute: what TensorFlow calls ------------------------------------------------------------------------------ */

bool attached(User &user, Call *call)
{
    if (user.session != nullptr)
        return true;
    if (library().ending.load() || library().callbacks.attach == nullptr) {
        end_failed(call, CL_SHUTDOWN, -1, "commlib was shut down");
        return false;
    }
    int answer = library().callbacks.attach(call);
    user.look();
    if (answer == CL_TENSORFLOW_BEGUN && user.session != nullptr)
        return true;
    end_answered(call, CL_TENSORFLOW_FAILED);
    return false;
}

void compute(void *kernel, TF_OpKernelContext *context, TF_AsyncOpKernelDoneCallback *done)
{
    Call *call = new Call(static_cast<Kernel *>(kernel), context, done);
    if (!read_inputs(call))
        return;
    User user;
    if (!attached(user, call))
        return;
    if (call->kernel->is_direct && user.session->direct.load())
        submit_directly(user.session, call);
    else
        end_answered(call, library().callbacks.begin(call));
}

/*
 * Ends with its input on another thread, when compute has returned: what every kernel here depends on. TensorFlow's callback
 * must be a std::function of the C++ library that this file was compiled with; its last words are addresses of TensorFlow's code.
 */
void compute_self_test(void *kernel, TF_OpKernelContext *context, TF_AsyncOpKernelDoneCallback *done)
{
    Status status;
    Dl_info manager, invoker;
    void *words[4];
    static_assert(sizeof words == sizeof(Done), "another C++ library than the one that TensorFlow is built with");
    memcpy(words, reinterpret_cast<void *>(done), sizeof words);
    if (!dladdr(words[2], &manager) || !dladdr(words[3], &invoker)) {
        TF_SetStatus(status, TF_INTERNAL, "callbacks of this TensorFlow look otherwise");
        TF_OpKernelContext_Failure(context, status);
        return; /* and never done: who waits for it gives up */
    }
    Call *call = new Call(static_cast<Kernel *>(kernel), context, done);
    void *source, *target;
    if (!read_inputs(call))
        return;
    if (!make_output(call, &source, &target))
        return;
    std::thread([call, source, target] {
        usleep(1000); /* compute has returned by now, most likely */
        if (source != target)
            memcpy(target, source, TF_TensorByteSize(call->output));
        end(call);
    }).detach();
}

/* ---- landing: the one thread that tells TensorFlow ----------------------------------------------------------------- */

void land(Call *call, cl_operation *told)
{
    library().functions->release(told);
    if (call->operation != nullptr) {
        land_directly(call);
        return;
    }
    int answer = library().callbacks.land(call);
    end_answered(call, answer == CL_TENSORFLOW_BEGUN ? CL_TENSORFLOW_DONE : answer);
}

void *land_all(void *)
{
    for (;;) {
        cl_operation *operation;
        void *token;
        if (library().functions->queue_next(library().queue, QUEUE_MS, &operation, &token) == CL_OK)
            land(static_cast<Call *>(token), operation);
    }
    return nullptr;
}

bool start_landing()
{
    sigset_t all, before; /* signals belong to the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    bool well = pthread_create(&thread, nullptr, land_all, nullptr) == 0;
    if (well)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return well;
}

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

template <bool is_direct>
void *create(TF_OpKernelConstruction *construction)
{
    Status status;
    int32_t list_size = 0, nbytes = 0;
    Kernel *kernel = new Kernel;
    kernel->is_direct = is_direct;
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

struct Op {
    const char *name;
    const char *inputs[2], *outputs[2];
    void (*shape)(TF_ShapeInferenceContext *, TF_Status *);
    void *(*create)(TF_OpKernelConstruction *);
    void (*compute)(void *, TF_OpKernelContext *, TF_AsyncOpKernelDoneCallback *);
};

const Op OPS[] = {
    {"CommlibAllreduce", {"tensor: T"}, {"reduced: T"}, shape_as_input, create<true>, compute},
    {"CommlibBroadcast", {"tensor: T"}, {"told: T"}, shape_as_input, create<false>, compute},
    {"CommlibAllgather", {"tensor: T"}, {"gathered: T"}, shape_unknown, create<false>, compute},
    {"CommlibReducescatter", {"tensor: T"}, {"share: T"}, shape_unknown, create<false>, compute},
    {"CommlibAlltoall", {"tensor: T", "splits: int64"}, {"received: T", "received_splits: int64"}, shape_unknown,
     create<false>, compute},
    {"CommlibBarrier", {}, {}, shape_none, create<false>, compute},
    {"CommlibNumber", {}, {"number: int32"}, shape_of_scalar, create<false>, compute},
    {"CommlibSelfTest", {"tensor: T"}, {"same: T"}, shape_as_input, create<false>, compute_self_test},
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
    if (op.inputs[0] != nullptr)
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
EXPORTED int commlib_tensorflow_open(const cl_functions *functions, cl_engine *engine, int direct)
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
    all.session.store(session);
    return CL_OK;
}

EXPORTED void *commlib_tensorflow_queue(void)
{
    return library().queue;
}

/* Whether C may submit by itself. */
EXPORTED void commlib_tensorflow_direct(int direct)
{
    User user;
    if (user.session != nullptr)
        user.session->direct.store(direct);
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
    TF_DeleteTensor(tensor); /* the context holds it */
    return data == nullptr ? &nothing : data;
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
