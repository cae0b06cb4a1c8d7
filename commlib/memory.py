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
