"""
Distances between sets of pictures by their features: FID and the Inception score, whose sums are torchmetrics', and
precision and recall, which are torch-fidelity's; here are features instead of pictures, constant memory, and how sure
a figure is.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

NEIGHBOURS = 3  # how many of them a picture's surroundings reach to, for precision and recall
NUM_GROUPS = 10  # of pictures, one of which is left out at a time for the standard error
Chunks = Callable[[], Iterable[torch.Tensor]]


class _Given(torch.nn.Module):
    """Stands where torchmetrics has a network: what comes in are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(true: Iterable[torch.Tensor], made: Iterable[torch.Tensor]) -> float:
    """
    The Frechet distance between normal distributions of two sets of features, as in FID.

    Args:
        true, made (iterables of `torch.Tensor` of shape `(any, num_features)`): The features, in parts.

    Raises:
        ValueError: If a set has fewer than two, or there is nothing at all.
        ImportError: If torchmetrics is missing.

    Source: Heusel et al. (https://arxiv.org/abs/1706.08500).
    """
    metric = None
    counts = [0, 0]
    for is_true, chunks in ((True, true), (False, made)):
        for chunk in chunks:
            if metric is None:
                metric = _frechet_metric(chunk.shape[1])
                metric.reset()
            metric.update(chunk.double(), real=is_true)
            counts[not is_true] += len(chunk)
    if metric is None or min(counts) < 2:
        raise ValueError(f"a distance needs two pictures on each side, but there are {counts[0]} and {counts[1]}.")
    return float(metric.compute())


@functools.lru_cache(maxsize=1)
def _frechet_metric(num_features: int) -> Any:
    """
    The library's metric, one for all distances: it refers to itself, so that its sums (`num_features ** 2` numbers)
    would stay in memory until the garbage collector happens to come by.
    """
    return torchmetrics().image.fid.FrechetInceptionDistance(feature=_Given(num_features))


def frechet_distance_with_error(true: Chunks, made: Chunks) -> tuple[float, float | None]:
    """
    The distance of [`frechet_distance`], and its standard error by leaving out one of ten groups at a time
    (jackknife); `None` with fewer than twenty pictures.

    Args:
        true, made (functions without arguments that give parts of features): Called once for each pass over them. Row
            `i` of both is of the same caption, and left out together.
    """
    whole = frechet_distance(true(), made())
    if min(sum(map(len, chunks())) for chunks in (true, made)) < 2 * NUM_GROUPS:
        return whole, None
    groups = range(NUM_GROUPS)
    return whole, jackknife_error([frechet_distance(_without(true(), own), _without(made(), own)) for own in groups])


def jackknife_error(parts: list[float]) -> float:
    """Standard error of a figure from those that were computed without one of the groups each."""
    mean = sum(parts) / len(parts)
    return math.sqrt((len(parts) - 1) / len(parts) * sum((part - mean) ** 2 for part in parts))


def inception_score(
    logits: Iterable[torch.Tensor], num_pictures: int, num_splits: int = 10
) -> tuple[float, float | None]:
    """
    The Inception score, and its standard deviation over splits: parts of the list as it stands. One of them is in
    memory at a time.

    Args:
        logits (iterable of `torch.Tensor` of shape `(any, num_classes)`): In parts.
        num_pictures (`int`): How many there are in all.
        num_splits (`int`, defaults to 10): Each with at least two pictures, so fewer where there are fewer pictures.

    Source: Salimans et al. (https://arxiv.org/abs/1606.03498).
    """
    if num_pictures < 2:
        raise ValueError(f"the Inception score needs two pictures, but there are {num_pictures}.")
    num_splits = min(num_splits, num_pictures // 2)
    ends = [num_pictures * (split + 1) // num_splits for split in range(num_splits)]
    scores: list[float] = []
    held: list[torch.Tensor] = []
    start = 0
    for chunk in logits:
        while len(chunk):
            left = ends[len(scores)] - start
            held.append(chunk[:left])
            start += len(held[-1])
            chunk = chunk[left:]
            if start == ends[len(scores)]:
                scores.append(_inception_score(torch.cat(held)))
                held = []
    values = torch.tensor(scores, dtype=torch.float64)
    return float(values.mean()), float(values.std()) if num_splits > 1 else None


def _inception_score(logits: torch.Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keeping all features, which are those of a split here
        metric = torchmetrics().image.inception.InceptionScore(feature=_Given(logits.shape[1]), splits=1)
    metric.update(logits.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one split has no deviation
        return float(metric.compute()[0])


def precision_and_recall(true: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    """
    How many of the pictures that were made lie among the true ones (`precision`: are they good?), and how many of the
    true ones among those that were made (`recall`: are they as manifold?). A picture lies among others if it is no
    farther from one of them than that one's third neighbour.

    Args:
        true, made (`torch.Tensor` of shape `(num_pictures, num_features)`): The features of all pictures.

    Raises:
        ValueError: If there are fewer than four pictures on a side.
        ImportError: If torch-fidelity is missing.

    Source: Kynkäänniemi et al. (https://arxiv.org/abs/1904.06991).
    """
    if min(len(true), len(made)) <= NEIGHBOURS:
        counts = f"{len(true)} and {len(made)}"
        raise ValueError(f"precision and recall need {NEIGHBOURS + 1} pictures on each side, but there are {counts}.")
    metric = torch_fidelity().metric_prc.prc_features_to_metric
    found = metric(made, true, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {name: found[name] for name in ("precision", "recall")}


def share_with_error(share: float, count: int) -> dict[str, float | None]:
    """A share of so many pictures with its standard error, that of a binomial distribution."""
    return {"value": share, "standard_error": math.sqrt(share * (1 - share) / count) if count > 1 else None}


def mean_with_error(values: torch.Tensor) -> tuple[float, float | None]:
    """A mean and its standard error; `None` for a single value."""
    error = None if len(values) < 2 else float(values.double().std() / math.sqrt(len(values)))
    return float(values.double().mean()), error


def _without(chunks: Iterable[torch.Tensor], group: int) -> Iterator[torch.Tensor]:
    start = 0
    for chunk in chunks:
        keep = (torch.arange(start, start + len(chunk)) % NUM_GROUPS) != group
        start += len(chunk)
        yield chunk[keep]


def torchmetrics() -> ModuleType:
    """
    The library.

    Raises:
        ImportError: If it is missing.
    """
    try:
        import torchmetrics
        import torchmetrics.image.fid
        import torchmetrics.image.inception
    except ImportError as error:
        raise ImportError('FID and the Inception score need `pip install "cogview_pipelines[evaluation]"`.') from error
    return torchmetrics


def torch_fidelity() -> ModuleType:
    """
    The library.

    Raises:
        ImportError: If it is missing, or cannot be loaded.
    """
    try:
        import torch_fidelity
        import torch_fidelity.metric_prc
    except (ImportError, RuntimeError) as error:  # a torchvision of another PyTorch is a RuntimeError
        raise ImportError(
            f'torch-fidelity cannot be loaded ({error}): pip install "cogview_pipelines[inception]". It takes a '
            f"torchvision that was built for this torch, {torch.__version__}."
        ) from error
    return torch_fidelity
