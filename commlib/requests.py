"""A request to the engine as C sees it: its struct, and the memory, texts, lists and plans that it points to.

This file knows cffi and makes things; who fills them in and submits them is other files' business.
"""

from commlib._native import ffi, lib
from commlib.errors import error_of

# The control plane's own exchanges have no plan, and tickets no chunks.
NO_PLAN = NO_OFFSETS = ffi.NULL


def string_of(text):
    """A C string as Python's."""
    return ffi.string(text).decode(errors="replace")


class Announced:
    """What another rank has submitted, as a rank that has joined is told of it.

    Attributes:
        native, request: the cl_announced, and the cl_request in it, which is to be completed.
        key, kind, dtype, count, reduction, hint: of the request; codes of the engine and of the submitter.
        text: what errors call it.
        members: the ranks of its group; None: all.
    """

    __slots__ = ("native", "request", "key", "kind", "dtype", "count", "reduction", "hint", "text", "members")

    def __init__(self, native):
        self.native = ffi.gc(native, lib.cl_announced_free)
        self.request = request = native.request
        self.key, self.kind, self.dtype, self.count = request.key, request.kind, request.dtype, request.count
        self.reduction, self.hint = request.reduction, request.hint
        self.text = string_of(request.text)
        members = request.listeners
        self.members = None if members == ffi.NULL else tuple(ffi.unpack(members, request.nlisteners))


def new_request():
    """An empty cl_request."""
    return ffi.new("cl_request *")


def copy_of_request(request):
    """A cl_request of its own; what it points to is the other's to keep."""
    return ffi.new("cl_request *", request[0])


def new_text(text):
    """A C string, which lives as long as the object."""
    return ffi.new("char[]", text.encode())


def new_offsets(offsets):
    """A C array of uint64_t."""
    return ffi.new("uint64_t[]", offsets)


def new_members(members):
    """A C array of int32_t."""
    return ffi.new("int32_t[]", list(members))


def native_plan(plan):
    """A commlib.plan.Plan as cl_plan, which is freed with the object.

    Raises:
        ValueError: the steps are no plan.
    """
    packed = plan.pack()
    steps = ffi.from_buffer("cl_step[]", packed) if plan.steps else ffi.NULL
    native = ffi.new("cl_plan **")
    status = lib.cl_plan_new(steps, len(plan.steps), plan.nchunks, plan.inputs, native)
    if status != lib.CL_OK:
        raise error_of(status)
    return ffi.gc(native[0], lib.cl_plan_free)


TEXT_NBYTES = 256  # of a request's text; the engine cuts it there


def write_request(request, address, text_address):
    """Writes a cl_request where native code wants it, and its text, of CL_TEXT_NBYTES at most, to where it will stay."""
    text = ffi.string(request.text)[: TEXT_NBYTES - 1] + b"\0"
    ffi.memmove(ffi.cast("char *", text_address), text, len(text))
    target = ffi.cast("cl_request *", address)
    target[0] = request[0]
    target.text = ffi.cast("char *", text_address)
