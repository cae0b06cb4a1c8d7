"""Draws what the benchmarks measured, and writes the README's tables: from the raw data alone.

    python benchmarks/plot.py

Reads benchmarks/results/*.json; writes docs/*.svg, and into README.md and docs/scaling.md whatever stands between
`<!-- table: NAME -->` and `<!-- end -->` for the names of TABLES.
"""

import argparse
import json
import pathlib
import re
import statistics

from cluster import PAYLOAD_SHARE
from peers import OURS

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASELINE = "gloo"


def load(folder):
    """{name of the benchmark: its record} of those that were run."""
    names = ("allreduce", "latency", "torch_link", "torch_overhead", "torch_training", "scaling", "cluster_allreduce")
    paths = [folder / f"{name}.json" for name in names]
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


def medians(of_peers):
    """{peer: {bytes: seconds}} of {peer: {bytes: [seconds]}}; without those that were not measured."""
    return {name: {int(nbytes): statistics.median(times_s) for nbytes, times_s in sizes.items() if times_s}
            for name, sizes in of_peers.items() if any(sizes.values())}  # fmt: skip


# ---- tables ------------------------------------------------------------------------------------------------------

def allreduce_table(records):
    """Two ranks, every peer."""
    record = records["allreduce"]
    times = medians(record["allreduce"]["2"])
    names = [*times, *(name for name in record["absent"] if name not in times)]
    ours = [name for name in OURS if name in times]
    lines = [["bytes", *names, "fastest other", *(f"{name} against it" for name in ours)]]
    for nbytes in times[ours[0]]:
        cells = [microseconds(times[name].get(nbytes)) if name in times else "absent" for name in names]
        other = fastest_other(times, nbytes)
        lines.append([size_text(nbytes), *cells, other or "", *(against(times, name, other, nbytes) for name in ours)])
    return "\n".join([f"Microseconds. {about(record)}", "", *markdown(lines), "", *absences(record)]).rstrip()


def crowded_table(records):
    """More ranks than cores."""
    record = records["allreduce"]
    counts = [count for count in record["allreduce"] if count != "2"]
    times = {count: medians(record["allreduce"][count]) for count in counts}
    columns = (OURS[0], BASELINE, f"against {BASELINE}")
    lines = [["bytes", *(f"{count} ranks: {column}" for count in counts for column in columns)]]
    for nbytes in times[counts[0]][OURS[0]]:
        lines.append([size_text(nbytes)])
        for count in counts:
            own = [microseconds(times[count].get(name, {}).get(nbytes)) for name in columns[:2]]
            lines[-1] += [*own, against(times[count], OURS[0], BASELINE, nbytes)]
    return "\n".join([f"Microseconds. {about(record)}", "", *markdown(lines)])


def latency_table(records):
    """Many at once, and an urgent one behind a large one."""
    record = records["latency"]
    orders, seconds = record["orders"], record["seconds"]
    count, urgent = orders["at_once"]["count"], orders["urgent"]
    lines = [["", f"{count:,} x {size_text(orders['at_once']['nbytes'])} at once, each", "as a list, each",
              f"{size_text(urgent['nbytes'])} alone",
              f"{size_text(urgent['nbytes'])}, urgent, behind {size_text(urgent['behind_nbytes'])}"]]  # fmt: skip
    for name in seconds["idle"]:
        of_peer = {what: statistics.median(seconds[what][name]) if seconds[what][name] else None for what in orders}
        each_s = [of_peer.get(what) and of_peer[what] / count for what in ("at_once", "as_list")]
        lines.append([name, *map(microseconds, (*each_s, of_peer["idle"], of_peer["urgent"]))])
    return "\n".join([f"Microseconds. {about(record)}", "", *markdown(lines), "", *absences(record)]).rstrip()


def torch_link_table(records):
    """A training step over a slow link, beside the ideal schedule."""
    runs = records["torch_link"]["runs"]
    names = {"overlapped": "commlib", "waiting": "commlib, step() waits", "ddp": "DDP (gloo)", "beside": "side by side",
             "plain": "no communication"}  # fmt: skip
    lines = [["model", "gradients", "ideal", *names.values()]]
    for name, run in runs.items():
        ideal_s = run["bounds_s"]["both passes"]
        cells = [f"{run['medians_s'][way] * 1e3:,.0f} ({run['medians_s'][way] / ideal_s:.2f}x)" for way in names]
        gradients = f"{run['nbytes'] / 1e6:.0f} MB in {run['parameters']} tensors"
        lines.append([name, gradients, f"{ideal_s * 1e3:,.0f}", *cells])
    said = ("Milliseconds per step, and how many times the ideal schedule. Side by side: plain steps, while as many bytes "
            "travel that have nothing to do with them.")  # fmt: skip
    return "\n".join([said, "", *markdown(lines), "", *about_runs(runs)])


def torch_overhead_table(records):
    """What the adapter costs beside the plain optimizer."""
    runs = records["torch_overhead"]["runs"]
    forms = [form for form in next(iter(runs.values()))["times_s"] if form != "plain"]
    lines = [["ResNet-50", "plain step", *forms]]
    for name, run in runs.items():
        plain_s = run["times_s"]["plain"]
        extra_s = {form: statistics.median(own - plain for own, plain in zip(run["times_s"][form], plain_s)) for form in forms}
        lines.append([name, f"{statistics.median(plain_s) * 1e3:,.1f} ms", *(
            f"{extra_s[form] / statistics.median(plain_s):+.1%}, {extra_s[form] / run['parameters'] * 1e6:+.1f} us per parameter"
            for form in forms
        )])  # fmt: skip
    return "\n".join(["What a step takes longer than the plain one.", "", *markdown(lines), "", *about_runs(runs)])


def about_runs(runs):
    """The machine and the versions once, and how loaded it was in each run."""
    machine, versions = next(iter(runs.values()))["machine"], packages_of([run["versions"] for run in runs.values()])
    loads = [f"{name}: {run['load_before'][0]:.1f}, {run['load_after'][0]:.1f}, {run['commit']}, {run['date'][:10]}"
             for name, run in runs.items()]  # fmt: skip
    return [f"{machine['processor'] or machine['architecture']}, {machine['cores']} cores; {versions}. Load average before and "
            f"after, commit and day: {'; '.join(loads)}."]  # fmt: skip


def packages_of(records):
    """The versions of several runs as words: of packages, or of each peer's packages."""
    packages = {}
    for versions in records:
        for name, version in versions.items():
            packages.update(version if isinstance(version, dict) else {name: version})
    return ", ".join(f"{package} {version}" for package, version in packages.items())


def training_table(records):
    """A training step: what communication adds to it, and to compute beside it."""
    record = records["torch_training"]
    lines = [["", "alone", "DDP, gloo", "commlib", "commlib, waiting", "exposed: DDP", "commlib", "commlib, waiting",
              "CPU time added: DDP", "commlib", "compute slowed by gloo", "by commlib"]]  # fmt: skip
    ways = ("ddp", "commlib", "commlib_waiting")
    for name, case in record["cases"].items():
        steps, cpu, compute = ({way: statistics.median(times_s) for way, times_s in case[what].items()}
                               for what in ("steps_s", "cpu_s", "compute_s"))  # fmt: skip
        lines.append([
            f"{name} ({case['nbytes'] / 1e6:.0f} MB)", *(milliseconds(steps[way]) for way in ("alone", *ways)),
            *(milliseconds(steps[way] - steps["alone"]) for way in ways),
            *(milliseconds(cpu[way] - cpu["alone"]) for way in ways[:2]),
            *(f"{compute[way] / compute['alone'] - 1:+.0%}" for way in ("gloo", "commlib")),
        ])  # fmt: skip
    return "\n".join([f"Milliseconds per step. {about(record)}", "", *markdown(lines), "", *absences(record)]).rstrip()


def scaling_table(records):
    """Emulated clusters: every schedule beside the ideal."""
    runs = records["scaling"]["runs"]
    columns = list(dict.fromkeys((mover, schedule) for run in runs.values() for mover, schedules in run["steps_s"].items()
                                 for schedule in schedules))  # fmt: skip
    lines = [["model, hosts, links", "compute", "ideal", *(f"{mover}: {SCHEDULES[schedule]}" for mover, schedule in columns)]]
    for name, run in runs.items():
        ideal_s = run["bounds_s"]["ours"]
        lines.append([name, milliseconds(run["compute_s"]), milliseconds(ideal_s)])
        for mover, schedule in columns:
            by_rank = run["steps_s"].get(mover, {}).get(schedule)
            step_s = by_rank and max(map(statistics.median, by_rank))
            lines[-1].append(f"{milliseconds(step_s)} ({step_s / ideal_s:.2f}x)" if step_s else "")
    return "\n".join([*markdown(lines), "", "Milliseconds per step.", "", *about_runs(runs)])


def cluster_table(records):
    """All-reduce between hosts: milliseconds, share of the links' ceiling, and bytes sent."""
    runs = records["cluster_allreduce"]["runs"]
    lines = [["hosts x ranks, links", "bytes", "library", "milliseconds", "of the ceiling", "bytes sent per byte", "CPU s per GB"]]
    for name, run in runs.items():
        hosts, rate = int(name.split()[0]), run["arguments"]["rate_mbit"] * 1e6 / 8 * PAYLOAD_SHARE
        of = hosts if run.get("cpu_of") == "all ranks" else 1  # earlier runs have it of rank 0 alone
        for nbytes in dict.fromkeys(size for sizes in run["allreduce"].values() for size in sizes):
            for peer, sizes in run["allreduce"].items():
                if nbytes not in sizes:
                    continue
                times_s, sent_nbytes, cpu_s = sizes[nbytes]
                median_s, least_s = statistics.median(times_s), 2 * (hosts - 1) / hosts * int(nbytes) / rate
                large = int(nbytes) >= 1 << 20  # below, latency counts, and a bucket's worth passes unshaped
                lines.append([
                    name, size_text(int(nbytes)), peer, milliseconds(median_s) if large else f"{median_s * 1e3:.3f}",
                    f"{least_s / median_s:.3f}" if large else "", f"{sent_nbytes / int(nbytes):.2f}" if large else "",
                    f"{cpu_s / of / sent_nbytes * 1e9:.2f}" if large and cpu_s is not None else "",
                ])  # fmt: skip
    return "\n".join([*markdown(lines), "", *about_runs(runs)])


# As the schedules of emulated.py are called in tables.
SCHEDULES = {"none": "no overlap", "backward": "overlaps backward, buckets", "unordered": "overlaps both, unordered",
             "ours": "overlaps both, needed first"}  # fmt: skip

TABLES = {
    "cluster_allreduce": ("cluster_allreduce", cluster_table),
    "scaling": ("scaling", scaling_table),
    "torch_link": ("torch_link", torch_link_table),
    "torch_overhead": ("torch_overhead", torch_overhead_table),
    "allreduce": ("allreduce", allreduce_table),
    "crowded": ("allreduce", crowded_table),
    "latency": ("latency", latency_table),
    "torch_training": ("torch_training", training_table),
}


def markdown(lines):
    """Rows of cells, the first one the header."""
    return ["| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]]


def about(record):
    """On what machine, how loaded, with which versions."""
    machine = record["machine"]
    before, after = record["load_before"][0], record["load_after"][0]
    return (f"{machine['processor'] or machine['architecture']}, {machine['cores']} cores, load average {before:.1f} before "
            f"and {after:.1f} after; {packages_of([record['versions']])}; "
            f"commit {record['commit']}, {record['date'][:10]}.")  # fmt: skip


def absences(record):
    """A line per peer that was not measured, or not to the end."""
    return [f"Not measured: {name}: {reason}." for name, reason in record["absent"].items()]


def fastest_other(times, nbytes):
    """The fastest peer at a size; None if no other was measured."""
    others = [name for name in times if name not in OURS and nbytes in times[name]]
    return min(others, key=lambda name: times[name][nbytes], default=None)


def against(times, name, other, nbytes):
    """How many times as fast as another peer."""
    if nbytes not in times.get(other, {}) or nbytes not in times.get(name, {}):
        return ""
    return f"{times[other][nbytes] / times[name][nbytes]:.2f}x"


def microseconds(seconds):
    """For a cell; what was not measured is left empty."""
    if seconds is None:
        return ""
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def milliseconds(seconds):
    """For a cell."""
    return f"{seconds * 1e3:,.1f}"


def size_text(nbytes):
    """Example:
        >>> size_text(8), size_text(65536), size_text(256 << 20)
        ('8 B', '64 KB', '256 MB')
    """
    for unit in ("B", "KB"):
        if nbytes < 1024:
            return f"{nbytes} {unit}"
        nbytes //= 1024
    return f"{nbytes} MB"


def write_tables(records, paths):
    """Replaces what stands between the markers of files; returns what there is to say."""
    texts, said = {path: path.read_text(encoding="utf-8") for path in paths}, []
    for name, (needed, make) in TABLES.items():
        if needed not in records:
            said.append(f"table {name}: run benchmarks/{needed}.py first")
            continue
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        table, places = make(records), []
        for path, text in texts.items():
            texts[path], count = marked.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
            places += [f"{count} in {path.name}"] if count else []
        said.append(f"table {name}: {', '.join(places)}" if places else f"there is no marker for this:\n\n{table}\n")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return said


# ---- plots -------------------------------------------------------------------------------------------------------

def draw(record, path):
    """Time over size, a panel for each number of ranks."""
    from matplotlib.figure import Figure

    runs = record["allreduce"]
    figure = Figure(figsize=(5 * len(runs), 4.5), layout="constrained")
    for axes, (count, of_peers) in zip(figure.subplots(1, len(runs), squeeze=False, sharey=True)[0], runs.items()):
        for name, of_sizes in medians(of_peers).items():
            axes.plot(list(of_sizes), list(of_sizes.values()), marker="o", label=name, markersize=3,
                      linewidth=2.5 if name in OURS else 1)  # fmt: skip
        axes.set(yscale="log", xlabel="bytes", title=f"all-reduce, {count} ranks")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("seconds (median)")
    figure.savefig(path)


def draw_scaling(record, path):
    """Speed-up over the number of hosts, of runs whose hosts share one step's compute."""
    from matplotlib.figure import Figure

    runs = [run for run in record["runs"].values() if run["arguments"]["strong"]]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = {}
    for run in sorted(runs, key=lambda run: run["hosts"]):
        lines.setdefault("the ideal schedule", {})[run["hosts"]] = run["bounds_s"]["ours"]
        for mover, of_mover in run["steps_s"].items():
            for schedule, by_rank in of_mover.items():
                lines.setdefault(f"{mover}: {SCHEDULES[schedule]}", {})[run["hosts"]] = max(map(statistics.median, by_rank))
    for name, steps_s in lines.items():
        total_s = runs[0]["arguments"]["compute_s"]
        axes.plot(list(steps_s), [total_s / step_s for step_s in steps_s.values()], marker="o", markersize=3, label=name,
                  linestyle="--" if "ideal" in name else "-")  # fmt: skip
    axes.set(xlabel="hosts", ylabel="speed-up", title=f"{runs[0]['model']}, {runs[0]['rate_mbit']} Mbit/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--plots", type=pathlib.Path, default=ROOT / "docs", metavar="FOLDER")
    arguments = parser.parse_args()
    records = load(arguments.results)
    print("\n".join(write_tables(records, [arguments.readme, arguments.plots / "scaling.md"])))
    if "allreduce" in records:
        draw(records["allreduce"], arguments.plots / "allreduce.svg")
        print(f"plot: {arguments.plots / 'allreduce.svg'}")
    if "scaling" in records:
        draw_scaling(records["scaling"], arguments.plots / "scaling.svg")
        print(f"plot: {arguments.plots / 'scaling.svg'}")


if __name__ == "__main__":
    main()
