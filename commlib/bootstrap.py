"""Who am I: rank, size and meeting place of this process, found in the variables that its launcher set.

The only file that reads the environment; nothing here opens a socket or waits. Each launcher is one line of
`LAUNCHERS`: how it is recognised and how its variables become a `Placement`. What a launcher does not tell (the local
rank under a bare PMI, say) stays None here and is derived after the ranks have met.
"""
from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
from dataclasses import dataclass, field
from typing import Callable, Mapping, NamedTuple, Optional

from commlib.secret import FILE_VARIABLE, VARIABLE, Secret, SecretError, load_secret

OPTION_PREFIX = "COMMLIB_"
START_TIMEOUT_S = 60.0  # Horovod's --start-timeout waits 30 s; imports from a busy network disk can take longer


class StartError(RuntimeError):
    """The job could not be started. `rank` is the rank to blame, None if no single one is."""

    def __init__(self, text: str, rank: Optional[int] = None):
        super().__init__(text)
        self.rank = rank


@dataclass(frozen=True)
class Placement:
    """One process's place in its job.

    Args:
        launcher: name of the launcher that was recognised.
        rank, size: this process and the number of processes; ``0 <= rank < size``.
        local_rank, local_size: the same among the processes of this host; None if the launcher does not say.
        cross_rank, cross_size: index of this host and number of hosts; None if the launcher does not say.
        store: where the ranks meet: ``unix:@name``, ``host:port``, or "" for a single process.
        store_owner: who serves the store: "commrun", or "rank 0".
        job: equal on all ranks of one job and, as far as the launcher allows, on no others.
        options: the remaining COMMLIB_* variables, lower case and without prefix: ``{"transport": "tcp"}``.
        secret: what the processes of the job share and nobody else has; empty if the launcher gave none.

    Example:
        >>> discover({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        ...           "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).rank
        1
    """

    launcher: str
    rank: int
    size: int
    local_rank: Optional[int]
    local_size: Optional[int]
    cross_rank: Optional[int]
    cross_size: Optional[int]
    store: str
    store_owner: str
    job: str
    options: Mapping[str, str] = field(default_factory=dict)
    secret: Secret = Secret()

    @property
    def start_timeout_s(self) -> float:
        """How long the ranks wait for each other: COMMLIB_START_TIMEOUT_S, or 60 s."""
        text = self.options.get("start_timeout_s", str(START_TIMEOUT_S))
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = -1.0
        if not 0.0 < timeout_s < float("inf"):
            raise StartError(f"COMMLIB_START_TIMEOUT_S is {text!r}: give a positive number of seconds")
        return timeout_s


class _Found(NamedTuple):
    """What one launcher's variables said, before it is checked."""

    rank: int
    size: int
    local_rank: Optional[int]
    local_size: Optional[int]
    job: str
    cross_rank: Optional[int] = None
    cross_size: Optional[int] = None
    store: str = ""  # where several hosts meet; "" if the launcher gives no address
    store_owner: str = "rank 0"


def discover(environ: Optional[Mapping[str, str]] = None) -> Placement:
    """Finds this process's placement in `environ` (the process's own environment by default).

    Args:
        environ: variables as the launcher set them.
    Raises:
        StartError: the variables contradict each other, some are missing, or the ranks would have nowhere to meet.
    Example:
        >>> discover({}).size
        1
    """
    environ = os.environ if environ is None else environ
    launcher = next(launcher for launcher in LAUNCHERS if launcher.recognises(environ))
    found = launcher.read(environ)
    _check(launcher.name, found)
    return Placement(
        launcher.name, found.rank, found.size, found.local_rank, found.local_size, found.cross_rank, found.cross_size,
        store=_meeting_place(launcher.name, found, environ), store_owner=found.store_owner, job=found.job,
        options=_options(environ), secret=_secret(environ),
    )


def placed(rank: int, size: int, job: str, environ: Optional[Mapping[str, str]] = None) -> Placement:
    """The placement of a rank that need not be found, since its ranks have met already; `environ` has the options only.

    Example:
        >>> placed(1, 2, "MPI", {"COMMLIB_TRANSPORT": "shm"}).options
        {'transport': 'shm'}
    """
    options = _options(os.environ if environ is None else environ)
    return Placement(job, rank, size, None, None, None, None, store="", store_owner=job, job=job, options=options)


def options(environ: Optional[Mapping[str, str]] = None) -> dict:
    """The COMMLIB_* variables that place nobody, as in `Placement.options`."""
    return _options(os.environ if environ is None else environ)


def _check(launcher: str, found: _Found) -> None:
    pairs = (("rank", found.rank, "size", found.size),
             ("local rank", found.local_rank, "local size", found.local_size),
             ("cross rank", found.cross_rank, "cross size", found.cross_size))
    for index_name, index, count_name, count in pairs:
        if index is not None and count is not None and not 0 <= index < count:
            raise StartError(f"{launcher} gave {index_name} {index} and {count_name} {count}, which cannot both be "
                             "right: start every process with the same launcher, or unset its variables")
    if found.local_size is not None and found.local_size > found.size:
        raise StartError(f"{launcher} gave {found.local_size} processes on this host but {found.size} in all: start "
                         "every process with the same launcher, or unset its variables")


def _meeting_place(launcher: str, found: _Found, environ: Mapping[str, str]) -> str:
    """One host: an abstract socket named after user and job. Several: the user's or the launcher's address."""
    if found.size == 1:
        return ""
    given = environ.get("COMMLIB_STORE", "")
    if given:
        return given
    if found.local_size == found.size:
        return f"unix:@commlib-{os.getuid()}-{_digest(found.job)}"
    if not found.store:
        raise StartError(f"{launcher} started {found.size} ranks on several hosts but names no host where they can "
                         "meet: set COMMLIB_STORE=HOST:PORT on every rank, HOST being the host of rank 0 and PORT a "
                         "free port there")
    return found.store


def _options(environ: Mapping[str, str]) -> dict:
    return {name[len(OPTION_PREFIX):].lower(): value for name, value in environ.items()
            if name.startswith(OPTION_PREFIX) and name not in _COMMRUN_VARIABLES}


def _secret(environ: Mapping[str, str]) -> Secret:
    """The variable's, which commrun sets for one job, before the file's, which a user keeps."""
    try:
        if environ.get(VARIABLE):
            return Secret(environ[VARIABLE])
        return Secret(load_secret(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else "")
    except SecretError as error:
        raise StartError(f"{VARIABLE}: {error}" if environ.get(VARIABLE) else str(error)) from None


def _digest(text: str) -> str:
    """Abstract socket names are limited to 107 bytes; job ids are not."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _integer(environ: Mapping[str, str], name: str, launcher: str) -> int:
    if name not in environ:
        raise StartError(f"{launcher} was recognised, but {name} is not set: start every process with {launcher}, or "
                         "unset its variables to run as a single process")
    try:
        return int(environ[name])
    except ValueError:
        raise StartError(f"{name} is {environ[name]!r}, not an integer: {launcher} should have set it") from None


def _integer_or_none(environ: Mapping[str, str], name: str, launcher: str) -> Optional[int]:
    return _integer(environ, name, launcher) if name in environ else None


def _port(environ: Mapping[str, str], name: str, launcher: str) -> int:
    port = _integer(environ, name, launcher)
    if not 0 < port < 65535:
        raise StartError(f"{name} is {port}: commlib meets on the port after it, which must be in [2, 65535]")
    return port + 1


# ---- one reader per launcher ------------------------------------------------------------------------------------

def _read_commrun(environ: Mapping[str, str]) -> _Found:
    numbers = {name: _integer(environ, "COMMLIB_" + name.upper(), "commrun")
               for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")}
    if numbers["size"] > 1 and not environ.get("COMMLIB_STORE"):
        raise StartError("COMMLIB_RANK is set, but COMMLIB_STORE is not: start the program with commrun, or unset "
                         "COMMLIB_RANK and COMMLIB_SIZE")
    owner = environ.get("COMMLIB_STORE_OWNER", "rank 0")
    return _Found(job=environ.get("COMMLIB_JOB", ""), store_owner=owner, **numbers)


def _read_torchrun(environ: Mapping[str, str]) -> _Found:
    name = "torchrun"
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    address, store = environ.get("MASTER_ADDR", ""), ""
    if address and "MASTER_PORT" in environ:
        store = _join_address(address, _port(environ, "MASTER_PORT", name))
    # without the address: some cluster operators tell rank 0 "localhost" and the others its name
    parts = (name, environ.get("TORCHELASTIC_RUN_ID", ""), restart, environ.get("MASTER_PORT", ""))
    return _Found(
        _integer(environ, "RANK", name), _integer(environ, "WORLD_SIZE", name),
        _integer_or_none(environ, "LOCAL_RANK", name), _integer_or_none(environ, "LOCAL_WORLD_SIZE", name),
        job="/".join(parts), cross_rank=_integer_or_none(environ, "GROUP_RANK", name),
        cross_size=_integer_or_none(environ, "GROUP_WORLD_SIZE", name), store=store,
    )


def _read_open_mpi(environ: Mapping[str, str]) -> _Found:
    name, prefix = "Open MPI", "OMPI_COMM_WORLD_"
    return _Found(
        _integer(environ, prefix + "RANK", name), _integer(environ, prefix + "SIZE", name),
        _integer_or_none(environ, prefix + "LOCAL_RANK", name), _integer_or_none(environ, prefix + "LOCAL_SIZE", name),
        job=_first(environ, "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri", "COMMLIB_STORE",
                   launcher=name),
    )


def _read_hydra(environ: Mapping[str, str]) -> _Found:
    """MPICH and Intel MPI. Intel's hydra names the job; MPICH's does not, so its proxy's pid stands in."""
    name = "MPICH or Intel MPI"
    local_size = _integer(environ, "MPI_LOCALNRANKS", name)
    size = _integer(environ, "PMI_SIZE", name)
    job = environ.get("I_MPI_HYDRA_UUID") or f"hydra-proxy-{_hydra_proxy_pid(environ)}"
    if local_size != size and "I_MPI_HYDRA_UUID" not in environ:
        job = "hydra"  # one proxy per host: no name is common to all of them, the given address must do
    rank, local_rank = _integer(environ, "PMI_RANK", name), _integer(environ, "MPI_LOCALRANKID", name)
    return _Found(rank, size, local_rank, local_size, job)


def _read_slurm(environ: Mapping[str, str]) -> _Found:
    name = "srun"
    size = _integer(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS", name)
    cross_rank = _integer_or_none(environ, "SLURM_NODEID", name)
    job = f"slurm-{environ.get('SLURM_JOB_ID', '')}.{environ['SLURM_STEP_ID']}"
    return _Found(
        _integer(environ, "SLURM_PROCID", name), size, _integer_or_none(environ, "SLURM_LOCALID", name),
        _slurm_local_size(environ, cross_rank, size), job=job, cross_rank=cross_rank,
        cross_size=_integer_or_none(environ, "SLURM_STEP_NUM_NODES", name), store=_slurm_store(environ, job),
    )


def _read_pmi(environ: Mapping[str, str]) -> _Found:
    """A process manager that speaks PMI and says nothing of hosts."""
    name = "a PMI launcher"
    return _Found(_integer(environ, "PMI_RANK", name), _integer(environ, "PMI_SIZE", name), None, None,
                  job=environ.get("PMI_JOBID", "pmi"))


def _read_single(environ: Mapping[str, str]) -> _Found:
    return _Found(0, 1, 0, 1, job=f"single-{os.getpid()}", cross_rank=0, cross_size=1)


# ---- what the readers need ---------------------------------------------------------------------------------------

def _first(environ: Mapping[str, str], *names: str, launcher: str) -> str:
    for name in names:
        if environ.get(name):
            return environ[name]
    raise StartError(f"{launcher} was recognised, but none of {', '.join(names)} is set, so its jobs cannot be told "
                     "apart: set COMMLIB_STORE=HOST:PORT, HOST being the host of rank 0")


def _join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _hydra_proxy_pid(environ: Mapping[str, str]) -> int:
    """PMI_FD is a socket made by hydra's proxy, the parent of all ranks of a host; the kernel keeps its maker's pid.

    The parent's own pid is the same thing unless a shell stands between the proxy and the rank.
    """
    try:
        duplicate = os.dup(int(environ["PMI_FD"]))
        with socket.socket(fileno=duplicate) as connection:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", credentials)[0] or os.getppid()
    except (KeyError, ValueError, OSError):
        return os.getppid()


def _slurm_local_size(environ: Mapping[str, str], node: Optional[int], size: int) -> Optional[int]:
    """SLURM_STEP_TASKS_PER_NODE is run-length coded: ``4(x2),3`` is 4, 4 and 3 tasks."""
    counts = []
    for item in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            return None
        counts += [int(match.group(1))] * min(int(match.group(2) or 1), size)
    return counts[node] if node is not None and node < len(counts) else None


def _slurm_store(environ: Mapping[str, str], job: str) -> str:
    """The step's first host, and a port made from the job id: srun reserves none."""
    match = re.match(r"([^,\[\]]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", ""))
    if match is None:
        return ""
    # 20000..29999 lies below Linux's ephemeral ports (32768 and up), so no client's own port is in the way
    port = 20000 + int(_digest(job), 16) % 10000
    return _join_address(match.group(1) + (match.group(2) or ""), port)


class _Launcher(NamedTuple):
    name: str
    recognises: Callable[[Mapping[str, str]], bool]
    read: Callable[[Mapping[str, str]], _Found]


def _any_of(*names: str) -> Callable[[Mapping[str, str]], bool]:
    return lambda environ: any(name in environ for name in names)


_COMMRUN_VARIABLES = frozenset(OPTION_PREFIX + name for name in (
    "RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "STORE", "STORE_OWNER", "JOB", "SECRET",
    "SECRET_FILE"))

# The first that recognises its variables is believed. MPI comes before Slurm because mpirun inside an allocation starts
# its daemons with srun, whose variables the ranks inherit; Slurm comes before bare PMI because srun --mpi=pmi2 sets
# both. A batch script has SLURM_PROCID but no step: there a process is on its own.
LAUNCHERS = (
    _Launcher("commrun", _any_of("COMMLIB_RANK", "COMMLIB_SIZE"), _read_commrun),
    _Launcher("torchrun", _any_of("RANK", "WORLD_SIZE"), _read_torchrun),
    _Launcher("Open MPI", _any_of("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), _read_open_mpi),
    _Launcher("MPICH or Intel MPI", _any_of("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), _read_hydra),
    _Launcher("srun", lambda environ: "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ, _read_slurm),
    _Launcher("a PMI launcher", _any_of("PMI_RANK", "PMI_SIZE"), _read_pmi),
    _Launcher("none", lambda environ: True, _read_single),
)
