"""Random runs of the engine with random faults (tests/native/seeds_test.c), and what they are worth: each of the mutations
below is a defect as somebody might make it, put into a copy of the engine's sources, and must be seen within 1,000 seeds.

10,000 seeds of the engine as it is are run by test_engine.py; `make soak` runs on until it is stopped.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"
PROGRAMS = ROOT / "tests" / "native"
PARTS = ["seeds_test.c", "storm.c", "storm_end.c", "tasks.c", "world.c"]
SEEDS = 1000
LONGEST_S = 100  # it takes seconds; a hang is what this is for

# what is wrong: (file of the engine, what it says, what it says instead)
MUTATIONS = {
    "a grant is dropped now and then": (
        "operation.c",
        "    cl_engine_tell(operation->engine, peer->rank, &frame, NULL);\n}\n\nstatic bool feeds",
        "    if (operation->engine->stats.frames % 64 != 5)\n"
        "        cl_engine_tell(operation->engine, peer->rank, &frame, NULL);\n}\n\nstatic bool feeds"),
    "a piece is added twice": (
        "arithmetic.c",
        "    } else {\n        operation->engine->kernels->reduce[r->dtype][r->reduction](place + offset, data,",
        "    } else {\n        for (int i = 0; i < (offset == 256 ? 2 : 1); i++)\n"
        "            operation->engine->kernels->reduce[r->dtype][r->reduction](place + offset, data,"),
    "a result is scaled twice where it comes in two pieces": (
        "arithmetic.c",
        "        uint64_t first = (uint64_t)(place + done - operation->output) / width;",
        "        uint64_t first = (uint64_t)(place + (done > 0 ? done - width : 0) - operation->output) / width;"),
    "an answer is not written where the payload lies": (
        "arithmetic.c",
        "reduce_both[r->dtype][r->reduction](place, data, nbytes / cl_dtype_nbytes(r->dtype));",
        "reduce[r->dtype][r->reduction](place, data, nbytes / cl_dtype_nbytes(r->dtype));"),
    "a chunk ends one border too early": (
        "request.c",
        "    return part == parts ? count : (count * part / parts) & ~(uint64_t)(CHUNK_ALIGNMENT - 1);",
        "    return part == parts ? count : (count * part / parts - (part > 1)) & ~(uint64_t)(CHUNK_ALIGNMENT - 1);"),
    "a chunk of a later segment is one element short": (
        "request.c",
        "    *count = border(length, (uint64_t)step->end_chunk, nchunks) - from;\n}\n\n/* Segment s",
        "    *count = border(length, (uint64_t)step->end_chunk, nchunks) - from;\n"
        "    *count -= segment > 2 && *count > 64;\n}\n\n/* Segment s"),
    "nobody is woken for a gate": (
        "thread.c",
        "    if (engine->wake != NULL)\n        engine->wake(engine);\n}\n\nvoid cl_runtime_completed",
        "    if (engine->wake != NULL && first != 1)\n        engine->wake(engine);\n}\n\nvoid cl_runtime_completed"),
    "nobody is woken for a submission": (
        "thread.c",
        "    if (engine->wake != NULL && !lazy)",
        "    if (engine->wake != NULL && !lazy && operation->request.priority != 3)"),
    "a link that has more to read is left asleep": (
        "engine.c",
        "    if (moved > 0 && peer->watched)",
        "    if (moved > 3 && peer->watched)"),
    "a peer is forgotten when there is room for its next send": (
        "frames.c",
        "    operation->posted[operation->plan->peer_of[step]] -= frame->nbytes;\n    cl_engine_touch(engine, link->peer);",
        "    operation->posted[operation->plan->peer_of[step]] -= frame->nbytes;"),
    "of what came early for one operation, some is lost": (
        "frames.c",
        "        while (first->next != NULL)\n            first = first->next;\n        first->next = kept;",
        "        first->next = kept;"),
    "a sender's budget is not given back when it fails": (
        "operation.c",
        "            peer->eager_used -= step_nbytes(operation, entry->segment, entry->step);\n    }",
        "            peer->eager_used -= 0;\n    }"),
    "more is posted than may be in flight": (
        "engine.c",
        "    if (peer->posted_nbytes > 0 && peer->posted_nbytes + frame.nbytes > window_of(engine, peer))",
        "    if (peer->posted_nbytes > 0 && peer->posted_nbytes > window_of(engine, peer))"),
    "what is urgent goes last": (
        "heap.c", "a->priority < b->priority", "a->priority > b->priority"),
    "a payload is still read after its operation has failed": (
        "outgoing.c",
        "    peer->link->transport->forget(peer->link, key);\n    for", "    for"),
    "an operation ends before its metadata is compared": (
        "operation.c", " && operation->unverified == 0;", ";"),
    "a failure is not told to rank 1": (
        "outgoing.c",
        "        if (rank != engine->rank && !engine->peers[rank].left)",
        "        if (rank != engine->rank && rank != 1 && !engine->peers[rank].left)"),
    "a loss is not told": (
        "engine.c", "        if ((tell || r == rank) && says_goodbye_to(engine, r)) {", "        if (r == rank && !tell) {"),
    "a loss that others tell of is ignored if the lost rank had said goodbye here": (
        "engine.c",
        "    if (is_peer && tell) {\n        if (engine->peers[rank].lost)",
        "    if (is_peer && engine->peers[rank].left)\n        return;\n"
        "    if (is_peer && tell) {\n        if (engine->peers[rank].lost)"),
    "a rank that others have lost is not told so, and hears of them no more": (
        "engine.c",
        "    if (is_peer && tell) {\n        if (engine->peers[rank].lost)",
        "    if (is_peer && !tell)\n        engine->peers[rank].lost = true;\n"
        "    if (is_peer && tell) {\n        if (engine->peers[rank].lost)"),
    "who submits late waits for a rank that has left": (
        "engine.c", "        fail_if_somebody_left(engine, operation);", "        (void)fail_if_somebody_left;"),
    "who leaves does not say so": (
        "engine.c", "            engine->peers[r].owes_bye = true;", "            engine->peers[r].owes_bye = r != 2;"),
    "a member's entry goes to its neighbour": (
        "control.c",
        "        if (append(&exchange->entries[m], data + sizeof length, length) != CL_OK) {",
        "        if (append(&exchange->entries[m == 2 ? 1 : m], data + sizeof length, length) != CL_OK) {"),
    "a ticket that comes back lets no other go": (
        "ticket.c",
        "        cl_operation_complete(operation, CL_OK);\n    hand_out(engine);",
        "        cl_operation_complete(operation, CL_OK);"),
}


def compiler():
    found = shutil.which("gcc") or shutil.which("cc")
    if not found:
        pytest.skip("no C compiler")
    return [found, "-std=gnu11", "-pthread", "-O1", f"-I{NATIVE}"]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """A folder with the objects of the engine and of the random runs."""
    folder = tmp_path_factory.mktemp("seeds")
    sources = [*sorted(NATIVE.glob("*.c")), *(PROGRAMS / part for part in PARTS)]
    subprocess.run([*compiler(), "-c", *sources], check=True, cwd=folder)
    return folder


def run_seeds(program, first, count):
    return subprocess.run([program, str(first), str(count)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", timeout=LONGEST_S)  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_seen_and_its_seed_repeats_it(name, objects, tmp_path):
    file, right, wrong = MUTATIONS[name]
    source = (NATIVE / file).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{file} says something else by now: mend this mutation"
    (tmp_path / file).write_text(source.replace(right, wrong), encoding="utf-8")
    mutated = file.replace(".c", ".o")
    subprocess.run([*compiler(), "-w", "-c", tmp_path / file], check=True, cwd=tmp_path)
    linked = [tmp_path / mutated, *(path for path in sorted(objects.glob("*.o")) if path.name != mutated)]
    program = tmp_path / "seeds_test"
    subprocess.run([*compiler(), "-o", program, *linked, "-lm"], check=True)
    result = run_seeds(program, 1, SEEDS)
    assert result.returncode != 0, f"not seen in {SEEDS} seeds"
    said = re.search(r"seed (\d+) failed; repeat it with: ", result.stdout)
    assert said, result.stdout
    again = run_seeds(program, said[1], 1)
    assert again.returncode != 0 and again.stdout.splitlines()[0] == result.stdout.splitlines()[0]
