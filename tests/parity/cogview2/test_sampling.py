"""
Cluster sampling and top-k against the exact distributions of the original.

The samplers run as they are; only the draw at the end of each step is replaced by one that keeps the weights it was
shown and returns a choice of ours, so that the exact distribution can be put together.
"""

import pytest
import torch

from cogview_pipelines import LoPARScheduler
from cogview_pipelines.generation import sampling

from .conftest import assert_same, cases, longs

TOLERANCE = 2e-6  # of a probability


class Draws:
    """Replaces `draw`: keeps the weights of each call, and returns the choices it was given."""

    def __init__(self, *choices):
        self.choices, self.weights = list(choices), []

    def __call__(self, probabilities, noise):
        self.weights.append(probabilities / probabilities.sum(-1, keepdim=True))
        return self.choices.pop(0)


def cluster_marginal(sample, logits, num_kept, monkeypatch):
    """
    Run `sample(logits, noise)` once for each kept cluster; the probability of each token, and the codes that each can
    give.
    """
    draws = Draws(torch.arange(num_kept), torch.zeros(num_kept, dtype=torch.long))
    monkeypatch.setattr(sampling, "draw", draws)
    sample(logits.expand(num_kept, -1), torch.zeros(num_kept, 2))
    clusters, inside = draws.weights
    return (clusters[0, :, None] * inside).sum(0), [row.nonzero()[:, 0] for row in inside]


@pytest.fixture
def settings(arrays):
    data = arrays("cluster_sampling")
    names = [str(name) for name in data["setting_names"]]
    values = zip(data["setting_temp"], data["setting_topk"], data["setting_temp_cluster"])
    return {name: (float(t), int(k), float(inside)) for name, (t, k, inside) in zip(names, values)}


def test_cluster_sampling_has_the_original_distribution(arrays, settings, monkeypatch):
    data = arrays("cluster_sampling")
    labels = longs(data["cluster_labels"])
    for name, (temperature, top_k, cluster_temperature) in settings.items():

        def sample(logits, noise, values=(temperature, top_k, cluster_temperature)):
            return sampling.sample_cluster_tokens(logits, noise, labels, *values)

        for row, logits in enumerate(torch.from_numpy(data["logits"])):
            marginal, codes = cluster_marginal(sample, logits, top_k, monkeypatch)
            expected = torch.from_numpy(data[f"{name}_marginal"][row])
            assert (marginal - expected).abs().max() <= TOLERANCE, name
            ours = [int(labels[members[0]]) for members in codes]
            assert sorted(ours) == sorted(data[f"{name}_clusters_{row}"].tolist()), name


def test_direct_super_resolution_samples_as_the_original_by_default(
    arrays, settings, direct_sr_scheduler, monkeypatch
):
    data = arrays("cluster_sampling")
    labels = longs(data["cluster_labels"])
    temperature, top_k, cluster_temperature = settings["dsr_default"]
    assert direct_sr_scheduler.config.temperature == temperature
    assert direct_sr_scheduler.config.cluster_temperature == pytest.approx(cluster_temperature)

    def sample(logits, noise):
        everywhere = torch.ones(1, 1, dtype=torch.bool)
        canvas = torch.zeros(len(logits), 1, 1, dtype=torch.long)
        direct_sr_scheduler.step(logits[:, None], 1, canvas, everywhere, noise[:, None], labels)

    for row, logits in enumerate(torch.from_numpy(data["logits"])):
        draws = Draws(torch.arange(top_k)[:, None], torch.zeros(top_k, 1, dtype=torch.long))
        monkeypatch.setattr(sampling, "draw", draws)
        sample(logits.expand(top_k, -1), torch.zeros(top_k, 2))
        clusters, inside = (weights[:, 0] for weights in draws.weights)
        marginal = (clusters[0, :, None] * inside).sum(0)
        assert (marginal - torch.from_numpy(data["dsr_default_marginal"][row])).abs().max() <= TOLERANCE


def test_iterative_super_resolution_samples_as_the_original_in_every_pass(arrays, iterative_sr_scheduler, monkeypatch):
    data = arrays("cluster_sampling")
    logits = torch.from_numpy(data["logits"])
    found = {int(name.removeprefix("itersr_top")): name for name in cases(data, "_marginal") if "itersr_top" in name}
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    canvas = torch.zeros(len(logits), 1, 1, dtype=torch.long)
    for step, top_k in enumerate(iterative_sr_scheduler.config.top_k, start=1):
        draws = Draws(torch.zeros(len(logits), 1, dtype=torch.long))
        monkeypatch.setattr(sampling, "draw", draws)
        iterative_sr_scheduler.step(logits[:, None], step, canvas, everywhere, torch.zeros(len(logits), 1, 2))
        expected = torch.from_numpy(data[f"{found[top_k]}_marginal"])
        assert (draws.weights[0][:, 0] - expected).abs().max() <= TOLERANCE, f"pass {step}"


def test_drawn_tokens_are_distributed_as_the_weights_say(arrays):
    data = arrays("cluster_sampling")
    logits, labels = torch.from_numpy(data["reduced_logits"]), longs(data["reduced_labels"])
    count = 2**16
    noise = torch.stack([(torch.arange(count) + 0.5) / count, torch.rand(count)], -1)
    tokens = sampling.sample_cluster_tokens(logits.expand(count, -1), noise, labels, 1.1, 3, 0.8)
    # cluster by cluster, by the rule in words
    weights = (logits / 1.1).softmax(-1)
    masses = torch.stack([weights[labels == label].sum() for label in range(int(labels.max()) + 1)])
    expected = torch.zeros_like(weights)
    for cluster in masses.topk(3).indices:
        inside = labels == cluster
        expected[inside] = masses[cluster] * (logits[inside] / 1.1 / 0.8).softmax(-1)
    frequencies = tokens.bincount(minlength=len(logits)) / count
    assert (frequencies - expected / expected.sum()).abs().max() < 0.01


def test_one_number_of_clusters_is_greedy_over_clusters(arrays):
    data = arrays("cluster_sampling")
    labels = longs(data["cluster_labels"])
    name = str(data["setting_names"][0])
    temperature = float(data["setting_temp"][0])
    for row, logits in enumerate(torch.from_numpy(data["logits"])):
        token = sampling.sample_cluster_tokens(logits[None], torch.rand(1, 2), labels, temperature, 1)
        assert_same(labels[token], data[f"{name}_clusters_{row}"][:1])


def test_scheduler_refuses_cluster_sampling_without_labels(direct_sr_scheduler):
    with pytest.raises(ValueError, match="cluster_labels"):
        direct_sr_scheduler.step(
            torch.zeros(1, 1, 4), 1, torch.zeros(1, 1, 1).long(), torch.ones(1, 1).bool(), torch.zeros(1, 1, 2)
        )
    assert isinstance(direct_sr_scheduler, LoPARScheduler)
