"""The proof of a shared key: right keys pass, and nothing else does, replays and reflections least of all."""
import itertools
import logging
import random

import pytest

from commlib.proof import (
    ANSWER_NBYTES, NONCE_NBYTES, PROOF_NBYTES, REFUSAL, THE_STORE, Calling, Claim, Listening, Strangers,
)  # fmt: skip
from commlib.secret import Secret

KEY, OTHER = Secret("1" * 32).key("links", "job"), Secret("1" * 32).key("links", "other job")


@pytest.mark.parametrize("claim", [Claim(1, 0), Claim(0, 1), Claim(65535, THE_STORE)])
def test_who_holds_the_key_is_believed(claim):
    listening, calling = Listening(KEY), Calling(KEY, claim)
    proof = calling.greeting + calling.prove(listening.challenge)
    assert (len(listening.challenge), len(proof)) == (NONCE_NBYTES, PROOF_NBYTES)
    assert listening.judge(proof) == claim
    assert len(listening.answer) == ANSWER_NBYTES and calling.accepts(listening.answer)


@pytest.mark.parametrize("listeners, callers", [(KEY, OTHER), (OTHER, KEY), (KEY, Secret().key("links", "job"))])
def test_another_key_is_refused_on_both_sides(listeners, callers):
    listening, calling = Listening(listeners), Calling(callers, Claim(1, 0))
    assert listening.judge(calling.greeting + calling.prove(listening.challenge)) is None
    assert listening.answer == REFUSAL and not calling.accepts(listening.answer)
    believed = Listening(callers)
    believed.judge(calling.greeting + calling.prove(believed.challenge))
    impostor = Listening(listeners)
    impostor.challenge = believed.challenge
    assert not calling.accepts(impostor.answer)


def test_every_bit_counts():
    """A proof or an answer with any one bit changed, or cut, or longer, is no proof."""
    for bit in range(8 * PROOF_NBYTES):
        listening, calling = Listening(KEY), Calling(KEY, Claim(1, 0))
        proof = bytearray(calling.greeting + calling.prove(listening.challenge))
        proof[bit // 8] ^= 1 << bit % 8
        assert listening.judge(bytes(proof)) is None and listening.answer == REFUSAL
    for bit in range(8 * ANSWER_NBYTES):
        answer = bytearray(honest_run()[3])
        answer[bit // 8] ^= 1 << bit % 8
        assert not calling.accepts(bytes(answer))
    for wrong in (b"", proof[:-1], proof + b"x", bytes(PROOF_NBYTES)):
        assert Listening(KEY).judge(bytes(wrong)) is None


def honest_run(claim=Claim(1, 0)):
    listening, calling = Listening(KEY), Calling(KEY, claim)
    proof = calling.greeting + calling.prove(listening.challenge)
    listening.judge(proof)
    return calling, listening.challenge, proof, listening.answer


def test_what_was_overheard_is_worth_nothing():
    """Replayed to a listener, replayed to a caller, sent back to where it came from, one run's parts in another."""
    runs = [honest_run(claim) for claim in (Claim(1, 0), Claim(0, 1), Claim(1, 0))]
    for _, _, proof, _ in runs:
        assert Listening(KEY).judge(proof) is None
    for (_, challenge, _, _), (_, _, _, answer) in itertools.product(runs, runs):
        fresh = Calling(KEY, Claim(1, 0))
        fresh.prove(challenge)
        assert not fresh.accepts(answer)
    calling = Calling(KEY, Claim(1, 0))
    mirrored = calling.prove(bytes(NONCE_NBYTES))[-ANSWER_NBYTES:]  # a listener that sends our own code back
    assert not calling.accepts(mirrored)


def test_a_caller_cannot_be_used_to_answer_for_a_listener():
    """A stranger passes a caller's challenge on to another rank that calls him: the code is one for another claim."""
    victim, helper = Calling(KEY, Claim(2, 0)), Calling(KEY, Claim(1, 0))
    victim.prove(bytes(NONCE_NBYTES))
    assert not victim.accepts(helper.prove(bytes(NONCE_NBYTES))[-ANSWER_NBYTES:])


def test_random_bytes_prove_nothing():
    rng = random.Random(5)
    assert all(Listening(KEY).judge(rng.randbytes(rng.randrange(2 * PROOF_NBYTES))) is None for _ in range(2000))


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def test_strangers_are_few_and_stay_a_short_time():
    clock = Clock()
    strangers = Strangers("rank 0", expected=4, clock=clock)
    evicted = [gone for number in range(1000) for gone in strangers.admit(number)]
    assert evicted == list(range(1000 - 256 - 4))
    assert strangers.oldest() == 740 and strangers.next_deadline() == 110.0
    strangers.forget(740)
    clock.now_s = 105.0
    strangers.admit("late")
    assert strangers.expired() == []
    clock.now_s = 110.0
    assert strangers.expired() == list(range(741, 1000))
    assert strangers.next_deadline() == 115.0 and strangers.expired() == []


def test_a_scanner_does_not_fill_the_log(caplog):
    strangers = Strangers("rank 0")
    with caplog.at_level(logging.WARNING, "commlib"):
        for port in range(1000):
            strangers.refuse(("10.0.0.9", port), "it sent something else")
    assert len(caplog.records) == 11 and "10.0.0.9 port 0" in caplog.text and "without a word" in caplog.text
