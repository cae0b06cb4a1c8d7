"""Every hard model: the same bits on all ranks and in the forms that overlap and wait, and what one process learns."""

import pytest
from hard_check import check
from hard_models import CASES

# 16-bit weights round differently when one process adds all rows. Horovod's form moves weights that no rank used.
NOT_AS_ALONE = {"HalfPrecision", "Float16"}
# spectral_norm's vectors move once per forward, of which one process has more.
NOT_AS_ALONE |= {"Parametrized"}
WAITED_FOR = {"Overlaid": "share memory"}
NOISY = {"Attention": ("lion",)}  # a key's bias has no influence; Lion looks at the sign of its gradient
ONLY_SOME = {"Complex": ("sgd", "adamw", "adagrad")}  # NAdam and Lion know no complex numbers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_model(torch_ranks, size, case):
    horovod_as_alone = case != "Captured" and not case.startswith("By")
    check(torch_ranks(size), "hard_models", case, as_alone=case not in NOT_AS_ALONE, waited_for=WAITED_FOR.get(case),
          optimizers=ONLY_SOME.get(case), noisy=NOISY.get(case, ()), horovod_as_alone=horovod_as_alone)  # fmt: skip
