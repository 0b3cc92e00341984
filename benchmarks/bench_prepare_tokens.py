#!/usr/bin/env python
"""
How near making token shards comes to the speed of the image tokenizer alone: both rates, measured in one run.

    python benchmarks/bench_prepare_tokens.py --vqvae MODEL/vqvae --low-size 160 --fine-size 480 --device cuda
    python benchmarks/bench_prepare_tokens.py                             # the shipped model, on a CPU
    python benchmarks/bench_prepare_tokens.py --released --num-pictures 32 --batch-size 4

Pictures are made up: JPEG files of smooth random colours, with a sentence each, in WebDataset tars. The tokenizer
alone encodes batches of the same size that lie on the device, of both sizes, as often as there are pictures; what
prepare_tokens.py does beside it is reading tars, decoding, scaling, copying, and writing shards. Memory is the most
that the process has held.
"""

import importlib.util
import io
import json
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import typer

SCRIPT = Path(__file__).parents[1] / "training_scripts" / "prepare_tokens.py"


def write_tars(folder: Path, num_pictures: int, num_tars: int, side: int) -> None:
    """Tars as img2dataset writes them."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(num_tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(num_pictures // num_tars):
                small = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(small).resize((side * 5 // 4, side), Image.Resampling.BICUBIC).save(file, "JPEG")
                text = f"a picture of number {index} of {number}".encode()
                for suffix, content in (("jpg", file.getvalue()), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:05d}{index:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def encode_alone(vqvae, sizes: list[int], batch_size: int, num_pictures: int, rate: int, device: str) -> float:
    """Pictures a second of the tokenizer."""
    import torch

    batches = [torch.rand(batch_size, 3, size, size, device=device) for size in sizes]
    for warm in (True, False):
        started = time.perf_counter()
        for _ in range(1 if warm else -(-num_pictures // batch_size)):
            for pixels in batches:
                tokens = vqvae.encode(pixels, rate).tokens
            tokens.cpu()
    return -(-num_pictures // batch_size) * batch_size / (time.perf_counter() - started)


def main(
    vqvae: str = typer.Option(None, help="Image tokenizer; by default that of the shipped model."),
    released: bool = typer.Option(
        False, help="One of the released size instead, at 160 and 480 pixels; random weights."
    ),
    low_size: int = typer.Option(80, help="As of prepare_tokens.py."),
    fine_size: int = typer.Option(240, help="As of prepare_tokens.py."),
    compression_rate: int = typer.Option(8, help="As of prepare_tokens.py."),
    num_pictures: int = typer.Option(512, min=1, help="Pictures."),
    num_tars: int = typer.Option(4, min=1, help="Tars, and so shards."),
    picture_side: int = typer.Option(512, help="Shorter side of the pictures in pixels."),
    batch_size: int = typer.Option(32, min=1, help="Pictures at a time."),
    data_workers: int = typer.Option(2, help="Threads that read ahead."),
    device: str = typer.Option("cpu", help="Where to encode."),
) -> None:
    """Measure making token shards against the tokenizer alone; prints one JSON line."""
    import torch

    from cogview_pipelines import IcetkVQConfig, IcetkVQModel
    from cogview_pipelines.environment import SHIPPED_MODEL, stamp
    from cogview_pipelines.models.image_tokenizers.auto import load_image_tokenizer

    vqvae = vqvae or str(SHIPPED_MODEL / "vqvae")
    spec = importlib.util.spec_from_file_location("prepare_tokens", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["prepare_tokens"] = script
    spec.loader.exec_module(script)
    if released:
        low_size, fine_size = 160, 480
        model = IcetkVQModel(IcetkVQConfig()).to(device).eval()
    else:
        model = load_image_tokenizer(vqvae, dtype=torch.float32).to(device).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        source, sizes = Path(folder) / "tars", [low_size, fine_size]
        source.mkdir()
        write_tars(source, num_pictures, num_tars, picture_side)
        alone = [encode_alone(model, sizes, batch_size, num_pictures, compression_rate, device)]
        options = {"image_folder": source, "vqvae": vqvae, "low_size": low_size, "fine_size": fine_size}
        options |= {"compression_rate": compression_rate, "batch_size": batch_size, "data_workers": data_workers}
        options |= {"device": device, "output_dir": Path(folder) / "shards"}
        config = script.PrepareConfig(**{k: str(v) if isinstance(v, Path) else v for k, v in options.items()})
        started = time.perf_counter()
        script.prepare_shards(config, model, {"low": low_size, "fine": fine_size}, None)
        made = num_pictures // num_tars * num_tars / (time.perf_counter() - started)
        alone.append(encode_alone(model, sizes, batch_size, num_pictures, compression_rate, device))
    mean = sum(alone) / 2
    report = {"encoded_per_second": round(mean, 2), "made_per_second": round(made, 2), "share": round(made / mean, 3)}
    report["resident_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    report["released_size"] = released
    options = {"sizes": sizes, "num_pictures": num_pictures, "batch_size": batch_size, "data_workers": data_workers}
    print(json.dumps({"benchmark": "prepare_tokens", "device": device, **options, **report, **stamp(device)}))


if __name__ == "__main__":
    typer.run(main)
