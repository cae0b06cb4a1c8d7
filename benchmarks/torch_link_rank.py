"""One rank of torch_link.py: trains a model in all ways in turn; rank 0 prints and writes."""

import contextlib
import ctypes
import os
import statistics
import time

import torch
import torch_models
from record import add_run

import commlib.torch as comm
from commlib import models
from commlib.schedule import LayerTime, backward_overlap_step_time, ideal_step_time, no_overlap_step_time

# ---- models: a function that makes a copy, and one that makes a batch ------------------------------------------------

CPU = {
    "vgg16": (torch_models.vgg16, lambda count: torch.randn(count, 3, 32, 32)),
    "resnet50": (torch_models.resnet50, lambda count: torch.randn(count, 3, 64, 64)),
    "gpt": (torch_models.GPT, lambda count: torch.randint(4096, (count, 64))),
}
FIRST_BATCH = 8


class Device:
    """An accelerator that is waited for. A wait that took too long makes the next one shorter."""

    def __init__(self):
        self._late_s = 0.0

    def run(self, work_s):
        begin_s = time.monotonic()
        time.sleep(max(0.0, work_s - self._late_s))
        self._late_s += time.monotonic() - begin_s - work_s


class Work(torch.autograd.Function):
    """Forward and backward of a layer as timed waits; its gradients are real tensors."""

    @staticmethod
    def forward(ctx, x, device, time_s, *weights):
        ctx.device, ctx.time_s = device, time_s
        ctx.save_for_backward(*weights)
        device.run(time_s.forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.device.run(ctx.time_s.backward_s)
        return gradient, None, None, *(torch.full_like(weight, 1e-3) for weight in ctx.saved_tensors)


class WaitingLayer(torch.nn.Module):
    """A layer that owns real tensors and computes nothing."""

    def __init__(self, counts, time_s, device):
        super().__init__()
        self.time_s, self.device = time_s, device
        self.names = [f"tensor{index}" for index in range(len(counts))]
        for name, count in zip(self.names, counts):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(count)))

    def forward(self, x):
        return Work.apply(x, self.device, self.time_s, *(getattr(self, name) for name in self.names))


def waiting_model(name, shrink, rate):
    """A function that makes a chain of waiting layers, of which forward and backward take as long as the link."""
    layers = getattr(models, name)()
    sizes = [[max(1, tensor.parameters // shrink) for tensor in layer.tensors] for layer in layers]
    communication_s = 4 * sum(map(sum, sizes)) / rate
    times = models.layer_times(layers, communication_s, communication_s)
    device = Device()
    return lambda: torch.nn.Sequential(*(WaitingLayer(*one, device) for one in zip(sizes, times)))


def suitable_batch(make, batch_of, rate):
    """Samples for which forward and backward take about as long as the link; rank 0's word counts."""
    model, count = make(), FIRST_BATCH
    wanted_s = 4 * sum(parameter.numel() for parameter in model.parameters()) / rate
    for _ in range(3):
        comm.barrier()
        begin_s = time.process_time()  # compute is one thread's, and others may want its core
        model(batch_of(count)).square().mean().backward()
        count = max(2, round(count * wanted_s / (time.process_time() - begin_s)))
    return comm.broadcast_object(count, root_rank=0)


# ---- ways to train ---------------------------------------------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def plain(model):
    return model, sgd(model)


def overlapped(model):
    return model, comm.DistributedOptimizer(sgd(model), model=model, name="overlapped")


def waiting(model):
    return model, comm.DistributedOptimizer(sgd(model), model=model, overlap_forward=False, name="waiting")


def ddp(model):
    optimizer = sgd(model)
    return torch.nn.parallel.DistributedDataParallel(model), optimizer


class Beside:
    """A plain optimizer, while as many bytes as its gradients have are reduced beside it: two who share only the cores."""

    def __init__(self, optimizer, count):
        self._optimizer = optimizer
        self._block = torch.ones(count)
        self._handle = None
        self.zero_grad = optimizer.zero_grad

    def step(self):
        self._optimizer.step()
        self.synchronize()
        self._handle = comm.allreduce_async_(self._block, name="beside")

    def synchronize(self):
        if self._handle is not None:
            comm.synchronize(self._handle)
        self._handle = None


def beside(model):
    return model, Beside(sgd(model), sum(parameter.numel() for parameter in model.parameters()))


WAYS = {"plain": plain, "beside": beside, "overlapped": overlapped, "waiting": waiting, "ddp": ddp}


def train(model, optimizer, batch, steps, marks=None):
    """The usual loop. Returns when each step began, and when all was done."""
    begins_s = []
    for _ in range(steps):
        begins_s.append(time.monotonic())
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        if marks is not None:
            marks.append(("loss", time.monotonic()))
        loss.backward()
        if marks is not None:
            marks.append(("backward", time.monotonic()))
        optimizer.step()
        if marks is not None:
            marks.append(("step", time.monotonic()))
    getattr(optimizer, "synchronize", lambda: None)()
    begins_s.append(time.monotonic())
    return begins_s


# ---- what the ideal schedule is told ---------------------------------------------------------------------------------


def measured_rate():
    """Bytes per second of each direction, from the fastest of large all-reduces: two ranks send n bytes each."""
    block = torch.ones(4 << 20)
    times_s = []
    for _ in range(4):
        comm.barrier()
        begin_s = time.monotonic()
        comm.allreduce_(block, name="rate")
        times_s.append(time.monotonic() - begin_s)
    return comm.allreduce(torch.tensor(block.nbytes / min(times_s)), op=comm.Min, name="slower rate").item()


class LayerClock:
    """When each layer of a model began its forward, and had all its gradients: marks of (what, seconds)."""

    def __init__(self, model):
        self.marks = []
        self.nbytes = {}
        for name, module in model.named_modules():
            parameters = list(module.parameters(recurse=False))
            if parameters:
                self.nbytes[name] = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
                module.register_forward_pre_hook(lambda *_, name=name: self.marks.append((("forward", name), time.monotonic())))
                for parameter in parameters:
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, name=name: self.marks.append((("gradient", name), time.monotonic()))
                    )

    def layer_times(self, begins_s, rate):
        """A LayerTime per layer, in forward order, medians over steps; they add up to the plain step."""
        steps = [self._one_step(begin_s, end_s) for begin_s, end_s in zip(begins_s[1:], begins_s[2:])]
        total = sum(self.nbytes.values())
        layers = []
        for index, name in enumerate(steps[0][0]):
            forward_s, backward_s = (statistics.median(step[1 + which][index] for step in steps) for which in (0, 1))
            update_s = statistics.median(step[3] for step in steps) * self.nbytes[name] / total
            layers.append(LayerTime(forward_s + update_s, backward_s, self.nbytes[name] / rate))
        return layers

    def _one_step(self, begin_s, end_s):
        """(names in forward order, seconds of forward, of backward, of the update)."""
        at = {what: at_s for what, at_s in self.marks if begin_s <= at_s <= end_s}  # the last one of each
        names = [what[1] for what in at if what[0] == "forward"]
        starts_s = [begin_s] + [at["forward", name] for name in names[1:]] + [at["loss"]]
        ends_s = [at["backward"]] + [at["gradient", name] for name in names[1:]] + [at["loss"]]
        forward_s = [after - before for before, after in zip(starts_s, starts_s[1:])]
        # Layers side by side, such as a shortcut, may have their gradients in another order.
        backward_s = [max(0.0, after - before) for after, before in zip(ends_s, ends_s[1:])]
        return names, forward_s, backward_s, at["step"] - at["backward"]


# ---- the run ---------------------------------------------------------------------------------------------------------


def main(arguments, rendezvous):
    torch.set_num_threads(1)
    if arguments.compute == "waits":
        ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK: waits end when they should
    load_before = os.getloadavg()
    comm.init()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=arguments.rank, world_size=2)
    rate = measured_rate()
    if arguments.compute == "cpu":
        make, batch_of = CPU[arguments.model]
        batch = batch_of(suitable_batch(make, batch_of, rate))
    else:
        make, batch = waiting_model(arguments.model, arguments.shrink, rate), torch.ones(1, requires_grad=True)
    ways = {}
    for name in arguments.ways or WAYS:
        torch.manual_seed(1)
        ways[name] = WAYS[name](make())
    clock = LayerClock(ways["plain"][0])
    steps_s, layers, cpu_s = {name: [] for name in ways}, [], {name: [] for name in ways}
    for round_number in range(arguments.rounds + 1):
        for name, (model, optimizer) in ways.items():
            comm.barrier()
            with traced(arguments, name == "overlapped" and round_number == arguments.rounds, model):
                begin_cpu_s = time.process_time()
                begins_s = train(model, optimizer, batch, arguments.steps, clock.marks if name == "plain" else None)
                if name == "plain":
                    layers.append(clock.layer_times(begins_s[:-1], rate))
                    clock.marks.clear()
                if round_number:  # the first round measures, probes and warms up
                    # Steady state: the first interval lacks the waits for a step before, the last flushes.
                    steps_s[name] += [end - begin for begin, end in zip(begins_s[1:], begins_s[2:-1])]
                    cpu_s[name].append((time.process_time() - begin_cpu_s) / arguments.steps)
    of_rank = {"steps_s": steps_s, "cpu_s": cpu_s, "layers": [list(layer) for layer in middle(layers[1:])]}
    by_rank = comm.allgather_object(of_rank)
    if arguments.rank == 0:
        nbytes = sum(clock.nbytes.values())
        show(arguments, {"nbytes": nbytes, "parameters": len(list(make().parameters())), "batch": len(batch),
                         "rate_bytes_per_s": rate, "by_rank": by_rank, "load_before": load_before})  # fmt: skip
    comm.barrier()
    torch.distributed.destroy_process_group()
    comm.shutdown()


@contextlib.contextmanager
def traced(arguments, is_wanted, model):
    """A timeline of what runs within."""
    if not (arguments.timeline and is_wanted):
        yield
        return
    comm.start_timeline(arguments.timeline)
    remove = comm.trace_layers(model)
    yield
    remove()
    comm.stop_timeline()


def middle(rounds):
    """The round of which forward and backward together took the median time."""
    return sorted(rounds, key=lambda layers: sum(layer.forward_s + layer.backward_s for layer in layers))[len(rounds) // 2]


def show(arguments, record):
    """Prints medians beside the ideal, and writes everything."""
    by_rank = record["by_rank"]
    of_ranks = [[LayerTime(*layer) for layer in one["layers"]] for one in by_rank]
    makers = {"both passes": ideal_step_time, "backward": backward_overlap_step_time, "nothing": no_overlap_step_time}
    record["bounds_s"] = {name: max(make(layers).step_s for layers in of_ranks) for name, make in makers.items()}
    record["medians_s"] = {name: max(statistics.median(one["steps_s"][name]) for one in by_rank) for name in by_rank[0]["steps_s"]}
    ideal_s = record["bounds_s"]["both passes"]
    print(f"{arguments.model}, {arguments.compute}: {record['nbytes'] / 1e6:.1f} MB of gradients in {record['parameters']} "
          f"tensors, batch {record['batch']}, link {record['rate_bytes_per_s'] * 8e-6:.0f} Mbit/s of {arguments.rate_mbit} set, "
          f"C = {record['nbytes'] / record['rate_bytes_per_s'] * 1e3:.0f} ms")  # fmt: skip
    for name, bound_s in record["bounds_s"].items():
        print(f"ideal, {name + ' overlapped':<25} {bound_s * 1e3:8.1f} ms  {bound_s / ideal_s:5.2f}")
    for name, median_s in record["medians_s"].items():
        cpu_s = max(statistics.median(one["cpu_s"][name]) for one in by_rank)
        print(f"{name:<32} {median_s * 1e3:8.1f} ms  {median_s / ideal_s:5.2f}   CPU {cpu_s * 1e3:8.1f} ms")
    if arguments.output:
        load_before = record.pop("load_before")
        record["versions"] = {"torch": torch.__version__}
        add_run(arguments.output, f"{arguments.model}, {arguments.compute}", arguments, load_before, record)
