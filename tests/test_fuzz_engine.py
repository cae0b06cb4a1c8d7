"""Whatever peers say over tcp, or write into shared memory, an engine stays in its own memory and ends: tests/native/fuzz.c.

libFuzzer looks for bytes that break it where clang has it (`make fuzz` goes on for as long as you like). With any compiler, the
inputs that once found something and random ones are run.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE, PROGRAMS = ROOT / "native", ROOT / "tests" / "native"
TARGETS = ["fuzz_tcp", "fuzz_shm"]
SOURCES = [*(PROGRAMS / name for name in ("fuzz.c", "tasks.c", "world.c")), *sorted(NATIVE.glob("*.c"))]
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-O1", "-g", "-pthread", "-fno-sanitize-recover=undefined"]
RANDOM_INPUTS = 400
FUZZING_S = 4
LONGEST_S = 100  # it takes seconds; a hang is what this is for

# Without a check, the inputs that led to it must be seen to do harm: (file, what it says, what it says instead, target)
CHECKS = {
    "of me, others say other sizes than I did": (
        "control.c", "    if (!is_sound(operation)) {", "    if (0 && !is_sound(operation)) {", "fuzz_tcp"),
    "a piece of nothing is handed over": (
        "shm.c", "if (!(before & CL_REFERENCE_REVOKED) && link->in_frame.nbytes > 0)",
        "if (!(before & CL_REFERENCE_REVOKED))", "fuzz_shm"),
}  # fmt: skip


def compiled(compiler, sanitizers, folder, sources):
    """The command that it was done with; the objects lie in the folder."""
    command = [compiler, *FLAGS, f"-fsanitize={sanitizers}", f"-I{NATIVE}"]
    subprocess.run([*command, "-c", *sources], check=True, cwd=folder)
    return command


def linked(command, folder, target, *more):
    program = folder / target
    objects = [path for path in sorted(folder.glob("*.o")) if path.name not in {one.with_suffix(".o").name for one in more}]
    subprocess.run([*command, "-o", program, PROGRAMS / f"{target}.c", *more, *objects, "-lm"], check=True)
    return program


def run(program, *arguments, cwd):
    return subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", timeout=LONGEST_S, cwd=cwd)  # fmt: skip


def inputs_of(target):
    return PROGRAMS / "inputs" / target


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(command, folder with objects), by any compiler, with a driver of our own."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("plain")
    return compiled(compiler, "address,undefined", folder, [*SOURCES, PROGRAMS / "fuzz_main.c"]), folder


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_found_something_and_random_ones(target, plain, tmp_path):
    result = run(linked(*plain, target), RANDOM_INPUTS, 1, inputs_of(target), cwd=tmp_path)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout


NO_TARGET = """
int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n);
int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n) { return d == 0 && n > 0; }
"""


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory):
    """(command to link with libFuzzer, folder with objects), by clang if it has that."""
    compiler, folder = shutil.which("clang"), tmp_path_factory.mktemp("clang")
    (folder / "nothing.c").write_text(NO_TARGET)
    command = [compiler, "-fsanitize=fuzzer,address", "-o", folder / "nothing", folder / "nothing.c"]
    if not compiler or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no clang with libFuzzer")
    return [*compiled(compiler, "fuzzer-no-link,address,undefined", folder, SOURCES), "-fsanitize=fuzzer"], folder


@pytest.mark.parametrize("target", TARGETS)
def test_libfuzzer_finds_nothing(target, fuzzing, tmp_path):
    (tmp_path / "corpus").mkdir()
    result = run(linked(*fuzzing, target), f"-max_total_time={FUZZING_S}", "-len_control=0", "-max_len=600", "-seed=1",
                 "-rss_limit_mb=4096", tmp_path / "corpus", inputs_of(target), cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0 and "Done " in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("name", CHECKS)
def test_without_its_check_an_input_does_harm(name, plain, tmp_path):
    file, right, wrong, target = CHECKS[name]
    source = (NATIVE / file).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{file} says something else by now: mend this"
    (tmp_path / file).write_text(source.replace(right, wrong), encoding="utf-8")
    command, folder = plain
    result = run(linked([*command, "-w"], folder, target, tmp_path / file), 0, 0, inputs_of(target), cwd=tmp_path)
    assert result.returncode != 0 and ("Sanitizer" in result.stdout or "runtime error" in result.stdout), result.stdout
