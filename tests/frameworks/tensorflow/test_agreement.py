"""Gradients that one rank has and another one does not: nothing waits for ever."""

import pytest


@pytest.fixture(params=[False, True], ids=["eager", "function"])
def graph(request):
    return request.param


@pytest.mark.parametrize("size", [2, 3])
def test_tapes(tensorflow_ranks, size, graph):
    for errors, zeros, none in tensorflow_ranks(size).call("agreement_cases:of_tapes", graph):
        for (kind, text), part in zip(errors, ("and others do not: compute it on every rank", "is tf.IndexedSlices on some")):
            assert kind == ("FailedPreconditionError" if graph else "MismatchError")
            assert "ranks disagree" in text and part in text, text
        assert zeros == [3.0 * size, 4.0]
        assert none == [3.0 * size, None, None]


@pytest.mark.parametrize("way", ["graph", "eager", "overlap"])
def test_a_head_for_each_rank(tensorflow_ranks, way):
    for far, are_equal, unused in tensorflow_ranks(2).call("agreement_cases:in_fit", way):
        assert far < 1e-6 and are_equal and unused == [1.0] * 4


def test_one_waits_where_another_overlaps(tensorflow_ranks):
    assert tensorflow_ranks(2).call("agreement_cases:one_of_two_overlaps") == [True, True]


@pytest.mark.parametrize("way, part", [("accumulating", "and others do not"), ("sparse", "is tf.IndexedSlices on some")])
def test_what_cannot_be_brought_together(tensorflow_ranks, way, part):
    for kind, text in tensorflow_ranks(2).call("agreement_cases:refused_in_fit", way):
        assert kind == "FailedPreconditionError" and "ranks disagree" in text and part in text, text


def test_ranks_with_less_work(tensorflow_ranks, graph):
    assert tensorflow_ranks(3).call("agreement_cases:with_less_work", graph) == [2] * 3
