"""Every launcher's variables become the right placement, and half-set ones an error that says what to do."""
import os
import subprocess
import sys

import pytest
from support import program

from commlib.bootstrap import StartError, discover

COMMRUN = {"COMMLIB_RANK": "1", "COMMLIB_SIZE": "4", "COMMLIB_LOCAL_RANK": "1", "COMMLIB_LOCAL_SIZE": "4",
           "COMMLIB_CROSS_RANK": "0", "COMMLIB_CROSS_SIZE": "1", "COMMLIB_STORE": "unix:@x", "COMMLIB_JOB": "j",
           "COMMLIB_STORE_OWNER": "commrun", "COMMLIB_TRANSPORT": "tcp"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
            "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "run",
            "TORCHELASTIC_RESTART_COUNT": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-a-1@1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
INTEL = dict(HYDRA, I_MPI_HYDRA_UUID="62150000-2f8c")
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7",
         "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77",
         "SLURM_STEP_NODELIST": "n[07-08]", "SLURM_NTASKS": "99"}

EXPECTED = [  # variables, launcher, (rank, size, local rank, local size, cross rank, cross size)
    (COMMRUN, "commrun", (1, 4, 1, 4, 0, 1)),
    (TORCHRUN, "torchrun", (5, 8, 1, 4, 1, 2)),
    (OPEN_MPI, "Open MPI", (1, 2, 1, 2, None, None)),
    (HYDRA, "MPICH or Intel MPI", (1, 2, 1, 2, None, None)),
    (INTEL, "MPICH or Intel MPI", (1, 2, 1, 2, None, None)),
    (SLURM, "srun", (5, 7, 1, 3, 1, 2)),
    ({}, "none", (0, 1, 0, 1, 0, 1)),
]


@pytest.mark.parametrize("variables, launcher, place", EXPECTED)
def test_each_launcher_is_understood(variables, launcher, place):
    found = discover(variables)
    assert found.launcher == launcher
    assert (found.rank, found.size, found.local_rank, found.local_size, found.cross_rank, found.cross_size) == place


def test_options_are_the_other_variables_of_ours():
    found = discover(dict(COMMRUN, OTHER="x"))
    assert found.options == {"transport": "tcp"}
    assert (found.store, found.store_owner, found.job) == ("unix:@x", "commrun", "j")


@pytest.mark.parametrize("variables", [COMMRUN, TORCHRUN, OPEN_MPI, HYDRA, SLURM])
def test_ranks_of_a_job_meet_in_one_place(variables):
    """What differs between ranks (rank, local rank, host) must not lead them to different stores."""
    place_of = {"COMMLIB_RANK", "COMMLIB_LOCAL_RANK", "RANK", "LOCAL_RANK", "GROUP_RANK", "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "MPI_LOCALRANKID", "SLURM_PROCID", "SLURM_LOCALID",
                "SLURM_NODEID"}
    other = {name: "0" if name in place_of else value for name, value in variables.items()}
    mine, theirs = discover(variables), discover(other)
    assert mine.rank != theirs.rank
    assert (mine.store, mine.job) == (theirs.store, theirs.job)
    assert mine.store


@pytest.mark.parametrize("variables, name, value", [
    (dict(TORCHRUN, LOCAL_WORLD_SIZE="8"), "TORCHELASTIC_RUN_ID", "other"),
    (dict(TORCHRUN, LOCAL_WORLD_SIZE="8"), "TORCHELASTIC_RESTART_COUNT", "1"),
    (OPEN_MPI, "PMIX_NAMESPACE", "prterun-a-1@2"), (INTEL, "I_MPI_HYDRA_UUID", "63"),
    (dict(SLURM, SLURM_STEP_NUM_TASKS="3", SLURM_STEP_TASKS_PER_NODE="3,3", SLURM_PROCID="1"), "SLURM_STEP_ID", "1"),
])
def test_two_jobs_on_one_host_meet_apart(variables, name, value):
    one, other = discover(variables), discover(dict(variables, **{name: value}))
    assert one.store.startswith("unix:@") and one.store != other.store


def test_several_hosts_meet_over_tcp():
    assert discover(TORCHRUN).store == "node0:29501"
    assert discover(dict(TORCHRUN, MASTER_ADDR="fe80::1")).store == "[fe80::1]:29501"
    assert discover(dict(TORCHRUN, COMMLIB_STORE="other:1")).store == "other:1"
    host, port = discover(SLURM).store.split(":")
    assert host == "n07" and 20000 <= int(port) < 30000


@pytest.mark.parametrize("counts, node, size", [("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("2", 0, 2), ("", 0, None),
                                                ("nonsense", 0, None), ("2", 1, None)])
def test_slurm_task_counts(counts, node, size):
    found = discover(dict(SLURM, SLURM_STEP_TASKS_PER_NODE=counts, SLURM_NODEID=str(node), SLURM_STEP_NUM_NODES="3",
                          SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="11"))
    assert found.local_size == size


def test_a_batch_script_outside_a_step_is_alone():
    variables = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert discover(variables).launcher == "none"


def test_mpi_is_believed_before_the_srun_that_started_its_daemons():
    assert discover(dict(SLURM, **HYDRA)).launcher == "MPICH or Intel MPI"
    assert discover(dict(SLURM, PMI_RANK="5", PMI_SIZE="7")).launcher == "srun"


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize("variables, words", [
    (without(COMMRUN, "COMMLIB_SIZE"), ("COMMLIB_SIZE", "not set", "unset")),
    (without(COMMRUN, "COMMLIB_STORE"), ("COMMLIB_STORE", "not", "commrun")),
    (dict(COMMRUN, COMMLIB_RANK="one"), ("COMMLIB_RANK", "'one'")),
    (dict(COMMRUN, COMMLIB_RANK="4"), ("rank 4", "size 4")),
    (dict(COMMRUN, COMMLIB_LOCAL_SIZE="5"), ("5 processes", "4 in all")),
    (without(TORCHRUN, "RANK"), ("RANK", "not set", "torchrun")),
    (without(TORCHRUN, "WORLD_SIZE"), ("WORLD_SIZE", "not set", "torchrun")),
    (without(TORCHRUN, "MASTER_PORT"), ("COMMLIB_STORE=HOST:PORT",)),
    (dict(TORCHRUN, MASTER_PORT="65535"), ("MASTER_PORT", "65535")),
    (dict(HYDRA, MPI_LOCALNRANKS="1", MPI_LOCALRANKID="0"), ("several hosts", "COMMLIB_STORE=HOST:PORT")),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ("COMMLIB_STORE=HOST:PORT",)),
    (without(OPEN_MPI, "PMIX_NAMESPACE"), ("PMIX_NAMESPACE", "COMMLIB_STORE")),
])
def test_contradictions_are_errors_that_say_what_to_do(variables, words):
    with pytest.raises(StartError) as caught:
        discover(variables)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_bad_time_out_is_an_error(text):
    with pytest.raises(StartError, match="COMMLIB_START_TIMEOUT_S"):
        _ = discover({"COMMLIB_START_TIMEOUT_S": text}).start_timeout_s


def test_the_time_out_can_be_set():
    assert discover({"COMMLIB_START_TIMEOUT_S": "2.5"}).start_timeout_s == 2.5
    assert discover({}).start_timeout_s == 60.0


@pytest.mark.skipif(program("mpirun") is None, reason="no mpirun beside Python or on the PATH")
def test_a_real_mpirun():
    # One write for each line: unbuffered, print makes two, and mpirun may put another rank's between them.
    code = ("import commlib, os; c = commlib.init(); said = c.exchange(b'%d of %d' % (c.rank, c.size), name='who'); "
            "os.write(1, b'%r\\n' % said); commlib.shutdown()")  # fmt: skip
    environ = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    ran = subprocess.run([program("mpirun"), "-n", "2", sys.executable, "-c", code], env=environ, timeout=60, check=True,
                         stdout=subprocess.PIPE, text=True)
    assert ran.stdout.splitlines() == ["[b'0 of 2', b'1 of 2']"] * 2
