"""Whatever a peer sends, what parses it says no in its own words, or goes on: the words of the store, the store itself, a rank's
side of it, proofs, and commrun's connection with a host. The engine's frames have a fuzzer in C (tests/native/hostile_test.c).

Each begins from bytes that are right and changes them: cut, doubled, overwritten, with other numbers where numbers stand. The
same bytes in every run, so that a failure can be repeated.
"""

import contextlib
import math
import socket
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commlib.bootstrap import StartError
from commlib.launch.link import MARK, Link
from commlib.proof import ANSWER_NBYTES, NONCE_NBYTES, PROOF_NBYTES, THE_STORE, Calling, Claim, Listening
from commlib.rendezvous import Store, _Channel, listen
from commlib.rendezvous_server import Server, store_key
from commlib.rendezvous_wire import (
    MAX_PAYLOAD_NBYTES, MAX_RANKS, PROTOCOL, Decoder, Hello, WireError, encode, hello_of,
)  # fmt: skip
from commlib.secret import Secret
from test_rendezvous import TIMEOUT_S, exactly, member, new_name, together

ALIKE = settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
KEY = store_key(Secret(), "job")
HELLO = Hello(PROTOCOL, "1", 2, 1, 1, "host", 1)

NUMBERS = st.one_of(st.integers(), st.integers(-2, 70000), st.sampled_from([2**31, 2**63, 2**64, -2**63, 10**400]),
                    st.floats(allow_nan=True, allow_infinity=True))  # fmt: skip
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
                      lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
                      max_leaves=6)  # fmt: skip
KEYS = st.one_of(st.lists(st.one_of(st.sampled_from(["a", "b"]), VALUES), max_size=4), VALUES)


def headers():
    """What a rank may say to the store, with fields missing, added or of another kind."""
    right = st.one_of(
        st.just(HELLO.header()),
        st.fixed_dictionaries({"op": st.just("get"), "keys": st.lists(st.sampled_from("ab"), max_size=4), "timeout_s": NUMBERS}),
        st.fixed_dictionaries({"op": st.just("set"), "key": st.one_of(st.sampled_from("ab"), VALUES)}),
        st.fixed_dictionaries({"op": st.just("get"), "keys": KEYS, "timeout_s": st.one_of(NUMBERS, VALUES)}),
        st.fixed_dictionaries({"op": st.just("fail"), "text": VALUES}), st.just({"op": "bye"}), st.just({"op": "news"}),
    )  # fmt: skip
    changes = st.dictionaries(st.sampled_from(["op", "key", "keys", "timeout_s", "rank", "size", "generation", "pid", "text"]),
                              VALUES, max_size=2)  # fmt: skip
    return st.builds(lambda header, changed: {**header, **changed}, right, changes)


@st.composite
def mangled(draw, stream):
    """A stream of bytes, changed in a few places."""
    data = bytearray(draw(stream))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.binary(max_size=8))
        data[at:at + draw(st.sampled_from([0, len(piece), 1000]))] = piece
    return bytes(data)


def encoded(header, payload=b""):
    return encode(header, payload)


MESSAGES = st.builds(encoded, headers(), st.binary(max_size=40))
STREAMS = mangled(st.lists(MESSAGES, min_size=1, max_size=4).map(b"".join))


def decode(data, cut):
    """(messages, whether the rest was refused); fed in two pieces."""
    decoder, messages = Decoder(1 << 16), []
    try:
        for piece in (data[:cut], data[cut:]):
            decoder.feed(piece)
            message = decoder.next()
            while message is not None:
                messages.append(message)
                message = decoder.next()
    except WireError:
        return messages, True
    return messages, False


@ALIKE
@given(STREAMS, st.integers(0, 200))
def test_any_bytes_are_messages_or_refused_and_it_does_not_matter_how_they_come(data, cut):
    messages, _ = whole = decode(data, len(data))
    assert repr(decode(data, min(cut, len(data)))) == repr(whole)  # repr: NaN
    assert sum(len(message.payload) for message in messages) <= len(data)


@ALIKE
@given(headers())
def test_a_hello_is_sound_or_refused(header):
    with contextlib.suppress(WireError):
        hello = hello_of(dict(header, op=str(header["op"])))
        assert 0 <= hello.rank < hello.size <= MAX_RANKS and hello.generation > 0


def whole_proof(claim, challenge):
    calling = Calling(KEY, claim)
    return calling.greeting + calling.prove(challenge)


@ALIKE
@given(mangled(st.just(whole_proof(Claim(1, THE_STORE), bytes(NONCE_NBYTES)))))
def test_no_proof_for_another_challenge_is_believed(proof):
    listening = Listening(KEY)
    assert listening.judge(proof) is None and listening.answer == bytes(ANSWER_NBYTES)


# ---- the store, for somebody who has the secret and has gone mad --------------------------------------------------

@pytest.fixture(scope="module")
def store():
    address = f"unix:@{new_name()}"
    server = Server(listen(address), "job", "commrun")
    yield server, address
    server.close()


def proven(address):
    """A connection that the store believes to be rank 1's."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT_S)
    sock.connect("\0" + address[len("unix:@"):])
    sock.sendall(whole_proof(Claim(1, THE_STORE), exactly(sock, NONCE_NBYTES)))
    exactly(sock, ANSWER_NBYTES)
    return sock


GENERATIONS = iter(range(1, 1 << 30))


@settings(ALIKE, max_examples=200)
@given(STREAMS, st.booleans())
def test_nothing_that_a_rank_says_stops_the_store(store, data, greets):
    server, address = store
    with proven(address) as sock, contextlib.suppress(OSError):
        if greets:
            sock.sendall(encode(dict(HELLO.header(), generation=1000 + next(GENERATIONS))))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass  # until the store has heard it all, and has hung up
    assert server._thread.is_alive()


def asked(address, header):
    """What the store says to one question of a rank that has been welcomed."""
    with proven(address) as sock:
        sock.sendall(encode(dict(HELLO.header(), generation=10**6 + next(GENERATIONS))) + encode(header))
        decoder, answers = Decoder(), []
        while len(answers) < 2:
            decoder.feed(exactly(sock, 1))
            message = decoder.next()
            answers += [] if message is None else [message]
    return answers[1].header


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, -1.0, 1e30, 10**400, True, "1"])
def test_a_wait_of_no_length_is_refused(store, timeout_s):
    assert asked(store[1], {"op": "get", "keys": ["a"], "timeout_s": timeout_s})["op"] == "refused"
    assert store[0]._thread.is_alive()


def test_an_answer_of_more_than_a_message_may_have_is_refused():
    from commlib.rendezvous_room import Room, Wait

    class Asking:
        told = []

        def tell(self, header, payload=b""):
            self.told.append(header)

    room = Room(HELLO)
    room.set("a", bytes(1 << 20))
    assert room.answer(Wait(Asking(), ["a"] * (MAX_PAYLOAD_NBYTES >> 20), 1.0))
    assert room.answer(Wait(Asking(), ["a"] * (1 + (MAX_PAYLOAD_NBYTES >> 20)), 1.0))
    assert [header["op"] for header in Asking.told] == ["values", "late"]


def test_the_store_still_brings_ranks_together(store):
    for _ in range(3):
        generation = 10**8 + next(GENERATIONS)
        bodies = [member(rank, 2, store[1], owner="commrun", generation=generation) for rank in range(2)]
        assert together(*bodies) == [[b"0", b"1"]] * 2


# ---- a rank, whose store has gone mad ----------------------------------------------------------------------------

ANSWERS = st.builds(encoded, st.builds(lambda header, changed: {**header, **changed}, st.one_of(
    st.fixed_dictionaries({"op": st.just("values"), "lengths": st.one_of(st.lists(NUMBERS, max_size=3), VALUES)}),
    st.fixed_dictionaries({"op": st.sampled_from(["late", "failed", "refused"]), "text": VALUES, "rank": VALUES})),
    st.dictionaries(st.sampled_from(["lengths", "text", "rank"]), VALUES, max_size=1)), st.binary(max_size=8))  # fmt: skip


@ALIKE
@given(mangled(ANSWERS))
def test_a_rank_gets_its_values_or_a_start_error(answer):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        store = Store(_Channel(ours, "commrun", "unix:@x"), HELLO, TIMEOUT_S)
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        try:
            values = store.get_all(["a", "b"])
        except StartError as error:
            assert error.rank is None or type(error.rank) is int
        else:
            assert len(values) == 2 and all(type(value) is bytes for value in values)


# ---- commrun's connection with a host ----------------------------------------------------------------------------

@ALIKE
@given(mangled(st.builds(lambda noise, messages: noise + MARK + b"".join(messages), st.binary(max_size=20),
                         st.lists(MESSAGES, max_size=3))), st.integers(1, 50))  # fmt: skip
def test_a_host_is_understood_or_its_connection_ends(data, step):
    heard = []
    link = types.SimpleNamespace(_decoder=None, _before=b"", is_open=True, _heard=lambda _, message: heard.append(message))
    with contextlib.suppress(WireError):
        for at in range(0, len(data), step):
            Link._decode(link, data[at:at + step])
    assert all(isinstance(message.header["op"], str) for message in heard)
