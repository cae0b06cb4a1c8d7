"""What ranks run for test_process_sets.py: many small cases per call."""

import copy
import itertools
import pickle

import numpy
import torch
from models import Plain, batches, make, train, weights
from test_collectives import numbers, reduced

import commlib.torch as comm

DTYPES = ("uint8", "int64", "float16", "float32", "float64")
SHAPES = [(), (0,), (5,), (3, 2)]
SUBSETS = [[0, 2], [1, 2], [1]]


def raised(function, *arguments, **options):
    """What a ValueError says; None: there was none."""
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return None


def in_sets():
    """Every collective in every subset, against NumPy; the errors of ranks outside."""
    outside = []
    for ranks in SUBSETS:
        process_set = comm.add_process_set(ranks)
        assert process_set.ranks == ranks and process_set.size() == len(ranks)
        assert process_set.included() == (comm.rank() in ranks)
        if process_set.included():
            check_collectives(process_set)
        else:
            outside.append(raised(comm.allreduce, torch.ones(1), process_set=process_set))
            outside.append(raised(comm.barrier, process_set=process_set))
            outside.append(raised(process_set.rank))
        assert comm.remove_process_set(process_set) and process_set.process_set_id is None
        assert raised(comm.allreduce, torch.ones(1), process_set=process_set)
    return outside


def check_collectives(process_set):
    ranks, me, size = process_set.ranks, process_set.rank(), process_set.size()
    assert ranks[me] == comm.rank()

    def check(case, got, wanted):
        assert got.shape == wanted.shape and numpy.array_equal(got.numpy(), wanted), (case, got, wanted)

    for dtype, op, shape in itertools.product(DTYPES, (comm.Average, comm.Sum, comm.Min, comm.Max, comm.Product), SHAPES):
        case = ("set", ranks, dtype, op.word, shape)
        inputs = [numbers(case, r, shape, dtype) for r in ranks]
        tensor = torch.from_numpy(inputs[me].copy())
        check(case, comm.allreduce(tensor, op=op, process_set=process_set), reduced(op, inputs, dtype))
        comm.allreduce_(tensor, op=op, process_set=process_set, name="in place")
        check(case, tensor, reduced(op, inputs, dtype))
    for dtype, root in itertools.product(DTYPES, ranks):
        rows = [numbers("rows", r, (r + 1, 2), dtype) for r in ranks]
        tensor = torch.from_numpy(rows[me].copy())
        check(ranks, comm.allgather(tensor, process_set=process_set), numpy.concatenate(rows))
        same = [numbers("same", r, (7,), dtype) for r in ranks]
        tensor = torch.from_numpy(same[me].copy())
        check(root, comm.broadcast(tensor, root, process_set=process_set), same[ranks.index(root)])
        shares = numpy.array_split(reduced(comm.Sum, same, dtype), size)
        check(root, comm.reducescatter(tensor, op=comm.Sum, process_set=process_set), shares[me])
        rows, received = comm.alltoall(tensor, splits=torch.tensor([2] * size), process_set=process_set)
        check(root, rows, numpy.concatenate([x[2 * me : 2 * me + 2] for x in same]))
        assert received.tolist() == [2] * size and received.dtype == torch.int64
        assert comm.broadcast_object(("it", comm.rank()), root, process_set=process_set) == ("it", root)
    assert comm.allgather_object(comm.rank(), process_set=process_set) == ranks
    stranger = next(rank for rank in range(3) if rank not in ranks)
    assert "root_rank must be a rank of the process set" in raised(comm.broadcast, torch.ones(1), stranger,
                                                                   process_set=process_set)  # fmt: skip
    x = torch.ones(size, requires_grad=True)
    parts = [comm.allreduce(x, process_set=process_set), comm.broadcast(x, ranks[0], process_set=process_set),
             comm.allgather(x, process_set=process_set), comm.alltoall(x, process_set=process_set),
             comm.reducescatter(x, op=comm.Sum, process_set=process_set)]  # fmt: skip
    sum(part.sum() for part in parts).backward()
    assert x.grad.tolist() == [4.0 + (me == 0)] * size, x.grad


def copied():
    """Modules that hold sets are copied and saved; the sets stay the same, as long as they are registered."""
    process_set = comm.add_process_set([0, 2])
    for one in (process_set, comm.global_process_set):
        module = comm.SyncBatchNorm(2, process_set=one)
        assert copy.deepcopy(module).process_set is one
        saved = pickle.dumps(module)
        assert pickle.loads(saved).process_set is one
    comm.remove_process_set(process_set)
    saved = pickle.loads(pickle.dumps(process_set))
    assert saved.ranks == [0, 2] and saved.process_set_id is None


def different_sets():
    """The errors of ranks that disagree, and that all works afterwards."""
    messages = [
        raised(comm.add_process_set, [0, comm.rank() % 2 + 1]),
        raised(comm.add_process_set, range(comm.size())),
        raised(comm.add_process_set, [0, 0]),
    ]
    process_set = comm.add_process_set([2, 0])
    other = comm.add_process_set(comm.ProcessSet([1, 2]))
    assert other.process_set_id == process_set.process_set_id + 1
    messages.append(raised(comm.add_process_set, [0, 2]))
    messages.append(raised(comm.remove_process_set, [process_set, other][comm.rank() % 2]))
    assert not comm.remove_process_set(comm.global_process_set)
    assert comm.remove_process_set(process_set) and comm.remove_process_set(other)
    return messages


def sets_at_init():
    """Static sets, through two sessions with the same objects; then ones that differ between ranks."""
    sets = [comm.ProcessSet([0, 1]), comm.ProcessSet([2])]
    sums = []
    for _ in range(2):
        comm.shutdown()
        assert [one.process_set_id for one in sets] == [None, None]
        comm.init(process_sets=sets)
        assert [one.process_set_id for one in sets] == [1, 2]
        mine = sets[comm.rank() // 2]
        sums.append(comm.allreduce(torch.ones(1), op=comm.Sum, process_set=mine).item())
    rank = comm.rank()
    comm.shutdown()
    message = raised(comm.init, process_sets=[comm.ProcessSet([rank])])
    assert not comm.is_initialized()
    comm.init(process_sets="dynamic")
    return sums, message


def train_in_sets():
    """form -> weights after training in the set of ranks 0 and 2, and of the whole batch by one process."""
    process_set = comm.add_process_set([0, 2])
    data = batches(6, 8)
    results = {}
    for form in ("horovod", "overlapped"):
        model = make(Plain, seed=1 if form == "horovod" else 1 + comm.rank())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        named = {"named_parameters": model.named_parameters()} if form == "horovod" else {"model": model}
        optimizer = comm.DistributedOptimizer(optimizer, process_set=process_set, **named)
        mine = data
        if process_set.included():
            mine = [(x[process_set.rank() :: 2], target[process_set.rank() :: 2]) for x, target in data]
        train(model, optimizer, mine)
        results[form] = weights(model)
    comm.barrier()
    comm.remove_process_set(process_set)
    alone = {}
    for seed in (1, 2):
        model = make(Plain, seed=seed)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data)
        alone[seed] = weights(model)
    return results, alone
