"""What ranks run for test_horovod_api.py: many small cases per call."""

import itertools

import numpy
import torch
from test_collectives import numbers, reduced

import commlib
import commlib.torch as comm

DTYPES = ("uint8", "int32", "float16", "float32", "float64", "bool")
SHAPES = [(), (0,), (5,), (0, 2), (3, 2)]


def same(got, wanted):
    assert len(got) == len(wanted)
    for tensor, array in zip(got, wanted):
        assert tensor.shape == array.shape and numpy.array_equal(tensor.numpy(), array), (tensor, array)


def sets():
    """All ranks, and a set of its own for the last rank and the others."""
    last = comm.size() - 1
    made = [comm.add_process_set([last])]
    if last > 1:
        made.append(comm.add_process_set(range(last)))
    yield comm.global_process_set
    yield from (process_set for process_set in made if process_set.included())
    for process_set in made:
        comm.remove_process_set(process_set)


def grouped():
    """Every grouped form, of tensors of all dtypes and shapes at once, against NumPy."""
    for process_set in sets():
        ranks, me, size = process_set.ranks, process_set.rank(), process_set.size()
        everything = list(itertools.product(DTYPES, SHAPES))
        for op in (comm.Average, comm.Sum, comm.Min, comm.Max, comm.Product):
            cases = [(dtype, shape) for dtype, shape in everything if dtype != "bool" or op is not comm.Average]
            inputs = [[numbers((op.word, case), r, case[1], case[0]) for r in ranks] for case in cases]
            wanted = [reduced(op, arrays, dtype) for arrays, (dtype, _) in zip(inputs, cases)]
            tensors = [torch.from_numpy(arrays[me].copy()) for arrays in inputs]
            same(comm.grouped_allreduce(tensors, op=op, process_set=process_set), wanted)
            handle = comm.grouped_allreduce_async(tensors, op=op, name="grouped", process_set=process_set)
            same(comm.synchronize(handle), wanted)
            assert comm.poll(handle)
            in_place = comm.grouped_allreduce_(tensors, op=op, process_set=process_set)
            assert all(one is other for one, other in zip(in_place, tensors))
            same(tensors, wanted)
        rows = [[numbers(("rows", dtype), r, (r + n, 2), dtype) for r in ranks] for n, dtype in enumerate(DTYPES)]
        tensors = [torch.from_numpy(arrays[me].copy()) for arrays in rows]
        same(comm.grouped_allgather(tensors, process_set=process_set), [numpy.concatenate(arrays) for arrays in rows])
        for op in (comm.Sum, comm.Average):
            cases = [("int32", (7,)), ("float32", (5, 2)), ("float64", (0, 3)), ("float16", (2, 0))]
            inputs = [[numbers(case, r, case[1], case[0]) for r in ranks] for case in cases]
            shares = [numpy.array_split(reduced(op, arrays, dtype), size)[me] for arrays, (dtype, _) in zip(inputs, cases)]
            tensors = [torch.from_numpy(arrays[me].copy()) for arrays in inputs]
            same(comm.grouped_reducescatter(tensors, op=op, process_set=process_set), shares)
            handle = comm.grouped_reducescatter_async(tensors, op=op, process_set=process_set)
            same(handle.wait(20), shares)
    assert comm.grouped_allreduce([]) == []


def grouped_gradients():
    """Gradients through the grouped forms; those of the single forms are what they must be equal to."""
    weight, size = comm.rank() + 1.0, comm.size()

    def gradients_of(function):
        x, y = torch.ones(size, requires_grad=True), torch.ones(size, 2, requires_grad=True)
        one, other = function(x, y)
        ((one * weight).sum() + (other * other).sum()).backward()
        return [x.grad.tolist(), y.grad.tolist()]

    for many, single in ((comm.grouped_allreduce, comm.allreduce), (comm.grouped_allgather, comm.allgather),
                         (comm.grouped_reducescatter, comm.reducescatter)):  # fmt: skip
        assert gradients_of(lambda *tensors: many(tensors)) == gradients_of(lambda *tensors: map(single, tensors))


def one_of_a_group_fails():
    """A mismatch in the middle: the error, that what travelled by itself landed, and that all can be used again."""
    tensors = [torch.ones(2), torch.ones(2 + comm.rank()), torch.ones(100_000)]
    try:
        comm.grouped_allreduce_(tensors, name="torn", op=comm.Sum)
    except commlib.MismatchError as error:
        message = str(error)
    assert bool((tensors[2] == comm.size()).all())
    assert comm.grouped_allreduce([torch.ones(1)] * 3, name="torn", op=comm.Sum)[1].item() == comm.size()
    return message


def compressed():
    """all-reduce and reduce-scatter of rounded tensors, against rounding done by hand; and their gradients."""
    generator = torch.Generator().manual_seed(3)
    for (compression, dtype), wide in itertools.product(
        ((comm.Compression.fp16, torch.float16), (comm.Compression.bf16, torch.bfloat16)), (torch.float32, torch.float64)
    ):
        inputs = [torch.randn(6, generator=generator, dtype=wide) for _ in range(comm.size())]
        mine = inputs[comm.rank()].clone().requires_grad_()
        got = comm.allreduce(mine.detach(), op=comm.Max, compression=compression)
        wanted = torch.stack([x.to(dtype) for x in inputs]).amax(0).to(wide)
        assert got.dtype is wide and torch.equal(got, wanted) and not torch.equal(got, torch.stack(inputs).amax(0))
        got = comm.allreduce(mine, compression=compression)
        assert got.dtype is wide
        torch.testing.assert_close(got, torch.stack(inputs).mean(0), rtol=0.02, atol=0.02)
        got.sum().backward()
        assert torch.allclose(mine.grad, torch.ones(6, dtype=wide))
        shares = comm.grouped_reducescatter([mine.detach()], op=comm.Min, compression=compression)
        lowest = torch.stack([x.to(dtype) for x in inputs]).amin(0).to(wide).tensor_split(comm.size())
        assert torch.equal(shares[0], lowest[comm.rank()])
    whole = comm.allreduce(torch.tensor([2**20 + 1]), op=comm.Sum, compression=comm.Compression.bf16)
    assert whole.dtype is torch.int64 and whole.item() == (2**20 + 1) * comm.size()


def sparse():
    """Rows of all ranks, of which one has none, summed and averaged."""
    rank, size = comm.rank(), comm.size()
    for process_set, op in ((one, op) for one in sets() for op in (comm.Sum, comm.Average, None)):
        dense = [torch.zeros(5, 2) for _ in process_set.ranks]
        for r, matrix in zip(process_set.ranks, dense):
            if r:
                matrix[r], matrix[0] = r, 1
        handle = comm.sparse_allreduce_async(dense[process_set.rank()].to_sparse(1), name="rows", op=op, process_set=process_set)
        total = sum(dense) / (1 if op is comm.Sum else process_set.size())
        result = handle()
        assert result.is_sparse and torch.equal(result.to_dense(), total), (rank, size, result)
