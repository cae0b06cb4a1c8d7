"""A training step of two ranks over a slow link: commlib overlapped and waiting, DDP, and the ideal schedule.

    sudo python benchmarks/torch_link.py --model vgg16 --rate-mbit 400 --output link.json

Two network namespaces stand for two hosts, joined by a link with a limited rate (tbf on both ends); each runs one rank.
The models have the real tensors of VGG-16 or ResNet-50, one in `--shrink` elements of each, so that two slow cores can
train them; their compute is timed waits, spread over the layers by the real layers' work and scaled so that f + b = C,
the time in which the link carries all gradients. Optimizer updates are real. All ways take turns in one run.

Beside them stands commlib.schedule's ideal: free preemption, no latency, the link's rate as it was measured just before
(one large all-reduce), per-layer times as they were measured in the run, updates counted with forward.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

NAMES = ("commlib-bench-0", "commlib-bench-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORTS = (29611, 29612)  # of commlib's store, and of torch.distributed's
# 70 kB at once keep segmented packets cheap, and a message of megabytes does not notice them.
BURST_NBYTES = 70_000


# ---- the two hosts


def make_hosts(rate_mbit, notsent_nbytes):
    """Two namespaces and the link between them."""
    remove_hosts()
    run("ip link add c0 type veth peer name c1")
    for index, (name, address) in enumerate(zip(NAMES, ADDRESSES)):
        run(f"ip netns add {name}")
        run(f"ip link set c{index} netns {name} name eth0")
        inside = f"ip netns exec {name}"
        run(f"{inside} ip addr add {address}/24 dev eth0")
        run(f"{inside} ip link set eth0 up")
        run(f"{inside} ip link set lo up")
        if notsent_nbytes:
            run(f"{inside} sysctl -q -w net.ipv4.tcp_notsent_lowat={notsent_nbytes}")
        run(f"{inside} tc qdisc add dev eth0 root tbf rate {rate_mbit}mbit burst {BURST_NBYTES} latency 50ms")


def remove_hosts():
    """Undoes make_hosts, wholly or partly done."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def run(command):
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{command}` failed: {done.stderr.strip()} (namespaces, veth and tbf are needed, and root)")


def start_rank(rank, arguments):
    """A rank in its namespace; it talks over the link only."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COMMLIB_")}
    environ.update(
        COMMLIB_RANK=str(rank), COMMLIB_SIZE="2", COMMLIB_LOCAL_RANK="0", COMMLIB_LOCAL_SIZE="1",
        COMMLIB_CROSS_RANK=str(rank), COMMLIB_CROSS_SIZE="2", COMMLIB_STORE=f"{ADDRESSES[0]}:{PORTS[0]}",
        COMMLIB_STORE_OWNER="rank 0", COMMLIB_JOB="torch_link", COMMLIB_TRANSPORT="tcp", GLOO_SOCKET_IFNAME="eth0",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    command = ["ip", "netns", "exec", NAMES[rank], sys.executable, os.path.abspath(__file__), *arguments, "--rank", str(rank)]
    return subprocess.Popen(command, env=environ)


# ---- one rank


def rank_main(arguments):
    """Trains in all ways in turn; rank 0 prints and writes."""
    import torch

    import commlib.torch as comm
    from commlib import models

    torch.set_num_threads(1)
    comm.init()
    torch.distributed.init_process_group("gloo", init_method=f"tcp://{ADDRESSES[0]}:{PORTS[1]}", rank=arguments.rank,
                                         world_size=2)  # fmt: skip
    layers = getattr(models, arguments.model)()
    sizes = [[max(1, tensor.parameters // arguments.shrink) for tensor in layer.tensors] for layer in layers]
    nbytes = 4 * sum(map(sum, sizes))
    rate = measured_rate(comm, torch)
    communication_s = nbytes / rate
    times = models.layer_times(layers, communication_s, communication_s)
    ways = {name: make(torch, comm, sizes, times) for name, make in WAYS.items()}
    steps_s = {name: [] for name in ways}
    for round_number in range(arguments.rounds + 1):
        for name, train in ways.items():
            comm.barrier()
            begins_s = train(arguments.steps)
            if round_number:  # the first round measures, probes and warms up
                # Steady state: the first interval lacks the waits for a step before, the last flushes.
                steps_s[name] += [end - begin for begin, end in zip(begins_s[1:], begins_s[2:-1])]
    update_s = measured_update(torch, sizes)
    worst = comm.allgather_object(steps_s)
    if arguments.rank == 0:
        show(arguments, nbytes, rate, times, worst, update_s, sizes)
    comm.barrier()
    torch.distributed.destroy_process_group()
    comm.shutdown()


def measured_rate(comm, torch):
    """Bytes per second of each direction, from the fastest of large all-reduces: two ranks send n bytes each."""
    block = torch.ones(4 << 20)
    times_s = []
    for _ in range(4):
        comm.barrier()
        begin_s = time.monotonic()
        comm.allreduce_(block, name="rate")
        times_s.append(time.monotonic() - begin_s)
    return comm.allreduce(torch.tensor(block.nbytes / min(times_s)), op=comm.Min, name="slower rate").item()


def make_model(torch, sizes, times):
    """A chain of layers that own real tensors and wait instead of computing."""

    class Wait(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, time_s, *weights):
            ctx.time_s = time_s
            ctx.save_for_backward(*weights)
            time.sleep(time_s.forward_s)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(ctx.time_s.backward_s)
            return gradient, None, *(torch.full_like(weight, 1e-3) for weight in ctx.saved_tensors)

    class Layer(torch.nn.Module):
        def __init__(self, counts, time_s):
            super().__init__()
            self.time_s = time_s
            self.tensors = torch.nn.ParameterList(torch.zeros(count) for count in counts)

        def forward(self, x):
            return Wait.apply(x, self.time_s, *self.tensors)

    return torch.nn.Sequential(*(Layer(counts, time_s) for counts, time_s in zip(sizes, times)))


def loop(torch, model, optimizer, steps, finish):
    """The usual loop. Returns when each step began, and when all was done."""
    begins_s = []
    x = torch.ones(1, requires_grad=True)
    for _ in range(steps):
        begins_s.append(time.monotonic())
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    finish()
    begins_s.append(time.monotonic())
    return begins_s


def make_commlib(overlap):
    def make(torch, comm, sizes, times):
        model = make_model(torch, sizes, times)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = comm.DistributedOptimizer(optimizer, model=model, overlap_forward=overlap, name=f"overlap {overlap}")
        return lambda steps: loop(torch, model, optimizer, steps, optimizer.synchronize)

    return make


def make_ddp(torch, comm, sizes, times):
    model = torch.nn.parallel.DistributedDataParallel(make_model(torch, sizes, times))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return lambda steps: loop(torch, model, optimizer, steps, lambda: None)


WAYS = {"commlib overlapped": make_commlib(True), "commlib waiting": make_commlib(False), "DDP (gloo)": make_ddp}


def measured_update(torch, sizes):
    """Seconds of an optimizer's step over all tensors, with nothing to communicate."""
    parameters = [torch.nn.Parameter(torch.zeros(count)) for counts in sizes for count in counts]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    times_s = []
    for _ in range(10):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        begin_s = time.monotonic()
        optimizer.step()
        times_s.append(time.monotonic() - begin_s)
    return statistics.median(times_s)


# ---- results


def show(arguments, nbytes, rate, times, by_rank, update_s, sizes):
    """Prints medians beside the ideal, and writes everything."""
    from commlib.schedule import LayerTime, backward_overlap_step_time, ideal_step_time, no_overlap_step_time

    total = sum(map(sum, sizes))
    layers = [
        LayerTime(time_s.forward_s + update_s * sum(counts) / total, time_s.backward_s, 4 * sum(counts) / rate)
        for time_s, counts in zip(times, sizes)
    ]
    bounds_s = {
        "ideal, both passes overlapped": ideal_step_time(layers).step_s,
        "ideal, backward overlapped": backward_overlap_step_time(layers).step_s,
        "ideal, nothing overlapped": no_overlap_step_time(layers).step_s,
    }
    ideal_s = bounds_s["ideal, both passes overlapped"]
    print(f"{arguments.model}: {nbytes / 1e6:.1f} MB of gradients, link {rate * 8e-6:.0f} Mbit/s measured of "
          f"{arguments.rate_mbit} set, C = f + b = {nbytes / rate * 1e3:.0f} ms, update {update_s * 1e3:.1f} ms")  # fmt: skip
    for name, bound_s in bounds_s.items():
        print(f"{name:<32} {bound_s * 1e3:8.1f} ms  {bound_s / ideal_s:5.2f}")
    medians_s = {name: max(statistics.median(rank[name]) for rank in by_rank) for name in WAYS}
    for name, median_s in medians_s.items():
        print(f"{name:<32} {median_s * 1e3:8.1f} ms  {median_s / ideal_s:5.2f}")
    if arguments.output:
        record = {"arguments": vars(arguments), "nbytes": nbytes, "rate_bytes_per_s": rate, "update_s": update_s,
                  "layers": [list(layer) for layer in layers], "bounds_s": bounds_s, "steps_s_by_rank": by_rank}  # fmt: skip
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("alexnet", "vgg16", "resnet50", "bert_base"), default="vgg16")
    parser.add_argument("--shrink", type=int, default=16, help="one in so many elements of every tensor")
    parser.add_argument("--rate-mbit", type=int, default=400)
    parser.add_argument("--notsent-nbytes", type=int, default=0,
                        help="bytes that the kernel takes ahead of what it sends (tcp_notsent_lowat); 0: its default. "
                        "An urgent gradient waits for them")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of every way in each round")
    parser.add_argument("--output", metavar="FILE", help="raw data, as JSON")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments)
        return
    if os.geteuid() != 0:
        raise SystemExit("torch_link.py makes network namespaces: run it as root")
    if arguments.steps < 4:
        raise SystemExit("--steps must be at least 4: the first and the last are left out")
    try:
        make_hosts(arguments.rate_mbit, arguments.notsent_nbytes)
        ranks = [start_rank(rank, sys.argv[1:]) for rank in (0, 1)]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit("a rank failed")
    finally:
        remove_hosts()


if __name__ == "__main__":
    main()
