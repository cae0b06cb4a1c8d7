"""commlib as a backend of torch.distributed: every collective beside gloo's, works, groups, errors."""

import os

import pytest
from starting import start
from support import Died
from support_hosts import Hosts, why_not

HERE = os.path.dirname(os.path.abspath(__file__))
NO_HOSTS = why_not()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Four ranks with a default group of commlib's and groups of both backends over the first 1, 2, 3 and 4."""
    with started(4, tmp_path_factory.mktemp("c10d")) as ranks:
        yield ranks
        ranks.call("c10d_collectives:end")


def started(size, folder, **options):
    """Ranks of a default group that meets in a file in this folder."""
    ranks = start(size, initialize=False, **options)
    ranks.call("c10d_collectives:begin", str(folder / "store"))
    return ranks


def test_every_collective_gives_what_gloo_gives(ranks):
    counts = ranks.call("c10d_collectives:compare")
    assert counts == sorted(counts, reverse=True) and counts[-1] > 300


@pytest.mark.parametrize("case", ["other_dtypes", "other_reductions", "other_layouts", "points", "objects_and_futures",
                                  "subgroups", "beside_the_default"])  # fmt: skip
def test_beside_plain_torch(ranks, case):
    ranks.call(f"c10d_cases:{case}")


def test_over_tcp(tmp_path):
    with started(2, tmp_path, transport="tcp") as ranks:
        assert min(ranks.call("c10d_collectives:compare")) > 300
        ranks.call("c10d_cases:points")
        ranks.call("c10d_collectives:end")


def test_between_hosts(monkeypatch):
    if NO_HOSTS:
        pytest.skip(NO_HOSTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")])))
    with Hosts(2) as hosts, hosts.start(per_host=2, initialize=False) as ranks:
        ranks.call("c10d_cases:place")  # all have imported torch, which takes its time, before any waits for the others
        for host_sizes, transports in ranks.call("c10d_cases:between_hosts", hosts.addresses[0]):
            assert host_sizes == (2, 2) and transports == ["shm", "tcp", "tcp"]


def test_mismatches_are_told_on_every_rank(ranks):
    for texts in ranks.call("c10d_cases:mismatches"):
        for text, words in zip(texts, (("(3,)", "(4,)", "rank 1"), ("float64", "float32", "rank 2"), ("max", "sum"),
                                       ("root 1", "root 0"), ("(3,)", "(4,)"), ("rank 1", "2 elements", "3 of them"))):  # fmt: skip
            assert all(word in text for word in words), text


def test_timeouts_are_kept(ranks):
    first, *others = ranks.call("c10d_cases:late")
    assert first == []
    for short, own, received, from_anybody in others:
        assert "not done after 0.05 s; it goes on" in short
        assert "all_reduce was not done within 1 s, the timeout of its process group" in own
        assert "recv from rank 0" in received and "not done within 1 s" in received
        assert "recv from any rank with tag 9 was not done within 1 s" in from_anybody


def test_forked_children_hold_no_group(ranks):
    for text in ranks.call("c10d_cases:forked"):
        assert "a forked child holds no engine" in text


def test_a_lost_rank_is_named_on_all(tmp_path):
    with start(3, initialize=False) as ranks:
        outcomes = ranks.outcomes("c10d_cases:lost", str(tmp_path / "store"))
        assert isinstance(outcomes.pop(1), Died)
        for texts in outcomes:
            assert all("rank 1 was lost" in text for text in texts), texts


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with start(3, initialize=False) as ranks:
        ranks.call("c10d_cases:place")  # all have imported torch: what is late then does not come
        for rank, text in enumerate(ranks.call("c10d_cases:absent", str(tmp_path / "store"))):
            assert rank == 2 or "waited 4 s for rank 2 of the process group" in text, text


def test_groups_come_and_go(tmp_path):
    with start(2, initialize=False) as ranks:
        ranks.call("c10d_cases:place")
        ranks.call("c10d_cases:cycles", str(tmp_path / "store"), 50)
