"""What parses a peer's bytes in Python, with bytes that are nearly right: fuzz_python.py's targets, without atheris.

The same bytes in every run. `make fuzz` gives these targets to atheris, if it is installed.
"""

import random

import fuzz_python
import pytest

INPUTS = 1500
TOKENS = [b"null", b"true", b"-1", b"1e999", b"NaN", b'"', b"{}", b"[]", b"[[[[", b"18446744073709551616", b'{"op": "hello"}',
          b"\xff\xfe", b"\x00" * 4, b":", b",", b"0.5"]  # fmt: skip


def changed(data, generator, others):
    """A few changes: bytes cut, doubled, overwritten, and pieces of JSON put in."""
    data = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randint(0, len(data))
        length = generator.choice([0, 1, 2, 8, 30])
        piece = generator.choice([generator.randbytes(length), generator.choice(TOKENS), bytes(data[at:at + length]),
                                  generator.choice(others)])  # fmt: skip
        data[at:at + generator.choice([0, length, len(piece)])] = piece
    return bytes(data)


@pytest.mark.parametrize("name", fuzz_python.TARGETS)
def test_any_bytes_are_understood_or_refused(name):
    generator, seeds = random.Random(name), fuzz_python.TARGETS[name][2]
    for data in seeds:
        fuzz_python.run(name, data)
    for _ in range(INPUTS):
        data = changed(generator.choice(seeds), generator, seeds)
        try:
            fuzz_python.run(name, data)
        except Exception as error:
            raise AssertionError(f"{name} raises {error!r} for {data!r}") from error


@pytest.mark.parametrize("name", ["settings", "told", "values"])
def test_deep_nesting_is_refused(name):
    for opened, closed in (b"[]", b"{}"):
        fuzz_python.run(name, bytes([opened]) * 100_000 + bytes([closed]) * 100_000)
        fuzz_python.run(name, bytes([opened]) * 100_000)
