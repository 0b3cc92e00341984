"""
Three-region sparse attention: ours beside what one could use instead, in one run.

    python benchmarks/bench_sparse_attention.py           # 1,024, 4,096, 16,384 tokens; one JSON line each
    python benchmarks/bench_sparse_attention.py --lengths 4096 --num_heads 4 --threads 1

Every way is timed forward, and forward and backward: sparse attention (`merged`, `blocked` and `reference`), causal
`scaled_dot_product_attention`, which skips what is masked (`causal`), the same function with the sparse pattern as a
mask (`masked`), attention written out with a causal mask (`vanilla`, what the paper compares with), and compiled
FlexAttention with the sparse pattern (`flex`). Times are medians; memory is what a call of both
directions needs at most beyond its inputs. A way that fails, or would need more than `--max_gigabytes`, is null with
the reason.
"""

import argparse
import json
import os

import torch
import torch.nn.functional as F
from bench_local_attention import PeakMemory, measure

from cogview_pipelines.environment import stamp
from cogview_pipelines.ops.three_region_attention import draw_pivots, three_region_attention, visible_keys

SPARSE_WAYS = ("merged", "blocked", "reference")


def heads_first(tensors):
    return [tensor.transpose(1, 2) for tensor in tensors]


def sparse(backend, options):
    def build(pivots, length):
        window = {"window_size": options.window_size, "num_windows": options.num_windows}
        return lambda *inputs: three_region_attention(*inputs, pivots, **window, backend=backend)

    return build


def causal(pivots, length):
    return lambda *inputs: F.scaled_dot_product_attention(*heads_first(inputs), is_causal=True).transpose(1, 2)


def sparse_mask(pivots, length, options):
    """`(batch_size, length, length)`: what sparse attention sees; without the bonus of pivots."""
    window, left = visible_keys(length, options.window_size, options.num_windows, pivots.device)
    is_pivot = torch.zeros(len(pivots), length, dtype=torch.bool, device=pivots.device).scatter_(1, pivots, True)
    return window | (left & is_pivot[:, None])


def masked(options):
    def build(pivots, length):
        mask = sparse_mask(pivots, length, options)[:, None]
        return lambda *inputs: F.scaled_dot_product_attention(*heads_first(inputs), mask).transpose(1, 2)

    return build


def vanilla(pivots, length):
    mask = torch.ones(length, length, dtype=torch.bool, device=pivots.device).tril()

    def run(*inputs):
        query, key, value = heads_first(inputs)
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        return (scores.masked_fill(~mask, -10000.0).softmax(-1) @ value).transpose(1, 2)

    return run


def flex(options):
    def build(pivots, length):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = sparse_mask(pivots, length, options)
        seen = create_block_mask(
            lambda batch, head, query, key: mask[batch, query, key], len(pivots), None, length, length, pivots.device
        )
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda *inputs: compiled(*heads_first(inputs), block_mask=seen).transpose(1, 2)

    return build


def memory_of(way, inputs) -> float:
    """Roughly the bytes of the scores that a way keeps for its backward pass, to leave out what cannot fit."""
    batch_size, length, num_heads, _ = inputs[0].shape
    kept = {"vanilla": 4, "reference": 6, "masked": 1 / num_heads, "flex": 1 / num_heads}.get(way, 0)
    return kept * batch_size * num_heads * length**2 * inputs[0].element_size()


def run_case(length: int, options: argparse.Namespace) -> dict:
    generator = torch.Generator(options.device).manual_seed(0)
    shape = (options.batch_size, length, 3, options.num_heads, options.head_dim)
    fused = torch.randn(shape, generator=generator, device=options.device).to(getattr(torch, options.dtype))
    is_text = torch.zeros(options.batch_size, length, dtype=torch.bool, device=options.device)
    is_text[:, : options.num_text] = True
    pivots = draw_pivots(is_text, min(options.num_pivots, length), generator=generator)
    ways = {name: sparse(name, options) for name in SPARSE_WAYS}
    ways |= {"causal": causal, "masked": masked(options), "vanilla": vanilla, "flex": flex(options)}
    line = {"length": length, "batch_size": options.batch_size, "num_heads": options.num_heads}
    line |= {"head_dim": options.head_dim, "dtype": options.dtype, "window": options.window_size * options.num_windows}
    line |= {"window_size": options.window_size, "num_pivots": pivots.shape[1], "device": options.device}
    for way, build in ways.items():
        if options.only and way not in options.only:
            continue
        row = line[way] = {"forward_ms": None, "training_ms": None, "training_mb": None}
        try:
            needed = memory_of(way, fused.unbind(2))
            if needed > options.max_gigabytes * 1e9:
                raise MemoryError(f"would need about {needed / 1e9:.0f} GB")
            run = build(pivots, length)
            with torch.no_grad():
                inputs = fused.unbind(2)
                row["forward_ms"] = 1e3 * measure(lambda run=run, inputs=inputs: run(*inputs), options.device, 0.0)
            leaf = fused.clone().requires_grad_()
            upstream = torch.ones(shape[0], length, *shape[3:], device=options.device, dtype=fused.dtype)

            def train(run=run, leaf=leaf, upstream=upstream):
                torch.autograd.grad(run(*leaf.unbind(2)), leaf, upstream)

            row["training_ms"] = 1e3 * measure(train, options.device, options.seconds)
            with PeakMemory(options.device) as memory:
                train()
            row["training_mb"] = memory.bytes and memory.bytes / 1e6
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
            if way in SPARSE_WAYS and not isinstance(error, MemoryError) and options.device == "cpu":
                raise
    ours = min((line[way] for way in SPARSE_WAYS[:2] if line.get(way, {}).get("training_ms")), key=_training)
    for way in ("causal", "masked", "vanilla", "flex"):
        theirs = line.get(way, {})
        if theirs.get("training_ms"):
            line[f"faster_than_{way}"] = round(theirs["training_ms"] / ours["training_ms"], 2)
        if theirs.get("training_mb") and ours["training_mb"]:
            line[f"memory_of_{way}"] = round(ours["training_mb"] / theirs["training_mb"], 3)
    return line


def _training(row: dict) -> float:
    return row["training_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384], help="tokens of a sequence")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--window_size", type=int, default=128, help="positions of a block")
    parser.add_argument("--num_windows", type=int, default=6, help="blocks of the window")
    parser.add_argument("--num_pivots", type=int, default=768)
    parser.add_argument("--num_text", type=int, default=60, help="pivots that are text, at the beginning")
    parser.add_argument("--only", nargs="*", help="only these ways")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument(
        "--max_gigabytes", type=float, help="leave out ways that need more (default: a third of memory)"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.max_gigabytes is None:
        options.max_gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3e9
    for length in options.lengths:
        print(json.dumps({**run_case(length, options), **stamp(options.device)}), flush=True)


if __name__ == "__main__":
    main()
