"""Several hosts: shared memory inside, TCP between, hierarchical algorithms, ranks placed in blocks or round robin.

The hosts are pretended on one machine: ranks are told another host identity and that the loopback address leads to all.
Everything else, the sockets between "hosts" included, is real.
"""

import os

import pytest
from support import Ranks
from test_collectives import ROUND_OF_KIND, numbers
from test_collectives_mixed import mixed

import commlib
import commlib.connect
from commlib import algorithms
from commlib.layout import Layout

PLACEMENTS = [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2)]


def initialize_on(hosts):
    rank = int(os.environ["COMMLIB_RANK"])
    commlib.connect.host_identity = lambda: f"host {hosts[rank]}"
    commlib.connect._addresses = lambda *_: ["127.0.0.1"]
    for name in ("LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        os.environ[f"COMMLIB_{name}"] = {"LOCAL_RANK": str(hosts[:rank].count(hosts[rank])),
                                         "LOCAL_SIZE": str(hosts.count(hosts[rank])), "CROSS_RANK": str(hosts[rank]),
                                         "CROSS_SIZE": str(len(set(hosts)))}[name]  # fmt: skip
    communicator = commlib.init(timeout_s=30.0)
    settings = communicator.settings
    return (communicator.host_sizes, communicator.local_rank, communicator.cross_rank, communicator.is_homogeneous,
            settings.alpha_between_s > 0, settings.alpha_inside_s > 0)  # fmt: skip


def every_algorithm(hosts):
    """Every algorithm of every kind that such a group may get, with tiny segments and whole ones."""
    communicator, layout = commlib.communicator(), Layout(hosts)
    record, size, rank = communicator.settings, communicator.size, communicator.rank
    done = []
    for kind, round_of_kind in ROUND_OF_KIND.items():
        for name in algorithms.applicable(kind, layout.shape(kind, 0)):
            for count, segment_nbytes in ((0, 1024), (5, 1024), (1000, 256), (60_000, 65_536)):
                communicator.settings = record.replace(algorithms=((kind, name),), segment_nbytes=segment_nbytes)
                case = (kind, name, count)
                round_of_kind(communicator, case, [numbers(case, r, (count,), "float32") for r in range(size)], rank, size)
            done.append((kind, name))
    communicator.settings = record
    return done


def pinned_to_rank_0(hosts):
    return commlib.communicator().settings.hash


@pytest.mark.parametrize("hosts", PLACEMENTS, ids=str)
def test_hosts(hosts):
    with Ranks(len(hosts), initialize=False) as ranks:
        places = ranks.call(initialize_on, hosts)
        sizes = tuple(hosts.count(host) for host in sorted(set(hosts)))
        for rank, (host_sizes, local_rank, cross_rank, is_homogeneous, has_between, has_inside) in enumerate(places):
            assert host_sizes == sizes and local_rank == hosts[:rank].count(hosts[rank]) and cross_rank == hosts[rank]
            assert is_homogeneous == (len(set(sizes)) == 1)
            assert has_between and has_inside == (hosts.count(0) > 1)
        assert len(set(ranks.call(pinned_to_rank_0, hosts))) == 1
        done = ranks.call(every_algorithm, hosts)
        assert len({tuple(names) for names in done}) == 1 and {kind for kind, _ in done[0]} == set(ROUND_OF_KIND)
        seed = sum(hosts) + 77
        ranks.call(mixed, seed, 80, 40)
