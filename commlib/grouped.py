"""All-reduces of lists of arrays: small ones of one dtype travel together, as one operation.

What travels together is a function of dtypes, shapes and order alone, so equal lists make equal operations on all ranks,
and the shapes are part of what ranks check about each other. The copies there and back are one call into C each. This file
knows arrays and where they lie; operations are its communicator's.
"""

import time
import zlib
from typing import NamedTuple

from commlib.buffer import Buffer, as_buffer, new_like, style_of, writable_buffer
from commlib.errors import CommlibError
from commlib.memory import Pieces, address_of
from commlib.reduction import Adasum, Average, check_op

# By itself an array costs about 10 us on both of two ranks, in company a copy there and one back: 64 KiB take as long.
_SMALL_NBYTES = 64 << 10
# One bundle is copied while the ones before it travel.
_BUNDLE_NBYTES = 1 << 20
_MOST_LAYOUTS = 64
_MOST_SPARES = 2  # calls of one list in flight at once, beyond which memory is made anew


class _Shapes(tuple):
    """The shapes of a bundle, in few words."""

    def __str__(self):
        first = ", ".join(map(str, self[:3]))
        return f"{len(self)} arrays ({first}{', ...' if len(self) > 3 else ''}; layout {zlib.crc32(repr(self).encode()):08x})"


class _Bundle(NamedTuple):
    """What travels together; what travels alone is not copied."""

    places: tuple  # in the list
    dtype: str
    shapes: _Shapes
    nbytes: tuple  # of each
    count: int  # of elements, in all
    spares: list  # (Buffer, Pieces) of earlier calls


class GroupedHandle:
    """All-reduces in flight that complete together; `wait` gives the list of their arrays.

    Example:
        >>> import commlib, numpy
        >>> handle = commlib.init().grouped_allreduce_async([numpy.ones(2), numpy.zeros(1)], op=commlib.Sum)
        >>> handle.wait()  # with one rank
        [array([1., 1.]), array([0.])]
        >>> commlib.shutdown()
    """

    __slots__ = ("_parts", "_results", "_keep")

    def __init__(self, parts, results, keep):
        self._parts, self._results, self._keep = parts, results, keep

    def wait(self, timeout_s=None):
        """Waits until all are done and returns the arrays, in the order of the list.

        Raises:
            TimeoutError: they are not after timeout_s seconds; they go on, and may be waited for again.
            CommlibError: one failed, the first in the list; all are done.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        failure = None
        for handle, land in self._parts:
            try:
                handle.wait(None if end_s is None else max(0.0, end_s - time.monotonic()))
            except CommlibError as error:
                failure = failure or error
            else:
                if land is not None:
                    land()
        if failure is not None:
            raise failure
        self._parts, self._keep = [], None
        return self._results

    def done(self):
        """True if all are done, well or not: `wait` will not block."""
        return all(handle.done() for handle, _ in self._parts)


class GroupedCollectives:
    """The grouped half of a Communicator, which has the other one."""

    def grouped_allreduce_async_(self, arrays, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0):
        """Reduces arrays over all ranks, in place, those at the same place of the list with each other.

        Small neighbours of one dtype travel as one operation: a thousand of 4 KB cost a fraction of a thousand operations.

        Args:
            arrays: a list of arrays as for `allreduce_async_`, the same shapes and dtypes on all ranks. Do not touch them before
                the wait, which is when the results are there.
            name: the first part of the operations' names; None: by sequence number.
            op, priority, prescale_factor, postscale_factor: as for `allreduce_async_`, for all of them.

        Returns:
            A GroupedHandle; its wait() returns the list of the arrays.

        Raises:
            ValueError: read-only or non-contiguous array, name in flight.
            TypeError: no array, unknown dtype, unknown op.
        """
        arrays = list(arrays)
        places = [_writable(array) for array in arrays]
        return self._begin_group(arrays, places, places, arrays, name, op, priority, prescale_factor, postscale_factor)

    def grouped_allreduce_async(self, arrays, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0):
        """As `grouped_allreduce_async_`, with the results in new arrays; the arrays are only read."""
        arrays = list(arrays)
        sources = [as_buffer(array) for array in arrays]
        made = [new_like(style_of(array, source), source.shape, source.dtype) for array, source in zip(arrays, sources)]
        addresses, into = [_address(source) for source in sources], [_address(target) for _, target in made]
        return self._begin_group(sources, addresses, into, [result for result, _ in made], name, op, priority, prescale_factor,
                                 postscale_factor)  # fmt: skip

    def grouped_allreduce_(self, arrays, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                           timeout_s=None):  # fmt: skip
        """As `grouped_allreduce_async_`, and waits. Returns the list of the arrays."""
        return self.grouped_allreduce_async_(arrays, name=name, op=op, priority=priority, prescale_factor=prescale_factor,
                                             postscale_factor=postscale_factor).wait(timeout_s)  # fmt: skip

    def grouped_allreduce(self, arrays, *, name=None, op=Average, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                          timeout_s=None):  # fmt: skip
        """As `grouped_allreduce_async`, and waits. Returns the list of the new arrays.

        Example:
            >>> import commlib, numpy
            >>> commlib.init().grouped_allreduce([numpy.array([3, 4]), numpy.array(0.5)], op=commlib.Max)
            [array([3, 4]), array(0.5)]
            >>> commlib.shutdown()
        """
        return self.grouped_allreduce_async(arrays, name=name, op=op, priority=priority, prescale_factor=prescale_factor,
                                            postscale_factor=postscale_factor).wait(timeout_s)  # fmt: skip

    def _begin_group(self, sources, addresses, into, results, name, op, priority, prescale, postscale):
        if op is Adasum:
            return self._begin_adasum(sources, addresses, into, results, name, priority, (float(prescale), float(postscale)))
        bundles = self._bundles_of(sources)
        for dtype in {bundle.dtype for bundle in bundles}:
            check_op(op, dtype)
        options = {"priority": priority, "op": op, "scales": (float(prescale), float(postscale)), "overlapped": len(bundles) > 1}
        parts = []
        for number, bundle in enumerate(bundles):
            own_name = None if name is None else f"{name}.{number}"
            submit = self._submit_alone if len(bundle.places) == 1 else self._submit_bundle
            parts.append(submit(bundle, own_name, addresses, into, (sources, results), options))
        return GroupedHandle(parts, results, (sources, results))

    def _begin_adasum(self, sources, addresses, into, results, name, priority, scales):
        """All of a dtype travel together, each with its own coefficients."""
        keep, places = (sources, results), {}
        for place, buffer in enumerate(map(as_buffer, sources)):
            check_op(Adasum, buffer.dtype)
            places.setdefault(buffer.dtype, []).append((place, buffer.shape))
        parts = []
        for number, (dtype, members) in enumerate(places.items()):
            ends = [[Buffer(where[place], shape, dtype, keep, True) for place, shape in members] for where in (addresses, into)]
            own_name = None if name is None else f"{name}.{number}"
            parts.append((self._adasums.submit(own_name, *ends, None, priority, scales), None))
        return GroupedHandle(parts, results, keep)

    def _submit_alone(self, bundle, name, addresses, into, keep, options):
        place, = bundle.places
        source, target = [Buffer(where[place], bundle.shapes[0], bundle.dtype, keep, True) for where in (addresses, into)]
        return self._submitter.submit("allreduce", name, source, source if into is addresses else target, **options), None

    def _submit_bundle(self, bundle, name, addresses, into, keep, options):
        try:
            spare = bundle.spares.pop()
        except IndexError:
            whole = as_buffer(self.empty(sum(bundle.nbytes), "uint8"))
            spare = Buffer(whole.address, (bundle.count,), bundle.dtype, whole, True), Pieces(whole.address, bundle.nbytes)
        buffer, pieces = spare
        pieces.gather([addresses[place] for place in bundle.places])
        handle = self._submitter.submit("allreduce", name, buffer, buffer, shape=bundle.shapes, **options)

        def land():
            pieces.scatter([into[place] for place in bundle.places])
            if len(bundle.spares) < _MOST_SPARES:
                bundle.spares.append(spare)

        return handle, land

    def _bundles_of(self, sources):
        try:
            key = tuple([(array.dtype, array.shape) for array in sources])
        except AttributeError:  # memory that is no array: bytearray, array.array, ...
            sources = [as_buffer(array) for array in sources]
            key = tuple([(array.dtype, array.shape) for array in sources])
        bundles = self._layouts.get(key)
        if bundles is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            bundles = self._layouts[key] = list(_bundles([as_buffer(array) for array in sources]))
        return bundles


def _bundles(buffers):
    """Small ones of a dtype together, in order, up to a bundle's length."""
    gathering = {}  # dtype -> (places, their bytes)
    for place, buffer in enumerate(buffers):
        if buffer.nbytes > _SMALL_NBYTES:
            yield _bundle(buffers, [place])
            continue
        places, nbytes = gathering.get(buffer.dtype, ([], 0))
        if nbytes + buffer.nbytes > _BUNDLE_NBYTES:
            yield _bundle(buffers, places)
            places, nbytes = [], 0
        places.append(place)
        gathering[buffer.dtype] = (places, nbytes + buffer.nbytes)
    for places, _ in gathering.values():
        yield _bundle(buffers, places)


def _bundle(buffers, places):
    chosen = [buffers[place] for place in places]
    return _Bundle(tuple(places), chosen[0].dtype, _Shapes(buffer.shape for buffer in chosen),
                   tuple(buffer.nbytes for buffer in chosen), sum(buffer.count for buffer in chosen), [])  # fmt: skip


def _address(buffer):
    return address_of(buffer.owner) if buffer.known_address is None else buffer.known_address


def _writable(array):
    """Where an array begins that will be changed."""
    try:
        return address_of(array, writable=True)
    except (ValueError, TypeError, BufferError):  # no plain array: the long way knows what to do, or what is wrong
        return writable_buffer(array, "grouped_allreduce_").address
