"""What a result depends on besides the code: versions, hardware, threads. Importing this imports nothing heavy."""

import datetime
import functools
import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from ._version import __version__

PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "huggingface_hub", "safetensors", "sentencepiece")
# of the extras, and what changes how models are loaded or computed
OPTIONAL_PACKAGES = ("peft", "torchao", "bitsandbytes", "gradio", "fastapi", "numpy", "Pillow")
_MODELS = Path(__file__).parent / "demo" / "models"
SHIPPED = "shipped"
# The models that come with the package, by what `--model` calls them.
SHIPPED_MODELS = {SHIPPED: _MODELS / "cogview2-emoji", "cogview-emoji": _MODELS / "cogview-emoji"}
SHIPPED_MODEL = SHIPPED_MODELS[SHIPPED]
_PLACES, _PLACE_BYTES = 256, 4096  # of each file of a model, in its fingerprint


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python, and of what it stands on; `None` where a package is not installed."""
    return {"cogview_pipelines": __version__, "python": platform.python_version(), **_installed(PACKAGES)}


def optional_versions() -> dict[str, str | None]:
    """Versions of packages that a result does not depend on, but an error may."""
    return _installed(OPTIONAL_PACKAGES)


def _installed(names: Iterable[str]) -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and help needs no versions

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def model_identity(model: str, source: str) -> dict[str, str]:
    """
    What results say of a saved pipeline: its name, and of a folder the fingerprint, but not where it is.

    Args:
        model (`str`): As the user named it: a folder, a Hub id, or a key of `SHIPPED_MODELS`.
        source (`str`): The folder or Hub id that it stands for.
    """
    if not os.path.exists(source):
        return {"model": model}
    name = model if model in SHIPPED_MODELS else os.path.basename(os.path.abspath(source))
    return {"model": name, "model_fingerprint": fingerprint(Path(source))}


@functools.cache
def fingerprint(folder: Path) -> str:
    """
    Sixteen digits that change with the components of a saved pipeline: names and sizes of their files, and what stands
    in them at 256 places each, since reading them whole takes as long as loading the model.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "model_index.json", *folder.glob("*/*")]):
        if path.name.startswith(".") or path.parent.name.startswith(".") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode("utf-8", "backslashreplace"))
        with open(path, "rb") as file:
            if size <= _PLACES * _PLACE_BYTES:
                digest.update(file.read())
                continue
            for index in range(_PLACES):
                file.seek((size - _PLACE_BYTES) * index // (_PLACES - 1))
                digest.update(file.read(_PLACE_BYTES))
    return digest.hexdigest()[:16]


def processor_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def num_cores() -> int | None:
    """Processor cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_gib() -> float | None:
    """Main memory in GiB, where the system tells."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def devices() -> list[dict]:
    """The processor and every accelerator that torch can use, with memory in GiB."""
    import torch

    found = [
        {
            "device": "cpu",
            "name": processor_name(),
            "cores": num_cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": memory_gib(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor(), "memory_gib": memory_gib()})
    return found


def hardware(device: str) -> str:
    """The device of a measurement in words: `"cuda"` or `"cuda:0"` with its name, the CPU with its threads."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "cpu":
        return f"{processor_name()}, {torch.get_num_threads()} threads"
    return f"{device} of {processor_name()}"


def stamp(device: str) -> dict:
    """What every measurement says beside its numbers: hardware, versions, date (UTC)."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
