"""What ranks run for test_properties_torch.py: collectives made from a seed, each against plain NumPy.

A case is a kind, a dtype, shapes, an op, scales, a layout in memory and a group; every rank makes the same one of a seed, and all
ranks' tensors, so that it knows by itself what its result must be.
"""

import itertools
import random
import sys

import numpy as np
import torch

import commlib.torch as comm

DTYPES = {
    torch.uint8: np.uint8, torch.int8: np.int8, torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64,
    torch.float16: np.float64, torch.bfloat16: np.float64, torch.float32: np.float64, torch.float64: np.float64,
    torch.bool: np.bool_,
}  # fmt: skip
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = ((), (0,), (1,), (3, 0), (7,), (5, 3), (2, 1, 4), (129, 17))
OPS = {"Average": comm.Average, "Sum": comm.Sum, "Min": comm.Min, "Max": comm.Max, "Product": comm.Product}
FORMS = ("allreduce", "allreduce_", "allreduce_async", "allreduce_async_", "grouped_allreduce", "grouped_allreduce_async_")
ROW_KINDS = ("allgather", "grouped_allgather", "reducescatter", "alltoall", "alltoall with splits")


class Case:
    """One collective call, the same on all ranks."""

    def __init__(self, kind, dtype, shape, op, seed, size):
        rng = random.Random(seed)
        self.kind, self.dtype, self.shape, self.op, self.seed = kind, dtype, shape, op, seed
        self.members = sorted(rng.sample(range(size), rng.randint(1, size))) if rng.random() < 0.3 else list(range(size))
        self.is_strided = rng.random() < 0.3
        self.prescale, self.postscale = rng.choice(((1.0, 1.0), (1.0, 1.0), (2.0, 0.5), (0.5, 3.0)))
        if dtype is torch.bool or op is None:
            self.prescale = self.postscale = 1.0
        self.root = rng.choice(self.members)
        rest = shape[1:]
        self.shapes = {rank: shape for rank in range(size)}
        if kind in ("allgather", "grouped_allgather", "alltoall with splits"):
            self.shapes = {rank: (rng.randrange(6), *rest) for rank in range(size)}
        if kind == "alltoall":
            self.shapes = {rank: (2 * len(self.members), *rest) for rank in range(size)}
        self.splits = {rank: _parts_of(self.shapes[rank][0], len(self.members), rng) if shape else [] for rank in self.members}

    def __repr__(self):
        return f"{self.kind} {self.dtype} {self.shapes} {self.op} x{self.prescale} x{self.postscale} among {self.members}"

    def tensor(self, rank):
        """A rank's own."""
        generator = np.random.default_rng((self.seed, rank))
        values = generator.integers(0, 4 if self.dtype in (torch.uint8, torch.bool) else 5, self.shapes[rank])
        if self.dtype not in (torch.uint8, torch.bool):
            values = values - 2
        tensor = torch.from_numpy(np.asarray(values)).to(self.dtype)
        if self.is_strided and tensor.dim() > 1:  # the same values, in another order in memory
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return tensor

    def arrays(self):
        """All members' values, in a dtype wide enough."""
        return [self.tensor(rank).double().numpy().astype(DTYPES[self.dtype]) for rank in self.members]

    def traits(self):
        """The value of each axis of the matrix that this case stands for."""
        return (("kind", self.kind), ("dtype", self.dtype), ("shape", self.shape), ("op", self.op),
                ("scales", (self.prescale, self.postscale)), ("strided", self.is_strided),
                ("some ranks", len(self.members) < len(self.shapes)))  # fmt: skip

    # ---- the reference

    def reduced(self):
        """What a reduction must give."""
        arrays = [_scaled(array, self.prescale) for array in self.arrays()]
        if self.dtype is torch.bool:
            return np.logical_or.reduce(arrays) if self.op in ("Sum", "Max") else np.logical_and.reduce(arrays)
        function = {"Min": np.minimum, "Max": np.maximum, "Product": np.multiply}.get(self.op, np.add)
        total = arrays[0]
        for array in arrays[1:]:
            total = function(total, array)  # integers wrap, as in the engine
        share = self.postscale / len(arrays) if self.op == "Average" else self.postscale
        return _scaled(total, share)

    def wanted(self, rank):
        """What this member must get."""
        place, size = self.members.index(rank), len(self.members)
        if self.kind == "broadcast":
            return self.arrays()[self.members.index(self.root)]
        if self.kind in ("allgather", "grouped_allgather"):
            return np.concatenate(self.arrays())
        if self.kind == "alltoall":
            return np.concatenate([np.split(array, size)[place] for array in self.arrays()])
        if self.kind == "alltoall with splits":
            cuts = [np.cumsum([0, *self.splits[member]]) for member in self.members]
            return np.concatenate([array[cut[place] : cut[place + 1]] for array, cut in zip(self.arrays(), cuts)])
        total = self.reduced()
        if self.kind == "reducescatter":
            return np.array_split(total, size)[place]  # low ranks get the rows that remain
        return total

    # ---- the call

    def call(self, rank, process_set):
        """Returns what the collective gives this rank."""
        tensor = self.tensor(rank)
        scales = {"prescale_factor": self.prescale, "postscale_factor": self.postscale, "process_set": process_set}
        if self.kind in FORMS:
            op = OPS[self.op]
            is_grouped = self.kind.startswith("grouped")
            result = getattr(comm, self.kind)([tensor, tensor.clone()] if is_grouped else tensor, op=op, **scales)
            result = comm.synchronize(result) if "async" in self.kind else result
            in_place = self.kind.endswith("_") and not is_grouped
            assert not in_place or result.data_ptr() == tensor.data_ptr()
            assert not is_grouped or torch.equal(result[0], result[1]) or result[0].dtype.is_floating_point
            return result[1] if is_grouped else result
        if self.kind == "broadcast":
            return comm.broadcast(tensor, self.root, process_set=process_set)
        if self.kind == "allgather":
            return comm.allgather(tensor, process_set=process_set)
        if self.kind == "grouped_allgather":
            return comm.grouped_allgather([tensor, tensor], process_set=process_set)[1]
        if self.kind == "reducescatter":
            return comm.reducescatter(tensor, op=OPS[self.op], **scales)
        if self.kind == "alltoall":
            return comm.alltoall(tensor, process_set=process_set)
        result, received = comm.alltoall(tensor, self.splits[rank], process_set=process_set)
        assert received.tolist() == [self.splits[member][self.members.index(rank)] for member in self.members]
        return result

    def fault(self, rank, result):
        """What is wrong with a result, or None."""
        wanted = self.wanted(rank)
        if result.dtype is not self.dtype or tuple(result.shape) != wanted.shape:
            return f"{self}: {result.dtype} {tuple(result.shape)} instead of {wanted.shape}"
        if self.dtype not in TOLERANCES:
            same = np.array_equal(result.numpy(), wanted)
        else:
            same = np.allclose(result.double().numpy(), wanted, rtol=TOLERANCES[self.dtype], atol=TOLERANCES[self.dtype])
        if same:
            return None
        return f"{self}: {result.flatten()[:5].tolist()} instead of {wanted.flatten()[:5].tolist()}"


def _scaled(array, factor):
    """As the engine states it: floats multiply, integers multiply in fp64 and round toward zero."""
    if factor == 1.0 or array.dtype == np.bool_:
        return array
    if array.dtype == np.float64:
        return array * factor
    return np.trunc(array * np.float64(factor) + 1e-9 * np.sign(array)).astype(array.dtype)  # 3 * (1 / 3.) may be below 1


def _parts_of(count, size, rng):
    cuts = sorted(rng.randint(0, count) for _ in range(size - 1))
    return [end - first for first, end in zip([0, *cuts], [*cuts, count])]


def all_cases(seed, size):
    """dtype x shape x op of every reduction, dtype x shape of the others; form, group and the rest by chance."""
    rng = random.Random(f"{seed} {size}")
    for dtype, shape, op in itertools.product(DTYPES, SHAPES, OPS):
        if not (dtype is torch.bool and op == "Average"):
            yield Case(rng.choice(FORMS), dtype, shape, op, rng.randrange(1 << 30), size)
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        yield Case("broadcast", dtype, shape, None, rng.randrange(1 << 30), size)
        for kind in ROW_KINDS if shape else ():
            op = rng.choice([op for op in OPS if dtype is not torch.bool or op != "Average"]) if kind == "reducescatter" else None
            yield Case(kind, dtype, shape, op, rng.randrange(1 << 30), size)


def covering(cases, seed):
    """Fewer cases, in which any two values of two axes that some case has together still meet."""
    cases, seen, kept = list(cases), set(), []
    for case in random.Random(seed).sample(cases, len(cases)):
        pairs = set(itertools.combinations(case.traits(), 2))
        if not pairs <= seen:
            seen |= pairs
            kept.append(case)
    return kept


def _set_of(members, sets):
    if len(members) == comm.size():
        return comm.global_process_set
    if tuple(members) not in sets:
        sets[tuple(members)] = comm.add_process_set(list(members))
    return sets[tuple(members)]


def _faults(cases):
    rank, sets, faults = comm.rank(), {}, []
    for case in cases:
        process_set = _set_of(case.members, sets)  # on every rank, also outside
        if rank in case.members:
            faults.append(case.fault(rank, case.call(rank, process_set)))
    for process_set in sets.values():
        comm.remove_process_set(process_set)
    return [fault for fault in faults if fault is not None]


def check_part(seed, part, parts):
    """One case of so many. Returns (how many cases there were, what was wrong)."""
    cases = list(all_cases(seed, comm.size()))[part::parts]
    return len(cases), _faults(cases)


def check_covering(seed):
    """As `check_part` of fewer cases, which hold every value of every axis, and all that meet of any two axes."""
    cases = covering(all_cases(seed, comm.size()), seed)
    values = {trait for case in cases for trait in case.traits()}
    wanted = {("dtype", dtype) for dtype in DTYPES} | {("shape", shape) for shape in SHAPES} | {("op", op) for op in OPS}
    wanted |= {("kind", kind) for kind in (*FORMS, "broadcast", *ROW_KINDS)} | {("some ranks", comm.size() > 1)}
    return len(cases), [f"no case of {value}" for value in wanted - values] + _faults(cases)


def main(seed):
    """What a rank runs that mpirun has started, for all cases to go by MPI."""
    comm.init()
    assert comm.mpi_enabled() or comm.size() == 1
    count, faults = check_covering(seed)
    assert count > 100 and not faults, faults
    comm.shutdown()
    sys.stdout.write(f"{count} cases are right\n")


def check_between_cycles(seed, first, cycles):
    """A few cases in each of many lives of this process. Returns (lives, cases, what was wrong)."""
    faults, ncases, few = [], 0, 8
    cases = list(all_cases(seed, comm.size()))
    for number in range(first, first + cycles):
        comm.shutdown()
        assert not comm.is_initialized()
        comm.init()
        some = cases[number * few % (len(cases) - few) :][:few]
        ncases += len(some)
        faults += _faults(some)
    return cycles, ncases, faults
