"""Adasum: a sum of gradients that adds what is orthogonal and averages what is parallel, composed of the engine's operations.

    adasum(a, b) = (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b

Over ranks it is a tree: neighbours first, then pairs of pairs. With a number of ranks that is no power of two, 2^k + r, the
first r pairs of ranks become one node each before the tree of 2^k nodes begins. As drawn for six ranks:

    0 1   2 3   4   5     fold: (0, 1) and (2, 3); nodes are then 0, 2, 4, 5
     \\|    \\|   |   |
      0-----2   4---5     the tree
       \\________/

Long vectors are halved while distances double (Maleki et al.): each level exchanges one half with the partner, combines the
other, and sums the inner products over all ranks that hold parts of the two vectors; the halves come back on the way back.
2 n bytes leave each rank. Short ones are exchanged whole, log2(p) messages. Coefficients are one pair for each array, also
where several travel together. All ranks hold the same bits, as every element is computed once, or from the same operands.

This file knows the algorithm and its rounds; a thread goes on with whatever round is done. What travels is the submitter's.

References:
    Maleki, Musuvathi, Mytkowicz, Saarikivi, Xu, Eksarevskiy, Ekanayake, Barsoum, "Scaling distributed training with adaptive
    summation", 2020, arXiv:2006.02924.
"""

import json
import threading
import time
from collections import namedtuple
from contextlib import suppress

import numpy

from commlib.buffer import Buffer, as_buffer
from commlib.control import difference
from commlib.engine import operation_error
from commlib.errors import CommlibError, MismatchError
from commlib.memory import Completions, Pieces, adasum_dots, adasum_mix, scale
from commlib.names import EPOCH, base_key, busy_text, key_of_use
from commlib.plan import Plan, recv, recv_reduce, send
from commlib.results import exchanged

_BLOCK = 64  # elements: the engine cuts chunks on such borders
_SHORT_NBYTES = 64 << 10  # below, messages cost more than bytes
_MOST_ROUNDS = 256  # of one reduction, three for each doubling of the ranks
_SLICE_S = 1.0

_Shape = namedtuple("_Shape", "nodes levels is_leaf partner node")


class AdasumHandle:
    """One Adasum in flight; `wait` gives its result, as Handle.wait does."""

    def __init__(self, engine, name, result, first):
        self.name, self.kind, self.note = name, "allreduce", None
        self._engine = engine
        self._first = first  # the Handle of what was posted first, of which all others hear when this is done
        self._lock = threading.Lock()
        self._waiting = []
        self.times = (time.monotonic(), -1.0, -1.0)
        self._result, self._error = result, None
        self._is_done = threading.Event()

    def wait(self, timeout_s=None):
        """Waits until it is done and returns its array, or its list of arrays; see Handle.wait."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        left_s = _SLICE_S if timeout_s is None else timeout_s
        while left_s > 0 and not self._is_done.wait(min(left_s, _SLICE_S)):
            if self._engine.forked:
                self._engine.check()
            left_s = _SLICE_S if end_s is None else end_s - time.monotonic()
        if not self._is_done.is_set():
            raise TimeoutError(f"allreduce {self.name!r} is not done after {timeout_s} s; it goes on: wait again, and see that "
                               "every rank submits it")  # fmt: skip
        if self._error is not None:
            raise self._error
        return self._result

    def done(self):
        """True if it is done, well or not."""
        return self._is_done.is_set()

    def tell(self, tell):
        """Has tell(operation) called once it is done, perhaps by another thread; the operation is the engine's, and done, too."""
        with self._lock:
            if not self._is_done.is_set():
                self._waiting.append(tell)
                return
        tell(self._first.operation)

    def finish(self, error=None):
        """It is done."""
        self._error = error
        self.times = (self.times[0], self.times[0], time.monotonic())
        with self._lock:
            self._is_done.set()
        for tell in self._waiting:
            tell(self._first.operation)


class Adasums:
    """The Adasums of one communicator, and the thread that goes on with them while there are any.

    Args:
        submitter: of the communicator.
    """

    def __init__(self, submitter):
        self._submitter = submitter
        self._lock = threading.Lock()
        self._completions = Completions()
        self._is_running = False
        self._reductions = {}  # number -> Reduction
        self._in_flight = {}  # name -> AdasumHandle
        self._next = 1

    def submit(self, name, sources, targets, result, priority, scales):
        """Begins one of several arrays of one dtype.

        Args:
            name: None: by sequence number.
            sources, targets: Buffers read and written.
            result: of the handle.
            priority, scales: as for Submitter.submit.

        Raises:
            ValueError: the name is in flight.
        """
        with self._lock:
            before = self._in_flight.get(name)
            if before is not None and not before.done():
                raise ValueError(busy_text("allreduce", name))
            reduction = Reduction(self._submitter, name, sources, targets, result, priority, scales)
            number = self._next
            self._next += 1
            self._reductions[number] = reduction
            if name is not None:
                self._in_flight[name] = reduction.handle
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, args=(self._completions,), name="commlib-adasum", daemon=True).start()
            self._completions.tell(reduction.operation, number)
        return reduction.handle

    def settle(self):
        """Waits until nothing is in flight, well or not: a rank that joins can begin no further round."""
        for reduction in list(self._reductions.values()):
            while not reduction.handle.done():
                with suppress(CommlibError, ValueError, TimeoutError):
                    reduction.handle.wait(_SLICE_S)

    def _run(self, completions):
        """Until nothing has been in flight for a while."""
        while True:
            number = completions.next(_SLICE_S)
            if number is not None:
                self._go_on(completions, number)
                continue
            with self._lock:
                if not self._reductions:
                    self._is_running = False
                    return

    def _go_on(self, completions, number):
        reduction = self._reductions[number]
        if reduction.go_on():
            completions.tell(reduction.operation, number)
            return
        with self._lock:
            del self._reductions[number]
            if self._in_flight.get(reduction.name) is reduction.handle:
                del self._in_flight[reduction.name]
        reduction.end()


def shape_of(rank, size):
    """Where a rank stands in the tree: nodes, levels, whether it only folds, with whom, and its node.

    Example:
        >>> shape_of(3, 6).partner, shape_of(3, 6).is_leaf, shape_of(4, 6).node
        (2, True, 2)
    """
    levels = size.bit_length() - 1
    rest = size - (1 << levels)
    folds = rank < 2 * rest
    nodes = [2 * node if node < rest else node + rest for node in range(1 << levels)]
    return _Shape(nodes, levels, folds and rank % 2 == 1, rank ^ 1 if folds else None, rank // 2 if folds else rank - rest)


class Reduction:
    """One Adasum: what has been posted last, and what comes next.

    Attributes:
        operation: the engine's, posted last.
    """

    def __init__(self, submitter, name, sources, targets, result, priority, scales):
        self.name = name
        self._submitter, self._sources, self._targets = submitter, sources, targets
        self._priority, self._scales = priority, scales
        self._code, self._itemsize = sources[0].code, sources[0].itemsize
        self._words = {"arrays": [[source.dtype, list(source.shape)] for source in sources], "scaled by": list(scales)}
        self._told = submitter.submit("exchange", None if name is None else f"adasum {name}", as_buffer(self._mine()), None,
                                      priority=priority, shape=("adasum",), finish=exchanged)  # fmt: skip
        use = submitter.names.use("exchange", None if name is None else f"adasum {name}")
        self._first_round = (use.count - 1) * _MOST_ROUNDS
        self._base = base_key(submitter.names.group, "adasum", name)
        self.handle = AdasumHandle(submitter.engine, f"noname.{(use.count - 1) % EPOCH}" if name is None else name, result,
                                   self._told)  # fmt: skip
        self.operation = self._told.operation
        self._error = None
        self._rounds = self._reduce()

    def _mine(self):
        return json.dumps(self._words, sort_keys=True).encode()

    def go_on(self):
        """The last operation is done. True: another one was posted."""
        engine = self._submitter.engine
        try:
            if self.operation is not self._told.operation:
                self._land(engine)
            self.operation = next(self._rounds)
            return True
        except StopIteration:
            return False
        except Exception as error:
            self._error = error
            return False

    def end(self):
        """Nothing of it is in flight any more."""
        self._rounds.close()
        self._sources = self._targets = None
        self.handle.finish(self._error)

    def _land(self, engine):
        operation, status = self.operation, engine.wait(self.operation, 0)
        error = operation_error(operation) if status else None
        engine.release(operation)
        if error is not None:
            raise error

    # ---- the algorithm

    def _reduce(self):
        self._check(self._told.wait())
        submitter = self._submitter
        size, counts = submitter.size, [source.count for source in self._sources]
        total = sum(counts)
        if total == 0:
            return
        shape = shape_of(submitter.rank, size)
        is_short = total * self._itemsize <= _SHORT_NBYTES or total < 4 * _BLOCK << shape.levels
        unit = _BLOCK << max(1, 0 if is_short else shape.levels)
        length = -(-total // unit) * unit
        self._memory = numpy.zeros((2 * length if is_short else length + length // 2) * self._itemsize, numpy.uint8)
        self._at = self._memory.ctypes.data
        ends = numpy.cumsum([0, *counts]).tolist()
        self._spans = list(zip(ends, ends[1:]))
        pieces = Pieces(self._at, [source.nbytes for source in self._sources])
        pieces.gather([source.address for source in self._sources])
        self._scale(total, self._scales[0])
        yield from self._tree(shape, length, is_short) if size > 1 else ()
        self._scale(total, self._scales[1])
        pieces.scatter([target.address for target in self._targets])

    def _scale(self, count, factor):
        if factor != 1.0:
            scale(self._code, self._at, self._at, count, factor)

    def _check(self, payloads):
        for rank, other in enumerate(payloads):
            if other != payloads[0]:
                raise MismatchError(f"allreduce {self.handle.name!r} adasum failed: ranks disagree: "
                                    f"{difference(payloads[0], other, rank)}; submit the same on every rank")  # fmt: skip

    def _tree(self, shape, length, is_short):
        if shape.partner is not None:
            yield from self._fold(shape, length, is_short)
        if not shape.is_leaf:
            yield from (self._whole if is_short else self._halving)(shape, length)
        if shape.partner is not None:  # back to those that only folded
            mine = send(shape.partner, 0, 1) if not shape.is_leaf else recv(shape.partner, 0, 1)
            yield self._post(_MOST_ROUNDS - 1, 0, length, 1, (mine,))

    def _fold(self, shape, length, is_short):
        """Two ranks become one node: the even one holds what both had."""
        if is_short:
            step = send(shape.partner, 0, 1) if shape.is_leaf else recv(shape.partner, 1, 2)
            yield self._post(0, 0, 2 * length, 2, (step,))
            if not shape.is_leaf:
                self._mix(0, 0, length, 0, length, self._dots(0, 0, length, length))
            return
        pair = sorted((self._submitter.rank, shape.partner))
        yield from self._level(0, 0, 0, length, shape.is_leaf, shape.partner, pair)
        step = send(shape.partner, 1, 2) if shape.is_leaf else recv(shape.partner, 1, 2)
        yield self._post(3, 0, length, 2, (step,))

    def _whole(self, shape, length):
        for level in range(shape.levels):
            partner = shape.nodes[shape.node ^ 1 << level]
            yield self._post(4 + level, 0, 2 * length, 2, (send(partner, 0, 1), recv(partner, 1, 2)))
            first, second = (length, 0) if shape.node >> level & 1 else (0, length)
            self._mix(0, first, second, 0, length, self._dots(0, first, second, length))

    def _halving(self, shape, length):
        """Halves of halves, and back."""
        at, passed = 0, []
        for level in range(shape.levels):
            is_upper, partner = bool(shape.node >> level & 1), shape.nodes[shape.node ^ 1 << level]
            start = shape.node >> level + 1 << level + 1
            block = shape.nodes[start : start + (2 << level)]
            yield from self._level(4 + 3 * level, at, at, length, is_upper, partner, block)
            passed.append((at, length, is_upper, partner))
            length //= 2
            at += length * is_upper
        for number, (at, length, is_upper, partner) in enumerate(reversed(passed)):
            mine, theirs = (1, 0) if is_upper else (0, 1)
            steps = (send(partner, mine, mine + 1), recv(partner, theirs, theirs + 1))
            yield self._post(_MOST_ROUNDS - 2 - number, at, length, 2, steps)

    def _level(self, number, at, offset, length, is_upper, partner, block):
        """Exchanges halves of [at, at + length) with the partner and combines the one that stays; the other's lies behind both."""
        half = length // 2
        mine, other = (1, 0) if is_upper else (0, 1)
        yield self._post(number, at, 3 * half, 3, (send(partner, other, other + 1), recv(partner, 2, 3)))
        kept, received = at + mine * half, at + length
        first, second = (received, kept) if is_upper else (kept, received)
        dots = self._dots(offset + mine * half, first, second, half)
        self._sums = dots
        yield self._post_sums(number + 1, dots, block)
        self._mix(offset + mine * half, first, second, kept, half, dots)

    # ---- arithmetic, on pieces of the memory that hold elements from `offset` on of the whole

    def _overlaps(self, offset, length):
        for place, (first, end) in enumerate(self._spans):
            low, high = max(first, offset), min(end, offset + length)
            if low < high:
                yield place, low - offset, high - low

    def _address(self, element):
        return self._at + element * self._itemsize

    def _dots(self, offset, first, second, length):
        """a.a, a.b and b.b of every array, as far as it lies here."""
        dots = numpy.zeros((len(self._spans), 3))
        for place, low, count in self._overlaps(offset, length):
            adasum_dots(self._code, self._address(first + low), self._address(second + low), count, dots[place].ctypes.data)
        return dots

    def _mix(self, offset, first, second, to, length, dots):
        for place, low, count in self._overlaps(offset, length):
            adasum_mix(self._code, self._address(to + low), self._address(first + low), self._address(second + low), count,
                       coefficients(*dots[place].tolist()))  # fmt: skip

    # ---- operations

    def _post(self, number, at, count, nchunks, steps):
        part = Buffer(self._address(at), (count,), self._sources[0].dtype, self._memory, True)
        return self._submit(number, part, Plan(self._submitter.rank, nchunks, 0, steps))

    def _post_sums(self, number, dots, block):
        """The inner products of both vectors, out of those of their parts: recursive doubling, so all have the same bits."""
        place, steps = block.index(self._submitter.rank), []
        for level in range(len(block).bit_length() - 1):
            peer = block[place ^ 1 << level]
            steps += [send(peer, 0, 1), recv_reduce(peer, 0, 1)]
        part = Buffer(dots.ctypes.data, (dots.size,), "float64", dots, True)
        return self._submit(number, part, Plan(self._submitter.rank, 1, 0, tuple(steps)))

    def _submit(self, number, part, plan):
        key = key_of_use(self._base, self._first_round + number)
        text = f"allreduce {self.handle.name!r} adasum, round {number}"
        return self._submitter.submit_plan(key, text, part, plan, self._priority)


def coefficients(aa, ab, bb):
    """What a and b are multiplied by, of their inner products; a vector of zeros changes nothing.

    Example:
        >>> coefficients(1.0, 0.0, 4.0), coefficients(1.0, 1.0, 1.0)
        ((1.0, 1.0), (0.5, 0.5))
    """
    return (1.0 - ab / (2.0 * aa) if aa else 1.0), (1.0 - ab / (2.0 * bb) if bb else 1.0)
