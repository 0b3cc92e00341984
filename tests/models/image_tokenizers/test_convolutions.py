"""Convolutions of 16-bit numbers where the processor has no arithmetic for them."""

import pytest
import torch
from torch import nn

from cogview_pipelines.models.image_tokenizers import convolutions
from cogview_pipelines.models.image_tokenizers.convolutions import Conv2d, ConvTranspose2d

KINDS = [(Conv2d, nn.Conv2d), (ConvTranspose2d, nn.ConvTranspose2d)]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[1].__name__)
def layers(request):
    """One of ours and PyTorch's with the same float32 weights."""
    torch.manual_seed(0)
    ours, theirs = (layer(6, 4, 4, stride=2, padding=1) for layer in request.param)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_numbers_are_summed_in_float32_and_rounded_once(layers, dtype, monkeypatch):
    monkeypatch.setattr(convolutions, "multiplies", lambda _: False)
    ours, theirs = (layer.to(dtype) for layer in layers)
    inputs = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    output = ours(inputs)
    assert output.dtype == dtype
    assert torch.equal(output, theirs.float()(inputs.float()).to(dtype))
    output.float().square().sum().backward()
    assert ours.weight.grad.dtype == inputs.grad.dtype == dtype


@pytest.mark.parametrize("dtype, multiplies", [(torch.float32, False), (torch.bfloat16, True)])
def test_other_numbers_go_through_pytorch_as_they_are(layers, dtype, multiplies, monkeypatch):
    monkeypatch.setattr(convolutions, "multiplies", lambda _: multiplies)
    ours, theirs = (layer.to(dtype) for layer in layers)
    inputs = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(ours(inputs), theirs(inputs))
