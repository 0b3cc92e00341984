"""
Checkpoints that the fixtures hold only in part, to save room, since their tensors are those of another checkpoint.

Here they are put together, in the format of the release. `tensors.json` has the SHA-256 of every tensor in the file
that the original code wrote, and they are compared: what comes out is the original's, bit by bit. In a set of fixtures
that holds such a checkpoint whole, it is taken as it is.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch

TWO_RANKS, DIRECT_SR = "cogview-tiny-mp2", "cogview2-dsr"  # folders among the checkpoints
SPLIT_ROWS = ("word_embeddings.weight", "mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias")
SPLIT_COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the type, the shape and the elements."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} "
    return hashlib.sha256(head.encode() + tensor.contiguous().numpy().tobytes()).hexdigest()


def load_weights(folder: Path) -> dict:
    """What is in the only rank of a checkpoint."""
    (path,) = folder.glob("*/mp_rank_00_model_states.pt")
    return torch.load(path, weights_only=True)


def put_together(part: Path, files: dict[str, dict], scratch: Path) -> Path:
    """The small files of a checkpoint, and files of weights whose tensors are the original's; returns their folder."""
    folder = scratch / part.name
    shutil.copytree(part, folder, ignore=shutil.ignore_patterns("tensors.json", "*.pt"))
    expected = json.loads((part / "tensors.json").read_text("utf-8"))
    assert files.keys() == expected.keys()
    for name, content in files.items():
        digests = {key: digest(tensor) for key, tensor in content["module"].items()}
        assert list(digests) == list(expected[name]), f"{part.name}/{name}: other tensors than the original's"
        different = [key for key in digests if digests[key] != expected[name][key]]
        assert not different, f"{part.name}/{name}: {different} are not the original's"
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(content, folder / name)
    return folder


def share(key: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """What one of two ranks holds of a tensor: of queries, keys and values each a half, as of rows or columns."""
    if ".query_key_value." in key:
        return torch.cat([third.chunk(2)[rank] for third in tensor.chunk(3)])
    if key.endswith(SPLIT_ROWS):
        return tensor.chunk(2)[rank].clone()
    return tensor.chunk(2, 1)[rank].contiguous() if key.endswith(SPLIT_COLUMNS) else tensor


def two_ranks(fixtures: Path, scratch: Path) -> Path:
    """CogView in two model-parallel ranks: the weights of `cogview-tiny`, split."""
    part = fixtures / "checkpoints" / TWO_RANKS
    if any(part.glob("*/*.pt")):
        return part
    whole = load_weights(fixtures / "checkpoints" / "cogview-tiny")
    files = {}
    for rank in range(2):
        module = {key: share(key, tensor, rank) for key, tensor in whole["module"].items()}
        name = f"{whole['iteration']}/mp_rank_{rank:02d}_model_states.pt"
        files[name] = {"module": module, "iteration": whole["iteration"]}
    return put_together(part, files, scratch)


def direct_sr(fixtures: Path, scratch: Path) -> Path:
    """Direct super-resolution: CogLM's tensors, and those of its own in `own_tensors.pt`."""
    part = fixtures / "checkpoints" / DIRECT_SR
    own = list(part.glob("*/own_tensors.pt"))
    if not own:
        return part
    backbone = load_weights(fixtures / "checkpoints" / "coglm")["module"]
    module = {**torch.load(own[0], weights_only=True), **backbone}
    return put_together(part, {f"{own[0].parent.name}/mp_rank_00_model_states.pt": {"module": module}}, scratch)
