"""One table of dtype names, in both spellings."""

from __future__ import annotations

import pytest
import torch

from accel.dtypes import FLOATS, SHORT, TENSORS, torch_dtype
from accel.errors import UserError


def test_both_spellings_name_torchs_dtype():
    assert [torch_dtype(name) for name in SHORT] == [torch.float32, torch.bfloat16, torch.float16]
    assert [torch_dtype(name) for name in FLOATS] == [torch_dtype(name) for name in SHORT]
    assert torch_dtype("int64") == torch.int64 and set(FLOATS) < set(TENSORS)


@pytest.mark.parametrize("name", ["fp8", "Tensor", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UserError, match=f"unknown save dtype '{name}'\n.*one of: float32, float16"):
        torch_dtype(name, ("float32", "float16"), "save dtype")
