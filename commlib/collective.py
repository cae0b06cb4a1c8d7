"""One collective call as a request to the engine: key, algorithm, plan, segments, memory.

`Submitter` is the private half of a communicator. It knows kinds, names and plans; it checks no user's argument, which is
the communicator's work, and it waits for nothing.
"""

import math
import operator
import threading
import zlib

from commlib.buffer import DTYPES
from commlib.engine import AGAIN, KIND_CODES
from commlib.handle import Flight, Handle
from commlib.layout import Layout
from commlib.memory import memory_of, pointer_of
from commlib.names import EPOCH, Names, Use, base_key, busy_text, key_of_use
from commlib.prepared import Prepared
from commlib.reduction import Average
from commlib.rendezvous_wire import spell_ranks
from commlib.requests import NO_PLAN, copy_of_request, native_plan, new_members, new_offsets, new_request, new_text
from commlib.selection import MPI_OWN, select
from commlib.standing_in import StandsIn, hint_of

# The shapes of exchanges, in which every rank's bytes may have another length: also none, of a rank that has joined.
ANY, ANY_OR_NONE = ("any",), ("any or none",)

# These first tell each other their sizes, or check on every rank that all mean the same.
_WITH_MEMBERS = frozenset(("broadcast", "allgather", "alltoall", "exchange"))

_FLOAT_CODES = frozenset(DTYPES[dtype][0] for dtype in ("float16", "bfloat16", "float32", "float64"))

_MOST_REQUESTS = 8192  # more tensors than models have; about 1 KB each

_SEGMENT_ALIGNMENT = 64  # elements; the engine cuts chunks on such borders, and so kernels start on whole cache lines


class Submitter(StandsIn):
    """Everything between a checked call and cl_submit.

    Args:
        engine: a started commlib.engine.Engine.
        hosts: the host index of every rank.
        settings: the settings record that all ranks hold.
        group: the name of the group in the keys; equal on its ranks, different from other groups.
        members: the ranks of the group, in its order; None: all.
        flight: the engine's table of what is in flight, if there is one.
        whole: of a group's: the Submitter of all ranks.

    Attributes:
        rank, size, members: this rank's place in the group, the number of its ranks, and these.
    """

    backend = "native"  # who moves the bytes
    handle_class = Handle
    prepares = True  # whether `prepare` is for its operations

    def __init__(self, engine, hosts, settings, group="world", members=None, flight=None, whole=None):
        self.engine = engine
        self._hosts = hosts
        self.kin = [self] if whole is None else whole.kin  # of this engine; the first is that of all ranks
        self.members = tuple(range(engine.size)) if members is None else tuple(members)
        self.rank, self.size = self.members.index(engine.rank), len(self.members)
        self._is_part = members is not None
        self._parts = {}  # members -> how many groups of them were made
        self._layout = Layout(hosts)
        self.flight = flight or Flight(engine)
        self.names = Names(group, KIND_CODES, self.size, 0 if whole is None else whole.names.first)
        self.lock = threading.Lock() if whole is None else whole.lock
        self._plans = {}
        self._described = []  # names whose request is filled in
        self._members = new_members(self.members)
        self.use_settings(settings)

    def use_settings(self, settings):
        """Takes over a settings record; nothing is in flight."""
        self.settings = settings
        self._settings_hash = settings.hash
        for use in self._described:
            use.forget_request()
        self._described.clear()

    def submit(self, kind, name, source, target, *, priority=0, op=None, root=-1, scales=(1.0, 1.0), shape=None,
               overlapped=False, lazy=False, splits=None, parts=None, finish=None,
               result=None):  # fmt: skip
        """Posts one operation and returns its handle.

        Args:
            kind, name: what and under which name; name None is the next unnamed one of its kind.
            source, target: Buffers read and written; None for memory of the engine or none at all.
            priority: the engine's order; lower goes first.
            op: a ReduceOp, for the kinds that reduce.
            root: a rank, for broadcast.
            scales: (prescale, postscale) as the user wants them.
            shape: what must be equal on all ranks; the source's shape unless given.
            overlapped: one of many in flight: see `selection.select`.
            lazy: the caller waits next, and moves the bytes itself.
            splits: elements per member, for the kinds that exchange them.
            parts: element offsets of the plan's chunks, for reduce-scatter.
            finish: makes the result of the handle; without it, `result` is the result.

        Raises:
            ValueError: the name is in flight.
        """
        self.engine.check_open()  # before the lock, which a thread of the parent may have held at the fork
        use = self.names.use(kind, name)
        if use.handle is not None:
            self.free_name(kind, use)
        signature = (source.dtype, source.count, shape or source.shape, op, root, priority, scales, parts,
                     overlapped)  # fmt: skip
        with self.lock:
            if self.engine.joined:
                self.engine.check_open()
            if use.signature != signature:
                self._describe(use, kind, signature)
            request = use.request
            key, number = use.next_key(), use.count
            request.key, request.lazy = key, lazy
            request.input = pointer_of(source)
            if target is not None:
                request.output = request.input if target is source else pointer_of(target)
            if splits is not None:
                request.nsplits = len(splits)
                request.splits = held = new_offsets(splits)  # lives until the engine has copied it
            handle = self.handle_class(self.flight, use, kind, f"noname.{number % EPOCH}" if name is None else name,
                                       (source, target), finish, result)  # fmt: skip
            self.flight.add(handle)
            try:
                self._post(handle, request)
            except BaseException:
                self.flight.discard(handle)
                raise
        if name is not None:
            use.handle = handle
        return handle

    # ---- the short way: as the last time, in place, on any NumPy array of the same shape and dtype ----------------------

    def remember(self, kind, name, array, wish):
        """`wish` is all that the user asked for beside the array, which was just submitted under this name."""
        use = self.names.use(kind, name)
        use.wish, use.dtype, use.shape = wish, array.dtype, array.shape

    def run_again(self, kind, name, array, wish, timeout_s):
        """Runs an operation that asks for the same as the last one of its name, and waits. False: it does not, or may not."""
        use = self.names.used(kind).get(name)
        if use is None or use.wish != wish or array.dtype is not use.dtype or array.shape != use.shape:
            return False
        engine, flight, request, keep = self.engine, self.flight, use.request, use.keep
        if use.handle is not None or request is None or not engine.is_open or flight.timeline is not None:
            return False
        try:
            memory = memory_of(array)
        except (ValueError, TypeError, BufferError):
            return False  # the long way tells the user what is wrong
        with self.lock:
            key, number = use.next_key(), use.count
        place = engine.places.pop() if engine.places else engine.new_place()
        try:
            status = engine.run_at(request, key, memory, memory, place)
        except BaseException:  # Ctrl-C, which Python learns here; the operation goes on
            self._caught(kind, use, number, (memory, keep), engine.taken_from(place, AGAIN), array)
            raise
        if status != 0:
            self._caught(kind, use, number, (memory, keep), engine.taken_from(place, status), array).wait(timeout_s)
        engine.places.append(place)
        return True

    def start_again(self, kind, name, array, wish):
        """As `run_again`, but does not wait. Returns the handle, or None."""
        use = self.names.used(kind).get(name)
        if use is None or use.wish != wish or array.dtype is not use.dtype or array.shape != use.shape:
            return None
        engine, request, keep = self.engine, use.request, use.keep
        if use.handle is not None or request is None or not engine.is_open:
            return None
        try:
            memory = memory_of(array)
        except (ValueError, TypeError, BufferError):
            return None
        with self.lock:
            key, number = use.next_key(), use.count
        place = engine.places.pop() if engine.places else engine.new_place()
        handle = Handle(self.flight, use, kind, f"noname.{number % EPOCH}" if name is None else name, (memory, keep), None, array)
        self.flight.add(handle)
        status = engine.submit_at(request, key, memory, memory, place)
        if status != 0:
            self.flight.discard(handle)
        handle.operation = place[0] if status == 0 else engine.taken_from(place, status)
        engine.places.append(place)
        if name is not None:
            use.handle = handle
        return handle

    def _caught(self, kind, use, number, keep, operation, result):
        """An operation that was not done at once as one in flight."""
        name = f"noname.{number % EPOCH}" if use.name is None else use.name
        handle = Handle(self.flight, use, kind, name, keep, None, result)
        self.flight.add(handle)
        handle.operation = operation
        if use.name is not None:
            use.handle = handle
        return handle

    def prepare(self, kind, name, source, target, *, priority=0, op=None, scales=(1.0, 1.0), result=None):
        """A Prepared of an operation on this memory; arguments as for `submit`."""
        use = self.names.use(kind, name)
        with self.lock:
            self._describe(use, kind, (source.dtype, source.count, source.shape, op, -1, priority, scales, None, False))
            request, keep = copy_of_request(use.request), use.keep
        request.input = request.output = pointer_of(source)
        if target is not source:
            request.output = pointer_of(target)
        return Prepared(self, use, kind, request, (keep, source, target), result)

    def description(self, kind, name, dtype, shape, *, priority, op, scales, overlapped):
        """A request and its base key, for code that fills in memory and counts the uses of the name by itself.

        Its keys are not those of `submit`, which counts for itself. What the request points to lives as long as this
        object, but for the text, which lives as long as what is returned.

        Args:
            dtype, shape: of the array; the rest as for `submit`.

        Returns:
            A names.Use with `request` and `base`.
        """
        use = Use(self._native_group, kind, name, self.size)
        with self.lock:
            self._describe(use, kind, (dtype, math.prod(shape), shape, op, -1, priority, scales, None, overlapped))
        return use

    @property
    def _native_group(self):
        return f"{self.names.group}/native"

    def native_base(self, kind, name):
        """The base key that `description` gives for a name."""
        return base_key(self._native_group, kind, name)

    def part(self, members, hosts, name=None):
        """What posts the operations of a group on the same engine, which moves their bytes whatever moves those of all ranks.

        Args:
            members: the ranks of the group, in its order.
            hosts: the host index of each.
            name: of the group, different from those of others; None: its number among those of the same members.
        """
        if name is None:
            name = self._parts[tuple(members)] = self._parts.get(tuple(members), 0) + 1
        name = f"{self.names.group}/{name} of {members}"
        part = self.part_class(self.engine, hosts, self.settings, name, members, self.flight, self.kin[0])
        self.kin.append(part)
        return part

    def submit_plan(self, key, text, part, plan, priority):
        """Posts a sum by a plan of the caller's own, in place. Returns the engine's operation, to be waited for and released.

        Args:
            key: equal on all ranks, and different from all others.
            text: what errors call it.
            part: a Buffer, which the caller keeps alive.
            plan: a commlib.plan.Plan over the ranks of the group.
        """
        self.engine.check_open()
        plan_key = ("own", plan.nchunks, plan.steps)
        native = self._plans.get(plan_key)
        if native is None:
            native = self._plans[plan_key] = native_plan(plan.relabelled(self.members) if self._is_part else plan)
        request, words = new_request(), new_text(f"{text} among {spell_ranks(self.members)}" if self._is_part else text)
        request.key, request.text, request.kind, request.dtype = key, words, KIND_CODES["allreduce"], part.code
        request.root, request.priority, request.settings_hash = -1, _priority(priority), self._settings_hash
        request.prescale = request.postscale = 1.0
        request.plan, request.count, request.my_part = native, part.count, self.rank
        request.input = request.output = pointer_of(part)
        if self._is_part:
            request.listeners, request.nlisteners = self._members, self.size
        with self.lock:
            return self.engine.submit(request)

    def is_begun(self, kind):
        """See `Communicator.is_begun`."""
        use = self.names.use(kind, None)
        return self.engine.is_begun(key_of_use(use.base, use.count))

    def algorithm(self, kind, nbytes, overlapped=False):
        """What `selection` gives to an operation."""
        return select(kind, nbytes, self._layout.shape(kind, 0), self.settings, overlapped).algorithm

    def close(self):
        """The engine was shut down: nothing is in flight any more."""
        self.flight.sweep()

    def after_fork(self):
        """In a forked child: the timeline is the parent's."""
        self.flight.timeline = None

    def _post(self, handle, request, submit=None):
        """Submits a request; `submit(request)` in place of the engine's, for one that stands in."""
        handle.operation = self.engine.submit(request) if submit is None else submit()

    def free_name(self, kind, use):
        """The last operation of a name may be done without anybody having noticed."""
        handle = use.handle
        if not handle.done():
            raise ValueError(busy_text(kind, use.name))
        self.flight.landed(handle)

    def _describe(self, use, kind, signature):
        """Fills in all of a request that does not change from one use of a name to the next."""
        dtype, count, shape, op, root, priority, scales, parts, overlapped = signature
        use.signature = use.wish = None  # while the request is half written
        request = self._make_request(use)
        code, itemsize = DTYPES[dtype]
        plan, segment_count = self._plan(kind, count * itemsize, itemsize, max(root, 0), overlapped)
        words = _text_of(kind, use.name, dtype, shape, op, self.members[root] if root >= 0 else root, scales, overlapped)
        text = new_text(f"{words} among {spell_ranks(self.members)}" if self._is_part else words)
        offsets = new_offsets(parts) if parts is not None else None
        request.text, request.kind, request.dtype = text, KIND_CODES[kind], code
        request.reduction = op.code if op is not None else 0
        request.root = root
        request.priority = _priority(priority)
        request.shape_hash = zlib.crc32(repr((shape, overlapped)).encode())
        request.settings_hash = self._settings_hash
        request.prescale, request.postscale = scales[0], scales[1] * share_of(op, dtype, self.size)
        request.count = count
        request.my_part = self.rank
        request.hint = hint_of(kind, overlapped, is_silent=shape == ANY_OR_NONE)
        request.plan, request.segment_count = plan, segment_count
        if offsets is not None:
            request.parts = offsets
        if kind in _WITH_MEMBERS:
            request.members, request.nmembers = self._members, self.size
        if self._is_part:
            request.listeners, request.nlisteners = self._members, self.size
        use.keep = (text, offsets, plan)
        use.signature = signature

    def _make_request(self, use):
        """Programs may make up names without end; what is kept of them beside their number of uses is bounded.

        A new request each time: another thread may be reading the old one.
        """
        if use.request is None:
            if len(self._described) >= _MOST_REQUESTS:
                for old in self._described:
                    old.forget_request()
                self._described.clear()
            self._described.append(use)
        use.request = new_request()
        return use.request

    def _plan(self, kind, nbytes, itemsize, root, overlapped):
        """The engine's plan for an operation, made once per (kind, algorithm, root), and elements per segment."""
        if kind == "exchange":
            return NO_PLAN, 0
        shape = self._layout.shape(kind, root)
        choice = select(kind, nbytes, shape, self.settings, overlapped)
        if choice.algorithm == MPI_OWN and self._is_part:  # MPI's own collectives are those of all ranks
            choice = select(kind, nbytes, shape, self.settings.replace(algorithms=(), table=()), overlapped)
        if choice.algorithm == MPI_OWN:
            raise ValueError("the settings choose MPI's own all-reduce, which is there only if init() was given a communicator "
                             "(comm=...) and these settings: force another algorithm, or none")  # fmt: skip
        key = (kind, choice.algorithm, root)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._layout.plan(kind, choice.algorithm, self.rank, root)
            plan = self._plans[key] = native_plan(plan.relabelled(self.members) if self._is_part else plan)
        return plan, segment_elements(choice.segment_nbytes, itemsize)


def segment_elements(segment_nbytes, itemsize):
    """Elements per segment; 0: one segment."""
    if segment_nbytes == 0:
        return 0
    return max(_SEGMENT_ALIGNMENT, segment_nbytes // itemsize // _SEGMENT_ALIGNMENT * _SEGMENT_ALIGNMENT)


def _priority(priority):
    """A user's priority as the engine's 64 bits."""
    try:
        priority = operator.index(priority)
    except TypeError:
        raise TypeError(f"priority must be an int, not {priority!r}") from None
    if not -(1 << 63) <= priority < 1 << 63:
        raise ValueError(f"priority must fit into 64 bits, not {priority}")
    return priority


def share_of(op, dtype, size):
    """What a sum is multiplied by to become the reduction: 1 / size for Average."""
    if op is not Average or size == 1:
        return 1.0
    if DTYPES[dtype][0] in _FLOAT_CODES:
        return 1.0 / size
    # Integers are truncated after the product, and 49 * (1 / 49.) is below 1: the next larger factor is right for every
    # sum below 2^52.
    return math.nextafter(1.0 / size, 2.0)


def _text_of(kind, name, dtype, shape, op, root, scales, overlapped):
    """What error messages call the operation: all that must be equal on its ranks."""
    words = [kind, "(unnamed)" if name is None else repr(name)]
    if kind not in ("barrier", "exchange"):
        words += [dtype, str(shape)]
    if op is not None:
        words.append(op.word)
    if root >= 0:
        words.append(f"root {root}")
    if scales != (1.0, 1.0):
        words.append(f"scaled by {scales[0]:g} and {scales[1]:g}")
    if overlapped:
        words.append("overlapped")
    return " ".join(words)


Submitter.part_class = Submitter  # groups' bytes are the engine's, whoever moves those of all ranks
