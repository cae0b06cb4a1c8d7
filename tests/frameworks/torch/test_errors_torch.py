"""What a user does wrong, or what is not supported yet, is refused at the call with words that help."""

from functools import partial

import pytest
import torch
from torch import nn

import commlib.torch as comm


@pytest.fixture(autouse=True)
def one_rank():
    """Each test is the only rank of its own session."""
    comm.init()
    yield
    comm.shutdown()


def sgd(model=None):
    return torch.optim.SGD((model or nn.Linear(2, 1)).parameters(), lr=0.1)


def test_before_init():
    comm.shutdown()
    x = torch.ones(1)
    of_ranks = (comm.rank, comm.size, comm.local_rank, comm.local_size, comm.cross_rank, comm.cross_size, comm.is_homogeneous,
                comm.mpi_threads_supported, comm.barrier, comm.global_process_set.size)  # fmt: skip
    of_tensors = (comm.allreduce, comm.allreduce_, comm.allgather, comm.reducescatter, comm.alltoall)
    of_lists = (comm.grouped_allreduce, comm.grouped_allreduce_, comm.grouped_allgather, comm.grouped_reducescatter)
    others = (lambda: comm.DistributedOptimizer(sgd()), lambda: comm.broadcast(x, 0), lambda: comm.broadcast_object(x),
              lambda: comm.add_process_set([0]))  # fmt: skip
    calls = [*of_ranks, *(partial(call, x) for call in of_tensors), *(partial(call, [x]) for call in of_lists), *others]
    for call in calls:
        with pytest.raises(ValueError, match="init"):
            call()


@pytest.mark.parametrize("arguments, message", [
    ({"compression": 16}, "compression must be one of"),
    ({"process_set": object()}, "process_set must be a ProcessSet"),
    ({"groups": -1}, "groups should be a non-negative integer or a list of list of torch.Tensor"),
    ({"groups": [torch.ones(1)]}, "groups should be a non-negative integer or a list of list of torch.Tensor"),
    ({"groups": [[torch.ones(1)]]}, "that this optimizer does not train"),
    ({"backward_passes_per_step": 0}, "at least 1"),
    ({"gradient_predivide_factor": 2.0, "op": comm.Sum}, "gradient_predivide_factor not supported with op != Average"),
    ({"named_parameters": [nn.Parameter(torch.ones(1))]}, "should be a sequence of tuples"),
    ({"named_parameters": [("a", torch.ones(1)), ("a", torch.zeros(1))]}, "must be unique. Found duplicates: a"),
    ({"named_parameters": []}, "one or more model parameters were not named"),
])  # fmt: skip
def test_arguments_of_the_optimizer(arguments, message):
    with pytest.raises(ValueError, match=message):
        comm.DistributedOptimizer(sgd(), **arguments)


def test_objects_of_the_optimizer():
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="needs a torch.optim.Optimizer, got Linear"):
        comm.DistributedOptimizer(model)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, not generator"):
        comm.DistributedOptimizer(sgd(model), model=model.parameters())
    with pytest.raises(ValueError, match="not both"):
        comm.DistributedOptimizer(sgd(model), model.named_parameters(), model=model)
    with pytest.raises(ValueError, match="is a DistributedOptimizer already"):
        comm.DistributedOptimizer(comm.DistributedOptimizer(sgd(model), model=model), model=model)


def test_lazy_modules_have_to_be_called_first():
    model = nn.LazyLinear(1)
    with pytest.raises(ValueError, match="run one batch through the model on every rank"):
        comm.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)


@pytest.mark.parametrize("call, error, message", [
    (lambda: comm.allreduce(3.0), TypeError, "allreduce needs a torch.Tensor, got float"),
    (lambda: comm.allreduce(torch.ones(1, dtype=torch.complex64)), ValueError, "complex64 is not supported"),
    (lambda: comm.allreduce(torch.ones(2).to_sparse()), ValueError, "only dense tensors"),
    (lambda: comm.allreduce(torch.ones(2, device="meta")), ValueError, "on the meta device and has no values"),
    (lambda: comm.allreduce(torch.ones(1), average=True, op=comm.Sum), ValueError, "op parameter supersedes average"),
    (lambda: comm.reducescatter(torch.ones(1), op=comm.Adasum), ValueError, "Adasum is not supported here"),
    (lambda: comm.allreduce(torch.ones(1), compression="fp16"), ValueError, "compression must be one of"),
    (lambda: comm.grouped_allreduce([torch.ones(1), 3]), TypeError, "needs a torch.Tensor, got int"),
    (lambda: comm.grouped_allreduce([torch.ones(1, requires_grad=True)], op=comm.Min), ValueError, "is not differentiable"),
    (lambda: comm.grouped_allreduce_([torch.ones(1, requires_grad=True) * 2]), ValueError, "which is differentiable"),
    (lambda: comm.grouped_allgather([torch.ones(1), torch.tensor(1)]), ValueError, "scalar"),
    (lambda: comm.grouped_reducescatter([torch.tensor(1)]), ValueError, "scalar"),
    (lambda: comm.sparse_allreduce_async(torch.ones(2), "x", comm.Sum), ValueError, "needs a sparse COO tensor"),
    (lambda: comm.sparse_allreduce_async(torch.ones(2).to_sparse(), "x", comm.Max), ValueError, "Average or Sum"),
    (lambda: comm.allreduce(torch.ones(1), process_set=1), ValueError, "process_set must be a ProcessSet"),
    (lambda: comm.allreduce(torch.ones(1, requires_grad=True), op=comm.Max), ValueError, "is not differentiable"),
    (lambda: comm.allreduce_(torch.ones(1, requires_grad=True) * 2), ValueError, "use allreduce, which"),
    (lambda: comm.broadcast(torch.ones(1), root_rank=1), ValueError, "root_rank"),
    (lambda: comm.reducescatter(torch.tensor(1.0)), ValueError, "scalar"),
    (lambda: comm.alltoall(torch.ones(2), splits=[3]), ValueError, "splits"),
    (lambda: comm.broadcast_parameters(3, root_rank=0), ValueError, "invalid params of type"),
    (lambda: comm.broadcast_parameters({"a": 3}, root_rank=0), ValueError, "'a' is a int, not a tensor"),
    (lambda: comm.init(process_sets="static"), ValueError, "must be a list of ProcessSet or"),
    (lambda: comm.init(process_sets=[comm.ProcessSet([0])]), ValueError, "there already"),
    (lambda: comm.add_process_set([0]), ValueError, "there already: use that one"),
    (lambda: comm.add_process_set([0, 1]), ValueError, "needs ranks in"),
    (lambda: comm.ProcessSet(["0"]), ValueError, "should be initialized with a list of process ranks"),
    (lambda: comm.allreduce(torch.ones(1), process_set=comm.ProcessSet([0])), ValueError, "is not registered"),
])  # fmt: skip
def test_arguments_of_collectives(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_rank_trains_as_without_commlib():
    torch.manual_seed(1)
    plain = nn.Linear(2, 1)
    wrapped = nn.Linear(2, 1)
    wrapped.load_state_dict(plain.state_dict())
    for model in (plain, wrapped):
        optimizer = sgd(model)
        if model is wrapped:
            optimizer = comm.DistributedOptimizer(optimizer, model=model)
            assert type(optimizer).__name__ == "SGD" and isinstance(optimizer, torch.optim.SGD)
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
    assert torch.equal(plain.weight, wrapped.weight)
    assert optimizer.report()["overlap"] == "nothing: there is one rank"
