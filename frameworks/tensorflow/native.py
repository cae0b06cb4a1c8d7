"""Where the op library's kernels and commlib's default communicator meet.

Kernels run on TensorFlow's threads. An all-reduce is described to them here once; everything else, and all-reduces while a
timeline is recorded or another backend moves the bytes, is submitted here for each execution, and landed here when a queue
says that it is done. This file mirrors native/tensorflow_ops.h; it knows no tensor of TensorFlow's, only memory.
"""

import _thread
import atexit
import ctypes
import functools
import json
import threading

import numpy

import commlib
from commlib.buffer import DTYPES
from commlib.direct import Direct
from commlib.errors import error_of, status_of
from commlib.names import busy_text
from commlib.process_sets import process_set_of_id
from commlib.tensorflow.forms import check
from commlib.tensorflow.library import native as _library

_VERSION = 2
_TEXT_NBYTES, _REQUEST_TEXT_NBYTES = 1024, 256
_BEGUN, _DONE, _FAILED = 0, 1, 2
_DRAIN_MS = 5000  # TensorFlow is told of what has ended; that takes no time unless its threads are stuck

_DTYPE_NAMES = {code: name for name, (code, _) in DTYPES.items()}
_I32, _I64, _U64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


# ---- native/tensorflow_ops.h


class _Call(ctypes.Structure):
    """cl_tensorflow_call: one execution of an op."""

    _fields_ = (
        ("token", _POINTER), ("call", ctypes.c_char_p), ("dtype", _I32), ("ndims", _I32),
        ("dims", ctypes.POINTER(_I64)), ("data", _POINTER),
        ("splits", ctypes.POINTER(_I64)), ("nsplits", _I64), ("status", _I32), ("peer", _I32),
        ("text", ctypes.c_char * _TEXT_NBYTES),
    )  # fmt: skip

    @property
    def shape(self):
        return tuple(self.dims[: self.ndims])

    @property
    def dtype_name(self):
        return _DTYPE_NAMES[self.dtype]

    def buffer(self):
        """Input 0, which the library keeps until the call has landed."""
        return commlib.Buffer(self.data or 0, self.shape, self.dtype_name, None, True)


class _Description(ctypes.Structure):
    """cl_tensorflow_description without the cl_request that follows."""

    _fields_ = (("base", _U64), ("stride", _U64), ("is_named", _I32), ("busy", ctypes.c_char * _TEXT_NBYTES),
                ("text", ctypes.c_char * _REQUEST_TEXT_NBYTES))  # fmt: skip


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Call))
_DESCRIBE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Call), ctypes.POINTER(_Description))


class _Callbacks(ctypes.Structure):
    _fields_ = (("attach", _CALLBACK), ("describe", _DESCRIBE), ("begin", _CALLBACK), ("land", _CALLBACK))


# ---- what a call is: the op's attribute


class Wish:
    """What a kernel is asked for, as JSON in its op's attribute `call`.

    Attributes:
        kind: of the operation, or of the number that is wanted.
        name: that ranks match it by; None: by sequence.
        set: the process set's number.
        op: a commlib.ReduceOp.
        scales, priority, overlapped, root: as the core has them; root is a rank among all.
    """

    __slots__ = ("kind", "name", "set", "op", "scales", "priority", "overlapped", "root")

    def __init__(self, kind, name=None, set=0, op=commlib.Average, scales=(1.0, 1.0), priority=0, overlapped=False, root=-1):
        self.kind = kind
        self.name = name
        self.set = set
        self.op = op
        self.scales = scales
        self.priority = priority
        self.overlapped = overlapped
        self.root = root

    def text(self):
        """The attribute."""
        fields = {field: getattr(self, field) for field in self.__slots__}
        return json.dumps({**fields, "op": self.op.name})

    @property
    def communicator(self):
        """Of the ranks that it is for."""
        return process_set_of_id(self.set).communicator()


@functools.lru_cache(maxsize=4096)
def wish_of(text):
    """The reverse of Wish.text, for an attribute as TensorFlow has it, in bytes."""
    fields = json.loads(text)
    fields["op"] = commlib.ReduceOp[fields["op"]]
    fields["scales"] = tuple(fields["scales"])
    return Wish(**fields)


# ---- kinds: how each begins, and what it is when it has landed


def _begin_allreduce(wish, call):
    prescale, postscale = wish.scales
    communicator = wish.communicator
    # C submits others of this name, or begins them for someone else to finish.
    if wish.name is not None and not _library.commlib_tensorflow_claim(call, _session.direct.base_of(communicator, wish.name)):
        raise ValueError(busy_text("allreduce", wish.name))
    return communicator.allreduce_async(
        call.buffer(), name=wish.name, op=wish.op, priority=wish.priority, prescale_factor=prescale, postscale_factor=postscale,
        overlapped=wish.overlapped,
    )  # fmt: skip


def _begin_broadcast(wish, call):
    communicator = wish.communicator
    return communicator.broadcast_async(call.buffer(), place_of(wish.root, communicator), name=wish.name, priority=wish.priority)


def place_of(root_rank, communicator):
    """Horovod names the root of a process set by its rank among all.

    Raises:
        ValueError: it is not in the set.
    """
    if type(root_rank) is not int or root_rank not in communicator.ranks:
        raise ValueError(f"root_rank must be a rank of the process set, one of {list(communicator.ranks)}, not {root_rank!r}")
    return communicator.ranks.index(root_rank)


def _begin_allgather(wish, call):
    return wish.communicator.allgather_async(call.buffer(), name=wish.name, priority=wish.priority)


def _begin_reducescatter(wish, call):
    prescale, postscale = wish.scales
    return wish.communicator.reducescatter_async(call.buffer(), name=wish.name, op=wish.op, priority=wish.priority,
                                                 prescale_factor=prescale, postscale_factor=postscale)  # fmt: skip


def _begin_alltoall(wish, call):
    communicator, splits = wish.communicator, call.splits[: call.nsplits]
    if not splits and call.ndims and call.dims[0] % communicator.size == 0:
        splits = [call.dims[0] // communicator.size] * communicator.size
    return communicator.alltoall_async(call.buffer(), splits or None, name=wish.name, priority=wish.priority)


def _begin_check(wish, call):
    values = call.buffer()
    check(wish.name, numpy.ctypeslib.as_array((_I32 * values.count).from_address(values.address)).copy())
    _write(call, 0, values)


def _begin_barrier(wish, call):
    return _session.direct.barrier_async(wish.communicator)


# Each returns a handle; None: its outputs were written.
_BEGIN = {
    "allreduce": _begin_allreduce, "adasum": _begin_allreduce, "broadcast": _begin_broadcast, "allgather": _begin_allgather,
    "reducescatter": _begin_reducescatter, "alltoall": _begin_alltoall, "barrier": _begin_barrier,
    "check": _begin_check,
}  # fmt: skip

_NUMBERS = {
    "rank": lambda wish: commlib.rank(),
    "local_rank": lambda wish: commlib.local_rank(),
    "local_size": lambda wish: commlib.local_size(),
    "place": lambda wish: wish.communicator.rank,
    "size": lambda wish: process_set_of_id(wish.set).size(),
    "process_set_included": lambda wish: int(process_set_of_id(wish.set).included()),
}  # fmt: skip


def _write(call, index, result):
    """A result, a Buffer or a NumPy array of int64, becomes an output of the op."""
    shape = result.shape
    address = result.address if isinstance(result, commlib.Buffer) else result.ctypes.data
    dims = (_I64 * max(1, len(shape)))(*shape)
    target = _library.commlib_tensorflow_output(call, index, dims, len(shape))
    if not target:
        raise MemoryError(f"TensorFlow has no memory for a result of shape {shape}")
    ctypes.memmove(target, address, result.nbytes)


# ---- what the library calls


def _answering(function):
    """A function of (call, ...) as C wants it: it answers, and raises nothing."""

    @functools.wraps(function)
    def answering(pointer, *rest):
        call = pointer.contents
        try:
            return function(call, *(other.contents for other in rest))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _thread.interrupt_main()  # Python's own threads know what to do with it
            call.status, call.peer = status_of(error)
            call.text = str(error).encode()[: _TEXT_NBYTES - 1] or type(error).__name__.encode()
            return _FAILED

    return answering


def _describe(call, description):
    wish = wish_of(call.call)
    description.base = _session.direct.describe_allreduce(
        wish.communicator, wish.name, call.dtype_name, call.shape, op=wish.op, priority=wish.priority, scales=wish.scales,
        overlapped=wish.overlapped, address=ctypes.addressof(description) + ctypes.sizeof(_Description),
        text_address=ctypes.addressof(description) + _Description.text.offset,
    )  # fmt: skip
    description.stride = _session.direct.stride
    description.is_named = wish.name is not None
    description.busy = busy_text(wish.kind, wish.name).encode()[: _TEXT_NBYTES - 1]
    return _BEGUN


def _begin(call):
    wish = wish_of(call.call)
    number = _NUMBERS.get(wish.kind)
    if number is not None:
        _write(call, 0, numpy.array(number(wish), dtype=numpy.int32))
        return _DONE
    handle = _BEGIN[wish.kind](wish, call)
    if handle is None:
        return _DONE
    _session.handles[call.token] = handle
    _session.direct.tell(handle, _library.commlib_tensorflow_queue(), call.token)
    return _BEGUN


def _land(call):
    results = _session.handles.pop(call.token).wait()
    for index, result in enumerate(results if type(results) is tuple else (results,)):
        if result is not None and wish_of(call.call).kind != "barrier":
            _write(call, index, result if index == 0 else result.astype(numpy.int64))
    return _DONE


class _Session:
    """The kernels' connection with the default communicator, of which there is one."""

    def __init__(self):
        self.direct = None
        self.handles = {}  # token of a call -> Handle
        self._lock = threading.Lock()

    def open(self):
        """Lets kernels use the default communicator.

        Raises:
            ValueError: there is none.
        """
        with self._lock:
            communicator = commlib.communicator()
            if self.direct is not None:
                return
            direct = Direct(communicator)
            status = _library.commlib_tensorflow_open(direct.functions, direct.engine, direct.is_possible, direct.first_use)
            if status:
                raise error_of(status, "commlib's engine and its op library for TensorFlow do not fit together: reinstall commlib")
            self.direct = direct
            communicator.on_close(_library.commlib_tensorflow_close)
            direct.on_change(lambda: _library.commlib_tensorflow_direct(direct.is_possible, direct.first_use))
            direct.on_ended(self._ended)

    def _ended(self):
        _library.commlib_tensorflow_drain(_DRAIN_MS)
        self.direct = None


def _attach(call):
    _session.open()
    return _BEGUN


_session = _Session()
attach = _session.open
drop_begun = _library.commlib_tensorflow_drop
# Kept for as long as kernels may call them, which is for ever.
_callbacks = _Callbacks(_CALLBACK(_answering(_attach)), _DESCRIBE(_answering(_describe)), _CALLBACK(_answering(_begin)),
                        _CALLBACK(_answering(_land)))  # fmt: skip


def _declare():
    """Tells ctypes what the library's functions take, and the library what Python's are.

    Raises:
        ImportError: the library is of another version of commlib.
    """
    address = ctypes.c_void_p
    _library.commlib_tensorflow_open.argtypes = (address, address, ctypes.c_int, _U64)
    _library.commlib_tensorflow_direct.argtypes = (ctypes.c_int, _U64)
    _library.commlib_tensorflow_queue.restype = address
    _library.commlib_tensorflow_output.restype = address
    _library.commlib_tensorflow_claim.argtypes = (ctypes.POINTER(_Call), _U64)
    _library.commlib_tensorflow_output.argtypes = (ctypes.POINTER(_Call), ctypes.c_int, ctypes.POINTER(_I64), ctypes.c_int)
    _library.commlib_tensorflow_failure.argtypes = (ctypes.c_char_p, ctypes.POINTER(_I32), ctypes.c_char_p, ctypes.c_size_t)
    said = (_U64(), _U64(), _U64())
    _library.commlib_tensorflow_version(*map(ctypes.byref, said))
    if tuple(one.value for one in said) != (_VERSION, ctypes.sizeof(_Call), ctypes.sizeof(_Description)):
        raise ImportError("commlib's op library for TensorFlow is of another version than its Python files: reinstall commlib")
    _library.commlib_tensorflow_install(ctypes.byref(_callbacks))
    atexit.register(_library.commlib_tensorflow_ending)


_declare()


# ---- failures


def translated(error):
    """commlib's own exception for one that TensorFlow raised; TensorFlow's, if it has nothing to do with commlib.

    Args:
        error: a tf.errors.OpError, of an eager op or of a function.
    """
    peer, text = _I32(), ctypes.create_string_buffer(_TEXT_NBYTES)
    status = _library.commlib_tensorflow_failure(str(error).encode(), ctypes.byref(peer), text, _TEXT_NBYTES)
    return error_of(status, text.value.decode(errors="replace"), peer.value) if status else error
