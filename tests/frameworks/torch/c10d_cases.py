"""What ranks run for test_c10d.py beside collectives that gloo has, too: what it lacks, groups, futures, errors, ends."""

import gc
import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from c10d_collectives import begin, destroy, numbers, place


def other_dtypes():
    """Dtypes and reductions that gloo lacks."""
    group, (rank, size) = dist.group.WORLD, place()
    for dtype in (torch.bool, torch.int16, torch.bfloat16):
        parts = [numbers(other, (6,), torch.int64, 5).to(dtype) for other in range(size)]
        tensor = parts[rank].clone()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        assert torch.equal(tensor, torch.stack(parts).amax(0)), dtype
        everything = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(everything, parts[rank])
        assert all(map(torch.equal, everything, parts)), dtype
    for dtype in (torch.float8_e4m3fn, torch.uint16, torch.complex64):
        parts = [numbers(other, (3, 2), torch.float32, 6).to(dtype) for other in range(size)]
        everything = [torch.empty_like(part) for part in parts]
        dist.all_gather(everything, parts[rank])
        assert all(torch.equal(got.view(torch.uint8), part.view(torch.uint8)) for got, part in zip(everything, parts)), dtype
        tensor = parts[rank].clone()
        dist.broadcast(tensor, size - 1)
        assert torch.equal(tensor.view(torch.uint8), parts[-1].view(torch.uint8)), dtype
    tensor = torch.tensor([1 + 2j, rank * 1j])
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.tensor([size * (1 + 2j), size * (size - 1) / 2 * 1j]))
    assert "no meaning" in refused(group.allreduce, [tensor], _options(dist.ReduceOp.MIN))
    assert "for integers" in refused(dist.all_reduce, torch.ones(2), op=dist.ReduceOp.BXOR)
    assert "uint16" in refused(dist.all_reduce, torch.ones(2, dtype=torch.uint16))


def _options(op):
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


def refused(function, *arguments, **options):
    """The text of the error that a call raises at once."""
    try:
        function(*arguments, **options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError("it was accepted")


def other_reductions():
    """AVG, PREMUL_SUM and sparse tensors."""
    rank, size = place()
    for op, factor in ((dist.ReduceOp.AVG, 1 / size), (dist._make_nccl_premul_sum(2.5), 2.5)):
        tensor = torch.arange(4.0) + rank
        dist.all_reduce(tensor, op=op)
        torch.testing.assert_close(tensor, factor * sum(torch.arange(4.0) + other for other in range(size)))
        output = torch.empty(1)
        dist.reduce_scatter_tensor(output, torch.arange(float(size)) + rank, op=op)
        torch.testing.assert_close(output, factor * torch.tensor([float(sum(rank + other for other in range(size)))]))
    parts = [torch.sparse_coo_tensor([[other, 3]], [1.0 + other, 10.0], (size + 3,)) for other in range(size)]
    tensor = parts[rank].clone()
    dist.all_reduce(tensor)
    assert torch.equal(tensor.to_dense(), sum(part.to_dense() for part in parts))


def other_layouts():
    """Tensors that do not lie in order, and parts of different sizes."""
    rank, size = place()
    tensor = (torch.arange(12.0) + rank).view(3, 4).t()
    dist.all_reduce(tensor)
    assert torch.equal(tensor, (size * torch.arange(12.0) + sum(range(size))).view(3, 4).t())
    outputs = [torch.empty(other + 1, 2).t() for other in range(size)]
    dist.all_gather(outputs, torch.full((2, rank + 1), float(rank)).contiguous())
    assert all(torch.equal(output, torch.full((2, other + 1), float(other))) for other, output in enumerate(outputs))
    output = torch.empty(rank + 1)
    dist.reduce_scatter(output, [torch.full((other + 1,), float(rank)) for other in range(size)])
    assert torch.equal(output, torch.full((rank + 1,), float(sum(range(size)))))
    parameter = torch.nn.Parameter(torch.ones(3))
    before = parameter._version
    dist.broadcast(parameter.data, 0)
    assert parameter._version == before


def points():
    """Messages from anybody, by tag, to oneself; batches; many in flight."""
    rank, size = place()
    if rank == 0:
        senders = []
        for _ in range(2 * (size - 1)):
            tensor = torch.empty(2, dtype=torch.int64)
            sender = dist.recv(tensor, tag=4)
            assert tensor[0] == sender
            senders.append((sender, int(tensor[1])))
        assert sorted(senders) == [(other, number) for other in range(1, size) for number in range(2)]
        assert all(senders.index((other, 0)) < senders.index((other, 1)) for other in range(1, size))
    else:
        for number in range(2):
            dist.send(torch.tensor([rank, number]), 0, tag=4)
    everything = torch.empty(size, dtype=torch.int64)
    receives = [dist.P2POp(dist.irecv, everything[other:other + 1], other) for other in range(size) if other != rank]
    sends = [dist.P2POp(dist.isend, torch.tensor([rank]), other) for other in range(size) if other != rank]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    everything[rank] = rank
    assert torch.equal(everything, torch.arange(size))
    if rank == 0:
        works = [dist.isend(torch.full((1 << 14,), number), 1) for number in range(80)]
    elif rank == 1:
        tensors = [torch.empty(1 << 14, dtype=torch.int64) for _ in range(80)]
        works = [dist.irecv(tensor, 0) for tensor in tensors]
    for work in works if rank < 2 else ():
        work.wait()
    if rank == 1:
        assert [int(tensor[-1]) for tensor in tensors] == list(range(80))
    assert "another rank" in refused(dist.group.WORLD.send, [torch.ones(1)], rank, 0)


def objects_and_futures():
    """What torch.distributed builds on collectives; futures with callbacks, in whatever order."""
    rank, size = place()
    everything = [None] * size
    dist.all_gather_object(everything, {"rank": rank, "text": "x" * rank})
    assert everything == [{"rank": other, "text": "x" * other} for other in range(size)]
    sent = [f"from {rank}"]
    dist.broadcast_object_list(sent, src=size - 1)
    assert sent == [f"from {size - 1}"]
    received = [None]
    dist.scatter_object_list(received, list("abcdefgh")[:size] if rank == 0 else None, src=0)
    assert received == ["abcdefgh"[rank]]
    works = [dist.all_reduce(torch.full((1000,), float(number)), async_op=True) for number in range(20)]
    doubled = [work.get_future().then(lambda future: 2 * future.value()[0]) for work in works]
    for number in reversed(range(20)):
        assert torch.equal(doubled[number].wait(), torch.full((1000,), 2.0 * number * size))
        assert works[number].wait() and works[number].exception() is None
    with dist._coalescing_manager():
        tensors = [torch.full((2,), float(number)) for number in range(3)]
        for tensor in tensors:
            dist.all_reduce(tensor)
    assert [float(tensor[0]) for tensor in tensors] == [0, size, 2 * size]
    dist.barrier()
    work = dist.barrier(async_op=True)
    work.wait(timedelta(seconds=30))
    assert dist.get_backend() == "commlib" and repr(dist.group.WORLD) == f"CommlibGroup(rank={rank}, size={size})"


def subgroups():
    """Groups within groups: some ranks, one rank, the same ranks twice, a mesh."""
    rank, size = place()
    for ranks in ([1, 3], [2], [0, 1], [0, 1], [3, 0]):
        group = dist.new_group(ranks, use_local_synchronization=False)
        if rank in ranks:
            assert dist.get_process_group_ranks(group) == sorted(ranks) or dist.get_process_group_ranks(group) == ranks
            tensor = torch.tensor([rank])
            dist.all_reduce(tensor, group=group)
            assert int(tensor) == sum(ranks)
            dist.broadcast(tensor.fill_(rank), ranks[-1], group=group)
            assert int(tensor) == ranks[-1]
            dist.destroy_process_group(group)
    if rank in (0, 2):
        group = dist.new_group([0, 2], use_local_synchronization=True)
        everything = [None, None]
        dist.all_gather_object(everything, rank, group=group)
        assert everything == [0, 2]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("rows", "columns"))
    tensor = torch.tensor([rank])
    dist.all_reduce(tensor, group=mesh.get_group("columns"))
    assert int(tensor) == (1 if rank < 2 else 5)


# ---- errors


def mismatches():
    """What every rank is told where the ranks differ; the group stays usable."""
    rank, size = place()
    texts = []
    for function in (
        lambda: dist.all_reduce(torch.ones(3 + (rank == 1))),
        lambda: dist.all_reduce(torch.ones(2, dtype=torch.float64 if rank == 2 else torch.float32)),
        lambda: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX if rank == 3 else dist.ReduceOp.SUM),
        lambda: dist.broadcast(torch.ones(2), 1 if rank == 0 else 0),
        lambda: dist.all_reduce(torch.ones(3 + (rank == 1)), async_op=True).get_future().wait(),
    ):
        texts.append(refused(function))
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((2,), float(size)))
    outputs = [torch.empty(3) for _ in range(size)]
    texts.append(refused(dist.all_gather, outputs, torch.ones(2 if rank == 1 else 3)))
    dist.barrier()
    return texts


def late():
    """A collective that one rank does not call fails on the others in time, and says so; waiting less changes nothing."""
    rank, size = place()
    group = dist.new_group(list(range(size)), timedelta(seconds=1))
    if rank == 0:
        dist.barrier()  # the others have given up
        return []
    work = dist.all_reduce(torch.ones(2), group=group, async_op=True)
    texts = [refused(work.wait, timedelta(milliseconds=50)), refused(work.wait)]
    assert work.is_completed() and work.exception() is not None
    other = dist.irecv(torch.empty(1), 0, group=group)
    texts += [refused(other.get_future().wait), refused(dist.recv, torch.empty(1), group=group, tag=9)]
    dist.barrier()
    return texts


def beside_the_default():
    """commlib.init() and the process group live in one process, each with its own names."""
    import commlib
    import commlib.torch as comm

    comm.init()
    rank, size = place()
    handle = commlib.allreduce_async(torch.ones(3).numpy(), op=commlib.Sum)
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert handle.wait().tolist() == tensor.tolist() == [size] * 3
    comm.shutdown()
    dist.all_reduce(tensor)
    assert tensor.tolist() == [size * size] * 3


def cycles(path, count):
    """Groups are made and destroyed again and again, in one store, with an operation in flight; no thread and file is left."""
    rank, size = place()
    store = dist.FileStore(path, size)
    before = None
    for number in range(count):
        dist.init_process_group("commlib", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        tensor = torch.tensor([rank])
        future = dist.all_reduce(tensor, async_op=True).get_future()
        future.wait()
        assert int(tensor) == sum(range(size))
        left = dist.irecv(torch.empty(1), (rank + 1) % size, tag=number)
        dist.barrier()
        destroy()
        assert "shut down" in refused(left.wait) or "closed" in refused(left.wait), refused(left.wait)
        others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        assert "commlib futures" not in [thread.name for thread in others]
        for thread in others:  # the engine's own end by themselves
            thread.join(30)
        if number % 10 == 9:
            del left, future
            gc.collect()  # a group's objects know each other
            files = len(os.listdir("/proc/self/fd"))
            before = before or files
            assert files == before


def forked():
    """A child of fork, such as a DataLoader's worker, holds no group: what it does there is refused, and harms nothing."""
    rank, size = place()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        text = refused(dist.all_reduce, torch.ones(1))
        dist.group.WORLD.shutdown()  # as at the end of a process
        os.write(writing, text.encode())
        os._exit(0)
    text = os.read(reading, 1 << 12).decode()
    os.waitpid(child, 0)
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert float(tensor) == size
    return text


def lost(path):
    """Rank 1 dies in a collective."""
    rank, size = place()
    begin(path)
    dist.barrier()
    if rank == 1:
        os._exit(3)
    works = [dist.all_reduce(torch.ones(1000), async_op=True), dist.irecv(torch.empty(1), tag=1)]
    texts = [refused(works[0].wait), refused(works[1].wait), refused(dist.barrier)]
    destroy()
    return texts


def absent(path):
    """Rank 2 does not make the group."""
    rank, size = place()
    if rank == 2:
        return ""
    return refused(begin, path, 4)


def between_hosts(address):
    """Two hosts of two ranks, which meet in a TCPStore: all links, and what the ranks know of each other."""
    rank, size = place()
    store = dist.TCPStore(address, 29571, size, rank == 0, timeout=timedelta(seconds=30), wait_for_workers=False)
    dist.init_process_group("commlib", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    communicator = dist.group.WORLD.communicator
    for count in (3, 100_000):
        tensor = torch.full((count,), float(rank))
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full((count,), 6.0))
    points()
    dist.barrier()
    destroy()
    return communicator.host_sizes, sorted(communicator.transports.values())
