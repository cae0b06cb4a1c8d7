"""What ranks run for test_properties_tensorflow.py: collectives made from a seed, in eager mode and in one function, against NumPy.

A case is a kind, a dtype, a shape, an op, scales and a group of ranks; every rank makes the same ones of a seed, and all ranks'
inputs, so that it knows by itself what its result must be. The list holds each value of each of these by construction.
"""

import os
import random

import numpy as np
import tensorflow as tf
from test_collectives import numbers, reduced

import commlib
import commlib.tensorflow as comm

KINDS = ("allreduce", "grouped_allreduce", "broadcast", "allgather", "grouped_allgather", "reducescatter", "grouped_reducescatter",
         "alltoall", "alltoall with splits")  # fmt: skip
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool")
SHAPES = ((), (0,), (1,), (3, 0), (7,), (5, 3), (2, 1, 4), (129, 17))
OPS = (commlib.Average, commlib.Sum, commlib.Min, commlib.Max, commlib.Product)
SCALES = ((1.0, 1.0), (2.0, 0.5), (0.5, 2.0))


class Case:
    """One collective call, the same on all ranks."""

    def __init__(self, kind, dtype, shape, op, scales, members, seed):
        rng = random.Random(seed)
        self.kind, self.dtype, self.members, self.seed = kind, dtype, members, seed
        self.op = commlib.Max if dtype == "bool" and op is commlib.Average else op
        self.scales = (1.0, 1.0) if dtype == "bool" else scales
        self.root = rng.choice(members)
        needs_rows = kind not in ("allreduce", "grouped_allreduce", "broadcast")
        shape = shape or (rng.randrange(4),) if needs_rows else shape
        self.shapes = {rank: shape for rank in members}
        if "allgather" in kind or kind == "alltoall with splits":
            self.shapes = {rank: (rng.randrange(6), *shape[1:]) for rank in members}
        if kind == "alltoall":
            self.shapes = {rank: (2 * len(members), *shape[1:]) for rank in members}
        self.splits = {rank: _parts_of(self.shapes[rank][0], len(members), rng) for rank in members} if needs_rows else {}

    def __repr__(self):
        return f"{self.kind} {self.dtype} {self.shapes} {self.op} x{self.scales} among {self.members}, seed {self.seed}"

    @property
    def values(self):
        """What must occur of each axis."""
        is_reduction = "reduce" in self.kind
        return {self.kind, self.dtype, "some" if len(self.members) < comm.size() else "all",
                *([str(self.op), str(self.scales)] if is_reduction else []),
                *([str(self.shapes[self.members[0]])] if self.kind in ("allreduce", "grouped_allreduce", "broadcast") else [])}

    def array(self, rank):
        """A rank's own; of bfloat16 in float32."""
        return numbers(self.seed, rank, self.shapes[rank], "float32" if self.dtype == "bfloat16" else self.dtype)

    def wanted(self, rank):
        """The results that this member must get, as a list."""
        arrays, place, size = [self.array(one) for one in self.members], self.members.index(rank), len(self.members)
        if self.kind == "broadcast":
            return [self.array(self.root)]
        if "allgather" in self.kind:
            return [np.concatenate(arrays)] * (2 if "grouped" in self.kind else 1)
        if self.kind == "alltoall":
            return [np.concatenate([np.split(array, size)[place] for array in arrays])]
        if self.kind == "alltoall with splits":
            cuts = [np.cumsum([0, *self.splits[member]]) for member in self.members]
            rows = np.concatenate([array[cut[place] : cut[place + 1]] for array, cut in zip(arrays, cuts)])
            return [rows, np.array([self.splits[member][place] for member in self.members], np.int32)]
        total = reduced(self.op, arrays, arrays[0].dtype, *self.scales)
        if self.dtype == "bfloat16":
            total = tf.cast(tf.cast(tf.constant(total), tf.bfloat16), tf.float32).numpy()
        total = np.array_split(total, size)[place] if "scatter" in self.kind else total
        return [total] * (2 if "grouped" in self.kind else 1)

    def call(self, rank, process_set):
        """What the collective gives this rank, as a list of tensors."""
        tensor = tf.cast(tf.constant(self.array(rank)), self.dtype)
        options = {"process_set": process_set}
        if "reduce" in self.kind:
            options.update(op=self.op, prescale_factor=self.scales[0], postscale_factor=self.scales[1])
        if "grouped" in self.kind:
            return list(getattr(comm, self.kind)([tensor, tensor], **options))
        if self.kind == "broadcast":
            return [comm.broadcast(tensor, self.root, **options)]
        if self.kind == "alltoall with splits":
            return list(comm.alltoall(tensor, self.splits[rank], **options))
        return [getattr(comm, self.kind)(tensor, **options)]

    def fault(self, rank, results):
        """What is wrong with results, or None."""
        assert len(results) == len(self.wanted(rank))
        for number, (result, wanted) in enumerate(zip(results, self.wanted(rank))):
            dtype = tf.int32 if number and self.kind == "alltoall with splits" else tf.as_dtype(self.dtype)
            got = (tf.cast(result, tf.float32) if result.dtype == tf.bfloat16 else result).numpy()
            if result.dtype != dtype or got.shape != wanted.shape or not np.array_equal(got, wanted):
                return f"{self}: {result.dtype} {got.shape} {got.ravel()[:5]} instead of {wanted.shape} {wanted.ravel()[:5]}"
        return None


def _parts_of(count, size, rng):
    cuts = sorted(rng.randint(0, count) for _ in range(size - 1))
    return [end - first for first, end in zip([0, *cuts], [*cuts, count])]


def cases_of(seed, size):
    """Each kind with every dtype; shapes, ops, scales and groups go round beside them, each kind from another place on."""
    rng = random.Random(f"{seed} {size}")
    some = sorted(rng.sample(range(size), max(1, size - 1)))
    for kind in KINDS:
        turns = [rng.randrange(100) for _ in range(4)]
        for number, dtype in enumerate(DTYPES):
            shape, op, scales, group = (number + turn for turn in turns)
            yield Case(kind, dtype, SHAPES[shape % len(SHAPES)], OPS[op % len(OPS)], SCALES[scales % len(SCALES)],
                       some if group % 3 == 0 else list(range(size)), rng.randrange(1 << 30))  # fmt: skip


def check(seed, transport):
    """Another life over a transport, all cases in it. Returns (how many cases there were, what was wrong, what did not occur)."""
    before = os.environ.get("COMMLIB_TRANSPORT")
    comm.shutdown()
    os.environ["COMMLIB_TRANSPORT"] = transport
    comm.init()
    try:
        assert comm.size() == 1 or set(commlib.communicator().transports.values()) == {transport}
        return _check(seed)
    finally:
        comm.shutdown()
        os.environ.pop("COMMLIB_TRANSPORT")
        if before is not None:
            os.environ["COMMLIB_TRANSPORT"] = before
        comm.init()


def _check(seed):
    rank, size = comm.rank(), comm.size()
    cases = list(cases_of(seed, size))
    sets = {tuple(range(size)): comm.global_process_set}
    for members in sorted({tuple(case.members) for case in cases} - set(sets)):
        sets[members] = comm.add_process_set(list(members))
    mine = [case for case in cases if rank in case.members]

    def calls():
        return [case.call(rank, sets[tuple(case.members)]) for case in mine]

    faults = []
    for made in (calls(), tf.function(calls, autograph=False)()):
        faults += filter(None, (case.fault(rank, results) for case, results in zip(mine, made)))
    axes = {*KINDS, *DTYPES, *map(str, SHAPES), *map(str, OPS), *map(str, SCALES), "all", *(["some"] if size > 1 else [])}
    return len(cases), faults, sorted(axes - set().union(*(case.values for case in cases)))
