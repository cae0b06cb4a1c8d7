"""Memory that a collective reads or writes: an address, a shape and a dtype by name, and who keeps it alive.

This file knows NumPy and the buffer protocol, so that the rest of the core need not; it knows no engine. Frameworks hand
over their tensors as `Buffer`s, also of dtypes that NumPy lacks (bfloat16).
"""

import ctypes
import math

import numpy
from numpy import ndarray

# The engine's cl_dtype of every dtype name, and its size.
DTYPES = {
    "uint8": (0, 1), "int8": (1, 1), "int16": (2, 2), "int32": (3, 4), "int64": (4, 8),
    "float16": (5, 2), "bfloat16": (6, 2), "float32": (7, 4), "float64": (8, 8), "bool": (9, 1),
}  # fmt: skip

# Native byte order only: a dtype of the other order is not equal to these.
_NAME_OF_NUMPY = {numpy.dtype(name): name for name in DTYPES if name != "bfloat16"}


class Buffer:
    """A contiguous piece of memory with a shape and a dtype.

    Args:
        address: the first byte, an int; None: the owner is a NumPy array and says it when asked.
        shape: a tuple of ints; () is one element.
        dtype: a name: "float32", "bfloat16", ...
        owner: the object whose life keeps the memory alive.
        writable: False for memory that must not be changed.

    Raises:
        TypeError: commlib does not know the dtype.

    Example:
        >>> import numpy
        >>> array = numpy.zeros(3, dtype=numpy.float32)
        >>> Buffer(array.ctypes.data, (3,), "float32", array, True).nbytes
        12
    """

    __slots__ = ("known_address", "shape", "dtype", "owner", "writable", "count", "code", "itemsize")

    def __init__(self, address, shape, dtype, owner, writable):
        try:
            self.code, self.itemsize = DTYPES[dtype]
        except KeyError:
            raise TypeError(f"commlib has no dtype {dtype!r}; it has {', '.join(DTYPES)}") from None
        self.known_address = address
        self.shape = tuple(shape)
        self.dtype = dtype
        self.owner = owner
        self.writable = writable
        self.count = math.prod(shape)

    @property
    def address(self):
        """The first byte, as an int."""
        if self.known_address is None:
            self.known_address = self.owner.__array_interface__["data"][0]
        return self.known_address

    @property
    def nbytes(self):
        """The size in bytes."""
        return self.count * self.itemsize

    def __repr__(self):
        return f"Buffer({self.dtype} {self.shape} at {self.address:#x})"


def buffer_of_numpy(array):
    """A NumPy array as a Buffer.

    Raises:
        TypeError: a dtype that commlib does not reduce (objects, strings, complex, foreign byte order).
        ValueError: the array is not contiguous.
    """
    dtype = _NAME_OF_NUMPY.get(array.dtype)
    address = None
    if dtype is None:
        if array.dtype.name != "bfloat16":  # ml_dtypes registers it with NumPy under this name
            raise TypeError(f"commlib cannot send dtype {array.dtype!r}: convert it with array.astype(...) to one of "
                            f"{', '.join(DTYPES)}")  # fmt: skip
        dtype = "bfloat16"
        address = array.__array_interface__["data"][0]  # ml_dtypes' arrays have no buffer protocol
    flags = array.flags
    if not flags.c_contiguous:
        raise ValueError(f"the array of shape {array.shape} is not C-contiguous: pass numpy.ascontiguousarray(array)")
    return Buffer(address, array.shape, dtype, array, flags.writeable)


def as_buffer(array):
    """Anything that has memory as a Buffer, without a copy: a Buffer, NumPy, __array_interface__, the buffer protocol.

    Raises:
        TypeError: no memory there (a list, a number), or a dtype that commlib does not know.
        ValueError: the memory is not contiguous.
    """
    if isinstance(array, ndarray):
        return buffer_of_numpy(array)
    if isinstance(array, Buffer):
        return array
    if isinstance(array, numpy.generic):
        return _read_only(numpy.array(array))  # a NumPy scalar cannot be changed
    if hasattr(array, "__array_interface__"):
        return buffer_of_numpy(numpy.asarray(array))
    try:
        view = memoryview(array)
    except TypeError:
        raise TypeError(
            f"commlib needs an array (NumPy, the buffer protocol or commlib.Buffer), not {type(array).__name__}: use "
            "numpy.asarray(...), or the adapter of your framework, such as commlib.torch"
        ) from None
    return buffer_of_numpy(numpy.asarray(view))


def _read_only(array):
    array.flags.writeable = False
    return buffer_of_numpy(array)


def writable_buffer(array, what):
    """As `as_buffer`, for memory that an in-place form will change.

    Raises:
        ValueError: the memory is read-only.
    """
    buffer = as_buffer(array)
    if not buffer.writable:
        raise ValueError(f"{what} writes its result into the array, which is read-only: use {what[:-1]}, or pass a copy")
    return buffer


def style_of(array, buffer):
    """What kind of array the caller uses, and so gets: None for a Buffer, else the NumPy dtype."""
    return None if array is buffer else buffer.owner.dtype


def new_like(style, shape, dtype):
    """New memory in the caller's style.

    Returns:
        (what the caller gets, its Buffer); the same object twice for a Buffer.
    """
    if style is not None:
        result = numpy.empty(shape, dtype=style)
        return result, buffer_of_numpy(result)
    memory = numpy.empty(math.prod(shape) * DTYPES[dtype][1], dtype=numpy.uint8)
    buffer = over_memory(None, shape, dtype, memory)
    return buffer, buffer


def over_memory(style, shape, dtype, memory):
    """Memory that exists (a NumPy array of uint8) in the caller's style."""
    if style is None:
        return Buffer(memory.__array_interface__["data"][0], tuple(shape), dtype, memory, True)
    return memory.view(style).reshape(shape)


def copy_into(target, source):
    """Copies the bytes of one Buffer to another of the same size."""
    ctypes.memmove(target.address, source.address, source.nbytes)
