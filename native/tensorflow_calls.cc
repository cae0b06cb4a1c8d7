/*
 * tensorflow_calls.cc: executions of ops, from TensorFlow's call to its callback.
 *
 * A kernel submits and returns; one thread of this library takes finished operations off a queue and tells TensorFlow, so
 * nothing of TensorFlow runs on the engine's threads, and nothing of the engine below TensorFlow's. An all-reduce goes from
 * kernel to engine without Python, once Python has described it; every other kind is begun and landed by Python
 * (frameworks/tensorflow/native.py), which also sees all-reduces while a timeline is recorded or another backend moves the bytes.
 *
 * This file knows no name, no reduction and no process set: those are in the op's attribute `call`, which Python wrote and reads.
 * The library object is the one global here, as TensorFlow makes kernels without asking for whom.
 */
#include "tensorflow_calls.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <thread>

namespace commlib {

Library &library()
{
    static Library *one = new Library; /* never freed: threads of TensorFlow's may outlive main */
    return *one;
}

namespace {

const Dtype DTYPES[] = {
    {TF_FLOAT, CL_FLOAT32, 4}, {TF_BFLOAT16, CL_BFLOAT16, 2}, {TF_HALF, CL_FLOAT16, 2}, {TF_DOUBLE, CL_FLOAT64, 8},
    {TF_INT32, CL_INT32, 4},   {TF_INT64, CL_INT64, 8},       {TF_UINT8, CL_UINT8, 1},  {TF_INT8, CL_INT8, 1},
    {TF_INT16, CL_INT16, 2},   {TF_BOOL, CL_BOOL, 1},
};
} /* namespace */

const Dtype *dtype_of(TF_DataType theirs)
{
    for (const Dtype &dtype : DTYPES)
        if (dtype.theirs == theirs)
            return &dtype;
    return nullptr;
}

namespace {

/* TensorFlow's word for a status; which exception it becomes, where Python does not translate it. ("Unavailable" is kept for
 * TensorFlow's own network: it would become "internal".) */
TF_Code code_of(int32_t status)
{
    static const std::unordered_map<int32_t, TF_Code> codes = {
        {CL_INVALID, TF_INVALID_ARGUMENT}, {CL_NO_MEMORY, TF_RESOURCE_EXHAUSTED}, {CL_MISMATCH, TF_FAILED_PRECONDITION},
        {CL_PEER_LOST, TF_ABORTED},        {CL_PEER_LEFT, TF_ABORTED},            {CL_SHUTDOWN, TF_ABORTED},
        {CL_FORKED, TF_ABORTED},           {CL_JOINED, TF_FAILED_PRECONDITION},   {CL_STALLED, TF_ABORTED},
    };
    auto found = codes.find(status);
    return found == codes.end() ? TF_INTERNAL : found->second;
}

void remember(int32_t status, int32_t peer, const char *text)
{
    Library &all = library();
    std::lock_guard<std::mutex> lock(all.mutex);
    Failure &failure = all.failures[all.nfailures++ % KEPT_FAILURES];
    failure.status = status;
    failure.peer = peer;
    failure.text = text;
}

} /* namespace */

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

void end_answered(Call *call, int answer)
{
    if (answer == CL_TENSORFLOW_FAILED)
        end_failed(call, call->status, call->peer, call->text);
    else if (answer == CL_TENSORFLOW_DONE)
        end(call);
}

Name *name_of(Session *session, uint64_t base)
{
    std::lock_guard<std::mutex> lock(session->mutex);
    std::unique_ptr<Name> &name = session->names[base];
    if (name == nullptr) {
        name.reset(new Name);
        name->uses.store(session->first_use);
    }
    return name.get();
}

namespace {

/* TensorFlow refused something. */
void end_refused(Call *call, const Status &status)
{
    end_failed(call, CL_SYSTEM, -1, status.text());
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

/* How a finished operation has ended. */
int outcome(cl_operation *operation, const char **text, int32_t *peer)
{
    int status = library().functions->status(operation, text, peer);
    if (status != CL_OK && status != CL_AGAIN && **text == '\0')
        *text = library().functions->status_text(status);
    return status;
}

void land_directly(Call *call)
{
    cl_operation *operation = call->operation;
    const char *text;
    int32_t peer;
    int status = outcome(operation, &text, &peer);
    if (status == CL_OK)
        end(call);
    else
        end_failed(call, status, peer, text);
    library().functions->release(operation); /* and its text */
}

/* Submits; the caller has it told to somebody. Null: it could not, and the call has ended. */
cl_operation *submit(Session *session, Call *call)
{
    std::shared_ptr<Description> description = description_of(session, call);
    if (description == nullptr && (description = describe(session, call)) == nullptr)
        return nullptr;
    Name *name = description->name;
    if (description->it.is_named) {
        if (name->in_flight.exchange(true)) {
            end_failed(call, CL_INVALID, -1, description->it.busy);
            return nullptr;
        }
        call->name = name;
    }
    void *source, *target;
    if (!make_output(call, &source, &target))
        return nullptr;
    uint64_t key = description->it.base + name->uses.fetch_add(1) * description->it.stride;
    cl_operation *operation;
    int status = session->functions->submit_at(session->engine, &description->it.request, key, source, target, &operation);
    if (status != CL_OK) {
        end_failed(call, status, -1, session->functions->status_text(status));
        return nullptr;
    }
    return operation;
}

void submit_directly(Session *session, Call *call)
{
    cl_operation *operation = call->operation = submit(session, call);
    const char *text;
    int32_t peer;
    if (operation == nullptr)
        return;
    if (session->functions->status(operation, &text, &peer) == CL_AGAIN)
        session->functions->tell(operation, library().queue, static_cast<Landing *>(call));
    else
        land_directly(call); /* done already: no change of threads */
}

/* ---- a reduction in two halves: begun by one op, finished by another ------------------------------------------------ */

/* Gives what has landed to the op that finishes it, and forgets it; with the session's lock, which ends here. */
void deliver(Pending *landed, Call *call, std::unique_lock<std::mutex> &lock)
{
    auto found = landed->session->pending.find(landed->key);
    std::unique_ptr<Pending> pending = std::move(found->second);
    pending->session->pending.erase(found);
    lock.unlock();
    if (pending->name != nullptr)
        pending->name->in_flight.store(false);
    if (pending->status != CL_OK) {
        end_failed(call, pending->status, pending->peer, pending->text.c_str());
        return;
    }
    Status status;
    TF_SetOutput(call->context, 0, pending->tensor, status);
    if (status.well())
        end(call);
    else
        end_refused(call, status);
}

/* The execution that begins has done its part; what it leaves behind is found by its attribute. */
Pending *leave_pending(Session *session, Call *call)
{
    std::unique_ptr<Pending> pending(new Pending);
    Pending *it = pending.get();
    it->session = session;
    it->key = call->call;
    it->tensor = call->output;
    it->name = call->name;
    it->operation = call->operation;
    it->input = call->input;
    call->output = call->input = nullptr;
    call->name = nullptr;
    std::lock_guard<std::mutex> lock(session->mutex);
    session->pending[it->key] = std::move(pending);
    return it;
}

void begin(Session *session, Call *call)
{
    cl_operation *operation = call->operation = submit(session, call);
    if (operation == nullptr)
        return;
    library().outstanding.fetch_add(1); /* until it has landed */
    Pending *pending = leave_pending(session, call);
    session->functions->tell(operation, library().queue, static_cast<Landing *>(pending));
    end(call);
}

void finish(Session *session, Call *call)
{
    std::unique_lock<std::mutex> lock(session->mutex);
    auto found = session->pending.find(call->call);
    if (found == session->pending.end() || found->second->waiting != nullptr || found->second->dropped) {
        lock.unlock();
        end_failed(call, CL_INVALID, -1, "nothing of this name was begun: each beginning is finished once");
        return;
    }
    if (found->second->landed)
        deliver(found->second.get(), call, lock);
    else
        found->second->waiting = call;
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

} /* namespace */

void compute(void *kernel, TF_OpKernelContext *context, TF_AsyncOpKernelDoneCallback *done)
{
    Call *call = new Call(static_cast<Kernel *>(kernel), context, done);
    if (!read_inputs(call))
        return;
    User user;
    if (!attached(user, call))
        return;
    Role role = call->kernel->role;
    if (role == Role::finishes)
        finish(user.session, call);
    else if (role == Role::by_python || !user.session->direct.load())
        end_answered(call, library().callbacks.begin(call));
    else
        (role == Role::begins ? begin : submit_directly)(user.session, call);
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

void Call::land(cl_operation *told)
{
    library().functions->release(told);
    if (operation != nullptr) {
        land_directly(this);
        return;
    }
    int answer = library().callbacks.land(this);
    User user;
    if (answer != CL_TENSORFLOW_FAILED && kernel->role == Role::begins && user.session != nullptr)
        leave_pending(user.session, this)->landed = true; /* the slow way: it was waited for */
    end_answered(this, answer == CL_TENSORFLOW_BEGUN ? CL_TENSORFLOW_DONE : answer);
}

void Pending::land(cl_operation *told)
{
    const char *why;
    library().functions->release(told);
    std::unique_lock<std::mutex> lock(session->mutex);
    status = outcome(operation, &why, &peer);
    text = why;
    library().functions->release(operation);
    operation = nullptr;
    landed = true;
    if (waiting != nullptr) {
        deliver(this, waiting, lock);
    } else if (dropped) {
        name->in_flight.store(false);
        session->pending.erase(session->pending.find(key)); /* and this with it */
    }
    library().outstanding.fetch_sub(1);
}

Pending::~Pending()
{
    for (TF_Tensor *one : {tensor, input})
        if (one != nullptr)
            TF_DeleteTensor(one);
}

void drop_pending(Session *session)
{
    std::lock_guard<std::mutex> lock(session->mutex);
    for (auto next = session->pending.begin(); next != session->pending.end();) {
        Pending *pending = next->second.get();
        pending->dropped = true;
        if (!pending->landed) {
            ++next;
            continue;
        }
        if (pending->name != nullptr)
            pending->name->in_flight.store(false);
        next = session->pending.erase(next);
    }
}

namespace {

void *land_all(void *)
{
    for (;;) {
        cl_operation *operation;
        void *token;
        if (library().functions->queue_next(library().queue, QUEUE_MS, &operation, &token) == CL_OK)
            static_cast<Landing *>(token)->land(operation);
    }
    return nullptr;
}

} /* namespace */

bool start_landing(void)
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

} /* namespace commlib */
