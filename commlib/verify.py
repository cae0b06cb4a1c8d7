"""Symbolic verification: do the plans of all ranks together do what their kind of collective promises?

This file knows plans and the promise of each kind. It must not know algorithms, bytes or links, and it shares nothing
with the engine but `Plan`: it is the second opinion.

The model is stricter than an engine needs to be, so what finishes here finishes there:
  - rendezvous: a message moves only when its send may go and its receive is ready; a rank's steps go as soon as the
    steps that they depend on are done, not one by one;
  - messages from one rank to another move in list order;
  - a RECV is ready when all that it depends on is done: it lands in place;
  - a RECV_REDUCE lands in the rank's one staging slot. It is ready when the slot is its own (slots go in list order),
    the receives that it depends on are done, and the sends that it depends on may go. It is done, and the slot free,
    when those sends have left too.
Every event waits only for certain other events, so nothing depends on timing: either all events happen, whatever the
order, or the same ones never do. Conflicting steps of a rank are ordered by its list (`Plan.dependencies`), and
messages pair by number, so the value that each message carries is the same in every order too.

A sum is scaled (an average) by the step that completes it: a rank's last step that writes a chunk, if that is a RECV_REDUCE.
Where the last one is a RECV, the sender must have scaled. Nothing may be added to what is scaled, and every result is.

Without the slot (`staging=False`) a RECV_REDUCE waits as a RECV does. Recursive doubling then locks up, since each side
would first send what the other cannot take yet: without a slot, such plans must not run under rendezvous.
"""
from __future__ import annotations

from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from .plan import RECV, RECV_REDUCE, SEND, Plan, Shape, StepId, StepKind, matches


class VerificationError(Exception):
    """The plans are wrong; the message says where and how."""


def verify(
    kind: str,
    plans: Sequence[Plan],
    shape: Shape,
    *,
    staging: bool = True,
    lossy: bool = False,
    pick: Callable[[int], int] = lambda possible: possible - 1,
) -> None:
    """Checks that the plans of all ranks match, finish, and fulfil the promise of their kind.

    Args:
        kind: "allreduce", "broadcast", "allgather", "reducescatter", "alltoall" or "barrier".
        plans: plans[r] is the plan of rank r, for all ranks of the shape.
        shape: the group; its root matters to a broadcast.
        staging: whether every rank has one staging slot for a RECV_REDUCE (see the model above).
        lossy: bytes travel in a rounding wire format. Contributions, results, and what a rank keeps of what it has
            sent are then rounded as well; with this rule, the ranks must still end with equal values.
        pick: pick(n) says which of n possible events happens next. The outcome does not depend on it; tests try that.

    Raises:
        VerificationError: the plans do not match, lock up, or give a wrong or differing result.

    Example:
        >>> from commlib.algorithms import plans_for
        >>> shape = Shape((4,))
        >>> verify("allreduce", plans_for("allreduce", "ring", shape), shape)
    """
    check_structure(plans, shape)
    check_pairs(plans)
    check_first_steps(plans)
    values = Values(idempotent=kind == "barrier", lossy=lossy)
    promise = PROMISES[kind]
    buffers = [[promise.begins_with(values, plan, chunk, shape) for chunk in range(plan.nchunks)] for plan in plans]
    run(plans, buffers, values, progress(plans, staging, pick), promise.scaled)
    result = [[value if value is None else values.sent(value) for value in buffer] for buffer in buffers]
    promise.check(values, result, plans, shape)


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raises VerificationError with the message (made only if it is needed)."""
    if not condition:
        raise VerificationError(message())


# ---- structure and matching -----------------------------------------------------------------------------------------


def check_structure(plans: Sequence[Plan], shape: Shape) -> None:
    """One plan per rank, over the same chunks; every step by itself makes sense."""
    require(len(plans) == shape.size, lambda: f"{len(plans)} plans for {shape.size} ranks")
    for rank, plan in enumerate(plans):
        require(plan.rank == rank, lambda: f"plan {rank} belongs to rank {plan.rank}")
        require((plan.nchunks, plan.inputs) == (plans[0].nchunks, plans[0].inputs),
                lambda: f"rank {rank} cuts {plan.nchunks} chunks ({plan.inputs} of input), "
                        f"rank 0 cuts {plans[0].nchunks} ({plans[0].inputs})")
        for index, step in enumerate(plan.steps):
            where = StepId(rank, index)
            require(0 <= step.peer < shape.size and step.peer != rank,
                    lambda: f"{describe(plans, where)}: the peer is not another rank of the group")
            require(0 <= step.first_chunk < step.end_chunk <= plan.nchunks,
                    lambda: f"{describe(plans, where)}: not a range of the {plan.nchunks} chunks")
            require(step.kind == SEND or step.first_chunk >= plan.inputs,
                    lambda: f"{describe(plans, where)}: writes to the input, chunks [0, {plan.inputs})")


def describe(plans: Sequence[Plan], where: StepId) -> str:
    """A step for a human: whose, which, what."""
    return f"rank {where.rank} step {where.index}, {plans[where.rank].steps[where.index]}"


def check_pairs(plans: Sequence[Plan]) -> None:
    """Every send has its receive, of the same chunks; between input and output, of as many chunks."""
    partner = matches(plans)
    for plan in plans:
        for index, step in enumerate(plan.steps):
            here = StepId(plan.rank, index)
            require(here in partner,
                    lambda: f"{describe(plans, here)}: rank {step.peer} has no matching "
                            f"{'receive' if step.kind == SEND else 'send'}")
            other = plans[step.peer].steps[partner[here].index]
            same = step.width == other.width and (plan.inputs or step.first_chunk == other.first_chunk)
            require(bool(same), lambda: f"{describe(plans, here)}: its partner, {describe(plans, partner[here])}, "
                                        f"moves other chunks")


def check_first_steps(plans: Sequence[Plan]) -> None:
    """Of two ranks, one must begin with a send to the other: metadata travels with it."""
    first: Dict[Tuple[int, int], StepId] = {}
    for plan in plans:
        for index, step in enumerate(plan.steps):
            first.setdefault((plan.rank, step.peer), StepId(plan.rank, index))
    for (rank, peer), here in first.items():
        there = first[peer, rank]
        kinds = {plans[rank].steps[here.index].kind, plans[peer].steps[there.index].kind}
        require(SEND in kinds, lambda: f"{describe(plans, here)} and {describe(plans, there)}: both ranks begin with a "
                                       f"receive; a send that waits for nothing must be listed first")


# ---- progress: what can happen, and whether everything does ---------------------------------------------------------


# An event is named by a step. That of a send: its message has landed, in place or in the staging slot. That of a
# RECV_REDUCE: it has taken its message out of the slot. A RECV has none of its own: it is done when its message lands.
Event = StepId


def waits(plans: Sequence[Plan], staging: bool) -> Dict[Event, Set[Event]]:
    """For each event, the events that must happen before it: the model above, in full."""
    partner = matches(plans)
    result: Dict[Event, Set[Event]] = {here: set() for here in partner if _kind(plans, here) != RECV}

    def after(event: Event, steps: Iterable[StepId]) -> None:
        """The event happens after these steps are done."""
        result[event].update(partner[step] if _kind(plans, step) == RECV else step for step in steps)

    for plan in plans:
        last_to: Dict[int, StepId] = {}  # per receiver, the send before
        last_in_slot: List[StepId] = []  # the RECV_REDUCE before
        for index, step in enumerate(plan.steps):
            here = StepId(plan.rank, index)
            if step.kind == SEND:
                after(here, needed_by(plan, index))
                after(here, [last_to[step.peer]] if step.peer in last_to else [])
                last_to[step.peer] = here
            elif step.kind == RECV or not staging:
                after(partner[here], needed_by(plan, index))
            else:
                after(partner[here], needed_to_stage(plan, index))
                after(partner[here], last_in_slot)
                last_in_slot = [here]
            if step.kind == RECV_REDUCE:
                after(here, [partner[here], *needed_by(plan, index)])
    return result


def needed_by(plan: Plan, index: int) -> List[StepId]:
    """What must be done before a step is."""
    return [StepId(plan.rank, earlier) for earlier in plan.dependencies[index]]


def needed_to_stage(plan: Plan, index: int) -> List[StepId]:
    """What must be done before a RECV_REDUCE may land in the slot: receives, and what lets the sends go."""
    result = []
    for earlier in needed_by(plan, index):
        is_send = plan.steps[earlier.index].kind == SEND
        result += needed_by(plan, earlier.index) if is_send else [earlier]
    return result


def _kind(plans: Sequence[Plan], here: StepId) -> StepKind:
    return plans[here.rank].steps[here.index].kind


def progress(plans: Sequence[Plan], staging: bool, pick: Callable[[int], int]) -> Iterator[Event]:
    """All events in an order in which they can happen.

    Raises:
        VerificationError: some events can never happen; the message tells a circle of waiting.
    """
    before = waits(plans, staging)
    after: Dict[Event, List[Event]] = {}
    for event, needed in before.items():
        for earlier in needed:
            after.setdefault(earlier, []).append(event)
    missing = {event: len(needed) for event, needed in before.items()}
    possible = [event for event, count in missing.items() if count == 0]
    while possible:
        event = possible.pop(pick(len(possible)))
        del missing[event]
        yield event
        for later in after.get(event, ()):
            missing[later] -= 1
            if missing[later] == 0:
                possible.append(later)
    require(not missing, lambda: "deadlock: " + "; which waits for ".join(
        describe(plans, event) for event in circle(before, set(missing))))


def circle(before: Mapping[Event, Set[Event]], stuck: Set[Event]) -> List[Event]:
    """Events that wait for each other in a circle; the first one is repeated at the end."""
    path: List[Event] = []
    event = min(stuck)
    while event not in path:
        path.append(event)
        event = min(before[event] & stuck)
    return path[path.index(event):] + [event]


# ---- values: who has contributed what, in which order ---------------------------------------------------------------


class Values:
    """Reduction trees over contributions (rank, chunk), as numbers: equal trees have equal numbers.

    Trees are commutative, a + b = b + a, as floating-point addition is, but not associative.
    """

    def __init__(self, idempotent: bool, lossy: bool) -> None:
        self._idempotent, self._lossy = idempotent, lossy
        self._numbers: Dict[tuple, int] = {}
        self._rounded: Set[int] = set()
        self._scaled: Set[int] = set()
        self.chunks: List[int] = []  # by number: the chunk that the value belongs to
        self._ranks: List[int] = []  # by number: the contributing ranks, as bits

    def _number(self, key: tuple, chunk: int, ranks: int) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.chunks)
            self.chunks.append(chunk)
            self._ranks.append(ranks)
        return self._numbers[key]

    def contribution(self, rank: int, chunk: int) -> int:
        """What `rank` brings to `chunk`."""
        return self.sent(self._number(("contribution", rank, chunk), chunk, 1 << rank))

    def combined(self, left: int, right: int) -> int:
        """The reduction of two values of one chunk."""
        chunk, both = self.chunks[left], self._ranks[left] & self._ranks[right]
        require(chunk == self.chunks[right], lambda: f"chunk {self.chunks[right]} is reduced into chunk {chunk}")
        require(self._idempotent or not both, lambda: f"rank {_bits(both)[0]} is counted twice in chunk {chunk}")
        require(left not in self._scaled and right not in self._scaled,
                lambda: f"chunk {chunk} is added to after it was scaled")
        key = ("combined", min(left, right), max(left, right))
        return self._number(key, chunk, self._ranks[left] | self._ranks[right])

    def sent(self, value: int) -> int:
        """The value after a trip in the wire format. A second trip changes nothing."""
        if not self._lossy or value in self._rounded:
            return value
        result = self._number(("rounded", value), self.chunks[value], self._ranks[value])
        self._rounded.add(result)
        if value in self._scaled:
            self._scaled.add(result)
        return result

    def scaled(self, value: int) -> int:
        """The value as a result: nothing more is added to it."""
        result = self._number(("scaled", value), self.chunks[value], self._ranks[value])
        self._scaled.add(result)
        return result

    def is_scaled(self, value: int) -> bool:
        """Whether this is a result."""
        return value in self._scaled

    def contributors(self, value: int) -> List[int]:
        """The ranks whose contributions are in the value."""
        return _bits(self._ranks[value])


def _bits(mask: int) -> List[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


Buffer = List[Optional[int]]  # of one rank: the value of each chunk, None where nothing meaningful lies


def completed(plan: Plan, scaling: Callable[[Plan, int], bool]) -> Set[Tuple[int, int]]:
    """(step, chunk) wherever a step completes a result: it is the last to write the chunk, and adds to it."""
    last = {chunk: index for index, step in enumerate(plan.steps) if step.kind != SEND
            for chunk in range(step.first_chunk, step.end_chunk)}
    return {(index, chunk) for chunk, index in last.items()
            if plan.steps[index].kind == RECV_REDUCE and scaling(plan, chunk)}


def run(plans: Sequence[Plan], buffers: List[Buffer], values: Values, events: Iterator[Event],
        scaling: Callable[[Plan, int], bool] = lambda plan, chunk: False) -> None:
    """Lets the events happen to the buffers."""
    partner = matches(plans)
    complete = [completed(plan, scaling) for plan in plans]
    slots: Dict[StepId, List[int]] = {}
    for here in events:
        step = plans[here.rank].steps[here.index]
        chunks = range(step.first_chunk, step.end_chunk)
        buffer = buffers[here.rank]
        if step.kind == RECV_REDUCE:
            for chunk, value in zip(chunks, slots.pop(here)):
                own = buffer[chunk]
                require(own is not None, lambda: f"{describe(plans, here)}: reduces into chunk {chunk}, "
                                                 f"which holds nothing")
                total = values.combined(own, value)
                buffer[chunk] = values.scaled(total) if (here.index, chunk) in complete[here.rank] else total
            continue
        for chunk in chunks:
            require(buffer[chunk] is not None, lambda: f"{describe(plans, here)}: sends chunk {chunk}, "
                                                       f"which holds nothing")
            buffer[chunk] = values.sent(buffer[chunk])
        message = [buffer[chunk] for chunk in chunks]
        there = partner[here]
        target = plans[there.rank].steps[there.index]
        if target.kind == RECV_REDUCE:
            slots[there] = message
        else:
            buffers[there.rank][target.first_chunk:target.end_chunk] = message


# ---- promises: what each kind of collective begins and ends with ----------------------------------------------------


class Promise(NamedTuple):
    """What lies in a chunk at the beginning (None: nothing), and a check of what lies there at the end."""

    begins_with: Callable[[Values, Plan, int, Shape], Optional[int]]
    check: Callable[[Values, List[Buffer], Sequence[Plan], Shape], None]
    scaled: Callable[[Plan, int], bool] = lambda plan, chunk: False  # which chunks of a rank are results that are scaled


def _everyone_contributes(values: Values, plan: Plan, chunk: int, shape: Shape) -> Optional[int]:
    return values.contribution(plan.rank, chunk)


def _root_contributes(values: Values, plan: Plan, chunk: int, shape: Shape) -> Optional[int]:
    return values.contribution(plan.rank, chunk) if plan.rank == shape.root else None


def _owner_contributes(values: Values, plan: Plan, chunk: int, shape: Shape) -> Optional[int]:
    return values.contribution(plan.rank, chunk) if plan.rank == chunk else None


def _input_contributes(values: Values, plan: Plan, chunk: int, shape: Shape) -> Optional[int]:
    return values.contribution(plan.rank, chunk) if chunk < plan.inputs else None


def _require_whole(values: Values, buffer: Buffer, rank: int, chunk: int, shape: Shape) -> None:
    value = buffer[chunk]
    require(value is not None and values.chunks[value] == chunk,
            lambda: f"rank {rank} ends with something else in chunk {chunk}")
    missing = set(range(shape.size)).difference(values.contributors(value))
    require(not missing, lambda: f"rank {rank} ends without the contribution of rank {min(missing)} in chunk {chunk}")
    require(shape.size == 1 or values.is_scaled(value), lambda: f"rank {rank} ends with chunk {chunk} unscaled")


def _require_value(buffer: Buffer, rank: int, chunk: int, expected: int, source: int) -> None:
    require(buffer[chunk] == expected, lambda: f"rank {rank} ends without the data of rank {source} in chunk {chunk}")


def _check_allreduce(values: Values, buffers: List[Buffer], plans: Sequence[Plan], shape: Shape) -> None:
    for rank, buffer in enumerate(buffers):
        for chunk in range(len(buffer)):
            _require_whole(values, buffer, rank, chunk, shape)
            require(buffer[chunk] == buffers[0][chunk],
                    lambda: f"ranks 0 and {rank} reduce chunk {chunk} in different orders: their bits would differ")


def _check_broadcast(values: Values, buffers: List[Buffer], plans: Sequence[Plan], shape: Shape) -> None:
    for rank, buffer in enumerate(buffers):
        for chunk in range(len(buffer)):
            _require_value(buffer, rank, chunk, values.contribution(shape.root, chunk), shape.root)


def _check_allgather(values: Values, buffers: List[Buffer], plans: Sequence[Plan], shape: Shape) -> None:
    for rank, buffer in enumerate(buffers):
        require(len(buffer) == shape.size, lambda: f"{len(buffer)} chunks for {shape.size} ranks")
        for owner in range(shape.size):
            _require_value(buffer, rank, owner, values.contribution(owner, owner), owner)


def _check_reducescatter(values: Values, buffers: List[Buffer], plans: Sequence[Plan], shape: Shape) -> None:
    for rank, buffer in enumerate(buffers):
        require(len(buffer) == shape.size, lambda: f"{len(buffer)} chunks for {shape.size} ranks")
        _require_whole(values, buffer, rank, rank, shape)


def _check_alltoall(values: Values, buffers: List[Buffer], plans: Sequence[Plan], shape: Shape) -> None:
    for rank, buffer in enumerate(buffers):
        require(len(buffer) == 2 * shape.size and plans[rank].inputs == shape.size,
                lambda: f"{len(buffer)} chunks, {plans[rank].inputs} of input, for {shape.size} ranks")
        for source in set(range(shape.size)) - {rank}:
            _require_value(buffer, rank, shape.size + source, values.contribution(source, rank), source)


def _check_barrier(values: Values, buffers: List[Buffer], plans: Sequence[Plan], shape: Shape) -> None:
    for rank, buffer in enumerate(buffers):
        heard = {peer for value in buffer if value is not None for peer in values.contributors(value)}
        missing = set(range(shape.size)) - heard
        require(not missing, lambda: f"rank {rank} passes the barrier without having heard of rank {min(missing)}")


PROMISES: Mapping[str, Promise] = {
    "allreduce": Promise(_everyone_contributes, _check_allreduce, lambda plan, chunk: True),
    "broadcast": Promise(_root_contributes, _check_broadcast),
    "allgather": Promise(_owner_contributes, _check_allgather),
    "reducescatter": Promise(_everyone_contributes, _check_reducescatter, lambda plan, chunk: chunk == plan.rank),
    "alltoall": Promise(_input_contributes, _check_alltoall),
    "barrier": Promise(_everyone_contributes, _check_barrier),
}
