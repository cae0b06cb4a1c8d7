"""Raw data: what was measured, with which versions, on which machine, how loaded before and after."""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import subprocess

from environments import absence, versions
from peers import HERE


@contextlib.contextmanager
def recorded(path, names, absent):
    """Yields a dict for the results, and writes it to a JSON file with all that a reader must know beside them.

    Args:
        path: of the file.
        names: of the peers that were to be measured.
        absent: {peer: why it was not measured, or not to the end}; it may grow meanwhile.
    """
    results = {}
    record = {**about(), "load_before": os.getloadavg()}
    yield results
    record["load_after"] = os.getloadavg()
    record["versions"] = {name: versions(name) for name in names if absence(name) is None}
    record["absent"] = absent
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, **results}, indent=1) + "\n")


def add_run(path, name, arguments, load_before, results):
    """Writes one run beside those that are in a JSON file, as {"runs": {name: record}}.

    Args:
        path: of the file.
        name: of the run; one of this name is replaced.
        arguments: what it was run with, an argparse.Namespace.
        load_before: os.getloadavg() when it began.
        results: a dict of what was measured.
    """
    path = pathlib.Path(path)
    record = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "rank", "timeline")}
    record["runs"][name] = {**about(), "load_before": load_before, "load_after": os.getloadavg(), "arguments": settings, **results}
    path.write_text(json.dumps(record, indent=1) + "\n")


def about():
    """When, which sources, on which machine."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"architecture": platform.machine(), "processor": _processor(), "cores": len(os.sched_getaffinity(0)),
                    "kernel": platform.release(), "python": platform.python_version()},
    }  # fmt: skip


def _commit():
    """The sources measured; "+" after it: with changes."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=HERE, capture_output=True, text=True)
    return answer.stdout.strip() or None


def _processor():
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None
