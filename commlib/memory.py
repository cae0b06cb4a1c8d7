"""Memory by its address: where arrays begin, and the kernels that work on it without an engine. Knows no operation."""

from commlib._native import ffi, lib

_BYTES = ffi.typeof("char[]")
_ADDRESS = ffi.typeof("uintptr_t")


def memory_of(array):
    """The bytes of a C-contiguous, writable array with the buffer protocol; they keep the array alive, and as long as it is.

    Raises:
        ValueError, TypeError, BufferError: it is no such array.
    """
    return ffi.from_buffer(_BYTES, array, True)


def address_of(array, writable=False):
    """Where the memory of a C-contiguous array with the buffer protocol begins, as an int; raises as `memory_of`."""
    return int(ffi.cast(_ADDRESS, ffi.from_buffer(_BYTES, array, writable)))


def pointer_of(buffer):
    """Where a commlib Buffer begins, as the request wants it; it keeps no more alive than the buffer does."""
    if buffer.known_address is None:
        return ffi.from_buffer(buffer.owner)
    return ffi.cast("void *", buffer.known_address)


class Pieces:
    """A piece of memory that holds what lies elsewhere in small pieces, one after the other: copied there and back in one call.

    Args:
        address: of the whole, which must live as long as the object.
        nbytes: of every piece, in order.

    Example:
        >>> import numpy
        >>> whole, parts = numpy.zeros(3), [numpy.ones(2), numpy.full(1, 5.0)]
        >>> pieces = Pieces(whole.ctypes.data, [part.nbytes for part in parts])
        >>> pieces.gather([part.ctypes.data for part in parts])
        >>> whole
        array([1., 1., 5.])
    """

    __slots__ = ("_whole", "_addresses", "_nbytes", "_count")

    def __init__(self, address, nbytes):
        self._count = len(nbytes)
        self._whole = ffi.cast("void *", address)
        self._nbytes = ffi.new("uint64_t[]", nbytes)
        self._addresses = ffi.new("uintptr_t[]", self._count)

    def gather(self, addresses):
        """Copies the pieces into the whole.

        Args:
            addresses: of every piece, in order, as ints. They are not looked at: wrong ones end the process.

        Raises:
            ValueError: not as many as pieces.
        """
        self._addresses[0 : self._count] = addresses
        lib.cl_gather(self._whole, self._addresses, self._nbytes, self._count)

    def scatter(self, addresses):
        """Copies the whole into the pieces; addresses: as for `gather`."""
        self._addresses[0 : self._count] = addresses
        lib.cl_scatter(self._whole, self._addresses, self._nbytes, self._count)


def scale(code, output, source, count, factor):
    """output[i] = source[i] * factor as the engine computes it; `code` is a cl_dtype, both are addresses, and may be equal."""
    lib.cl_scale(code, ffi.cast("void *", output), ffi.cast("void *", source), count, factor)


def adasum_dots(code, a, b, count, sums):
    """sums[0:3] = a.a, a.b, b.b of floats at two addresses; `code` is a cl_dtype, `sums` an address of fp64."""
    lib.cl_adasum_dots(code, ffi.cast("void *", a), ffi.cast("void *", b), count, ffi.cast("double *", sums))


def adasum_mix(code, out, a, b, count, factors):
    """out[i] = factors[0] * a[i] + factors[1] * b[i] at addresses, of which `out` may be one of the others."""
    lib.cl_adasum_mix(code, ffi.cast("void *", out), ffi.cast("void *", a), ffi.cast("void *", b), count, *factors)


class Completions:
    """Operations in the order in which they are done, for one thread that waits for whatever is next."""

    def __init__(self):
        self._queue = ffi.NULL
        queue = ffi.new("cl_queue **")
        if lib.cl_queue_new(queue) != lib.CL_OK:
            raise MemoryError("out of memory for a queue of operations")
        self._queue = queue[0]
        self._operation, self._token = ffi.new("cl_operation **"), ffi.new("void **")

    def tell(self, operation, token):
        """An operation is to come with this int, once."""
        lib.cl_operation_tell(operation, self._queue, ffi.cast("void *", token))

    def next(self, timeout_s):
        """The int of the operation that was done first; None: none was in time."""
        if lib.cl_queue_next(self._queue, int(timeout_s * 1e3), self._operation, self._token) != lib.CL_OK:
            return None
        lib.cl_operation_release(self._operation[0])
        return int(ffi.cast("uintptr_t", self._token[0]))

    def __del__(self):
        lib.cl_queue_free(self._queue)  # all that was told to it has come: whoever waited for it let go of this object after that
