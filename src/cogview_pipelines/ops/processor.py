"""What arithmetic the processor has: 16-bit numbers are slow where it has none for them."""

import functools
import platform

import torch

# what has to be there, any of it, on x86
_X86_INSTRUCTIONS = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
_ELSEWHERE = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """
    Whether the processor has instructions for products of such numbers, which PyTorch uses.

    Where it has none, PyTorch's products of 16-bit numbers take many times as long as those of float32: they save
    memory, but no time.
    """
    if dtype not in _X86_INSTRUCTIONS:
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return any(getattr(torch.cpu, name, lambda: False)() for name in _X86_INSTRUCTIONS[dtype])
    known = getattr(torch.ops.mkldnn, _ELSEWHERE[dtype], None)
    return known is not None and bool(known())
