"""Everything around the optimizer: the same bits on all ranks and in all forms, and what one process learns."""

import pytest
from hard_check import check
from hard_optimizers import CASES, FUSED_SCALED, MIXED, WITH_ITS_OWN

# Forms that do not wait for whole steps get a reason to, here.
WAITED_FOR = {
    "closure": "step(closure)", "lbfgs": "step(closure)", "lbfgs, strong_wolfe": "step(closure)",
    "scaled, fused": "GradScaler", "scaled, fused, infinite": "GradScaler", "scaled, fused, unscale": "GradScaler",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_optimizer(torch_ranks, size, case):
    optimizers = ("sgd",) if case in WITH_ITS_OWN else None  # a case with its own makes it whatever it is told
    as_alone = case not in MIXED and case not in FUSED_SCALED
    check(torch_ranks(size), "hard_optimizers", case, as_alone=as_alone, waited_for=WAITED_FOR.get(case), optimizers=optimizers)
