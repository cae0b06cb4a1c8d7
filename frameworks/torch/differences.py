"""What ranks did differently, in words that are the same on every rank.

When the counts of a step (presence.py) show that ranks differ, each tells all others what it did, and all raise the same
error. This file knows what was told; how it travels is somebody else's.
"""

import json


def told_by_all(communicator, name, mine):
    """(every rank's record, whose they are) in rank order; a rank that has joined tells none."""
    payloads = communicator.exchange(json.dumps(mine).encode(), name=name, without_joined=True)
    told = [(json.loads(payload), rank) for payload, rank in zip(payloads, communicator.ranks) if payload]
    return tuple(zip(*told))


def check_alike(told, names, ranks):
    """Refuses to go on if ranks did different things that have to be alike.

    Args:
        told: every rank's record: "frozen", and after a step "steps" and "changed".
        names: of the gradients, by number.
        ranks: of those who told it.

    Raises:
        RuntimeError: names two ranks and what to do.
    """
    if "steps" in told[0]:
        _check_steps([one["steps"] for one in told], ranks)
        _check_changed([one["changed"] for one in told], ranks)
    _check_frozen([one["frozen"] for one in told], names, ranks)


def _check_steps(steps, ranks):
    rank = next((rank for rank, made in enumerate(steps) if made != steps[0]), None)
    if rank is not None:
        raise RuntimeError(
            f"ranks have made different numbers of steps, so their weights differ: rank {ranks[0]} had made {steps[0]} and rank "
            f"{ranks[rank]} {steps[rank]}. A step must be skipped by all ranks or by none: after an exception on one rank it "
            "still has to call step()"
        )


def _check_frozen(frozen, names, ranks):
    sets = [set(numbers) for numbers in frozen]
    different = sorted(set.union(*sets) - set.intersection(*sets))
    if different:
        number = different[0]
        there = next(rank for rank, numbers in enumerate(sets) if number in numbers)
        here = next(rank for rank, numbers in enumerate(sets) if number not in numbers)
        raise RuntimeError(
            f"parameter {names[number]!r} is frozen on rank {ranks[there]} (requires_grad is False) and trained on rank "
            f"{ranks[here]}, and so {len(different)} in all: call requires_grad_() on every rank, between the same two steps"
        )


def _check_changed(changed, ranks):
    if any(changed) and not all(changed):
        raise RuntimeError(
            f"rank {ranks[changed.index(True)]} changed its reduced gradients before step() (clipping, unscaling) and rank "
            f"{ranks[changed.index(False)]} did not, so their weights differ: do it on every rank. A rank that called "
            "backward() for no parameter has no gradients that it could change: give it some, with "
            "(0 * sum(p.sum() for p in model.parameters())).backward()"
        )
