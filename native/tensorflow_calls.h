/*
 * tensorflow_calls.h: kernels, their executions, and what they share: between tensorflow_calls.cc, which runs them, and
 * tensorflow_ops.cc, which tells TensorFlow and Python of them. Nothing else sees it.
 */
#ifndef CL_TENSORFLOW_CALLS_H
#define CL_TENSORFLOW_CALLS_H

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "tensorflow_abi.h"
extern "C" {
#include "tensorflow_ops.h"
}

namespace commlib {

using Done = std::function<void()>; /* what TensorFlow's callback is; the self-test looks whether it still is */

/* ---- what lives as long as the process, and what as long as a communicator ------------------------------------------ */

struct Name {
    std::atomic<uint64_t> uses{0};
    std::atomic<bool> in_flight{false};
};

struct Pending;

struct Session {
    uint64_t number;
    const cl_functions *functions;
    cl_engine *engine;
    std::atomic<int> direct{1}; /* 0: Python must see every operation */
    std::mutex mutex;           /* of what follows */
    uint64_t first_use = 0;     /* from which uses of names are counted */
    std::unordered_map<uint64_t, std::unique_ptr<Name>> names;        /* by base key */
    std::unordered_map<std::string, std::unique_ptr<Pending>> pending; /* by the attribute of who began it */
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

Library &library();

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

/* nullptr: one that cannot travel. */
const Dtype *dtype_of(TF_DataType theirs);

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

/* What an op does beside what its attribute says. */
enum class Role {
    by_python, /* begun and landed there */
    direct,    /* C may submit it */
    begins,    /* ditto, and its result is another op's */
    finishes   /* it gives what the op that begins has begun */
};

struct Kernel {
    std::string call;
    Role role;
    std::mutex mutex;
    std::shared_ptr<Description> last;
};

/* What a queue's token is. */
struct Landing {
    virtual ~Landing() = default;
    /* The operation is done; `told` is held for the queue. */
    virtual void land(cl_operation *told) = 0;
};

/* One execution. Whoever ends it deletes it. */
struct Call : Landing, cl_tensorflow_call {
    Call(Kernel *its_kernel, TF_OpKernelContext *its_context, TF_AsyncOpKernelDoneCallback *callback)
        : kernel(its_kernel), context(its_context),
          done(*reinterpret_cast<Done *>(callback)) /* theirs dies when compute returns */
    {
        token = static_cast<Landing *>(this);
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

    void land(cl_operation *told) override;

    Kernel *kernel;
    TF_OpKernelContext *context;
    Done done;
    TF_Tensor *input = nullptr, *splits_input = nullptr, *output = nullptr;
    cl_operation *operation = nullptr; /* of a direct one */
    Name *name = nullptr;              /* ditto, if it has one */
    std::vector<int64_t> shape;
};

/* A reduction that one op has begun and another will finish, which may be in another function, or never come. */
struct Pending : Landing {
    ~Pending() override;
    void land(cl_operation *told) override;

    Session *session = nullptr;
    std::string key;
    TF_Tensor *tensor = nullptr, *input = nullptr; /* the result, from its landing on; what it is made of, if that lies apart */
    cl_operation *operation = nullptr;
    Name *name = nullptr;
    Call *waiting = nullptr;     /* of the op that finishes */
    bool landed = false;
    bool dropped = false;        /* nobody will finish it */
    int32_t status = CL_OK, peer = -1;
    std::string text;
};

/* Ends an execution: well; badly; or as Python has answered. */
void end(Call *call);
void end_failed(Call *call, int32_t status, int32_t peer, const char *text);
void end_answered(Call *call, int answer);

/* The name of a base key, made at its first use. */
Name *name_of(Session *session, uint64_t base);

/* What TensorFlow calls. */
void compute(void *kernel, TF_OpKernelContext *context, TF_AsyncOpKernelDoneCallback *done);
void compute_self_test(void *kernel, TF_OpKernelContext *context, TF_AsyncOpKernelDoneCallback *done);

/* Forgets all that was begun and not finished. */
void drop_pending(Session *session);
/* Starts the one thread that tells TensorFlow of what has landed. */
bool start_landing(void);

} /* namespace commlib */

#endif
