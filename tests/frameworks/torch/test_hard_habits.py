"""Every habit: the same bits on all ranks and in the forms that overlap and wait, and what one process learns."""

import pytest
from hard_check import check
from hard_habits import APART, CASES

# A Horovod script moves what no rank has a gradient for; the model says "zeros" to a step before any backward.
HOROVOD_APART = {"stepped_first", "bad_batch"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_habit(torch_ranks, size, case):
    check(torch_ranks(size), "hard_habits", case, as_alone=case not in APART, horovod_as_alone=case not in HOROVOD_APART)
