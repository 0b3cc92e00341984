"""
From a checkpoint in the released format to a picture: generate one of random weights, convert it, load it, use it.

    python benchmarks/bench_conversion.py --folder /tmp/tenth                      # 1/10 of the released size, on the
    CPU python benchmarks/bench_conversion.py --folder /tmp/tenth --device cuda --dtype float16
    python benchmarks/bench_conversion.py --folder /tmp/big --hidden_size 2048 --num_layers 28 --steps generate,convert

Nobody needs the released weights for this: the shapes are real (150,016 words, 20 x 20 and 60 x 60 tokens, the whole
image tokenizer), only narrower and shallower. Each step runs in a process of its own and prints one JSON line with its
time and its peak memory, so that neither hides in the other's. The folder needs 8 GB of disk at 1/10.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT_TOKENIZER = ROOT / "tests" / "parity" / "fixtures" / "icetk" / "ice_text.model"
STEPS = ("generate", "convert", "load", "picture")
PROMPT = "一只老虎 戴着 VR 眼镜"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="Gets `release/` and `cogview2/`; neither may be there yet.")
    add(
        "--hidden_size",
        type=int,
        default=1280,
        help=("Width; heads are 64 wide (default: %(default)s; release: 3072)."),
    )
    add("--num_layers", type=int, default=20, help="Layers (default: %(default)s; release: 48).")
    add("--vocab_size", type=int, default=150016, help="Word embeddings (default: %(default)s).")
    add("--steps", default=",".join(STEPS), help="Which steps, in order (default: %(default)s).")
    add("--device", default="cpu", help="For the picture (default: %(default)s).")
    add("--dtype", default="float32", help="For loading and the picture (default: %(default)s).")
    add("--lopar_steps", type=int, help="Passes of iterative super-resolution (default: the schedule's, 6).")
    add("--only_step", choices=STEPS, help=argparse.SUPPRESS)
    return parser


def generate(args: argparse.Namespace) -> dict:
    """
    Write random checkpoints; direct super-resolution shares CogLM's backbone, as it does where only the rest was
    trained.
    """
    import numpy as np
    import torch

    from cogview_pipelines import IcetkVQConfig, IcetkVQModel
    from cogview_pipelines.conversion.cogview2 import layout

    def random_tensors(model_class, config, rename, seed=0):
        tensors = {}
        for key, shape in layout.expected_shapes(model_class, config).items():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + seed)
            if "norm" in key:
                tensor = torch.full(shape, float(key.endswith("weight")), dtype=torch.float16)
            else:
                # one million random numbers, over and over: what they are does not matter, but drawing them takes time
                noise = torch.empty(2**20).normal_(0, 0.02, generator=generator).half()
                numel = math.prod(shape)
                tensor = noise.repeat(-(-numel // len(noise)))[:numel].clone().view(shape)
            tensors[rename(key)] = tensor
        return tensors

    release, count = args.folder / "release", 0
    for stage in layout.STAGES:
        model_class = layout.model_class_of(stage.component)
        config = model_class.config_class.released(
            stage.released_name,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
            vocab_size=args.vocab_size,
        )
        iteration = layout.RELEASED_ITERATIONS[stage.released_name]
        folder = release / stage.released_name / iteration
        folder.mkdir(parents=True)
        # the backbones of the first two are equal, that of the third is another
        seed = int(stage.super_resolution == "iterative")
        tensors = random_tensors(model_class, config, layout.released_transformer_key, seed)
        count += sum(tensor.numel() for tensor in tensors.values())
        torch.save({"module": tensors}, folder / "mp_rank_00_model_states.pt")
        (folder.parent / "latest").write_text(iteration)
        (folder.parent / "model_config.json").write_text(json.dumps(layout.released_config(config, stage)))
    vq = random_tensors(IcetkVQModel, IcetkVQConfig(), layout.released_image_tokenizer_key)
    labels = vq.pop("cluster_labels").long()
    torch.save({"module": vq}, release / "ice_image.pt")
    np.save(release / "cluster_label.npy", (torch.arange(len(labels)) % 500).numpy())
    return {"parameters": count, "gigabytes": size_of(release)}


def convert(args: argparse.Namespace) -> dict:
    """The conversion script, on all files."""
    import runpy

    release = args.folder / "release"
    parts = {
        "--coglm": release / "coglm",
        "--direct_sr": release / "cogview2-dsr",
        "--iterative_sr": release / "cogview2-itersr",
        "--image_tokenizer": release / "ice_image.pt",
        "--cluster_labels": release / "cluster_label.npy",
        "--text_tokenizer": TEXT_TOKENIZER,
        "--output": args.folder / "cogview2",
    }
    main = runpy.run_path(str(ROOT / "conversion_scripts" / "convert_cogview2.py"))["main"]
    if main([str(word) for pair in parts.items() for word in pair]):
        sys.exit(1)
    return {"gigabytes": size_of(args.folder / "cogview2")}


def load_pipeline(args: argparse.Namespace):
    import torch

    from cogview_pipelines import CogView2Pipeline

    return CogView2Pipeline.from_pretrained(args.folder / "cogview2", dtype=getattr(torch, args.dtype)).to(args.device)


def load(args: argparse.Namespace) -> dict:
    """Load the pipeline and count what it holds, shared weights once."""
    pipe = load_pipeline(args)
    models = (pipe.transformer, pipe.direct_sr_transformer, pipe.iterative_sr_transformer, pipe.vqvae)
    storages = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
    return {"gigabytes": round(sum(storages.values()) / 1e9, 2), "dtype": args.dtype}


def picture(args: argparse.Namespace) -> dict:
    """Load the pipeline and make one picture."""
    import torch

    pipe = load_pipeline(args)
    start = time.monotonic()
    output = pipe(PROMPT, num_lopar_steps=args.lopar_steps, generator=torch.Generator().manual_seed(0))
    seconds = time.monotonic() - start
    output.images[0].save(args.folder / "picture.png")
    result = {
        "picture_seconds": round(seconds, 1),
        "size": list(output.images[0].size),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
    }
    if args.device.startswith("cuda"):
        result["gpu"] = torch.cuda.get_device_name()
        result["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def size_of(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)


def run_step(args: argparse.Namespace) -> None:
    """One step in this process."""
    start = time.monotonic()
    result = {"generate": generate, "convert": convert, "load": load, "picture": picture}[args.only_step](args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux
    line = {"step": args.only_step, "seconds": round(time.monotonic() - start, 1), "peak_memory_gib": round(peak, 2)}
    print(json.dumps(line | result), flush=True)


def main() -> int:
    args = make_parser().parse_args()
    if args.only_step:
        run_step(args)
        return 0
    steps = args.steps.split(",")
    unknown = sorted(set(steps) - set(STEPS))
    if unknown:
        sys.exit(f"`--steps` may name {STEPS}, but names {unknown}.")
    made = {"generate": "release", "convert": "cogview2"}
    for step in steps:
        if step in made and (args.folder / made[step]).exists():
            sys.exit(f"{args.folder / made[step]} exists already. Delete it, or leave `{step}` out of `--steps`.")
    for step in steps:
        status = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only_step", step]).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
