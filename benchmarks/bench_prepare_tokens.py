#!/usr/bin/env python
"""
How near making token shards comes to the speed of the image tokenizer alone: both rates, measured in one run.

    python benchmarks/bench_prepare_tokens.py --vqvae MODEL/vqvae --low-size 160 --fine-size 480 --device cuda
    python benchmarks/bench_prepare_tokens.py                             # the shipped model, on a CPU
    python benchmarks/bench_prepare_tokens.py --released --num-pictures 2 --num-tars 1 --batch-size 1   # many minutes

Pictures are made up: JPEG files of smooth random colours, with a sentence each, in WebDataset tars. The tokenizer
alone encodes batches of the same size that lie on the device, of both sizes, as often as there are pictures; what
prepare_tokens.py does beside it is reading tars, decoding, scaling, copying, and writing shards. `share` compares
rates by the clock, `share_of_cpu_seconds` the computing time of the process (on a CPU; other programs hardly change
it). Memory is the most that the process has held.
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


class Watch:
    """Seconds since it was made: of the clock, and that the process computed."""

    def __init__(self):
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def encode_alone(
    vqvae, sizes: list[int], batch_size: int, num_pictures: int, rate: int, device: str
) -> tuple[float, float]:
    """Seconds a picture of the tokenizer: of the clock, and computed."""
    import torch

    batches = [torch.rand(batch_size, 3, size, size, device=device) for size in sizes]
    for warm in (True, False):
        watch = Watch()
        for _ in range(1 if warm else -(-num_pictures // batch_size)):
            for pixels in batches:
                tokens = vqvae.encode(pixels, rate).tokens
            tokens.cpu()
    return tuple(seconds / (-(-num_pictures // batch_size) * batch_size) for seconds in watch.read())


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
        watch = Watch()
        script.prepare_shards(config, model, {"low": low_size, "fine": fine_size}, None)
        made = [seconds / (num_pictures // num_tars * num_tars) for seconds in watch.read()]
        alone.append(encode_alone(model, sizes, batch_size, num_pictures, compression_rate, device))
    clock, computed = (sum(seconds) / 2 for seconds in zip(*alone))
    report = {"encoded_per_second": round(1 / clock, 4), "made_per_second": round(1 / made[0], 4)}
    report |= {"share": round(clock / made[0], 3), "share_of_cpu_seconds": round(computed / made[1], 3)}
    report["resident_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    report["released_size"] = released
    options = {"sizes": sizes, "num_pictures": num_pictures, "batch_size": batch_size, "data_workers": data_workers}
    print(json.dumps({"benchmark": "prepare_tokens", "device": device, **options, **report, **stamp(device)}))


if __name__ == "__main__":
    typer.run(main)
