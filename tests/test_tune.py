"""commlib tune: the choice is near the best at every measured size, its file is used, and the command runs on real ranks."""

import random
import subprocess
import sys

import pytest

from commlib import algorithms, commands, tune, tune_report
from commlib.cost import Link, Machine, cost_s
from commlib.fit import CALL_S
from commlib.plan import Shape
from commlib.selection import select
from commlib.settings import Settings

DEADLINE_S = 60.0
SIZES = tune.sizes_upto(1 << 20)


def result_of(times, shape, settings=None):
    settings = settings or Settings(alpha_inside_s=2e-6, beta_inside_s_per_byte=1e-10, gamma_s_per_byte=1e-10)
    return tune.Result(shape, settings, 1e-6, times, tune.distinct(shape))


def with_table(result):
    lines = tune.staircase(result.times, {nbytes: result.closed_form_choice(nbytes) for nbytes in result.sizes})
    table = tuple(("allreduce", result.shape.ranks_per_host, upto_nbytes, name) for upto_nbytes, name in lines)
    return result._replace(settings=result.settings.replace(table=table))


def test_sizes_span_the_range():
    assert SIZES[0] == 8 and SIZES[-1] == 512 << 10 and tune.sizes_upto(7) == [8]


@pytest.mark.parametrize("seed", range(30))
def test_choices_are_near_the_best_whatever_was_measured(seed):
    generator = random.Random(seed)
    shape = Shape((generator.choice((2, 3, 4, 8)),))
    names = list(tune.distinct(shape))
    times = {(name, nbytes): generator.choice((1.0, 1.04, 1.06, 2.0)) for name in names for nbytes in SIZES}
    result = with_table(result_of(times, shape))
    for nbytes in SIZES:
        assert times[result.choice(nbytes), nbytes] <= 1.05 * min(times[name, nbytes] for name in names)
    assert select("allreduce", 1 << 40, shape, result.settings).algorithm == result.choice(SIZES[-1])


def test_the_closed_form_keeps_its_choice_where_that_is_as_good():
    shape = Shape((2,))
    times = {(name, nbytes): 1.0 for name in tune.distinct(shape) for nbytes in SIZES}
    result = with_table(result_of(times, shape))
    assert len(result.settings.table) == 1, "one line does where all are equal"
    votes = [result.closed_form_choice(nbytes) for nbytes in SIZES]
    assert result.choice(8) == max(set(votes), key=votes.count)


def test_same_plans_are_measured_once():
    assert tune.distinct(Shape((2,)))["ring"] == ["halving_doubling", "direct", "hierarchical", "hierarchical_doubling"]
    for shape in (Shape((8,)), Shape((1,) * 3), Shape((2, 2))):
        same = tune.distinct(shape)
        named = sorted([*same, *(name for names in same.values() for name in names)])
        assert named == sorted(algorithms.applicable("allreduce", shape))


def test_fitted_constants_predict_the_times():
    shape, link = Shape((4,)), Link(3e-6, 2e-10, 1e-10)
    times = {(name, nbytes): 5e-6 + cost_s(algorithms.algorithm("allreduce", name), shape, nbytes, Machine(link, link))
             for name in tune.distinct(shape) for nbytes in SIZES}  # fmt: skip
    fitted = tune.fitted_to(times, shape)
    result = result_of(times, shape, Settings())._replace(call_s=fitted.pop(CALL_S))
    result = result._replace(settings=Settings(**fitted))
    for (name, nbytes), seconds in times.items():
        assert result.predicted_s(name, nbytes) == pytest.approx(seconds, rel=1e-6)
    for nbytes in SIZES:
        assert times[result.closed_form_choice(nbytes), nbytes] == min(times[name, nbytes] for name in result.same)


def test_the_table_says_why():
    shape = Shape((2,))
    times = {(name, nbytes): (2e-6 if name == "ring" else 1e-6) for name in tune.distinct(shape) for nbytes in SIZES}
    result = with_table(result_of(times, shape))
    last = tune_report.rows(result)[-1]
    assert last[-2:] == ["recursive_doubling", "table: closed form's ring takes 2.00x"]
    assert any(line.startswith("the closed form would choose: recursive_doubling up to") for line in tune_report.summary(result))
    assert "chosen from the table:        recursive_doubling" in tune_report.summary(result)


def result_with_equal_times():
    shape = Shape((2,))
    return with_table(result_of({(name, nbytes): 1e-6 for name in tune.distinct(shape) for nbytes in SIZES}, shape))


def test_without_matplotlib_one_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in tune_report.draw(result_with_equal_times(), str(tmp_path / "plot.svg"))


def test_with_matplotlib_there_is_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert "plot.svg" in tune_report.draw(result_with_equal_times(), str(tmp_path / "plot.svg"))
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_command_line_mistakes_get_a_message(capsys):
    for line in ("", "pigeon", "tune", "tune --output f --budget 0", "tune --output f --largest x"):
        with pytest.raises(SystemExit) as error:
            commands.main(line.split())
        assert error.value.code == 2
    assert "required: --output" in capsys.readouterr().err


def run_on_two(tmp_path, *options, program=("-m", "commlib", "tune", "--output", "tuned.json")):
    """The command as a user types it."""
    command = [sys.executable, "-m", "commlib.launch", "-np", "2", *options, sys.executable, *program]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S)


def test_tune_writes_a_file_that_ranks_use(tmp_path):
    other = ("allreduce", (8,), None, "direct")
    Settings(spin_us=3, table=(other, ("allreduce", (2,), None, "ring"))).save(tmp_path / "before.json")
    program = ("-m", "commlib", "tune", "--output", "tuned.json", "--budget", "0.1", "--largest", "40000")
    ran = run_on_two(tmp_path, "--settings", "before.json", program=program)
    assert ran.returncode == 0, ran.stderr
    for text in ("recursive_doubling", "32,768", "the closed form would choose", "commrun --settings tuned.json"):
        assert text in ran.stdout
    tuned = Settings.load(tmp_path / "tuned.json")
    assert tuned.spin_us == 3 and other in tuned.table
    assert tuned.tabled_algorithm("allreduce", (2,), 1 << 30) is not None
    assert tuned.alpha_inside_s > 0 and tuned.beta_inside_s_per_byte > 0 and tuned.gamma_s_per_byte > 0
    said = "import commlib, sys; sys.stdout.write(f'{commlib.init().settings.hash:08x}\\n')"
    assert run_on_two(tmp_path, "--settings", "tuned.json", program=("-c", said)).stdout.split() == [f"{tuned.hash:08x}"] * 2


def test_one_rank_is_told_to_be_more(tmp_path):
    ran = subprocess.run([sys.executable, "-m", "commlib", "tune", "--output", "tuned.json"], cwd=tmp_path,
                         capture_output=True, text=True, timeout=DEADLINE_S)  # fmt: skip
    assert ran.returncode == 2 and "commrun -np 2" in ran.stderr and not list(tmp_path.iterdir())
