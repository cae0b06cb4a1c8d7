"""commrun on several hosts: a launch agent makes hosts of this one, each with a host.py of its own and TCP in between.

Every way to lose a host is tried for real: a program that is not there, a connection that stops, a process that is killed.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support_launch import IMPATIENT, environ_with, mark_of, marked, run, start, wait_for

from commlib.launch.hosts import HostsError, parse_hosts, place, read_hostfile

# A host's name says what is wrong with it.
AGENT = f"""#!/bin/sh
host=$1; shift
case $host in
    unknown*) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
    locked*) echo "me@$host: Permission denied (publickey,password)." >&2; exit 255 ;;
    new*) echo "Host key verification failed." >&2; exit 255 ;;
    bare*) exec {sys.executable} -I -S -m commlib.launch.host ;;
    old*) exec {sys.executable} -c "import sys; from commlib.launch import host; host.VERSION = '0.0.1'; sys.exit(host.main())" ;;
    silent*) exec sleep 1000 ;;
    chatty*) echo "Welcome to $host!"; echo "Maintenance on Sunday." >&2 ;;
    far*) cat | "$@" | cat; exit ;;
    babbling*) (until [ -e "$BABBLE" ]; do sleep 0.02; done; echo "cron: disk almost full") & ;;
esac
exec "$@"
"""
JOIN = ["-c", "import commlib, numpy, sys; commlib.init(); c = commlib.communicator()\n"
              "total = commlib.allreduce(numpy.full(5, 2.0**c.rank), op=commlib.Sum)[0]\n"
              "sys.stdout.write(f'{c.rank} {c.size} {c.local_rank} {c.local_size} {c.cross_rank} {c.cross_size} {total:g}\\n')"]


@pytest.fixture(name="mark")
def make_mark(request):
    yield from mark_of(request)


@pytest.fixture(name="agent", scope="module")
def make_agent(tmp_path_factory):
    path = tmp_path_factory.mktemp("agent") / "agent"
    path.write_text(AGENT)
    path.chmod(0o755)
    return ["--launch-agent", str(path)]


# ---- what is said about hosts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("lines", [
    "a slots=4\nb slots=2\n", "a:4\nb:2", "# hosts\n\na slots=4 max-slots=8  # the big one\nb slots=2", "a\na\nb\na\na\nb\n",
    "a:3\na\nb:2",
])
def test_hostfiles_of_all_kinds(tmp_path, lines):
    path = tmp_path / "hosts"
    path.write_text(lines)
    assert read_hostfile(str(path)) == {"a": 4, "b": 2} == parse_hosts("a:4,b:2")


@pytest.mark.parametrize("lines", [
    "", "# none\n", "a slots=0", "a slots=x", "a sloths=4", "a slots=2 slots=3", "a:2:3", "-oProxyCommand=x",
])
def test_hostfiles_that_make_no_sense(tmp_path, lines):
    path = tmp_path / "hosts"
    path.write_text(lines)
    with pytest.raises(HostsError, match="slots|SLOTS"):
        read_hostfile(str(path))


@pytest.mark.parametrize("size", range(1, 9))
def test_ranks_fill_hosts_in_order(size):
    slots = {"a": 3, "b": 1, "c": 4}
    places = place(slots, size)
    assert [rank for one in places for rank in one.ranks] == list(range(size))
    assert [one.index for one in places] == list(range(len(places)))
    assert all(len(one.ranks) == slots[one.host] for one in places[:-1]) and 0 < len(places[-1].ranks) <= slots[places[-1].host]


def test_more_ranks_than_slots(agent):
    ran = run("-np", 4, "-H", "a:1,b:2", *agent, "true")
    assert ran.returncode == 2 and "-np 4" in ran.err and "3 slots of a:1,b:2" in ran.err


# ---- jobs that go well -------------------------------------------------------------------------------------------

def test_ranks_on_uneven_hosts_work_together(mark, agent):
    ran = run("-H", "a:1,chatty:2", *agent, sys.executable, *JOIN, env=environ_with(mark))
    assert ran.returncode == 0, ran.err
    assert sorted(ran.out.splitlines()) == ["0 3 0 1 0 2 7", "1 3 0 2 1 2 7", "2 3 1 2 1 2 7"]
    assert ran.err == ""


def test_one_remote_host(mark, agent, tmp_path):
    (tmp_path / "hosts").write_text("far slots=4")
    ran = run("-np", 2, "--hostfile", tmp_path / "hosts", *agent, sys.executable, *JOIN, env=environ_with(mark))
    assert sorted(ran.out.splitlines()) == ["0 2 0 2 0 1 3", "1 2 1 2 0 1 3"], ran.err


def test_environment_and_folder_travel(mark, agent, tmp_path):
    environ = environ_with(mark, COMMLIB_SPIN_US="7", OMP_NUM_THREADS="3", SECRET_RECIPE="soup", PYTHONPATH="lib", EXTRA="1 '2'\n3")
    agent = ["--launch-agent", f"env -u SECRET_RECIPE -u EXTRA -u COMMLIB_SPIN_US {agent[1]}"]  # a login's own environment
    names = ("COMMLIB_SPIN_US", "OMP_NUM_THREADS", "SECRET_RECIPE", "EXTRA", "WORD", "PYTHONPATH", "COMMLIB_CROSS_RANK")
    program = ("import os, sys\n"
               f"sys.stdout.write(' '.join([os.getcwd(), *(repr(os.environ.get(name)) for name in {names})]) + '\\n')")
    ran = run("-H", "a,b", *agent, "-x", "EXTRA", "-x", "WORD=x=y", sys.executable, "-c", program, env=environ, cwd=tmp_path)
    expected = [f"{tmp_path} '7' '3' None {environ['EXTRA']!r} 'x=y' {str(tmp_path / 'lib')!r} '{index}'" for index in range(2)]
    assert sorted(ran.out.splitlines()) == expected, ran.err


def test_ranks_import_what_lies_beside_their_script(mark, agent, tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'found'")
    (tmp_path / "script.py").write_text("import beside, sys\nsys.stdout.write(beside.WORD + '\\n')")
    ran = run("-H", "a,b", *agent, sys.executable, tmp_path / "script.py", env=environ_with(mark))
    assert ran.out.split() == ["found"] * 2, ran.err


def test_output_is_labelled_and_kept(mark, agent, tmp_path):
    ran = run("-H", "a:1,b:1", *agent, "--prefix-output", "--output-filename", tmp_path / "log", "sh", "-c",
              "echo out; echo err >&2; printf 'no newline'", env=environ_with(mark))  # fmt: skip
    for rank in (0, 1):
        label = f"[{rank}]<stdout>:"
        assert [line for line in ran.out.splitlines() if line.startswith(label)] == [f"{label}out", f"{label}no newline"]
        assert (tmp_path / "log" / f"rank.{rank}" / "stdout").read_text() == "out\nno newline"
        assert (tmp_path / "log" / f"rank.{rank}" / "stderr").read_text() == "err\n"
    assert sorted(ran.err.splitlines()) == ["[0]<stderr>:err", "[1]<stderr>:err"]


def test_much_output_arrives_whole_through_a_slow_reader(mark, agent):
    count, lines, seen = 300_000, [], set()
    process = start("-H", "a,b", *agent, "--prefix-output", "--heartbeat-timeout", "2", "seq", "1", str(count),
                    env=environ_with(mark))  # fmt: skip
    while seen != {"0", "1"}:
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
        seen.add(lines[-1][1])
    time.sleep(3.0)  # nobody reads: pipes fill, hosts hold their ranks back, and nobody takes commrun for dead
    lines += process.stdout.read().splitlines()
    assert process.wait(20.0) == 0, process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    for rank in "01":
        assert [int(line.partition(":")[2]) for line in lines if line[1] == rank] == list(range(1, count + 1))


def test_a_reader_that_leaves_ends_the_job(mark, agent):
    process = start("-H", "a,b", *agent, "yes", env=environ_with(mark))
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(20.0) == 128 + signal.SIGPIPE
    process.stderr.close()


def test_a_configuration_file(mark, agent, tmp_path):
    (tmp_path / "job.json").write_text('{"hosts": "a:2,b:2", "np": 4, "prefix-output": true, "x": ["WORD=5", "OTHER=6"]}')
    ran = run("--config-file", tmp_path / "job.json", "-np", 3, *agent, "sh", "-c", "echo $WORD$OTHER", env=environ_with(mark))
    assert sorted(ran.out.splitlines()) == [f"[{rank}]<stdout>:56" for rank in range(3)], ran.err


@pytest.mark.parametrize("text, word", [
    ("{", "JSON"), ('{"hots": "a"}', "hots"), ('{"verbose": 1}', "true or false"), ("[]", "object"),
])
def test_configuration_files_that_make_no_sense(tmp_path, text, word):
    (tmp_path / "job.json").write_text(text)
    ran = run("--config-file", tmp_path / "job.json", "-np", 2, "true")
    assert ran.returncode == 2 and word in ran.err


# ---- starts that fail --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host, options, words", [
    ("unknown", (), ("no host of this name", "--hostfile")),
    ("locked", (), ("password", "ssh-copy-id")),
    ("new", (), ("log in once by hand", "confirm")),
    ("bare", (), ("no commlib", "--python")),
    ("old", (), ("0.0.1", "same version")),
    ("silent", ("--start-timeout", "1"), ("within 1 s", "--start-timeout")),
    ("a", ("--python", "/no/such/python"), ("/no/such/python", "--python")),
    ("a", ("--wdir", "/no/such/folder"), ("/no/such/folder", "--wdir")),
    ("a", ("no-such-program",), ("no-such-program", "command not found")),
])  # fmt: skip
def test_a_start_that_fails_is_explained(mark, agent, host, options, words):
    hosts = host if host == "silent" else f"b,{host}"  # a loaded machine may need more than that second for the good one
    ran = run("-H", hosts, *agent, *options, "echo", "started", env=environ_with(mark))
    assert (ran.returncode, ran.out) == (1, ""), ran.err
    for word in (f"host {host}" if options == () or host == "silent" else "host ", *words):
        assert word in ran.err, ran.err
    assert "Traceback" not in ran.err


def test_something_prints_into_the_connection(mark, agent, tmp_path):
    environ = environ_with(mark, BABBLE=str(tmp_path / "now"))
    ran = run("-H", "a,babbling", *agent, "sh", "-c", "touch $BABBLE; exec sleep 1000", env=environ, commrun=IMPATIENT)
    assert ran.returncode == 1
    assert "host babbling" in ran.err and "nothing may print into it" in ran.err


# ---- jobs that fail ----------------------------------------------------------------------------------------------

def test_a_killed_rank_is_named_with_its_host(mark, agent):
    script = '[ $COMMLIB_RANK = 2 ] && kill -9 $$; trap "exit 5" TERM; while :; do sleep 0.02; done'
    ran = run("-H", "a:2,b:2", *agent, "sh", "-c", script, env=environ_with(mark), commrun=IMPATIENT)
    assert ran.returncode == 137
    lines = [line for line in ran.err.splitlines() if line.startswith("commrun")]
    assert len(lines) == 1 and re.fullmatch(r"commrun: rank 2 \(pid \d+ on b\) was killed by signal 9 \(SIGKILL\)", lines[0])


def test_the_killed_rank_is_the_cause_not_those_that_miss_it(mark, agent):
    program = ("import commlib, numpy, os, signal; commlib.init()\n"
               "if commlib.rank() == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
               "commlib.allreduce(numpy.ones(5))")
    ran = run("-H", "a,b", *agent, sys.executable, "-c", program, env=environ_with(mark))
    assert ran.returncode == 137, ran.err
    assert re.search(r"commrun: rank 1 \(pid \d+ on b\) was killed", ran.err) and "PeerLostError" in ran.err


def test_a_rank_that_dies_while_others_start_is_explained_to_them(mark, agent):
    program = "import commlib, os, sys\nif os.environ['COMMLIB_RANK'] == '1': sys.exit(3)\ncommlib.init()"
    ran = run("-H", "a,b", *agent, sys.executable, "-c", program, env=environ_with(mark))
    assert ran.returncode == 3
    assert re.search(r"StartError: rank 1 \(pid \d+ on b\) exited with code 3 while the job started", ran.err)


# A rank with a child in its own group and one in a session of its own, as daemons are.
FAMILY = "sleep 1000 & setsid sleep 1000 & echo up; wait"


def start_family(mark, agent, *options, hosts="a:1,far:1", script=FAMILY):
    process = start("-H", hosts, *agent, *options, "sh", "-c", script, env=environ_with(mark), commrun=IMPATIENT)
    for _ in range(2):
        assert process.stdout.readline() == "up\n", process.stderr.read()
    return process


def ended(process):
    _, err = process.communicate(timeout=20.0)
    return process.returncode, err


def ranks_of(mark):
    return [pid for pid in marked(mark) if any(item.startswith(b"COMMLIB_RANK=") for item in words_of(pid, "environ"))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_job_everywhere(mark, agent, number):
    process = start_family(mark, agent)
    process.send_signal(number)
    code, err = ended(process)
    assert code == 128 + number and f"stopping on {number.name}" in err
    assert not marked(mark)


def test_a_killed_commrun_leaves_nobody(mark, agent):
    process = start_family(mark, agent)
    process.kill()
    process.communicate(timeout=20.0)
    wait_for(lambda: not marked(mark), "ranks outlive commrun")


def words_of(pid, what):
    """A process's "environ" or "cmdline"; empty if it has just ended."""
    try:
        with open(f"/proc/{pid}/{what}", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return [b""]


def command_of(pid):
    return words_of(pid, "cmdline")


def test_a_killed_host_program_takes_its_ranks_along_and_is_named(mark, agent):
    process = start_family(mark, agent, hosts="a:1,b:1", script="sleep 1000 & echo up; wait")
    hosts = [pid for pid in marked(mark) if b"commlib.launch.host" in command_of(pid)]
    assert len(hosts) == 2
    os.kill(max(hosts), signal.SIGKILL)
    code, err = ended(process)
    assert code == 1 and re.search(r"commrun: host [ab]: the connection was lost while the job ran", err), err
    wait_for(lambda: not marked(mark), "ranks outlive their host's program")


def cats(mark):
    return [pid for pid in marked(mark) if command_of(pid)[0] == b"cat"]


def test_a_cut_connection_ends_both_sides(mark, agent):
    """The pipes of host far go through two cats; while these are stopped, nothing passes and nothing closes."""
    process = start_family(mark, agent, "--heartbeat-timeout", "1.5")
    relays = cats(mark)
    assert len(relays) == 2
    for pid in relays:
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: not ranks_of(mark), "ranks outlive the connection")
    code, err = ended(process)
    assert code == 1 and re.search(r"host far: it has been silent for 1.5 s", err), err
    for pid in cats(mark):  # what a cut network leaves of ssh
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not marked(mark), "something outlives the connection")


def test_a_connection_that_stalls_for_a_while_is_not_lost(mark, agent):
    process = start("-H", "a,far", *agent, "--heartbeat-timeout", "4", "sh", "-c", "echo up; sleep 2; echo down",
                    env=environ_with(mark))  # fmt: skip
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    stalled = [*cats(mark), process.pid]
    for pid in stalled:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    for pid in stalled:
        os.kill(pid, signal.SIGCONT)
    out, err = process.communicate(timeout=20.0)
    assert (process.returncode, out) == (0, "down\n" * 2), err


def test_a_job_that_takes_too_long(mark, agent):
    ran = run("-H", "a,b", *agent, "--timeout", "1.5", "sleep", "1000", env=environ_with(mark))
    assert ran.returncode == 124 and "--timeout" in ran.err


def test_nothing_of_this_environment_reaches_a_command_line(mark, agent):
    """Command lines can be read by every user of a host."""
    process = start("-H", "a,far", *agent, "-x", "TOKEN=5ecret-word", "sh", "-c", "echo up; sleep 1000",
                    env=environ_with(mark))  # fmt: skip
    for _ in range(2):
        assert process.stdout.readline() == "up\n"
    secret = next(item for pid in ranks_of(mark) for item in words_of(pid, "environ") if item.startswith(b"COMMLIB_SECRET="))
    words = [word for pid in marked(mark) if pid != process.pid for word in command_of(pid)]
    assert not [word for word in words if b"5ecret-word" in word or secret.partition(b"=")[2] in word]
    process.send_signal(signal.SIGINT)
    ended(process)


# ---- before a job ------------------------------------------------------------------------------------------------

def test_check_says_that_hosts_are_fit(mark, agent):
    ran = run("--check", "-H", "a:4,b", *agent, env=environ_with(mark))
    assert ran.returncode == 0, ran.err
    assert "2 hosts checked: fit for a job" in ran.out
    links = [line.split() for line in ran.out.partition("links")[2].splitlines() if len(line.split()) == 5]
    assert [row[:2] for row in links] == [["a", "b"], ["b", "a"]]
    assert all(float(row[3].replace(",", "")) > 0 and float(row[4].replace(",", "")) > 0 for row in links)


def test_check_names_what_is_wrong(mark, agent):
    ran = run("--check", "-H", "a,old,bare,unknown", *agent, env=environ_with(mark))
    assert ran.returncode == 1
    for words in ("host old has commlib 0.0.1", "host bare: .*no commlib", "host unknown: .*no host of this name"):
        assert re.search(words, ran.err), ran.err
    assert "3 problems" in ran.out


def test_check_build():
    ran = run("--check-build")
    assert ran.returncode == 0 and "[X] shm" in ran.out and "[X] allreduce" in ran.out
