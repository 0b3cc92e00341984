"""How the parity tests of all families compare this package's numbers with those of the original code."""

import numpy as np
import torch
from accelerate.utils import send_to_device

LOGITS_TOLERANCE = 1e-3  # absolute; the logits' standard deviation is above 2, float32 noise about 6e-5
CLEAR_MARGIN = 1e-3  # a decision with a larger margin must be the same


def run(function, *inputs, **options):
    """The output, on the CPU, of a model or one of its methods, wherever it runs."""
    device = getattr(function, "__self__", function).device
    inputs, options = send_to_device((inputs, options), device)
    return send_to_device(function(*inputs, **options), "cpu")


def longs(array: np.ndarray) -> torch.Tensor:
    """Token ids as torch wants them."""
    return torch.from_numpy(np.asarray(array, dtype=np.int64))


def bools(array: np.ndarray) -> torch.Tensor:
    """A mask as torch wants it."""
    return torch.from_numpy(np.asarray(array).astype(bool))


def assert_same(ours, theirs, what: str = "") -> None:
    """Equal to the last element."""
    ours, theirs = torch.as_tensor(ours).cpu(), torch.as_tensor(theirs).cpu()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    assert torch.equal(ours.long(), theirs.long()), f"{what}: {int((ours != theirs).sum())} elements differ"


def assert_close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = LOGITS_TOLERANCE, what: str = "") -> None:
    """Equal within an absolute tolerance."""
    theirs = torch.from_numpy(np.asarray(theirs))
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    difference = (ours.cpu().double() - theirs.double()).abs().max().item()
    assert difference <= tolerance, f"{what}: differs by {difference}"


def stored(logits: torch.Tensor, theirs) -> torch.Tensor:
    """The columns of logits that a set of fixtures holds: all, or every n-th, to save room."""
    return logits[..., :: -(-logits.shape[-1] // theirs.shape[-1])]


def assert_logits(ours: torch.Tensor, theirs: np.ndarray, what: str = "") -> None:
    """Equal within the tolerance of logits, in the columns that are stored."""
    assert_close(stored(ours, theirs), theirs, what=what)


def assert_thinned(ours: torch.Tensor, arrays: dict, name: str, tolerance: float = LOGITS_TOLERANCE) -> None:
    """
    Equal within a tolerance in what a set of fixtures holds of an array: all; or, to save room, every n-th of some
    axes, and the sums over each of these axes (`<name>_sum_<axis>`).
    """
    theirs = arrays[name]
    steps = [-(-length // kept) for length, kept in zip(ours.shape, theirs.shape)]
    assert_close(ours[tuple(slice(None, None, step) for step in steps)], theirs, tolerance, name)
    for axis, step in enumerate(steps):
        if step > 1:
            sums, room = ours.double().sum(axis), tolerance * ours.shape[axis] ** 0.5  # noise adds up like this
            assert_close(sums, arrays[f"{name}_sum_{axis}"], room, f"{name} summed over axis {axis}")


def assert_same_decisions(ours: torch.Tensor, theirs: np.ndarray, margin: np.ndarray, what: str = "") -> None:
    """Equal wherever the original's margin is clear; and most are clear, or this would say nothing."""
    clear = torch.from_numpy(np.asarray(margin, dtype=np.float32) > CLEAR_MARGIN)
    assert clear.float().mean() > 0.9, f"{what}: {int((~clear).sum())} margins are unclear"
    differ = (ours.cpu() != longs(theirs)) & clear
    assert not differ.any(), f"{what}: {int(differ.sum())} clear decisions differ"


def cases(arrays: dict[str, np.ndarray], suffix: str) -> list[str]:
    """Prefixes of the arrays whose names end so."""
    found = sorted(name.removesuffix(suffix) for name in arrays if name.endswith(suffix))
    assert found, f"no array ends with {suffix}"
    return found
