"""Reductions in two halves, which is how a step ends before its reductions do."""


def test_steps_finish_what_the_last_one_began(tensorflow_ranks):
    tensorflow_ranks(2).call("halves_cases:over_calls")


def test_each_beginning_is_finished_once(tensorflow_ranks):
    for message in tensorflow_ranks(2).call("halves_cases:one_after_the_other"):
        assert "allreduce 'mismatched half' float32" in message and "(3,)" in message and "(4,)" in message
