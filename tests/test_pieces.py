"""Pieces: memory gathered from many places, and scattered back."""

import numpy
import pytest

import commlib

LENGTHS = [3, 0, 1, 1000, 0, 17]


def lying_apart(values):
    return [numpy.array(part) for part in numpy.split(values, numpy.cumsum(LENGTHS)[:-1])]


def addresses_of(parts):
    return [part.ctypes.data if len(part) else 0 for part in parts]


def test_there_and_back():
    values = numpy.random.default_rng(1).standard_normal(sum(LENGTHS))
    whole, parts = numpy.zeros(len(values)), lying_apart(values)
    pieces = commlib.Pieces(whole.ctypes.data, [part.nbytes for part in parts])
    pieces.gather(addresses_of(parts))
    numpy.testing.assert_array_equal(whole, values)
    whole *= 2
    others = [numpy.zeros_like(part) for part in parts]
    pieces.scatter(iter(addresses_of(others)))  # any iterable, and other places than those it came from
    numpy.testing.assert_array_equal(numpy.concatenate(others), 2 * values)
    numpy.testing.assert_array_equal(numpy.concatenate(parts), values)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_addresses_as_pieces(count):
    whole, part = numpy.zeros(2), numpy.ones(1)
    pieces = commlib.Pieces(whole.ctypes.data, [8, 8])
    for copy in (pieces.gather, pieces.scatter):
        with pytest.raises((ValueError, IndexError)):
            copy([part.ctypes.data] * count)
        with pytest.raises((ValueError, IndexError)):
            copy(iter([part.ctypes.data] * count))
    assert whole.tolist() == [0, 0] and part.tolist() == [1]
