"""commrun with real processes: exit codes, signals, output, environment, and that nothing outlives it."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support import program
from support_launch import IMPATIENT, TIMEOUT_S, environ_with, mark_of, marked, run, start, wait_for

from commlib.settings import Settings


@pytest.fixture(name="mark")
def make_mark(request):
    yield from mark_of(request)


# ---- exit codes --------------------------------------------------------------------------------------------------

def test_success(mark):
    ran = run("-np", "3", "sh", "-c", "echo $COMMLIB_RANK", env=environ_with(mark))
    assert (ran.returncode, sorted(ran.out.split()), ran.err) == (0, ["0", "1", "2"], "")


def test_the_first_failure_is_reported(mark):
    program = ("import os, signal, sys\nif os.environ['COMMLIB_RANK'] == '1': sys.exit(3)\n"
               "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nwhile True: signal.pause()")
    ran = run("-np", "3", sys.executable, "-c", program, env=environ_with(mark), commrun=IMPATIENT)
    assert ran.returncode == 3
    assert re.fullmatch(r"commrun: rank 1 \(pid \d+\) exited with code 3\n", ran.err)


def test_a_killed_rank_is_reported(mark):
    ran = run("-np", "2", "sh", "-c", "[ $COMMLIB_RANK = 0 ] || kill -9 $$", env=environ_with(mark))
    assert ran.returncode == 128 + signal.SIGKILL
    assert re.fullmatch(r"commrun: rank 1 \(pid \d+\) was killed by signal 9 \(SIGKILL\)\n", ran.err)


def test_ranks_that_ignore_sigterm_are_killed(mark):
    script = 'if [ $COMMLIB_RANK = 1 ]; then exit 3; fi; trap "" TERM INT; while :; do sleep 0.05; done'
    ran = run("-np", "2", "sh", "-c", script, env=environ_with(mark), commrun=IMPATIENT)
    assert ran.returncode == 3


@pytest.mark.parametrize("arguments, code, words", [
    (("-np", "2", "no-such-program"), 127, ("no-such-program", "not found")),
    (("-np", "2", __file__), 126, ("not executable", "python ")),
    (("-np", "2"), 2, ("no command",)),
    (("-np", "0", "true"), 2, ("-np",)),
    (("-np", "x", "true"), 2, ("-np",)),
    (("true",), 2, ("-np",)),
    (("-np", "2", "-H", "localhost:1", "true"), 2, ("-np 2", "1 slots of localhost:1")),
    (("-np", "2", "--start-timeout", "0", "true"), 2, ("positive",)),
    (("-np", "2", "--output-filename", "/proc/none", "true"), 2, ("/proc/none", "folder")),
    (("-np", "2", "--settings", "/proc/none", "true"), 2, ("/proc/none", "tune")),
    (("-np", "2", "--settings", "/proc/version", "true"), 2, ("/proc/version", "tune")),
])
def test_mistakes_get_a_message(arguments, code, words):
    ran = run(*arguments)
    assert ran.returncode == code
    for word in words:
        assert word in ran.err


def test_the_command_keeps_its_own_options(mark):
    command = ("sh", "-c", "echo $0 $1", "--verbose", "-np")
    ran = run("-np", "1", "-H", "localhost:1", "--", *command, env=environ_with(mark))
    assert (ran.returncode, ran.out) == (0, "--verbose -np\n")


# ---- environment and input ---------------------------------------------------------------------------------------

# One write per line: ranks share a pipe, and print() may write its newline apart.
PLACE = """
import sys
from commlib.bootstrap import discover
names = "launcher rank size local_rank local_size cross_rank cross_size start_timeout_s".split()
placement = discover()
sys.stdout.write(" ".join(str(getattr(placement, name)) for name in names) + "\\n")
"""


def test_ranks_know_their_place(mark):
    ran = run("-np", "2", "--start-timeout", "7", sys.executable, "-c", PLACE, env=environ_with(mark))
    assert sorted(ran.out.splitlines()) == ["commrun 0 2 0 2 0 1 7.0", "commrun 1 2 1 2 0 1 7.0"], ran.err


def test_cores_are_divided_unless_the_user_did(mark):
    environ = environ_with(mark)
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    for name in names:
        environ.pop(name, None)
    command = ("-np", "2", "sh", "-c", f"echo ${' $'.join(names)}")
    expected = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert run(*command, env=environ).out.split() == [expected] * 6
    assert run(*command, env=dict(environ, **dict.fromkeys(names, "7"))).out.split() == ["7"] * 6


def test_ranks_are_told_of_the_settings_file(mark, tmp_path):
    Settings(spin_us=3).save(tmp_path / "settings.json")
    program = "import commlib, sys; sys.stdout.write(f'{commlib.init().settings.spin_us}\\n')"
    ran = run("-np", "2", "--settings", "settings.json", sys.executable, "-c", program, env=environ_with(mark), cwd=tmp_path)
    assert ran.out.split() == ["3", "3"], ran.err


def test_ranks_are_told_how_much_to_log(mark):
    program = "import commlib; commlib.init()"
    ran = run("-np", "2", "--log-level", "debug", sys.executable, "-c", program, env=environ_with(mark))
    assert sorted(re.findall(r"rank (\d) of 2: settings", ran.err)) == ["0", "1"], ran.err
    ran = run("-np", "1", sys.executable, "-c", program, env=environ_with(mark, COMMLIB_LOG_LEVEL="loud"))
    assert ran.returncode == 1 and "COMMLIB_LOG_LEVEL is 'loud'" in ran.err


def test_ranks_write_a_timeline(mark, tmp_path):
    program = "import commlib, numpy; commlib.init(); commlib.allreduce(numpy.ones(3), name='w')"
    ran = run("-np", "2", "--timeline-filename", "trace.json", sys.executable, "-c", program, env=environ_with(mark), cwd=tmp_path)
    assert ran.returncode == 0 and "allreduce.w" in (tmp_path / "trace.json").read_text(), ran.err


def test_rank_0_reads_standard_input(mark):
    process = start("-np", "2", "sh", "-c", "echo $COMMLIB_RANK $(cat)", env=environ_with(mark), stdin=subprocess.PIPE)
    out, _ = process.communicate("typed", timeout=TIMEOUT_S)
    assert sorted(out.splitlines()) == ["0 typed", "1"]


def test_ranks_inherit_no_descriptor_and_no_ignored_signal(mark):
    program = "ls /proc/self/fd | wc -l; grep SigIgn /proc/self/status"
    ran = run("-np", "1", "--prefix-output", "sh", "-c", program, env=environ_with(mark))
    assert ran.out.split("\n")[0] == "[0]<stdout>:4"  # 0, 1, 2 and the folder itself
    internal = 3 << 31  # 32 and 33 are the C library's own: whoever ignored them, nobody below can change it
    assert int(ran.out.split()[-1], 16) & ~internal == 0


# ---- output ------------------------------------------------------------------------------------------------------

def test_lines_are_labelled(mark):
    script = "echo one; echo two >&2; printf 'at  1%%\\rat 2%%\\rlast'"
    ran = run("-np", "2", "--prefix-output", "sh", "-c", script, env=environ_with(mark), text=False)
    for rank in (b"0", b"1"):
        lines = [line for line in re.findall(b"[^\r\n]+[\r\n]", ran.out) if line.startswith(b"[%b]" % rank)]
        assert lines == [b"[%b]<stdout>:" % rank + text for text in (b"one\n", b"at  1%\r", b"at 2%\r", b"last\n")]
    assert sorted(ran.err.splitlines()) == [b"[0]<stderr>:two", b"[1]<stderr>:two"]


def test_lines_are_stamped(mark):
    ran = run("-np", "1", "--prefix-output-with-timestamp", "echo", "hello", env=environ_with(mark))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[0\]<stdout>:hello\n", ran.out)


def test_output_goes_to_files_too(mark, tmp_path):
    folder = tmp_path / "new" / "log"
    ran = run("-np", "2", "--output-filename", str(folder), "sh", "-c", "echo out $COMMLIB_RANK; echo err >&2",
              env=environ_with(mark))
    assert sorted(ran.out.splitlines()) == ["out 0", "out 1"]
    for rank in (0, 1):
        assert (folder / f"rank.{rank}" / "stdout").read_text() == f"out {rank}\n"
        assert (folder / f"rank.{rank}" / "stderr").read_text() == "err\n"


def test_a_full_disk_costs_the_copy_and_not_the_job(mark, tmp_path):
    (tmp_path / "rank.0").mkdir()
    (tmp_path / "rank.0" / "stdout").symlink_to("/dev/full")
    ran = run("-np", "1", "--output-filename", str(tmp_path), "echo", "hello", env=environ_with(mark))
    assert (ran.returncode, ran.out) == (0, "hello\n")
    assert "rank.0/stdout" in ran.err and "No space left" in ran.err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_much_output_arrives_whole(mark, unbuffered):
    environ = dict(environ_with(mark), PYTHONUNBUFFERED=unbuffered)
    ran = run("-np", "2", "--prefix-output", "seq", "1", "30000", env=environ)
    for rank in (0, 1):
        assert [int(line[len("[0]<stdout>:"):]) for line in ran.out.splitlines() if line[1] == str(rank)] == list(range(1, 30001))


def test_a_reader_that_leaves_ends_the_job(mark):
    process = start("-np", "2", "--prefix-output", "yes", env=environ_with(mark))
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
    process.stderr.close()


def test_verbose_tells_what_happens(mark):
    ran = run("-np", "1", "--verbose", "true", env=environ_with(mark))
    assert re.search(r"rank 0 is pid \d+: true", ran.err)
    assert re.search(r"rank 0 \(pid \d+\) exited with code 0", ran.err)


# ---- nothing is left ---------------------------------------------------------------------------------------------

# A rank with a child in its own group and one in a session of its own, as daemons are.
FAMILY = "sleep 1000 & setsid sleep 1000 & echo up; wait"


def start_family(mark):
    process = start("-np", "2", "sh", "-c", FAMILY, env=environ_with(mark))
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    wait_for(lambda: len(marked(mark)) >= 6, "the family is not complete")
    return process


def ended(process):
    """Exit code and stderr; the pipes must close, so nobody may hold them any more."""
    _, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_whole_family(mark, number):
    process = start_family(mark)
    process.send_signal(number)
    code, err = ended(process)
    assert code == 128 + number
    assert f"stopping on {number.name}" in err
    assert not marked(mark)


INTERRUPTIBLE = """
import signal, sys
try:
    sys.stdout.write("up\\n")
    sys.stdout.flush()
    signal.pause()
except KeyboardInterrupt:
    sys.stdout.write("interrupted\\n")
    sys.exit(7)
"""


def test_ctrl_c_reaches_python_programs(mark):
    process = start("-np", "2", sys.executable, "-c", INTERRUPTIBLE, env=environ_with(mark))
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (130, "interrupted\n" * 2)


def test_a_second_ctrl_c_is_more_urgent(mark):
    script = 'trap "echo no" INT; echo up; while :; do sleep 0.02; done'
    process = start("-np", "1", "sh", "-c", script, env=environ_with(mark))
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "no\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    assert time.monotonic() - began < 3.0  # without it, SIGTERM would come after 5 s


def test_a_killed_commrun_leaves_nobody(mark):
    process = start("-np", "2", "sh", "-c", "sleep 1000 & echo up; wait", env=environ_with(mark))
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    process.kill()
    process.communicate(timeout=TIMEOUT_S)  # the pipes close: nobody holds them
    wait_for(lambda: not marked(mark), "processes outlive commrun")


def test_orphans_end_with_a_job_that_ended_well(mark):
    ran = run("-np", "2", "sh", "-c", "sleep 1000 & setsid sleep 1000 &", env=environ_with(mark))
    assert ran.returncode == 0
    assert not marked(mark)


def test_a_job_that_takes_too_long(mark):
    ran = run("-np", "2", "--timeout", "0.2", "sleep", "1000", env=environ_with(mark))
    assert ran.returncode == 124 and "--timeout" in ran.err


def test_no_files_are_left(mark, tmp_path):
    ran = run("-np", "2", "--prefix-output", "sh", "-c", "kill -9 $$", env=environ_with(mark, TMPDIR=str(tmp_path)))
    assert ran.returncode == 137
    assert not os.listdir(tmp_path)
    assert not [name for name in os.listdir("/dev/shm") if "commlib" in name or "commrun" in name]


# ---- starting together -------------------------------------------------------------------------------------------

JOIN = """
import os, signal, sys, time
from commlib.bootstrap import discover
from commlib.rendezvous import join
p = discover()
with join(p, 1, {version}, 15.0) as store:
    store.gather("ready", b"")
    {then}
    store.gather("never", b"")
"""


def join_program(version="'1'", then="pass"):
    return (sys.executable, "-c", JOIN.format(version=version, then=then))


def test_a_kill_during_init_is_explained_to_the_others(mark):
    began = time.monotonic()
    kill = "p.rank == 1 and os.kill(os.getpid(), signal.SIGKILL)"
    ran = run("-np", "3", "--prefix-output", *join_program(then=kill), env=environ_with(mark))
    assert time.monotonic() - began < 5.0
    assert ran.returncode == 137
    for rank in (0, 2):
        lines = [line for line in ran.err.splitlines() if line.startswith(f"[{rank}]<stderr>:")]
        assert re.search(r"StartError: rank 1 \(pid \d+\) was killed by signal 9 \(SIGKILL\) while", lines[-1])


def test_a_rank_that_never_joins_is_noticed(mark):
    program = "import os, sys\nif os.environ['COMMLIB_RANK'] == '1': sys.exit(0)\n" + join_program()[2]
    began = time.monotonic()
    ran = run("-np", "2", sys.executable, "-c", program, env=environ_with(mark))
    assert time.monotonic() - began < 5.0
    assert "StartError: rank 1" in ran.err and "exited with code 0 while the job started" in ran.err


def test_two_versions_are_named_on_both_sides(mark):
    ran = run("-np", "2", "--prefix-output", *join_program(version="str(p.rank)"), env=environ_with(mark))
    assert ran.returncode == 1
    for rank in (0, 1):
        assert re.search(rf"\[{rank}\]<stderr>:.*StartError: the ranks differ in commlib version: rank \d .* has \d", ran.err)


def test_without_commrun_a_kill_of_rank_0_is_noticed(mark):
    """Rank 0 serves the store itself; its death is the store's."""
    kill = "p.rank == 0 and os.kill(os.getpid(), signal.SIGKILL)"
    base = environ_with(mark, COMMLIB_SIZE="2", COMMLIB_LOCAL_SIZE="2", COMMLIB_CROSS_RANK="0", COMMLIB_CROSS_SIZE="1",
                        COMMLIB_STORE=f"unix:@commlib-test-{os.getpid()}")
    began = time.monotonic()
    ranks = [subprocess.Popen(join_program(then=kill), env=dict(base, COMMLIB_RANK=str(r), COMMLIB_LOCAL_RANK=str(r)),
                              stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in ranks]
    assert time.monotonic() - began < 5.0
    assert ranks[0].returncode == -signal.SIGKILL
    assert "StartError: rank 0 was lost while the job started" in errors[1]


GATHER = """
import sys
from commlib.bootstrap import discover
from commlib.rendezvous import join
placement = discover()
with join(placement, 1, "1", 15.0) as store:
    values = store.gather("all", b"%d" % store.rank)
sys.stdout.write(f"{placement.launcher} {values}\\n")
"""


@pytest.mark.skipif(program("torchrun") is None, reason="no torchrun beside Python or on the PATH")
def test_a_real_torchrun(mark):
    command = [program("torchrun"), "--no-python", "--nproc-per-node", "2", sys.executable, "-c", GATHER]
    ran = subprocess.run(command, env=environ_with(mark), capture_output=True, timeout=60, text=True, check=False)
    assert ran.stdout.splitlines() == ["torchrun [b'0', b'1']"] * 2, ran.stderr


def test_ranks_are_bound_to_their_share_of_the_cores():
    program = "import os; print(sorted(os.sched_getaffinity(0)))"
    mine = sorted(os.sched_getaffinity(0))
    for words, wanted in ((["--bind-to-cores"], [mine[:len(mine) // 2], mine[len(mine) // 2:]]), ([], [mine, mine])):
        if len(mine) < 2:
            wanted = [mine, mine]
        ran = run("-np", "2", *words, sys.executable, "-c", program)
        assert sorted(ran.out.splitlines()) == sorted(map(str, wanted)), ran.err
