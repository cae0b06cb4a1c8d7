"""Random models learn the same in every form, on every rank, and as one process; the seed is in the test's name."""

import pytest
from hard_check import check
from hard_random import CASES


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_random_model(torch_ranks, size, case):
    check(torch_ranks(size), "hard_random", case, horovod_as_alone=False)
