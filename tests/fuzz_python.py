"""What parses a peer's bytes in Python, as functions of bytes: for atheris (libFuzzer for Python), and for tests without it.

    pip install atheris
    python tests/fuzz_python.py settings -max_total_time=60     any of TARGETS, then libFuzzer's options and folders

Each takes bytes and may refuse them in its own words only; whatever else is raised is a finding. This file knows what is parsed;
where the bytes come from is the caller's business.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import types

if __name__ == "__main__":
    import atheris

    watching = atheris.instrument_imports(include=["commlib"])
else:
    watching = contextlib.nullcontext()

with watching:
    import commlib.bootstrap
    import commlib.launch.link
    import commlib.settings
    import commlib.timeline
    import commlib.told

from commlib.bootstrap import StartError
from commlib.launch.link import MARK, Link
from commlib.proof import ANSWER_NBYTES, NONCE_NBYTES, THE_STORE, Calling, Claim, Listening
from commlib.rendezvous_wire import MAX_RANKS, PROTOCOL, Decoder, Hello, Message, WireError, encode, hello_of, values_of
from commlib.settings import Settings
from commlib.timeline import joined
from commlib.told import facts_of, name_of, offers_of, ranks_of

KEY = bytes(32)
HELLO = Hello(PROTOCOL, "1", 2, 1, 1, "host", 1)
CLOCK = b'{"clock": "a", "epoch_us": 5}\n[{"ts": 1.5, "ph": "X"}]'


def wire(data):
    """The store's, a rank's and commrun's streams: whole messages, however they are cut, and what is made of them."""
    decoder, cut = Decoder(1 << 16), data[0] % 64 if data else 0
    for piece in (data[1:cut], data[max(1, cut):]):
        decoder.feed(piece)
        message = decoder.next()
        while message is not None:
            hello(json.dumps(message.header).encode())
            message = decoder.next()


def hello(data):
    header = json.loads(data)
    if isinstance(header, dict) and isinstance(header.get("op"), str):
        found = hello_of(header)
        assert 0 <= found.rank < found.size <= MAX_RANKS and found.generation > 0


def values(data):
    header, _, payload = data.partition(b"\n")
    found = values_of(Message({"op": "values", "lengths": json.loads(header)}, payload), 2)
    assert len(found) == 2 and b"".join(found) == payload


def proof(data):
    listening = Listening(KEY)
    assert listening.judge(data) is None and listening.answer == bytes(ANSWER_NBYTES)


def link(data):
    heard = []
    host = types.SimpleNamespace(_decoder=None, _before=b"", is_open=True, _heard=lambda _, message: heard.append(message))
    Link._decode(host, data)
    assert all(isinstance(message.header["op"], str) for message in heard)


def settings(data):
    record = Settings.from_json(data.decode())
    assert Settings.from_json(record.to_json()) == record


def told(data):
    for read in (facts_of, name_of, ranks_of, offers_of):
        try:
            read(data, 3)
        except StartError as error:
            assert error.rank == 3


def timeline(data):
    joined([CLOCK, data])


_PROOF = Calling(KEY, Claim(1, THE_STORE))

# name: (function, what it may raise, bytes to begin with)
TARGETS = {
    "wire": (wire, (WireError, ValueError), [b"\x20" + encode(HELLO.header()) + encode({"op": "get", "keys": ["a"]}, b"abc")]),
    "hello": (hello, (WireError, ValueError), [json.dumps(HELLO.header()).encode()]),
    "values": (values, (WireError, ValueError), [b"[1, 2]\nabc", b"[0, 0]\n"]),
    "proof": (proof, (), [_PROOF.greeting + _PROOF.prove(bytes(NONCE_NBYTES))]),
    "link": (link, (WireError,), [b"hello\n" + MARK + encode({"op": "ready", "pid": 3}) + encode({"op": "ended"}, b"1")]),
    "settings": (settings, (ValueError,), [
        Settings().to_json().encode(),
        Settings(algorithms=(("allreduce", "ring"),), table=(("allreduce", (2,), 4096, "ring"),)).to_json().encode()]),
    "told": (told, (), [b'{"host": "a", "name": "b", "transport": "auto", "nonce": "00"}', b'"name"', b"[1, 2]",
                        b'[["eth0", "10.0.0.7", 4711], ["lo", "::1", 1]]']),
    "timeline": (timeline, (ValueError, KeyError, TypeError, AttributeError), [CLOCK]),
}  # fmt: skip


def run(name, data):
    """One input; what may be raised is passed over."""
    function, refusals, _ = TARGETS[name]
    try:
        function(data)
    except (*refusals, RecursionError) if name in ("hello", "values", "timeline") else refusals:
        pass  # those parse JSON themselves, to hand it over


def main():
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(TARGETS[name][2]):
            pathlib.Path(folder, str(number)).write_bytes(data)
        atheris.Setup([*sys.argv, folder], lambda data: run(name, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
