"""Fujitsu's curve of 2016: a network fitted to the conventional schedule alone, then commlib's schedule predicted on it.

    python benchmarks/fujitsu_curve.py --json curve.json --plot docs/fujitsu.svg

Published: AlexNet, one batch divided among N accelerators, is 10.1 times as fast on 16 and 15.8 times on 64 with communication
after backward, and 14.7 and 27 times with communication scheduled by Fujitsu. Only the first two are used: they fix latency and
bandwidth (relative to the compute) once it is said what "conventional" is. Here it is one all-reduce per layer after backward,
one after the other, each in one piece, by one algorithm for all sizes; reductions cost nothing beside. See docs/fujitsu.md.
"""

import argparse
import json

from commlib.algorithms import algorithm
from commlib.cluster import Cluster
from commlib.cost import Link, Machine, cost_s
from commlib.plan import Shape
from commlib.selection import Choice
from commlib.settings import Settings
from commlib.simulate import Job, predict
from commlib.simulation import EventKind, Simulation
from commlib.workload import Workload

CONVENTIONAL = {16: 10.1, 64: 15.8}
FUJITSU = {16: 14.7, 64: 27.0}
COMPUTE_S = 1.0  # of the whole batch on one; only its ratio to the network's constants matters, but for sizes of segments
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Up to here everything is as in real runs. Beyond it a simulated ring of 2 (N - 1) rounds takes too long: halving-doubling is
# forced, and segments are eight times longer.
AS_REAL = 64
LONGEST_RING = 256
LARGE = Settings(algorithms=(("allreduce", "halving_doubling"),), segment_nbytes=8 << 20)
WORKLOAD = Workload.of_model("alexnet", COMPUTE_S)
LAYERS_NBYTES = [4 * sum(layer.counts) for layer in reversed(WORKLOAD.layers)]


def closed_form_s(name, size, alpha_s, beta_s_per_byte):
    """The conventional schedule's communication by the closed form of the algorithm, which takes no time for grants."""
    link, shape = Link(alpha_s, beta_s_per_byte), Shape((1,) * size)
    return sum(cost_s(algorithm("allreduce", name), shape, nbytes, Machine(link, link)) for nbytes in LAYERS_NBYTES)


def engine_s(name, size, alpha_s, beta_s_per_byte):
    """The same by the engine: each layer's all-reduce begins when the one before has ended on all ranks."""
    link = Link(alpha_s, beta_s_per_byte)
    network = Simulation(Shape((1,) * size), link, link, Settings())
    for key, nbytes in enumerate(LAYERS_NBYTES):
        for rank in range(size):
            network.allreduce(rank, key, nbytes // 4, choice=Choice(name, 0))
        while network.next().kind is not EventKind.IDLE:
            pass
    end_s = network.now_s
    network.close()
    return end_s


def communication_s(name, size, alpha_s, beta_s_per_byte):
    """By the engine, but for rings that are too long to be simulated: a ring's grants hide, and its closed form is right."""
    by = closed_form_s if name == "ring" and size > LONGEST_RING else engine_s
    return by(name, size, alpha_s, beta_s_per_byte)


def fit(name):
    """(alpha_s, beta_s_per_byte) that give the conventional speed-ups; None: none above zero do.

    Newton's method with the closed form's derivatives: the engine's time is as linear, but for grants.
    """
    wanted = {size: COMPUTE_S / ratio - COMPUTE_S / size for size, ratio in CONVENTIONAL.items()}
    (a, b), (c, d) = ([closed_form_s(name, size, *unit) for unit in ((1, 0), (0, 1))] for size in wanted)
    determinant = a * d - b * c
    if abs(determinant) < 1e-9 * a * d:
        return None  # both grow alike with the number of ranks: nothing tells them apart
    alpha_s, beta_s_per_byte = 0.0, 0.0
    for _ in range(30):
        low, high = (wanted[size] - engine_s(name, size, alpha_s, beta_s_per_byte) for size in wanted)
        alpha_s += (low * d - high * b) / determinant
        beta_s_per_byte += (a * high - c * low) / determinant
        if alpha_s <= 0 or beta_s_per_byte <= 0:
            return None
        if abs(low) + abs(high) < 1e-6 * COMPUTE_S:
            return alpha_s, beta_s_per_byte
    raise RuntimeError(f"{name}: the fit does not converge")


def speed_up(cluster, size, schedule, record=Settings()):
    """Predicted, of one schedule."""
    job = Job(WORKLOAD, cluster, fixed_batch=True, record=record)
    return predict(job, [size], [schedule], advise=False).points[0]


def curve(name, sizes):
    """Everything for one assumption about the conventional algorithm."""
    constants = fit(name)
    if constants is None:
        return None
    link = Link(*constants)
    cluster = Cluster(ranks_per_host=1, inside=link, between=link)
    rows = []
    for size in sizes:
        exposed_s = communication_s(name, size, *constants)
        row = {"ranks": size, "conventional": COMPUTE_S / (COMPUTE_S / size + exposed_s),
               "its overlap at best": COMPUTE_S / max(COMPUTE_S / size, exposed_s)}  # fmt: skip
        if size <= AS_REAL:
            same = Settings(algorithms=(("allreduce", name),))
            row["same algorithm"] = speed_up(cluster, size, "ours", same).speed_up
        ours = speed_up(cluster, size, "ours", Settings() if size <= AS_REAL else LARGE)
        row.update(ours=ours.speed_up, bound=ours.speed_up * ours.step_s / ours.bound_s, algorithms=ours.algorithms)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"alpha_s": link.alpha_s, "beta_s_per_byte": link.beta_s_per_byte, "rows": rows}


def table(curves):
    """Markdown."""
    lines = ["| conventional algorithm | ranks | conventional | its overlap at best | ours, same algorithm | ours | bound "
             "| published: conventional, Fujitsu |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for name, found in curves.items():
        for row in found["rows"] if found else []:
            alone = f"{row['same algorithm']:.1f}" if "same algorithm" in row else ""
            size = row["ranks"]
            published = f"{CONVENTIONAL[size]}, {FUJITSU[size]}" if size in FUJITSU else ""
            lines.append(f"| {name} | {size:,} | {row['conventional']:.1f} "
                         f"| {row['its overlap at best']:.1f} | {alone} | {row['ours']:.1f} | {row['bound']:.1f} "
                         f"| {published} |")  # fmt: skip
    return "\n".join(lines)


def draw(curves, path):
    """Speed-up over ranks, a panel per assumption."""
    from matplotlib.figure import Figure

    found = {name: each for name, each in curves.items() if each}
    figure = Figure(figsize=(6 * len(found), 5), layout="constrained")
    for axes, (name, each) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        for column, style in (("bound", "k--"), ("ours", "o-"), ("same algorithm", "s-"), ("conventional", "^-")):
            rows = [row for row in each["rows"] if column in row]
            axes.plot([row["ranks"] for row in rows], [row[column] for row in rows], style, label=column)
        axes.plot(list(CONVENTIONAL), list(CONVENTIONAL.values()), "kx", markersize=10, label="published, conventional (fitted)")
        axes.plot(list(FUJITSU), list(FUJITSU.values()), "k*", markersize=12, label="published, Fujitsu (not fitted)")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="ranks", ylabel="speed-up", title=f"conventional: {name}")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["ring", "halving_doubling", "recursive_doubling"])
    parser.add_argument("--ranks", nargs="+", type=int, default=SIZES)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    options = parser.parse_args()
    curves = {name: curve(name, options.ranks) for name in options.algorithms}
    for name, found in curves.items():
        print(f"{name}: latency {found['alpha_s'] * 1e6:.1f} us, {8e-9 / found['beta_s_per_byte']:.1f} Gbit/s" if found
              else f"{name}: no latency and bandwidth above zero give the two published speed-ups")  # fmt: skip
    print(table(curves))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(curves, file, indent=1)
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
