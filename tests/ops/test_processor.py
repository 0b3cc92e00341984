"""Which 16-bit products the processor has instructions for."""

import platform

import pytest
import torch

from cogview_pipelines.ops.processor import multiplies

NAMES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")


@pytest.mark.parametrize(
    "instructions, bfloat16, float16",
    [
        ((), False, False),
        (("_is_avx512_bf16_supported",), True, False),
        (("_is_amx_tile_supported",), True, False),
        (("_is_amx_tile_supported", "_is_amx_fp16_supported"), True, True),
    ],
)
def test_x86_multiplies_what_it_has_instructions_for(monkeypatch, instructions, bfloat16, float16):
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    for name in NAMES:
        monkeypatch.setattr(torch.cpu, name, lambda has=name in instructions: has, raising=False)
    assert multiplies.__wrapped__(torch.bfloat16) is bfloat16
    assert multiplies.__wrapped__(torch.float16) is float16
    assert multiplies.__wrapped__(torch.float32) is multiplies.__wrapped__(torch.float64) is True


@pytest.mark.parametrize("has", [False, True])
def test_of_other_processors_torch_knows(monkeypatch, has):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: has, raising=False)
    assert multiplies.__wrapped__(torch.bfloat16) is multiplies.__wrapped__(torch.float16) is has
