"""Reductions in two halves, which is how a step ends before its reductions do."""


def test_steps_finish_what_the_last_one_began(tensorflow_ranks):
    tensorflow_ranks(2).call("halves_cases:over_calls")


def test_each_beginning_is_finished_once(tensorflow_ranks):
    for message in tensorflow_ranks(2).call("halves_cases:one_after_the_other"):
        assert "allreduce 'mismatched half' float32" in message and "(3,)" in message and "(4,)" in message


def test_a_name_is_in_flight_however_it_was_submitted(tensorflow_ranks):
    for said in tensorflow_ranks(2).call("halves_cases:one_name"):
        assert len(said) == 16
        for case, message in said.items():
            assert message is not None and "allreduce 'one name' is still in flight" in message, (case, message)
