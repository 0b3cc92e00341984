#!/usr/bin/env python
"""
Make beforehand what benchmarks/run_gpu_queue.sh needs on a machine without a network, in the folder `gpu_inputs`.

    python benchmarks/prepare_gpu_queue.py
    python benchmarks/prepare_gpu_queue.py --only training --limit_mib 100

`base` holds packages that are seldom part of a PyTorch image (diffusers and what it needs), `speed` torchao for
quantised weights, `training` the drawings for 480-pixel scenes and the tokenizer of the emoji model. What is there
already is kept. In the end the sizes are told and held against what may travel together with the checkout. Needs pip
and, where `data/sprites` is missing, npm and `pip install -e ".[data]"`.
"""

import argparse
import contextlib
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"base": ["diffusers", "importlib_metadata", "lazy-importer"], "speed": ["torchao"]}
GROUPS = {
    "first": ("base",),
    "correctness": ("base", "training"),
    "speed": ("base", "speed"),
    "training": ("base",),
    "studies": ("base",),
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)] + ["manylinux2014_x86_64"]
SPRITES = ROOT / "data" / "sprites"


def download(package: str, python_version: str, folder: Path) -> None:
    """Fetch the wheel of a package, in the version that is installed here if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = package.lower().replace("-", "_")
    if any(path.name.lower().startswith(f"{prefix}-") for path in folder.glob("*.whl")):
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = f"{package}=={importlib.metadata.version(package).partition('+')[0]}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", python_version, "--implementation", "cp"]
    command += [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run([*command, package], check=True)


def pack_sprites(target: Path) -> None:
    """The drawings of 288 px as one file; they are drawn if `data/sprites` does not hold them."""
    if target.exists():
        return
    if not SPRITES.is_dir():
        with tempfile.TemporaryDirectory() as folder:  # the data of the package stay as they are
            script = ROOT / "training_scripts" / "emoji" / "prepare_data.py"
            options = ["--output_folder", folder, "--full_size_folder", str(SPRITES)]
            subprocess.run([sys.executable, str(script), *options], check=True, cwd=ROOT)
    with tarfile.open(target, "w") as archive:
        for path in sorted(SPRITES.rglob("*.webp")):
            archive.add(path, path.relative_to(SPRITES))


def train_tokenizer(target: Path) -> None:
    """The tokenizer of the emoji model."""
    if target.is_dir():
        return
    scripts = ROOT / "training_scripts"
    options = ["--config", str(scripts / "emoji" / "gpu" / "tokenizer.yaml"), "--output_dir", str(target)]
    subprocess.run([sys.executable, str(scripts / "train_tokenizer.py"), *options], check=True, cwd=ROOT)


def checkout_bytes() -> int:
    """What of the checkout travels: files that git tracks or would."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, check=True, capture_output=True, cwd=ROOT).stdout.split(b"\0")
    files = [ROOT / name.decode() for name in names if name]
    return sum(path.stat().st_size for path in files if path.is_file())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "gpu_inputs", help="default: gpu_inputs")
    parser.add_argument("--only", nargs="*", choices=("base", "speed", "training"), help="default: all parts")
    parser.add_argument("--python_version", default="3.12", help="of the machine with the GPU (default: 3.12)")
    parser.add_argument("--limit_mib", type=float, default=64.0, help="what may travel in one go (default: 64)")
    options = parser.parse_args(arguments)
    parts = options.only or ["base", "speed", "training"]
    for part in parts:
        for package in PACKAGES.get(part, ()):
            download(package, options.python_version, options.output_dir / part)
    if "training" in parts:
        (options.output_dir / "training").mkdir(parents=True, exist_ok=True)
        pack_sprites(options.output_dir / "training" / "sprites.tar")
        train_tokenizer(options.output_dir / "training" / "tokenizer")

    checkout, fits = checkout_bytes() / 2**20, True
    print(f"checkout {checkout:.1f} MiB")
    for group, needed in GROUPS.items():
        sizes = {part: folder_bytes(options.output_dir / part) / 2**20 for part in needed}
        total = checkout + sum(sizes.values())
        fits &= total <= options.limit_mib
        listed = ", ".join(f"{part} {size:.1f}" for part, size in sizes.items())
        verdict = "fits" if total <= options.limit_mib else f"is MORE than {options.limit_mib:g} MiB"
        print(f"{group:12} {total:.1f} MiB with {listed}: {verdict}")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
