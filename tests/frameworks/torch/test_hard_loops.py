"""Every hard loop: the same bits on all ranks and in the forms that overlap and wait, and what one process learns."""

import pytest
from hard_check import check
from hard_loops import CASES

# float32 for some of the steps; a Horovod script moves what no rank used.
NOT_AS_ALONE = {"moved"}
HOROVOD_APART = {"frozen_and_unfrozen", "exceptions"} | {case for case in CASES if "partly" in case}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_loop(torch_ranks, size, case):
    check(torch_ranks(size), "hard_loops", case, as_alone=case not in NOT_AS_ALONE, horovod_as_alone=case not in HOROVOD_APART)
