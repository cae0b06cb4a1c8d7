"""Every script: the same bits on all ranks and in the forms that overlap and wait, and what one process learns."""

import pytest
from hard_check import check
from hard_scripts import CASES

# float32 and bfloat16: sums over rows in another order.
NOT_AS_ALONE = {"long_run"}
WAITED_FOR = {"halves": "step(closure)"}
# torch.export, and the first bfloat16 of a process, take seconds; both know nothing of optimizers.
OPTIMIZERS = {"traced": ("adamw",), "long_run": ("sgd", "adamw")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_script(torch_ranks, size, case):
    check(torch_ranks(size), "hard_scripts", case, as_alone=case not in NOT_AS_ALONE, waited_for=WAITED_FOR.get(case),
          optimizers=OPTIMIZERS.get(case))  # fmt: skip
