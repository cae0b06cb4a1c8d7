"""What ranks run for test_c10d.py: every collective of torch.distributed on commlib and on gloo, with the same inputs.

Ranks keep one default group of commlib and beside it groups of gloo over the same ranks, for all calls.
"""

import itertools
import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

import commlib.torch.distributed  # noqa: F401, registers the backend

OPS = {op.name: op for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT)}
BITS = {op.name: op for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)}
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)
SHAPES = [(), (1,), (0,), (7,), (3, 5), (2, 0, 3), (70, 1001)]

_groups = {}  # ranks -> (commlib's group, gloo's)


def begin(path, timeout_s=60):
    """Makes the default group, which meets in a file, and pairs of groups of the first 1, 2, ... ranks."""
    rank, size = place()
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("commlib", store=dist.FileStore(path, size), rank=rank, world_size=size, timeout=timeout)
    for count in range(1, size + 1):
        ranks = tuple(range(count))
        ours = dist.group.WORLD if count == size else dist.new_group(ranks, timeout)
        pair = (ours, dist.new_group(ranks, timeout, backend="gloo"))
        if rank in ranks:
            _groups[ranks] = pair


def place():
    """Rank and size, as the launcher left them."""
    return int(os.environ["COMMLIB_RANK"]), int(os.environ["COMMLIB_SIZE"])


def destroy():
    """Destroys the default group; older torch does not tell a group in Python of it."""
    if not hasattr(dist.ProcessGroup, "shutdown"):
        dist.group.WORLD.shutdown()
    dist.destroy_process_group()


def end():
    """Destroys all groups; nothing of them is left."""
    _groups.clear()
    destroy()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "commlib futures"]


def numbers(rank, shape, dtype, seed):
    """Small integers, whose sums and products are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 4, shape, generator=generator).to(dtype)


# ---- one function per collective: (group, rank, size, make) -> the tensors that it gives; make(i) is the i-th input


def all_reduce(group, rank, size, make, op):
    tensor = make(0)
    dist.all_reduce(tensor, op=op, group=group)
    return [tensor]


def all_reduce_async(group, rank, size, make, op):
    tensors = [make(number) for number in range(3)]
    works = [dist.all_reduce(tensor, op=op, group=group, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert all(work.is_completed() and work.is_success() for work in works)
    return tensors


def all_reduce_coalesced(group, rank, size, make, op):
    tensors = [make(number) for number in range(3)]
    dist.all_reduce_coalesced(tensors, op=op, group=group)
    return tensors


def reduce(group, rank, size, make, op):
    results = []
    for root in range(size):
        tensor = make(root)
        dist.reduce(tensor, root, op=op, group=group)
        results += [tensor] if rank == root else []
    return results


def reduce_scatter(group, rank, size, make, op):
    outputs = [torch.empty_like(make(0))]
    dist.reduce_scatter(outputs[0], [make(number) for number in range(size)], op=op, group=group)
    return outputs


def reduce_scatter_tensor(group, rank, size, make, op):
    whole = torch.stack([make(number) for number in range(size)])
    output = torch.empty_like(whole[0])
    dist.reduce_scatter_tensor(output, whole, op=op, group=group)
    return [output]


def broadcast(group, rank, size, make):
    results = [make(root) for root in range(size)]
    for root, tensor in enumerate(results):
        dist.broadcast(tensor, root, group=group)
    return results


def all_gather(group, rank, size, make):
    outputs = [torch.empty_like(make(0)) for _ in range(size)]
    dist.all_gather(outputs, make(0), group=group)
    return outputs


def all_gather_into_tensor(group, rank, size, make):
    tensor = make(0)
    stacked = torch.empty((size, *tensor.shape), dtype=tensor.dtype)
    dist.all_gather_into_tensor(stacked, tensor, group=group)
    return [stacked]


def gather(group, rank, size, make):
    results = []
    for root in range(size):
        outputs = [torch.empty_like(make(0)) for _ in range(size)] if rank == root else None
        dist.gather(make(root), outputs, dst=root, group=group)
        results += outputs or []
    return results


def scatter(group, rank, size, make):
    results = []
    for root in range(size):
        output = torch.empty_like(make(0))
        dist.scatter(output, [make(number) for number in range(size)] if rank == root else None, src=root, group=group)
        results.append(output)
    return results


def all_to_all(group, rank, size, make):
    outputs = [torch.empty_like(make(0)) for _ in range(size)]
    dist.all_to_all(outputs, [make(number) for number in range(size)], group=group)
    return outputs


def all_to_all_single(group, rank, size, make):
    whole = torch.stack([make(number) for number in range(size)])
    output = torch.empty_like(whole)
    dist.all_to_all_single(output, whole, group=group)
    return [output]


def all_to_all_uneven(group, rank, size, make):
    """Rank r sends r + d rows to rank d."""
    sent, received = [rank + other for other in range(size)], [other + rank for other in range(size)]
    row = make(0).unsqueeze(0)
    output = torch.empty((sum(received), *row.shape[1:]), dtype=row.dtype)
    dist.all_to_all_single(output, torch.cat([row] * sum(sent) or [row[:0]]), received, sent, group=group)
    return [output]


def send_and_recv(group, rank, size, make):
    """Around a ring, twice with different tags, received in the other order."""
    if size == 1:
        return []
    after, before = (rank + 1) % size, (rank - 1) % size
    works = [dist.isend(make(tag), after, group=group, tag=tag) for tag in (3, 8)]
    results = [torch.empty_like(make(0)) for _ in range(2)]
    for tensor, tag in zip(results, (8, 3)):
        assert dist.recv(tensor, before, group=group, tag=tag) == before
    for work in works:
        work.wait()
    return results


REDUCING = [all_reduce, all_reduce_async, all_reduce_coalesced, reduce, reduce_scatter, reduce_scatter_tensor]
MOVING = [broadcast, all_gather, all_gather_into_tensor, gather, scatter, all_to_all, all_to_all_single, all_to_all_uneven,
          send_and_recv]  # fmt: skip



def _scattered_sum(group, rank, size, make, op):
    """What the forms of reduce-scatter give, by gloo's all-reduce: its own reduce-scatter crashes on scalars."""
    whole = torch.stack([make(number) for number in range(size)])
    dist.all_reduce(whole, op=op, group=group)
    return [whole[rank]]


def _stacked(group, rank, size, make):
    """What all_gather_into_tensor gives; gloo's refuses scalars."""
    return [torch.stack(all_gather(group, rank, size, make))]


def _exchanged(group, rank, size, make):
    """What all_to_all gives; older torch's gloo has none."""
    mine = torch.stack([make(number) for number in range(size)])
    everybodys = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(everybodys, mine, group=group)
    return [inputs[rank] for inputs in everybodys]


# What gloo cannot do itself is compared with what it can.
_BY_GLOO = {all_to_all: _exchanged, all_gather_into_tensor: _stacked, reduce_scatter: _scattered_sum,
            reduce_scatter_tensor: _scattered_sum}  # fmt: skip


def compare():
    """Every collective, op, dtype, shape and group size, beside gloo. Returns how many comparisons there were."""
    count = 0
    for ranks, pair in _groups.items():
        rank, size = dist.get_rank(pair[0]), len(ranks)
        for seed, (dtype, shape) in enumerate(itertools.product(DTYPES, SHAPES)):
            if shape not in SHAPES[::4] and (dtype not in (torch.uint8, torch.float32) or size in (2, 3)):
                continue  # every dtype with some shapes, and every shape with some dtypes
            bits = BITS if not dtype.is_floating_point else {}
            calls = [(function, op) for function in REDUCING for op in (*OPS.values(), *bits.values())]
            for function, *op in [*calls, *((function,) for function in MOVING)]:
                if shape == SHAPES[-1] and op and op[0] is not dist.ReduceOp.SUM:
                    continue  # the large one is about segments, not ops

                def make(number):
                    return numbers(rank, shape, dtype, 10 * seed + number)

                mine = function(pair[0], rank, size, make, *op)
                theirs = _BY_GLOO.get(function, function)(pair[1], rank, size, make, *op)
                where = f"{function.__name__} {op} {dtype} {shape} of {size}"
                assert len(mine) == len(theirs), where
                for ours, wanted in zip(mine, theirs):
                    assert ours.shape == wanted.shape and ours.dtype == wanted.dtype and torch.equal(ours, wanted), where
                count += 1
    return count
