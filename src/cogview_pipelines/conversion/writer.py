"""
Safetensors shards, written tensor by tensor.

The safetensors library wants a whole shard in memory; a converter must not. Since the format is a small header and
then the bytes of the tensors one after the other, this streams them from file to file. A component is written under
another name, to be renamed when it is whole; what is left after an interruption is continued, not trusted: finished
shards are hashed again before they are kept.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..foreign_files import describe_foreign_file
from .errors import ConversionError
from .reader import CHUNK_BYTES, ReadableTensor

Tensors = Mapping[str, ReadableTensor]
PROGRESS_FILE = "conversion_progress.json"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_tensor(tensor: ReadableTensor) -> str:
    """SHA-256 of dtype, shape and elements."""
    digest = _start_hash(tensor)
    for chunk in tensor.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _start_hash(tensor):
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())


def content_hash(hashes: Mapping[str, str]) -> str:
    """One hash for all tensors of a model."""
    return hashlib.sha256("".join(f"{key} {value}\n" for key, value in sorted(hashes.items())).encode()).hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write a JSON file so that it is never there in part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def plan_shards(tensors: Tensors, max_shard_size: int, dtype: torch.dtype | None) -> list[list[str]]:
    """Names of the tensors of each shard, in order; a tensor larger than `max_shard_size` gets a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = _target_bytes(tensor, dtype)
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _target_dtype(tensor: ReadableTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def _target_bytes(tensor: ReadableTensor, dtype: torch.dtype | None) -> int:
    return tensor.nbytes // tensor.dtype.itemsize * _target_dtype(tensor, dtype).itemsize


def write_shard(
    path: Path, tensors: Tensors, dtype: torch.dtype | None = None, advance: Callable[[int], None] = lambda count: None
) -> tuple[str, dict[str, str]]:
    """
    Write one safetensors file.

    Args:
        path (`Path`): The file; it appears when it is whole.
        tensors: By name.
        dtype (`torch.dtype`, *optional*): Convert floating point tensors; by default they stay as they are, bit by
            bit.
        advance: Called with the number of bytes read, as they are read.

    Returns:
        `tuple[str, dict[str, str]]`: SHA-256 of the file, and of each tensor as it was read.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + _target_bytes(tensor, dtype)
        header[name] = {
            "dtype": _DTYPE_NAMES[_target_dtype(tensor, dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    whole, hashes = hashlib.sha256(), {}
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:

        def write(data: bytes) -> None:
            whole.update(data)
            file.write(data)

        write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            digest, target = _start_hash(tensor), _target_dtype(tensor, dtype)
            for chunk in tensor.chunks():
                digest.update(chunk)
                write(chunk if target == tensor.dtype else _convert(chunk, tensor.dtype, target, name))
                advance(len(chunk))
            hashes[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return whole.hexdigest(), hashes


def _convert(chunk: bytes, source: torch.dtype, target: torch.dtype, name: str) -> bytes:
    values = torch.frombuffer(bytearray(chunk), dtype=source)
    converted = values.to(target)
    if not torch.equal(converted.isfinite(), values.isfinite()):
        raise ConversionError(
            f"`{name}` has values that {target} cannot hold. Choose another `dtype`, or leave it out."
        )
    return converted.view(torch.uint8).numpy().tobytes()


def write_component(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, object],
    source: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 2 * 2**30,
    advance: Callable[[int], None] = lambda count: None,
) -> dict:
    """
    Write a model folder, but for its last rename: shards, index and `config.json`.

    Args:
        folder (`Path`): What [`partial_of`] it, which is written, is to be named when it is whole.
        tensors: All tensors of the model, by our names.
        config: Content of `config.json`.
        source (`str`): Identifies the files that the tensors come from; a partial folder of another source is thrown
            away.
        dtype (`torch.dtype`, *optional*): As in [`write_shard`].
        max_shard_size (`int`): In bytes.
        advance: As in [`write_shard`].

    Returns:
        `dict`: `files` (name -> SHA-256), `tensors` (name -> SHA-256), `reused` (how many shards stood there already).
    """
    partial = partial_of(folder)
    progress = _continue_or_clear(partial, source)
    shards, reused = plan_shards(tensors, max_shard_size, dtype), 0
    total = sum(_target_bytes(tensor, dtype) for tensor in tensors.values())
    there = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    if shutil.disk_usage(partial).free + there < total + 2**26:
        raise ConversionError(f"{folder} needs {total / 2**30:.1f} GiB, which are not free on its disk.")
    names = (
        [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
        if len(shards) > 1
        else ["model.safetensors"]
    )
    for name, keys in zip(names, shards):
        part = {key: tensors[key] for key in keys}
        done = progress["shards"].get(name)
        if (
            done
            and set(done["tensors"]) == set(keys)
            and (partial / name).is_file()
            and hash_file(partial / name) == done["sha256"]
        ):
            reused += 1
            advance(sum(tensor.nbytes for tensor in part.values()))
            continue
        sha256, hashes = write_shard(partial / name, part, dtype, advance)
        progress["shards"][name] = {"sha256": sha256, "tensors": hashes}
        write_json(partial / PROGRESS_FILE, progress)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        write_json(
            partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_json(partial / "config.json", config)
    files = {name: progress["shards"][name]["sha256"] for name in names}
    files |= {f.name: hash_file(f) for f in sorted(partial.glob("*.json")) if f.name != PROGRESS_FILE}
    hashes = {key: value for name in names for key, value in progress["shards"][name]["tensors"].items()}
    return {"files": files, "tensors": hashes, "reused": reused}


def _is_shard(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("tensors"), dict)


def partial_of(folder: Path) -> Path:
    """Where a component is written until it is whole."""
    return folder.with_name(folder.name + ".partial")


def _continue_or_clear(partial: Path, source: str) -> dict:
    try:
        progress = json.loads((partial / PROGRESS_FILE).read_text(encoding="utf-8"))
        if progress["source"] == source and all(map(_is_shard, progress["shards"].values())):
            for left in partial.glob("*.tmp"):
                left.unlink()
            return progress
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    progress = {"source": source, "shards": {}}
    write_json(partial / PROGRESS_FILE, progress)
    return progress


# Saved models, and files of the releases ---------------------------------------------------------------------------


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model, mapped from its files: they are read when they are used."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not all(Path(name).name == name for name in names):
                raise ValueError("it names files of other folders")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConversionError(f"{index} is damaged ({type(error).__name__}: {str(error)[:200]}).") from error
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ConversionError(f"{path} is missing.")
        if (foreign := describe_foreign_file(path)) is not None:
            raise ConversionError(f"{path} {foreign}")
        try:
            with safe_open(path, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError) as error:
            raise ConversionError(f"{path} is damaged ({str(error)[:200]}). Copy or save the model again.") from error
    return tensors


def save_state_dict(state_dict: dict[str, torch.Tensor], path: Path, entry: str | None = "module") -> None:
    """Write a `.pt` file that is never there in part: a dict with the state dict as `entry`, or the state dict."""
    temporary = path.with_name(path.name + ".tmp")
    tensors = {key: tensor.contiguous() for key, tensor in state_dict.items()}
    torch.save(tensors if entry is None else {entry: tensors}, temporary)
    temporary.replace(path)
