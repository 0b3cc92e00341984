"""
From logits to tokens: pure functions, in which all randomness is the `noise` argument.

`noise` holds uniform numbers in [0, 1). `draw_noise` makes it, image by image, so that the image of a seed does not
depend on the batch it is made in; and since a draw needs one number, not one per vocabulary entry, all of it is drawn
before a loop starts.

Source: the CogView2 release and section 3.3 of the paper (https://arxiv.org/abs/2204.14217) on cluster sampling.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: tuple[int, ...], generator: Generators = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """
    Uniform float32 numbers in [0, 1) of `shape`, whose first dimension counts images.

    Args:
        shape (`tuple[int, ...]`): `(batch_size, ...)`.
        generator (`torch.Generator` or a list of them, *optional*): One for all images, or one per image.
        device (`torch.device`): Where the result is wanted. Numbers are drawn on the device of the generator, so a
            seed of a CPU generator gives the same image on every device.

    Raises:
        ValueError: If a list of generators has another length than the batch.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=source, dtype=torch.float32).to(device)
    if len(generator) != shape[0]:
        raise ValueError(
            f"`generator` must be one generator or one per image ({shape[0]}), but {len(generator)} came."
        )
    rows = [torch.rand(shape[1:], generator=g, device=g.device, dtype=torch.float32).to(device) for g in generator]
    return torch.stack(rows)


class FiniteCheck:
    """
    Raises an error if logits are not finite, because of broken weights or an overflow: nothing can be drawn from them.

    On a CPU it raises at once, elsewhere at the end of the loop: looking earlier would mean waiting for the device.
    """

    def __init__(self):
        self._total: torch.Tensor | None = None  # nan and infinity stay in a sum

    def see(self, logits: torch.Tensor) -> None:
        """Logits that are about to be drawn from."""
        total = logits.sum(dtype=torch.float32)
        self._total = total if self._total is None else self._total + total
        if logits.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """
        Raises:
            ValueError: If some of the logits seen were not finite.
        """
        if self._total is not None and not bool(self._total.isfinite()):
            raise ValueError(
                "The model's logits are not finite, so nothing can be drawn from them. Either its weights hold NaN or "
                "infinite numbers: load them again; or they overflow in this number format: load the model with "
                "`dtype=torch.float32`."
            )


def draw(probabilities: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    Draw from each distribution over the last dimension by inverting its cumulative sum.

    Args:
        probabilities (`torch.Tensor` of shape `(..., num_choices)`): Non-negative weights; they need not sum to one.
        noise (`torch.Tensor` of shape `(...)`): Uniform numbers in [0, 1).

    Returns:
        `torch.Tensor` of shape `(...)`: Indices; an index of weight zero is never drawn.
    """
    probabilities = probabilities.float()
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:]
    # strictly below the total, or rounding could select what comes after the last positive weight
    threshold = torch.minimum(noise[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, threshold, right=True)
    # of nan nothing can be drawn, but an index out of bounds would end the process on a GPU: see `FiniteCheck`
    drawn = drawn.clamp_(max=probabilities.shape[-1] - 1)
    # a GPU adds in parallel, so that a sum may differ by rounding from the one before it although the weight is zero
    likeliest = probabilities.argmax(-1, keepdim=True)
    return torch.where(probabilities.gather(-1, drawn) > 0, drawn, likeliest)[..., 0]


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the `k` largest logits of the last dimension to `-inf`; ties with the k-th stay."""
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """
    Set all but the likeliest tokens, whose probabilities first add up to more than `p`, to `-inf`.

    The likeliest one always stays.
    """
    values, order = logits.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = before > p
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), float("-inf"))


def token_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Float32 distribution of top-k and then top-p sampling, shaped like `logits`."""
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return logits.softmax(-1)


def sample_tokens(
    logits: torch.Tensor,
    noise: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """
    Temperature, top-k and top-p sampling.

    Args:
        logits (`torch.Tensor` of shape `(..., num_tokens)`): Scores.
        noise (`torch.Tensor` of shape `(..., 2)`): Uniform numbers; the second one is used.
        temperature (`float`): Divides the logits.
        top_k (`int`, *optional*): How many tokens stay; by default all.
        top_p (`float`, *optional*): Of these, the likeliest that together have more than this probability stay.
    """
    return draw(token_probabilities(logits, temperature, top_k, top_p), noise[..., 1])


def cluster_masses(probabilities: torch.Tensor, cluster_labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Sum of probabilities per cluster: `(..., num_tokens)` -> `(..., num_clusters)`."""
    masses = probabilities.new_zeros(*probabilities.shape[:-1], num_clusters)
    return masses.index_add_(-1, cluster_labels, probabilities)


def sample_cluster_tokens(
    logits: torch.Tensor,
    noise: torch.Tensor,
    cluster_labels: torch.Tensor,
    temperature: float = 1.0,
    top_k_clusters: int = 16,
    cluster_temperature: float = 1.0,
    num_clusters: int | None = None,
) -> torch.Tensor:
    """
    Cluster sampling: first a cluster of similar codes, then a code in it.

    Plain top-k cuts off codes with many near-twins, which share their probability; clusters are compared by their
    whole mass.

    Args:
        logits (`torch.Tensor` of shape `(..., num_tokens)`): Scores of the image codes.
        noise (`torch.Tensor` of shape `(..., 2)`): Uniform numbers, for the cluster and for the code in it.
        cluster_labels (`torch.Tensor` of shape `(num_tokens,)`): The cluster of each code.
        temperature (`float`): Divides the logits.
        top_k_clusters (`int`): How many of the heaviest clusters stay.
        cluster_temperature (`float`): Divides the logits again, inside the drawn cluster only.
        num_clusters (`int`, *optional*): Number of clusters; by default read from the labels, which waits for the
            device.
    """
    num_clusters = int(cluster_labels.max()) + 1 if num_clusters is None else num_clusters
    logits = logits.float() / temperature
    masses, clusters = cluster_masses(logits.softmax(-1), cluster_labels, num_clusters).topk(
        min(top_k_clusters, num_clusters)
    )
    # by number, not by mass: where two masses change places, the other clusters are drawn by the same noise as before,
    # so that guesses of parallel decoding settle sooner
    clusters, order = clusters.sort(-1)
    cluster = clusters.gather(-1, draw(masses.gather(-1, order), noise[..., 0])[..., None])
    inside = (logits / cluster_temperature).masked_fill(cluster_labels != cluster, float("-inf"))
    return draw(inside.softmax(-1), noise[..., 1])
