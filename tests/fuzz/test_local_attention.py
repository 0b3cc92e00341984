"""Fused local attention and its gradients against float64: random geometry, sizes, strides, biases and dtypes."""

import pytest
import torch

from ..ops.attention_cases import assert_as_accurate_as_pytorch, needs_kernels, random_case, to_dtype
from .utils import cases

FIRST_SEED = 1000  # the seeds before are those of tests/ops


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_are_as_accurate_as_those_of_pytorch(dtype):
    failed = []
    for number, _ in cases(150):
        generator = torch.Generator().manual_seed(FIRST_SEED + number)
        try:
            assert_as_accurate_as_pytorch(to_dtype(random_case(generator), dtype))
        except AssertionError as error:
            failed.append(f"seed {FIRST_SEED + number}: {str(error).splitlines()[0]}")
    assert not failed, failed[:10]
