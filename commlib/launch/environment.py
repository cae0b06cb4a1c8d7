"""The environment of ranks: what commrun adds for each, and what of its own it takes along to other hosts."""
from __future__ import annotations

import os
from typing import Dict, Iterable, Mapping, Optional

# What steers the libraries of a training job. A login's own variables (HOME, TMPDIR, DISPLAY, SSH_*) stay each host's own.
_NAMES = frozenset(("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ"))
_PREFIXES = (
    "COMMLIB_", "PYTHON", "CONDA_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_", "TF_", "XLA_", "KERAS_",
    "JAX_", "HF_", "CUDA_", "NCCL_", "GLOO_",
)  # fmt: skip

# How many threads libraries make: of themselves as many as the host has cores, in each rank.
_THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


def forwarded(environ: Mapping[str, str], extra: Iterable[str]) -> Dict[str, str]:
    """What goes to other hosts: variables of the job's libraries, and those of `-x NAME` and `-x NAME=VALUE`.

    Example:
        >>> forwarded({"PATH": "/bin", "HOME": "/root", "LEVEL": "3"}, ["LEVEL", "SEED=1"])
        {'PATH': '/bin', 'LEVEL': '3', 'SEED': '1'}
    """
    chosen = {name: value for name, value in environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    if "PYTHONPATH" in chosen:  # relative to our folder, which need not be the rank's
        chosen["PYTHONPATH"] = absolute(chosen["PYTHONPATH"])
    return {**chosen, **given(environ, extra)}


def given(environ: Mapping[str, str], extra: Iterable[str]) -> Dict[str, str]:
    """The variables of `-x`. A name that is not set here is left out."""
    chosen: Dict[str, str] = {}
    for item in extra:
        name, equals, value = item.partition("=")
        if equals or name in environ:
            chosen[name] = value if equals else environ[name]
    return chosen


def absolute(path: str) -> str:
    """A search path with each folder's whole name."""
    return os.pathsep.join(os.path.abspath(folder) for folder in path.split(os.pathsep) if folder)


def of_rank(environ: Mapping[str, str], rank: int, size: int, local_rank: int, local_size: int, cross_rank: int,
            cross_size: int, store: str, job: str, captured: bool) -> Dict[str, str]:
    """The whole environment of one rank.

    Args:
        environ: what all ranks get; it wins over the defaults that are set here, and loses against the rank's place.
        store, job: where the ranks meet, and what for; see `bootstrap.Placement`.
        captured: whether the rank's output goes through a pipe, where Python would hold it back.
    """
    share = max(1, len(os.sched_getaffinity(0)) // local_size)
    variables = dict.fromkeys(_THREADS, str(share))
    if captured:
        variables["PYTHONUNBUFFERED"] = "1"
    variables.update(environ)
    place = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size, "CROSS_RANK": cross_rank,
             "CROSS_SIZE": cross_size, "STORE": store, "STORE_OWNER": "commrun", "JOB": job}
    variables.update({f"COMMLIB_{name}": str(value) for name, value in place.items()})
    return variables


def of_options(options) -> Dict[str, str]:
    """The variables that stand for commrun's options."""
    named = {
        "START_TIMEOUT_S": options.start_timeout, "SETTINGS": _whole(options.settings), "LOG_LEVEL": options.log_level,
        "TIMELINE": _whole(options.timeline_filename), "NETWORK_INTERFACES": options.network_interfaces,
        "PORT_RANGE": options.port_range, "STALL_WARNING_S": options.stall_check_warning_time_seconds,
        "STALL_SHUTDOWN_S": options.stall_check_shutdown_time_seconds,
    }  # fmt: skip
    if options.no_stall_check:
        named["STALL_WARNING_S"] = named["STALL_SHUTDOWN_S"] = 0
    return {f"COMMLIB_{name}": str(value) for name, value in named.items() if value is not None}


def _whole(path: Optional[str]) -> Optional[str]:
    return None if path is None else os.path.abspath(path)
