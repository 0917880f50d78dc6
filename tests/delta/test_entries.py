"""What a merge writes is checked before: sums that are not finite, in every dtype, on devices without float64 too."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_dowser.delta.apply import Delta, merged_entries


class NoFloat64(TorchDispatchMode):
    """A device such as MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), func
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [[], [float("inf")], [float("nan")], [float("inf"), -float("inf")]])
def test_sums_that_are_not_finite_are_counted_without_float64(dtype: torch.dtype, bad: list[float]) -> None:
    weight, values = torch.full((9,), torch.finfo(dtype).max, dtype=dtype), torch.zeros(9)
    values[: len(bad)] = torch.tensor(bad)
    with NoFloat64():
        entries = merged_entries(weight, Delta(torch.arange(9), values))
        if not bad:
            entries.check_finite("default", "up_proj")
            return
        with pytest.raises(ValueError, match=rf"write {len(bad)} values that are not finite in {dtype}"):
            entries.check_finite("default", "up_proj")
