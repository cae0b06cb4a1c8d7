"""Settings, selection and calibration: the record survives its file, the choice is pure, bounded and forced on demand."""

import itertools
import math
import types

import pytest

from commlib import algorithms
from commlib.calibrate import calibrated, rounded
from commlib.cost import cost_s
from commlib.layout import Layout
from commlib.plan import Shape
from commlib.selection import machine_of, select
from commlib.settings import Settings

SHAPES = [Shape(hosts) for hosts in [(1,), (2,), (4,), (7,), (2, 2), (3, 2), (1, 1, 1), (4,) * 8, (1,) * 32]]
SIZES = [0, 1, 8, 4096, 100_000, 1 << 20, 1 << 26]


def test_record_survives_its_file(tmp_path):
    record = Settings(spin_us=3, algorithms=(("broadcast", "binomial"), ("allreduce", "ring")), alpha_inside_s=2.0**-19)
    record.save(tmp_path / "settings.json")
    loaded = Settings.load(tmp_path / "settings.json")
    assert loaded == record and loaded.hash == record.hash and hash(loaded) == hash(record)
    assert record.algorithms == (("allreduce", "ring"), ("broadcast", "binomial"))
    assert len({Settings().hash, record.hash, Settings(spin_us=4).hash, Settings(transport="tcp").hash}) == 4


def test_overrides_are_text():
    record = Settings().overridden({"spin_us": "7", "transport": "tcp", "algorithms": "allreduce=ring, barrier=x",
                                    "gamma_s_per_byte": "1e-10"})  # fmt: skip
    assert (record.spin_us, record.transport, record.gamma_s_per_byte) == (7, "tcp", 1e-10)
    assert record.forced_algorithm("allreduce") == "ring" and record.forced_algorithm("alltoall") is None


TABLE = (("allreduce", (4, 4), None, "hierarchical"), ("allreduce", (8,), None, "ring"), ("allreduce", (8,), 4096, "direct"))


def test_table_survives_its_file_and_text(tmp_path):
    record = Settings(table=TABLE)
    record.save(tmp_path / "settings.json")
    loaded = Settings.load(tmp_path / "settings.json")
    text = "allreduce@8:4096=direct, allreduce@8:any=ring,allreduce@4+4:any=hierarchical"
    assert record == loaded == Settings().overridden({"table": text})
    assert record.hash == loaded.hash != Settings().hash and hash(record) == hash(loaded)


@pytest.mark.parametrize("line", [
    ("allreduce", (8,), -1, "ring"), ("sum", (8,), 1, "ring"), ("allreduce", (), 1, "ring"), ("allreduce", 8, 1, "ring"),
    ("allreduce", (8,), 1), "allreduce", ("allreduce", (0,), 1, "ring"), ("allreduce", (8,), 1, None)])  # fmt: skip
def test_lines_of_a_table_are_checked(line):
    with pytest.raises(ValueError, match="table must be lines"):
        Settings(table=(line,))


def test_a_table_has_no_line_twice():
    with pytest.raises(ValueError, match="two lines"):
        Settings(table=(("allreduce", (8,), 1, "ring"), ("allreduce", [8], 1, "direct")))
    with pytest.raises(ValueError, match="setting table cannot be 'allreduce=ring'"):
        Settings().overridden({"table": "allreduce=ring"})


def test_table_goes_before_the_closed_form_and_forced_choices_before_the_table():
    settings = Settings(table=TABLE)
    for nbytes, name in ((0, "direct"), (4096, "direct"), (4097, "ring"), (1 << 40, "ring")):
        assert select("allreduce", nbytes, Shape((8,)), settings).algorithm == name
        assert select("allreduce", nbytes, Shape((7,)), settings) == select("allreduce", nbytes, Shape((7,)), Settings())
    assert select("allreduce", 8, Shape((4, 4)), settings).algorithm == "hierarchical"
    forced = settings.replace(algorithms=(("allreduce", "recursive_doubling"),))
    assert select("allreduce", 8, Shape((8,)), forced).algorithm == "recursive_doubling"
    many = select("allreduce", 1 << 26, Shape((4, 4)), settings, overlapped=True)
    assert many == select("allreduce", 1 << 26, Shape((4, 4)), Settings(), overlapped=True)


def test_tabled_algorithm_must_fit():
    with pytest.raises(ValueError, match="direct"):
        select("allreduce", 8, Shape((1, 1)), Settings(table=(("allreduce", (1, 1), None, "direct"),)))


@pytest.mark.parametrize("kind", sorted(algorithms.KINDS))
def test_choice_is_cheap_and_bounded(kind):
    for shape, nbytes, segment_nbytes in itertools.product(SHAPES, SIZES, (1024, 1 << 20)):
        settings = Settings(segment_nbytes=segment_nbytes)
        choice = select(kind, nbytes, shape, settings)
        assert choice == select(kind, nbytes, shape, settings)
        if shape.size == 1:
            continue
        least_between = (32 << 10) * algorithms.algorithm(kind, choice.algorithm).nchunks(shape) if shape.hosts > 1 else 0
        assert 0 < choice.segment_nbytes <= max(segment_nbytes, least_between)
        candidates = algorithms.applicable(kind, shape)
        size = settings.uneven_nbytes * shape.size if kind in ("allgather", "alltoall") else nbytes
        costs = {name: cost_s(module, shape, size, machine_of(settings)) for name, module in candidates.items()}
        assert costs[choice.algorithm] <= (1.25 if shape.hosts > 1 else 1.0) * min(costs.values())
        for name in candidates:
            assert select(kind, nbytes, shape, settings.replace(algorithms=((kind, name),))).algorithm == name


def test_overlapped_ones_may_cost_more_alone():
    """Between hosts only, and never one that the table lists after the cheapest."""
    for shape, nbytes in itertools.product(SHAPES, SIZES):
        names = list(algorithms.applicable("allreduce", shape))
        alone, overlapped = (select("allreduce", nbytes, shape, Settings(), flag).algorithm for flag in (False, True))
        if shape.hosts == 1:
            assert alone == overlapped
        else:
            assert names.index(overlapped) <= names.index(alone)


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_where_ranks_share_processors_few_messages_are_chosen(ranks):
    shape, crowded = Shape((ranks,)), Settings(alpha_inside_s=1e-6, beta_inside_s_per_byte=3e-11, message_s=8e-6)
    assert select("allreduce", 8, shape, crowded).algorithm == "recursive_doubling"
    assert select("allreduce", 8, shape, crowded.replace(message_s=0.0)).algorithm == "direct"
    assert select("allreduce", 1 << 28, shape, crowded).algorithm in ("direct", "halving_doubling")


def test_small_and_large_differ():
    shape = Shape((1,) * 16)
    small, large = (select("allreduce", nbytes, shape, Settings()).algorithm for nbytes in (8, 1 << 26))
    assert small != large


def test_overlapped_operations_between_hosts_take_a_ring_unless_it_is_far_slower():
    apart, together = Shape((1,) * 32), Shape((32,))
    for nbytes in (1 << 20, 1 << 26):
        assert select("allreduce", nbytes, apart, Settings(), overlapped=True).algorithm == "ring"
        assert select("allreduce", nbytes, together, Settings(), overlapped=True) == select(
            "allreduce", nbytes, together, Settings())
    assert select("allreduce", 8, apart, Settings(), overlapped=True).algorithm != "ring"


@pytest.mark.parametrize("latency_us, gbit_per_s, preferred", [(20, 10, True), (50, 25, True), (10, 100, True), (216, 232, False)])
def test_a_ring_is_preferred_only_where_what_is_in_flight_can_fill_it(latency_us, gbit_per_s, preferred):
    settings = Settings(alpha_between_s=latency_us * 1e-6, beta_between_s_per_byte=8e-9 / gbit_per_s)
    for nbytes in (16 << 20, 144 << 20):
        choice = select("allreduce", nbytes, Shape((1,) * 64), settings, overlapped=True)
        assert (choice.algorithm == "ring") == preferred


def test_forced_algorithm_must_fit():
    with pytest.raises(ValueError, match="no allreduce algorithm named 'pigeon'"):
        select("allreduce", 8, Shape((2,)), Settings(algorithms=(("allreduce", "pigeon"),)))


@pytest.mark.parametrize("hosts, cores, crowded", [([0] * 4, 2, True), ([0, 0], 2, False), ([0, 1] * 2, 2, False)])
def test_crowds_are_found_at_init(monkeypatch, hosts, cores, crowded):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    given = Settings(alpha_inside_s=1e-6, beta_inside_s_per_byte=1e-10, alpha_between_s=1e-5, beta_between_s_per_byte=1e-9)
    rank_0 = types.SimpleNamespace(rank=0, size=len(hosts))
    assert (calibrated(given, rank_0, hosts).message_s > 0) == crowded
    assert calibrated(given.replace(message_s=3e-6), rank_0, hosts).message_s == 3e-6


def test_rounding_hides_noise():
    assert all(rounded(2.0**-20 * factor) == 2.0**-20 for factor in (0.75, 1.0, 1.4))
    assert math.log2(rounded(3.3e-7)).is_integer()


@pytest.mark.parametrize("hosts", [(0, 1, 0, 1), (0, 1, 1, 0, 2), (1, 0)])
def test_round_robin_placement(hosts):
    """Relabelled plans are of the real ranks: every send has its receive."""
    layout = Layout(hosts)
    for kind in algorithms.KINDS:
        for name in algorithms.applicable(kind, layout.shape(kind, 1)):
            sends, receives = [], []
            for rank in range(len(hosts)):
                plan = layout.plan(kind, name, rank, 1)
                assert plan.rank == rank
                for step in plan.steps:
                    (sends if step.kind == 0 else receives).append((rank, step.peer) if step.kind == 0 else (step.peer, rank))
            assert sorted(sends) == sorted(receives)
