"""Results whose size only the collective knows: memory of the engine, seen as the caller's kind of array.

This file knows rows, the unit in which all-gather, reduce-scatter and all-to-all deal; it submits nothing.
"""

import math

import numpy

from commlib.buffer import new_like, over_memory, style_of


class EngineMemory:
    """The result memory of a finished operation, which lives as long as any array over it.

    Args:
        handle: the operation's Handle, kept alive.
        result: what Engine.result said of it.
        itemsize: bytes of one element.
    """

    __slots__ = ("__array_interface__", "handle", "count", "member_counts")

    def __init__(self, handle, itemsize):
        address, self.count, self.member_counts = handle.result_memory()
        self.handle = handle
        self.__array_interface__ = {
            "shape": (self.count * itemsize,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def new_shared(allocate, shape, dtype, shared_only=False):
    """An array of zeros over memory from allocate(nbytes); where that gives None, over ordinary memory or None too."""
    dtype = numpy.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = allocate(nbytes) if nbytes else None
    if memory is None:
        return None if shared_only else numpy.zeros(shape, dtype)
    return numpy.frombuffer(memory, dtype).reshape(shape)


def exchanged(handle):
    """Everybody's bytes as a list, in rank order."""
    memory = EngineMemory(handle, 1)
    whole = numpy.asarray(memory).tobytes()
    payloads, first = [], 0
    for count in memory.member_counts:
        payloads.append(whole[first : first + count])
        first += count
    return payloads


class Rows:
    """An array as rows along its first dimension.

    Rows without elements (shape (3, 0)) still count: they travel as one element each.

    Args:
        kind: the collective, for errors.
        array, source: what the caller passed, and its Buffer.

    Raises:
        ValueError: the array has no dimension.
    """

    __slots__ = ("style", "dtype", "itemsize", "nrows", "rest", "width", "payload")

    def __init__(self, kind, array, source):
        if not source.shape:
            raise ValueError(f"{kind} works along the first dimension, and a scalar has none: reshape it to (1,)")
        self.style = style_of(array, source)
        self.dtype = source.dtype
        self.itemsize = source.itemsize
        self.nrows, self.rest = source.shape[0], tuple(source.shape[1:])
        self.width = math.prod(self.rest) or 1
        self.payload = source if math.prod(self.rest) else new_like(self.style, (self.nrows,), self.dtype)[1]

    @property
    def shape_hashed(self):
        """What must be equal on all ranks: everything but the number of rows."""
        return ("rows", *self.rest)

    def even_splits(self, size):
        """The same number of rows for each of `size` ranks."""
        if self.nrows % size:
            raise ValueError(f"alltoall cannot share {self.nrows} rows evenly among {size} ranks: pass splits")
        return [self.nrows // size] * size

    def checked_splits(self, splits, size):
        """The user's rows per rank, as ints."""
        try:
            row_splits = [int(split) for split in splits]
        except TypeError:
            raise TypeError(f"splits must be a sequence of {size} ints, not {splits!r}") from None
        if len(row_splits) != size or min(row_splits) < 0 or sum(row_splits) > self.nrows:
            raise ValueError(f"splits must be {size} numbers of rows of at least 0, together at most {self.nrows}, "
                             f"not {row_splits}")  # fmt: skip
        return row_splits

    def elements(self, row_splits):
        """Numbers of rows as numbers of elements."""
        return tuple(split * self.width for split in row_splits)

    def share(self, rank, size):
        """[first, end) of a rank's rows; low ranks get the rows that remain."""
        base, extra = divmod(self.nrows, size)
        first = rank * base + min(rank, extra)
        return first, first + base + (rank < extra)

    def parts(self, size):
        """The element at which each rank's share begins, and the end."""
        width = math.prod(self.rest)
        return tuple(self.share(rank, size)[0] * width for rank in range(size + 1))

    # ---- results, made of a finished handle ------------------------------------------------------------------

    def gathered(self, handle):
        """All rows that came together."""
        memory = EngineMemory(handle, self.itemsize)
        shape = (memory.count // self.width, *self.rest)
        if not math.prod(self.rest):
            return new_like(self.style, shape, self.dtype)[0]
        return over_memory(self.style, shape, self.dtype, numpy.asarray(memory))

    def gathered_with_splits(self, handle):
        """All rows that came together, and how many came from each rank."""
        counts = EngineMemory(handle, self.itemsize).member_counts
        return self.gathered(handle), numpy.array([count // self.width for count in counts], dtype=numpy.int32)

    def scattered(self, rank, size, handle):
        """This rank's share."""
        first, end = self.share(rank, size)
        memory = EngineMemory(handle, self.itemsize)
        return over_memory(self.style, (end - first, *self.rest), self.dtype, numpy.asarray(memory))
