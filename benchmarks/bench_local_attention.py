"""
Local attention: ours beside what one could use instead, in one run.

    python benchmarks/bench_local_attention.py --device cpu                       # a table
    python benchmarks/bench_local_attention.py --device cuda --json               # one JSON line a case
    python benchmarks/bench_local_attention.py --device cpu --cases 60x60_9x9_h8 --threads 2

Every case is timed forward and forward + backward, for the fused kernels, the reference in PyTorch operations, and
the peers: compiled FlexAttention with a block mask, dense `scaled_dot_product_attention` with a mask, dense
attention written out (unfused), the unfold (im2col) way and, on CUDA where it is installed, NATTEN (which shifts
windows inwards at the border: other numbers, like work). Times are medians. A peer that fails or would need more
than `--max_gigabytes` is null, with the reason.

`fraction_of_floor` is the floor over our forward time. The floor is the longer of two times: reading query, keys and
values and writing the output once at the copy bandwidth measured in this run, and the multiplications inside the
windows at the matrix-product rate measured in this run. `training_fraction_of_floor` counts five products more and
every tensor and its gradient.
"""

import argparse
import ctypes
import json
import math
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cogview_pipelines.environment import stamp
from cogview_pipelines.ops.key_set import KeySet
from cogview_pipelines.ops.local_attention import in_window, local_attention, window_mask
from cogview_pipelines.ops.native import build_info

Grid = tuple[int, int]


@dataclass
class Case:
    """Shapes of a call. `cross` is (grid, kernel size)."""

    name: str
    batch_size: int
    num_heads: int
    head_dim: int
    grid: Grid
    kernel: Grid
    cross: tuple[Grid, Grid] | None = None
    context: int = 0
    dtype: str = "float32"
    devices: tuple[str, ...] = ("cpu", "cuda")


def all_cases() -> list[Case]:
    released = {
        "num_heads": 48,
        "head_dim": 64,
        "grid": (60, 60),
        "kernel": (9, 5),
        "dtype": "bfloat16",
        "devices": ("cuda",),
    }
    shipped = {"num_heads": 4, "head_dim": 64, "grid": (30, 30), "kernel": (9, 5)}
    coarse, shipped_coarse = ((20, 20), (5, 5)), ((10, 10), (5, 5))
    cases = [Case("60x60_9x9_h8", 1, 8, 64, (60, 60), (9, 9), devices=("cpu",))]
    cases += [
        Case("60x60_9x5_h8", 1, 8, 64, (60, 60), (9, 5), dtype=dtype, devices=("cpu",)) for dtype in ("float32",)
    ]
    cases += [Case("60x60_9x5_cross_h8", 1, 8, 64, (60, 60), (9, 5), coarse, devices=("cpu",))]
    cases += [Case("60x60_9x5_context_h8", 1, 8, 64, (60, 60), (9, 5), None, 16, devices=("cpu",))]
    cases += [Case("64x64_9x9_h8", 1, 8, 64, (64, 64), (9, 9), devices=("cpu",))]
    for batch_size in (1, 8):
        cases += [
            Case(f"60x60_9x5_b{batch_size}", batch_size, **released),
            Case(f"60x60_9x5_cross_b{batch_size}", batch_size, **released, cross=coarse),
            Case(f"60x60_9x5_context_b{batch_size}", batch_size, **released, context=16),
            Case(f"64x64_9x9_b{batch_size}", batch_size, **{**released, "grid": (64, 64), "kernel": (9, 9)}),
        ]
        for dtype in ("float32", "bfloat16"):
            cases += [
                Case(
                    f"shipped_direct_b{batch_size}_{dtype}", batch_size, **shipped, cross=shipped_coarse, dtype=dtype
                ),
                Case(f"shipped_iterative_b{batch_size}_{dtype}", batch_size, **shipped, context=16, dtype=dtype),
            ]
    return cases


# ------------------------------------------------------------------------------------------------------------ the ways


def make_inputs(case: Case, device: str) -> dict:
    """Tensors of a case, as views of fused projections, as `local_attention` takes them."""
    generator = torch.Generator(device).manual_seed(0)

    def views(positions, parts):
        shape = (case.batch_size, positions, parts, case.num_heads, case.head_dim)
        fused = torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))
        return fused.unbind(2)

    query, key, value = views(math.prod(case.grid), 3)
    key_sets = [KeySet(key, value, case.grid, case.kernel)]
    if case.cross:
        key_sets.append(KeySet(*views(math.prod(case.cross[0]), 2), *case.cross))
    if case.context:
        key_sets.append(KeySet(*views(case.context, 2)))
    return {"query": query, "key_sets": key_sets, "query_grid": case.grid}


def as_leaves(inputs: dict) -> dict:
    """The same inputs, of which gradients can be had."""

    def leaf(tensor):
        return tensor.detach().requires_grad_()

    sets = [keys.with_keys(leaf(keys.key), leaf(keys.value)) for keys in inputs["key_sets"]]
    return {**inputs, "query": leaf(inputs["query"]), "key_sets": sets}


def joined(inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and all keys and values, heads first."""
    keys, values = zip(*((keys.key, keys.value) for keys in inputs["key_sets"]), strict=True)
    return tuple(x.transpose(1, 2) for x in (inputs["query"], torch.cat(keys, 1), torch.cat(values, 1)))


def dense_mask(case: Case, device: str) -> torch.Tensor:
    masks = [window_mask(case.grid, case.grid, case.kernel, device=device)]
    if case.cross:
        masks.append(window_mask(case.grid, case.cross[0], case.cross[1], device=device))
    if case.context:
        masks.append(torch.ones(math.prod(case.grid), case.context, dtype=torch.bool, device=device))
    return torch.cat(masks, 1)


def dense_sdpa(case, device):
    mask = dense_mask(case, device)
    return lambda inputs: F.scaled_dot_product_attention(*joined(inputs), attn_mask=mask).transpose(1, 2)


def dense_unfused(case, device):
    mask = dense_mask(case, device)

    def run(inputs):
        query, key, value = joined(inputs)
        scores = (query * case.head_dim**-0.5) @ key.transpose(-1, -2)
        return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ value).transpose(1, 2)

    return run


def flex(case, device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, columns = case.grid
    own = rows * columns
    coarse_grid, coarse_kernel = case.cross or ((1, 1), (1, 1))
    coarse_keys = math.prod(coarse_grid) if case.cross else 0

    def seen(batch, head, query, key):
        cells = (query // columns, query % columns)
        result = (key < own) & in_window(*cells, key // columns, key % columns, case.grid, case.grid, case.kernel)
        if case.cross:
            other = key - own
            near = in_window(
                *cells, other // coarse_grid[1], other % coarse_grid[1], case.grid, coarse_grid, coarse_kernel
            )
            result = result | ((other >= 0) & near)
        if case.context:
            result = result | (key >= own + coarse_keys)
        return result

    block_mask = create_block_mask(seen, None, None, own, own + coarse_keys + case.context, device=device)
    torch._dynamo.reset()  # after a failure, such as the missing backward pass on a CPU, it would not compile again
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda inputs: compiled(*joined(inputs), block_mask=block_mask).transpose(1, 2)


def unfold(case, device):
    """im2col: a copy of the window of every query, then small products."""

    def windows(tensor, grid, kernel):
        batch_size, _, num_heads, head_dim = tensor.shape
        image = tensor.permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_dim, *grid)
        columns = F.unfold(
            image.float() if device == "cpu" else image, kernel, padding=(kernel[0] // 2, kernel[1] // 2)
        )
        return columns.to(tensor.dtype).view(batch_size * num_heads, head_dim, math.prod(kernel), -1)

    def sources(inputs):
        """Keys, and values, of the window on the own grid, of that on the coarse grid and of the context."""
        pairs = iter([(keys.key, keys.value) for keys in inputs["key_sets"]])
        absent = (None, None)
        return zip(next(pairs), next(pairs) if case.cross else absent, next(pairs) if case.context else absent)

    def all_windows(tensor, coarse, context):
        parts = [windows(tensor, case.grid, case.kernel)]
        if case.cross:
            part = windows(coarse, *case.cross)
            ratio = [size // edge for size, edge in zip(case.grid, case.cross[0], strict=True)]
            part = part.unflatten(-1, case.cross[0]).repeat_interleave(ratio[0], -2).repeat_interleave(ratio[1], -1)
            parts.append(part.flatten(-2))
        if case.context:
            part = context.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(-1)
            parts.append(part.expand(-1, -1, -1, math.prod(case.grid)))
        return torch.cat(parts, 2)

    ones = torch.ones(1, math.prod(case.grid), 1, 1, device=device)
    off_grid = windows(ones, case.grid, case.kernel) == 0
    if case.cross or case.context:
        single = torch.ones(1, math.prod(case.cross[0]), 1, 1, device=device) if case.cross else None
        context = torch.ones(1, case.context, 1, 1, device=device)
        off_grid = all_windows(ones, single, context) == 0

    def run(inputs):
        query = inputs["query"].permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(2) * case.head_dim**-0.5
        key, value = (all_windows(*tensors) for tensors in sources(inputs))
        weights = (query * key).sum(1, keepdim=True).masked_fill(off_grid, -math.inf).softmax(2)
        output = (weights * value).sum(2).unflatten(0, (case.batch_size, case.num_heads))
        return output.permute(0, 3, 1, 2)

    return run


def natten_attention(case, device):
    import natten

    if case.cross or case.context:
        raise NotImplementedError("NATTEN's windows cannot share a softmax with other keys in one call")

    def run(inputs):
        (keys,) = inputs["key_sets"]
        image = [tensor.unflatten(1, case.grid) for tensor in (inputs["query"], keys.key, keys.value)]
        return natten.na2d(*image, kernel_size=case.kernel).flatten(1, 2)

    return run


WAYS = {
    "ours": lambda case, device: lambda inputs: local_attention(**inputs, backend="fused"),
    "reference": lambda case, device: lambda inputs: local_attention(**inputs, backend="reference"),
    "flex": flex,
    "dense_sdpa": dense_sdpa,
    "dense_unfused": dense_unfused,
    "unfold": unfold,
    "natten": natten_attention,
}
PEERS = ("flex", "dense_sdpa", "dense_unfused", "unfold", "natten")


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(function, device: str, seconds: float) -> float:
    """Median seconds of a call, after two to warm up."""
    for _ in range(2):
        function()
    times = []
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 200):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # the launches are queued behind it, so that their cost on the host, up to 0.3 ms, is hidden
            torch.cuda._sleep(2_000_000)
            first.record()
            function()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) / 1000)
    else:
        start = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - start < seconds and len(times) < 200):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


class PeakMemory:
    """Bytes that a block needs at most beyond what was allocated before; on a CPU from the resident set (Linux)."""

    def __init__(self, device: str):
        self.device, self.bytes = device, None

    @staticmethod
    def _resident(name: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif os.path.exists("/proc/self/clear_refs"):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
            with open("/proc/self/clear_refs", "w") as peak:
                peak.write("5")
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif os.path.exists("/proc/self/clear_refs"):
            self.bytes = max(self._resident("VmHWM") - self.before, 0)


def machine_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a copy (read plus written) and operations per second of a matrix product, measured."""
    size = 256 * 2**20 if device == "cuda" else 64 * 2**20
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * size / measure(lambda: target.copy_(source), device, 0.5)
    edge = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    return bandwidth, 2 * edge**3 / measure(lambda: a @ b, device, 0.5)


def memory_of(case: Case, way: str) -> float:
    """Roughly the bytes that a way needs in training, to leave out what cannot fit."""
    positions, size = math.prod(case.grid), torch.finfo(getattr(torch, case.dtype)).bits // 8
    heads = case.batch_size * case.num_heads
    keys = math.prod(case.kernel) + (math.prod(case.cross[1]) if case.cross else 0) + case.context
    all_keys = positions + (math.prod(case.cross[0]) if case.cross else 0) + case.context
    if way == "unfold":
        return 6.0 * heads * positions * keys * case.head_dim * size
    if way == "dense_unfused" or (way == "dense_sdpa"):
        return (4.0 if way == "dense_unfused" else 1.0) * heads * positions * all_keys * size
    return 0.0


def run_case(case: Case, device: str, options: argparse.Namespace) -> dict:
    dtype = getattr(torch, case.dtype)
    bandwidth, rate = machine_rates(device, dtype)
    inputs = make_inputs(case, device)
    positions, heads = math.prod(case.grid), case.batch_size * case.num_heads
    pairs = int(window_mask(case.grid, case.grid, case.kernel).sum()) + positions * case.context
    keys = positions + case.context
    if case.cross:
        pairs += int(window_mask(case.grid, case.cross[0], case.cross[1]).sum())
        keys += math.prod(case.cross[0])
    operations = 4 * heads * pairs * case.head_dim
    moved = heads * case.head_dim * inputs["query"].element_size() * (2 * positions + 2 * keys)
    floor = max(moved / bandwidth, operations / rate)
    training_floor = max(3 * moved / bandwidth, 3.5 * operations / rate)
    line: dict = {"case": case.name, "device": device, "dtype": case.dtype, "batch_size": case.batch_size}
    line |= {"num_heads": case.num_heads, "head_dim": case.head_dim, "grid": case.grid, "kernel_size": case.kernel}
    line |= {"cross": case.cross, "context": case.context, "bandwidth_gb_s": round(bandwidth / 1e9, 1)}
    line |= {"matmul_tflops": round(rate / 1e12, 3), "floor_ms": round(floor * 1e3, 4)}
    line["training_floor_ms"] = round(training_floor * 1e3, 4)
    expected = None
    for way, build in WAYS.items():
        if options.only and way not in ("ours", *options.only):
            continue
        row: dict = {"forward_ms": None, "training_ms": None, "forward_mb": None, "training_mb": None}
        line[way] = row
        try:
            if memory_of(case, way) > options.max_gigabytes * 1e9:
                raise MemoryError(f"would need about {memory_of(case, way) / 1e9:.0f} GB")
            run = build(case, device)
            with torch.no_grad():
                output = run(inputs)
                expected = output if expected is None else expected
                if way != "natten":
                    torch.testing.assert_close(output.float(), expected.float(), atol=3e-2, rtol=3e-2)
                row["forward_ms"] = measure(lambda run=run: run(inputs), device, options.seconds) * 1e3
                with PeakMemory(device) as memory:
                    run(inputs)
                row["forward_mb"] = memory.bytes and memory.bytes / 1e6
            leaves = as_leaves(inputs)
            grad = torch.randn_like(output)

            def train(run=run, leaves=leaves, grad=grad):
                tensors = [leaves["query"], *(t for keys in leaves["key_sets"] for t in (keys.key, keys.value))]
                torch.autograd.grad(run(leaves), tensors, grad)

            row["training_ms"] = measure(train, device, options.seconds) * 1e3
            with PeakMemory(device) as memory:
                train()
            row["training_mb"] = memory.bytes and memory.bytes / 1e6
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
            if way == "ours":
                raise
    ours = line["ours"]
    for kind in ("forward", "training"):
        times = {way: line[way][f"{kind}_ms"] for way in PEERS if way in line and line[way][f"{kind}_ms"]}
        best = min(times, key=times.get) if times else None
        line[f"{kind}_best_peer"] = best
        line[f"{kind}_speedup_over_best_peer"] = times[best] / ours[f"{kind}_ms"] if best else None
    line["achieved_gb_s"] = moved / ours["forward_ms"] / 1e6
    line["achieved_tflops"] = operations / ours["forward_ms"] / 1e9
    line["fraction_of_floor"] = floor * 1e3 / ours["forward_ms"]
    line["training_fraction_of_floor"] = training_floor * 1e3 / ours["training_ms"]
    return line


def table(line: dict) -> str:
    text = [f"{line['case']} ({line['dtype']}, floor {line['floor_ms']:.3f} / {line['training_floor_ms']:.3f} ms)"]
    for way in WAYS:
        if way in line:
            numbers = [line[way][key] for key in ("forward_ms", "training_ms", "forward_mb", "training_mb")]
            shown = [f"{number:11.3f}" if number is not None else "          -" for number in numbers]
            text.append(f"  {way:14}{' '.join(shown)}  {line[way].get('failed', '')}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON line a case")
    parser.add_argument(
        "--cases", nargs="*", help="names, or beginnings of names, of cases; by default all of the device"
    )
    parser.add_argument("--only", nargs="*", choices=list(WAYS), help="beside ours, only these ways")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument(
        "--max_gigabytes", type=float, help="leave out peers that need more (default: half of the memory)"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.max_gigabytes is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if options.device == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory
        options.max_gigabytes = memory / 2e9
    torch.backends.cuda.matmul.allow_tf32 = False
    kernels = {key: value for key, value in build_info().items() if key != "library"}  # a path of this machine
    about = {**stamp(options.device), "kernels": kernels}
    if not options.json:
        print(
            json.dumps(about),
            "\n",
            f"{'':14}{'forward ms':>11} {'training ms':>11} {'forward MB':>11} {'training MB':>11}",
            sep="",
        )
    for case in all_cases():
        if options.device not in case.devices or (options.cases and not case.name.startswith(tuple(options.cases))):
            continue
        line = run_case(case, options.device, options) | about
        print(json.dumps(line) if options.json else table(line), flush=True)


if __name__ == "__main__":
    main()
