"""What ranks run for test_parallel.py: torch's own ways to train on many ranks, on commlib and on gloo, with the same data."""

import copy

import torch
import torch.distributed as dist
from c10d_collectives import _groups, place
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commlib.torch import Compression
from commlib.torch.distributed import DDPState, ddp_hook

STEPS = 4


def pair():
    """commlib's group of all ranks, and gloo's."""
    return _groups[tuple(range(place()[1]))]


def make():
    """The same model on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def train(model, optimizer=None):
    """A few steps on this rank's own data. Returns the losses."""
    generator = torch.Generator().manual_seed(place()[0])
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 6, generator=generator)), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def close(ours, theirs, tolerance=0.0):
    """Asserts that two models have the same weights."""
    for (name, mine), wanted in zip(ours.state_dict().items(), theirs.state_dict().values()):
        if tolerance:
            torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")
        else:
            torch.testing.assert_close(mine, wanted, msg=lambda text: f"{name}: {text}")


def wrapped(group, **options):
    """A DDP model that is synchronised by a group; small buckets, so that there are several."""
    return DistributedDataParallel(make(), process_group=group, bucket_cap_mb=0.001, **options)


def ddp():
    """DDP learns what it learns over gloo; with our hook, with compression nearly so."""
    ours, gloo = pair()
    reference = wrapped(gloo)
    train(reference)
    model = wrapped(ours)
    train(model)
    close(model.module, reference.module)
    for compression, tolerance in ((Compression.none, 1e-5), (Compression.fp16, 5e-2), (Compression.bf16, 5e-2)):
        for group in (ours, gloo):
            if group is gloo:
                import commlib

                commlib.init()
            model = wrapped(group)
            model.register_comm_hook(DDPState(group, compression), ddp_hook)
            train(model)
            close(model.module, reference.module, tolerance)
            if group is gloo:
                commlib.shutdown()
    model = wrapped(ours)
    model.register_comm_hook(None, ddp_hook)
    train(model)
    close(model.module, reference.module, 1e-5)


class Recording:
    """A communicator that remembers what it was asked for."""

    def __init__(self, communicator):
        self.communicator, self.size, self.priorities = communicator, communicator.size, []

    def allreduce_async_(self, buffer, **options):
        self.priorities.append(options["priority"])
        return self.communicator.allreduce_async_(buffer, **options)


def hook():
    """The first layers' bucket is the most urgent one; 16 bits are half of 32."""
    ours, _ = pair()
    sent_nbytes = {}
    for compression in (Compression.none, Compression.fp16, Compression.bf16):
        model, state = wrapped(ours), DDPState(ours, compression)
        state.communicator = Recording(ours.communicator)
        model.register_comm_hook(state, ddp_hook)
        before = ours.communicator.stats()["sent_nbytes"]
        train(model)
        sent_nbytes[compression] = ours.communicator.stats()["sent_nbytes"] - before
        priorities = state.communicator.priorities
        last = priorities[len(priorities) - 1 - priorities[::-1].index(0):]  # of the last step; DDP makes its buckets anew
        assert len(last) > 1 and last == [-index for index in range(len(last))], priorities
    for compression in (Compression.fp16, Compression.bf16):
        assert 0.4 < sent_nbytes[compression] / sent_nbytes[Compression.none] < 0.75, sent_nbytes


def ends():
    """commlib.shutdown() with a gradient in flight, which the other rank does not have: the hook's future says so."""
    import commlib

    _, gloo = pair()
    rank, size = place()
    commlib.init()
    state = DDPState(gloo)
    if rank == 0:
        future = ddp_hook(state, _Bucket())
        commlib.shutdown()
        try:
            future.wait()
            raise AssertionError("it came")
        except RuntimeError as error:
            assert "ShutdownError" in str(error), error
    dist.barrier(gloo)
    commlib.shutdown()


class _Bucket:
    """What a hook sees of DDP's."""

    def __init__(self):
        self.tensor = torch.ones(3)

    def buffer(self):
        return self.tensor

    def index(self):
        return 0


def ddp_features():
    """Unused parameters, no_sync, a static graph, uneven inputs with join(), sparse gradients, sync batch norm's gather."""
    ours, gloo = pair()
    rank, size = place()

    def learn(group, **options):
        torch.manual_seed(1)
        model = nn.ModuleDict({"table": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 2), "unused": nn.Linear(2, 2)})
        table = DistributedDataParallel(model["table"], process_group=group)
        forked = _Forked(model["head"], model["unused"])
        head = DistributedDataParallel(forked, process_group=group, **options)
        optimizer = torch.optim.SGD([*table.parameters(), *head.parameters()], lr=0.1)
        for step in range(3):
            tokens = (torch.arange(6) * (rank + 1) + step) % 10
            with head.no_sync():
                head(table(tokens)).sum().backward()
            head(table(tokens)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    close(learn(ours, find_unused_parameters=True), learn(gloo, find_unused_parameters=True))

    def join(group):
        torch.manual_seed(2)
        model = DistributedDataParallel(nn.Linear(3, 1), process_group=group)
        with model.join():
            for step in range(2 + rank):
                model(torch.full((2, 3), float(step + rank))).sum().backward()
        return model.module.weight.grad

    torch.testing.assert_close(join(ours), join(gloo))


class _Forked(nn.Module):
    def __init__(self, used, unused):
        super().__init__()
        self.used, self.unused = used, unused

    def forward(self, inputs):
        return self.used(inputs)


def fsdp():
    """FSDP2's sharded training, and its gathered state, on commlib and on gloo."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for options in ({}, {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}):
        states = []
        for group in pair():
            mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
            model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
            torch.manual_seed(3)
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh, **options)
            fully_shard(model, mesh=mesh, **options)
            train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            states.append(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            torch.testing.assert_close(states[0][name], states[1][name])


def dtensor():
    """DTensor: shards, replicas, partial sums, and tensor parallel layers."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rank, size = place()
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    whole = torch.arange(float(6 * size * size)).view(2 * size, 3 * size)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(rows.to_local(), whole.chunk(size)[rank])
    assert torch.equal(rows.redistribute(mesh, [Shard(1)]).to_local(), whole.chunk(size, 1)[rank])
    assert torch.equal(rows.full_tensor(), whole)
    partial = DTensor.from_local(torch.ones(4 * size), mesh, [Partial()])
    assert torch.equal(partial.redistribute(mesh, [Replicate()]).to_local(), torch.full((4 * size,), float(size)))
    assert torch.equal(partial.redistribute(mesh, [Shard(0)]).to_local(), torch.full((4,), float(size)))
    torch.testing.assert_close((rows @ distribute_tensor(whole.t(), mesh, [Replicate()])).full_tensor(), whole @ whole.t())
    plain = nn.Sequential(nn.Linear(8, 4 * size), nn.ReLU(), nn.Linear(4 * size, 2))
    for parameter in plain.parameters():
        dist.broadcast(parameter.data, 0)
    split = parallelize_module(copy.deepcopy(plain), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    inputs = torch.ones(3, 8)
    torch.testing.assert_close(split(inputs), plain(inputs))


def functional():
    """torch.distributed.nn's differentiable collectives, and the functional ones that compiled code uses."""
    import warnings

    import torch.distributed._functional_collectives as functional
    import torch.distributed.nn as differentiable

    rank, size = place()
    group = dist.group.WORLD
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.full((3,), float(rank + 1), requires_grad=True)
        total = differentiable.all_reduce(x)
        assert total.tolist() == [size * (size + 1) / 2] * 3
        (total * (rank + 1)).sum().backward()
        assert x.grad.tolist() == [size * (size + 1) / 2] * 3
        gathered = differentiable.all_gather(x)
        assert [float(part[0].detach()) for part in gathered] == [other + 1.0 for other in range(size)]
    assert functional.all_reduce(torch.ones(2), "avg", group).tolist() == [1.0, 1.0]
    assert functional.all_gather_tensor(torch.tensor([rank]), 0, group).tolist() == list(range(size))
    assert functional.reduce_scatter_tensor(torch.ones(size), "sum", 0, group).tolist() == [float(size)]
    assert functional.all_to_all_single(torch.full((size,), rank), None, None, group).tolist() == list(range(size))
    assert functional.broadcast(torch.tensor([rank]), 1, group).tolist() == [1]


def losing(path):
    """Rank 1 dies in the middle of DDP's training: backward on the others says so."""
    import os

    from c10d_collectives import begin

    begin(path)
    model = wrapped(dist.group.WORLD)
    train(model)
    dist.barrier()
    if place()[0] == 1:
        os._exit(3)
    try:
        train(model)
    except RuntimeError as error:
        return str(error)
    return "nothing happened"


def checkpoints(folder):
    """torch.distributed.checkpoint, also in the background, of sharded state."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rank, size = place()
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    whole = torch.arange(12.0).view(6, 2)

    def state(factor):
        tensor = factor * whole
        return {"rows": distribute_tensor(tensor, mesh, [Shard(0)]), "all": distribute_tensor(tensor, mesh, [Replicate()]),
                "step": factor}  # fmt: skip

    checkpoint.save(state(1), checkpoint_id=f"{folder}/now")
    checkpoint.async_save(state(2), checkpoint_id=f"{folder}/later").result()
    for name, factor in (("now", 1), ("later", 2)):
        loaded = state(5)
        checkpoint.load(loaded, checkpoint_id=f"{folder}/{name}")
        assert loaded["step"] == factor and torch.equal(loaded["rows"].full_tensor(), factor * whole)


def zero():
    """ZeroRedundancyOptimizer: each rank keeps a part of the optimizer's state."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    models = []
    for group in pair():
        model = wrapped(group)
        train(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, process_group=group, lr=0.01))
        models.append(model.module)
    close(*models)


def pipeline():
    """Two stages of a model, one on each rank, four micro-batches."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, size = place()
    torch.manual_seed(5)
    layers = [nn.Linear(4, 8), nn.Linear(8, 3)]
    inputs, targets = torch.randn(8, 4), torch.randn(8, 3)
    plain = copy.deepcopy(layers)
    wanted = nn.functional.mse_loss(plain[1](plain[0](inputs)), targets)
    wanted.backward()
    stage = PipelineStage(layers[rank], rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=nn.functional.mse_loss)
    losses = []
    if rank == 0:
        schedule.step(inputs)
    else:
        schedule.step(target=targets, losses=losses)
        torch.testing.assert_close(sum(losses) / 4, wanted)
    torch.testing.assert_close(layers[rank].weight.grad, plain[rank].weight.grad)
