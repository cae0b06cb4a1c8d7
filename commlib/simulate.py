"""commlib simulate: how fast a model would train on a cluster, before it is rented.

The real engine, with its plans, selection and priorities, runs on every simulated rank under a virtual clock:

    commlib simulate --model resnet50 --compute 0.2 --cluster cluster.json --ranks 8,64

prints, for each number of ranks, the step time, speed-up, efficiency and exposed communication of four schedules beside the
bound, what limits, and what would help. docs/simulate.md describes the files. This file predicts; `simulate_report` shows it.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import Counter
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from commlib import algorithms
from commlib.cluster import Cluster
from commlib.messages import FLOAT32_NBYTES, SCHEDULES, Message
from commlib.models import MODELS
from commlib.schedule import LayerTime, backward_overlap_step_time, ideal_step_time, no_overlap_step_time
from commlib.settings import Settings
from commlib.simulated_training import simulate_training
from commlib.simulation import Simulation
from commlib.workload import Workload, model_flops

DEFAULT_RANKS = "2,4,8,16,32,64"
DEFAULT_STEPS = 3
OURS = "ours"

# The bandwidth's share of what a schedule loses; the bound of all is the one of "ours".
_BOUNDS = {"none": no_overlap_step_time, "backward": backward_overlap_step_time, "unordered": ideal_step_time,
           OURS: ideal_step_time}  # fmt: skip

# What is lost to waiting is worth a name from here on.
_WORTH_NAMING = 0.05

Progress = Callable[[str, float], None]


class Job(NamedTuple):
    """What is simulated.

    Args:
        workload: the compute of one rank's batch.
        cluster: where.
        wire_nbytes: bytes of an element on its way: 4 (fp32), or 2 for a 16-bit wire format.
        fixed_batch: the batch of all ranks together is that of the workload ("strong scaling"); else each has as much.
        record: settings for what the cluster does not say: segments, budgets, forced algorithms.
        steps: training steps, at least 2; the last ones are looked at.
    """

    workload: Workload
    cluster: Cluster
    wire_nbytes: int = FLOAT32_NBYTES
    fixed_batch: bool = False
    record: Settings = Settings()
    steps: int = DEFAULT_STEPS

    def on(self, size: int) -> Workload:
        """What one of so many ranks computes in a step."""
        return self.workload.scaled(1 / size) if self.fixed_batch else self.workload

    def on_wire(self, count: int) -> int:
        """A number of elements as what the simulation moves: float32 elements of as many bytes."""
        return -(-count * self.wire_nbytes // FLOAT32_NBYTES)


class Point(NamedTuple):
    """One schedule on so many ranks.

    Args:
        ranks: how many.
        schedule: a key of messages.SCHEDULES.
        step_s: a step's length in steady state.
        speed_up: samples per second, in those of one rank alone.
        efficiency: speed_up / ranks.
        exposed_s: what the slowest rank's compute leaves of the step: communication that hides behind nothing.
        bound_s: no schedule and no algorithm makes a step shorter than this.
        limit: what keeps the ranks waiting most: "compute" (nothing much), "bandwidth", "reduction", "stragglers", or
            "latency": what those do not explain, such as latencies, the rounds of an algorithm, messages that wait for others.
        algorithms: algorithm -> messages of a step that it moves.
    """

    ranks: int
    schedule: str
    step_s: float
    speed_up: float
    efficiency: float
    exposed_s: float
    bound_s: float
    limit: str
    algorithms: Dict[str, int]


class Advice(NamedTuple):
    """What a change would do: `gain` times the samples per second of the schedule "ours" without it."""

    change: str
    gain: float
    point: Point


class Prediction(NamedTuple):
    """All that was simulated: the points by ranks and schedule, and advice for the most ranks."""

    job: Job
    points: List[Point]
    advice: List[Advice]


def predict(job: Job, sizes: Sequence[int], schedules: Sequence[str] = tuple(SCHEDULES), advise: bool = True,
            progress: Progress = lambda what, share: None) -> Prediction:  # fmt: skip
    """Simulates training; the command's power as a function.

    Args:
        job: what to simulate.
        sizes: numbers of ranks.
        schedules: keys of messages.SCHEDULES.
        advise: simulate also what would help at the largest size.
        progress: told what is being simulated, and which share of that is done.

    Raises:
        ValueError: no such schedule, no such algorithm in the record, or sizes that cannot be simulated.

    Example:
        >>> cluster = Cluster.from_dict({"ranks_per_host": 1, "between": {"latency_us": 20, "gbit_per_s": 10}})
        >>> result = predict(Job(Workload.of_model("alexnet", 0.4), cluster), [4], ["none", "ours"], advise=False)
        >>> [(point.schedule, round(point.efficiency, 2), point.limit) for point in result.points]
        [('none', 0.58, 'bandwidth'), ('ours', 1.0, 'compute')]
    """
    unknown = set(schedules) - set(SCHEDULES)
    if unknown or not schedules or not sizes:
        raise ValueError(f"simulate at least one number of ranks and one of the schedules {', '.join(SCHEDULES)}"
                         + (f", not {', '.join(sorted(unknown))}" if unknown else ""))  # fmt: skip
    for size in sizes:
        job.cluster.shape(size)
    points = [_point(job, size, name, progress, name) for size in sorted(set(sizes)) for name in schedules]
    return Prediction(job, points, _advice(job, max(sizes), points, progress) if advise and max(sizes) > 1 else [])


def changes(job: Job) -> List[Tuple[str, Job, float]]:
    """What might help: (change, the job with it, samples of a step in those without it)."""
    found = [("twice the bandwidth", job._replace(cluster=job.cluster.faster(2)), 1.0)]
    if job.wire_nbytes == FLOAT32_NBYTES:
        found.append(("half the bytes (16-bit wire)", job._replace(wire_nbytes=FLOAT32_NBYTES // 2), 1.0))
    found.append(("half the latency", job._replace(cluster=job.cluster.sooner(2)), 1.0))
    found.append(("twice the batch", job._replace(workload=job.workload.scaled(2)), 2.0))
    return found


def _advice(job, size, points, progress):
    now = next((point for point in points if point.ranks == size and point.schedule == OURS), None)
    now = now or _point(job, size, OURS, progress, OURS)
    advice = []
    for change, changed, samples in changes(job):
        point = _point(changed, size, OURS, progress, change)
        advice.append(Advice(change, samples * now.step_s / point.step_s, point))
    return advice


def _point(job: Job, size: int, name: str, progress: Progress, what: str) -> Point:
    workload, shape = job.on(size), job.cluster.shape(size)
    slowness = job.cluster.slowness(size)
    slowest_s = workload.compute_s * max(slowness)
    layers = _layer_times(job, workload.scaled(max(slowness)), shape)
    step_s, names = slowest_s, Counter()
    if size > 1:
        step_s, names = _simulated(job, shape, workload, name, lambda share: progress(f"{size} ranks, {what}", share))
    alone_s = job.workload.compute_s * (1 if job.fixed_batch else size)
    return Point(
        ranks=size, schedule=name, step_s=step_s, speed_up=alone_s / step_s, efficiency=alone_s / step_s / size,
        exposed_s=max(0.0, step_s - slowest_s), bound_s=ideal_step_time(layers).step_s,
        limit=_limit(step_s, _BOUNDS[name](layers).step_s, slowest_s, workload.compute_s, _narrowest(job.cluster, shape)),
        algorithms=dict(names),
    )  # fmt: skip


def _simulated(job, shape, workload, name, progress):
    cluster, schedule = job.cluster, SCHEDULES[name]
    slowness = cluster.slowness(shape.size)
    simulation = Simulation(
        shape, cluster.inside, cluster.between, cluster.settings(shape, job.record), shares_port=cluster.shared_nic,
        switch_beta_s_per_byte=cluster.switch_beta_s_per_byte(shape), jitter_s=cluster.jitter_s, seed=cluster.seed,
        slowness=slowness, processor=cluster.processor,
    )  # fmt: skip
    try:
        messages = [Message(job.on_wire(message.count), message.ready, message.needed)
                    for message in schedule.messages([layer.counts for layer in workload.layers])]  # fmt: skip
        names = Counter(simulation.choice(message.count * FLOAT32_NBYTES).algorithm for message in messages)
        steps_s = simulate_training(workload.layers, simulation, job.steps, schedule, messages, slowness, progress)
    finally:
        simulation.close()
    return statistics.median(steps_s[1:] or steps_s), names  # the first begins with idle links


def _layer_times(job, workload, shape):
    """For bounds: links that are never idle without need and have no latency."""
    cluster = job.cluster
    per_element_s = job.wire_nbytes * max(cluster.least_s_per_byte(shape), cluster.least_reduction_s_per_byte(shape))
    return [LayerTime(layer.forward_s, layer.backward_s, sum(layer.counts) * per_element_s) for layer in workload.layers]


def _narrowest(cluster, shape):
    return "bandwidth" if cluster.least_s_per_byte(shape) >= cluster.least_reduction_s_per_byte(shape) else "reduction"


def _limit(step_s, moving_s, slowest_s, compute_s, narrowest):
    lost = {"stragglers": slowest_s - compute_s, narrowest: moving_s - slowest_s, "latency": step_s - moving_s}
    if step_s - compute_s < _WORTH_NAMING * step_s:
        return "compute"
    return max(lost, key=lost.__getitem__)


# ---- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser):
    """The options of `commlib simulate`."""
    parser.add_argument("--model", required=True, metavar="NAME|FILE",
                        help=f"{', '.join(MODELS)}, or a file of layers, or a timeline: see docs/simulate.md")  # fmt: skip
    parser.add_argument("--cluster", required=True, metavar="FILE", help="hosts and links: see docs/simulate.md")
    parser.add_argument("--ranks", type=_numbers, default=_numbers(DEFAULT_RANKS), metavar="N,...",
                        help=f"how many ranks to simulate ({DEFAULT_RANKS})")  # fmt: skip
    parser.add_argument("--compute", type=float, metavar="S",
                        help="a named model: seconds of compute of a step on one rank alone")  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="SAMPLES", help="a named model, instead of --compute, where the cluster's "
                        "file says tflops: samples of a step on one rank")  # fmt: skip
    parser.add_argument("--fixed-batch", action="store_true", help="all ranks together have the batch of one (strong scaling)")
    parser.add_argument("--wire", type=int, choices=(16, 32), default=32, help="bits of an element on its way (32)")
    parser.add_argument("--schedules", type=lambda text: text.split(","), default=list(SCHEDULES), metavar="NAME,...",
                        help=f"of {', '.join(SCHEDULES)} (all)")  # fmt: skip
    parser.add_argument("--algorithm", choices=tuple(algorithms.KINDS["allreduce"]), help="the one for all messages, "
                        "instead of the one that fits the size best")  # fmt: skip
    parser.add_argument("--settings", metavar="FILE", help="a settings record, as commlib tune writes it: segments and "
                        "budgets are its, link constants the cluster's")  # fmt: skip
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=f"training steps, at least 2 ({DEFAULT_STEPS})")
    parser.add_argument("--no-advice", action="store_true", help="do not simulate what would help")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up over ranks there (.svg, .png or .pdf)")


def _numbers(text: str) -> List[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 2,8,64") from None


def run(options) -> int:
    """The command. Returns the exit code."""
    from commlib import simulate_report

    try:
        job = job_of(options)
        with simulate_report.progress_bar() as progress:
            prediction = predict(job, options.ranks, options.schedules, not options.no_advice, progress)
        simulate_report.show(prediction, options.json, options.plot)
    except (OSError, ValueError, MemoryError) as error:
        print(f"commlib simulate: {error}", file=sys.stderr)
        return 2
    return 0


def job_of(options) -> Job:
    """The job that the options of the command name.

    Raises:
        OSError: a file cannot be read.
        ValueError: options or files contradict themselves or each other.
    """
    cluster = Cluster.load(options.cluster)
    record = Settings.load(options.settings) if options.settings else Settings()
    if options.algorithm:
        forced = {**dict(record.algorithms), "allreduce": options.algorithm}
        record = record.replace(algorithms=tuple(sorted(forced.items())))
    return Job(_workload(options, cluster), cluster, options.wire // 8, options.fixed_batch, record, options.steps)


def _workload(options, cluster: Cluster) -> Workload:
    named = options.model in MODELS
    if not named and not os.path.exists(options.model):
        raise ValueError(f"{options.model!r} is neither a file nor one of the models {', '.join(MODELS)}")
    if named and (options.compute is None) == (options.batch is None):
        raise ValueError(f"{options.model} needs either --compute, seconds of a step's compute on one rank alone, or --batch, "
                         "samples of a step on one rank")  # fmt: skip
    if not named and not (options.compute is None and options.batch is None):
        raise ValueError(f"--compute and --batch are for the models {', '.join(MODELS)}; the layers of a file have their times")
    return Workload.of_model(options.model, _compute_s(options, cluster)) if named else Workload.load(options.model)


def _compute_s(options, cluster: Cluster) -> Optional[float]:
    if options.compute is not None:
        return options.compute
    if cluster.tflops is None or options.batch < 1:
        raise ValueError("--batch needs at least one sample, and \"tflops\" in the cluster's file: what a rank really sustains")
    return model_flops(options.model) * options.batch / (cluster.tflops * 1e12)
