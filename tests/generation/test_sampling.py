"""
Sampling against closed forms.

`draw` inverts a cumulative sum, so over `n` evenly spaced noises a choice of probability `p` must come up `n * p`
times, to within one: distributions are tested exactly, without chance.
"""

import pytest
import torch

from cogview_pipelines.generation.sampling import (
    cluster_masses,
    draw,
    draw_noise,
    keep_top_k,
    sample_cluster_tokens,
    sample_tokens,
    token_probabilities,
)

from ..utils import NUM_CLUSTERS, NUM_IMAGE_TOKENS, cluster_labels

LARGEST_NOISE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()


def make_logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spaced_noise(count):
    """`count` evenly spaced numbers in (0, 1)."""
    return (torch.arange(count) + 0.5) / count


def frequencies(tokens, num_choices):
    return torch.bincount(tokens.flatten(), minlength=num_choices) / tokens.numel()


def cluster_sampling_distribution(logits, labels, temperature, top_k_clusters, cluster_temperature):
    """The distribution of cluster sampling as the release defines it, cluster by cluster, in float64."""
    scaled = logits.double() / temperature
    probabilities = scaled.softmax(-1)
    masses = torch.stack([probabilities[labels == cluster].sum() for cluster in range(int(labels.max()) + 1)])
    kept = masses.argsort(descending=True)[:top_k_clusters]
    result = torch.zeros_like(probabilities)
    for cluster in kept.tolist():
        members = labels == cluster
        result[members] = masses[cluster] / masses[kept].sum() * (scaled[members] / cluster_temperature).softmax(-1)
    return result


@pytest.mark.parametrize("num_choices, count", [(5, 1000), (300, 10_000)])
def test_draw_follows_the_weights(num_choices, count):
    weights = make_logits(num_choices).exp()
    tokens = draw(weights.expand(count, -1), spaced_noise(count))
    expected = weights / weights.sum()
    assert (frequencies(tokens, num_choices) - expected).abs().max() <= 2 / count


def test_draw_does_not_depend_on_the_scale_of_the_weights():
    weights, noise = make_logits(64, 50).exp(), spaced_noise(64)
    assert torch.equal(draw(weights, noise), draw(2.0**-60 * weights, noise))


@pytest.mark.parametrize("noise", [0.0, LARGEST_NOISE])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 3.3e20])
def test_weights_of_zero_are_never_drawn(noise, scale):
    weights = torch.zeros(200, 40)
    generator = torch.Generator().manual_seed(1)
    positive = torch.rand(200, 40, generator=generator) < 0.2
    positive[:, 17] = True
    weights[positive] = scale * torch.rand(int(positive.sum()), generator=generator).clamp(min=1e-6)
    tokens = draw(weights, torch.full((200,), noise))
    assert positive.gather(1, tokens[:, None]).all()
    first, last = positive.int().argmax(-1), 39 - positive.flip(1).int().argmax(-1)
    assert torch.equal(tokens, first if noise == 0 else last)


@pytest.mark.parametrize("weight", [0.1, 1e-44])
def test_the_only_choice_is_drawn_whatever_the_noise(weight):
    weights = torch.zeros(100, 7)
    weights[:, 3] = weight
    assert (draw(weights, torch.linspace(0, LARGEST_NOISE, 100)) == 3).all()


def test_rounding_of_a_parallel_sum_draws_no_weight_of_zero(monkeypatch):
    """On a GPU a cumulative sum may rise or fall by rounding where the weight is zero."""
    weights = torch.tensor([0.25, 0.0, 0.0, 0.5, 0.0, 0.25, 0.0])
    rounding = 0.01 * torch.tensor([0, 1, -1, 0, 1, 0, 0])
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *arguments: cumsum(*arguments) + rounding)
    noise = spaced_noise(10_000)
    frequency = frequencies(draw(weights.expand(10_000, -1), noise), 7)
    assert (frequency[weights == 0] == 0).all()
    assert (frequency - weights).abs().max() <= 0.02


@pytest.mark.gpu
def test_draws_on_a_gpu_follow_the_weights_and_never_take_a_zero():
    weights = make_logits(20_000).exp()
    weights[torch.rand(20_000) < 0.99] = 0
    expected, count = weights / weights.sum(), 2000
    for part in spaced_noise(100 * count).cuda().split(count):
        tokens = draw(weights.cuda().expand(count, -1), part)
        assert (weights.cuda()[tokens] > 0).all()
    tokens = draw(weights.cuda().expand(count, -1), spaced_noise(count).cuda()).cpu()
    assert (frequencies(tokens, 20_000) - expected).abs().max() <= 2 / count


def test_draws_of_a_batch_are_those_of_its_rows():
    weights, noise = make_logits(4, 3, 20).exp(), torch.rand(4, 3)
    tokens = draw(weights, noise)
    rows = [[draw(weights[i, j], noise[i, j]).item() for j in range(3)] for i in range(4)]
    assert tokens.tolist() == rows


def test_top_k_keeps_the_largest_and_all_that_tie_with_the_last():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, -5.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    kept = keep_top_k(logits, 2)
    assert kept.isfinite().tolist() == [[True, False, True, True, False], [True] * 5]
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])
    assert torch.equal(logits[0], torch.tensor([3.0, 1.0, 2.0, 2.0, -5.0]))  # the argument stays as it is


def test_top_k_above_the_number_of_tokens_keeps_all():
    logits = make_logits(3, 5)
    assert torch.equal(keep_top_k(logits, 100), logits)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (1.7, 7), (0.8, 1), (1.0, 100)])
def test_token_sampling_follows_the_closed_form(temperature, top_k):
    logits, count = make_logits(30), 20_000
    noise = torch.stack([torch.rand(count), spaced_noise(count)], -1)
    frequency = frequencies(sample_tokens(logits.expand(count, -1), noise, temperature, top_k), 30)
    expected = (logits.double() / temperature).softmax(-1)
    if top_k is not None:
        expected[logits.argsort(descending=True)[top_k:]] = 0
    assert (frequency - expected / expected.sum()).abs().max() <= 2 / count
    assert (frequency[expected == 0] == 0).all()
    torch.testing.assert_close(token_probabilities(logits, temperature, top_k).double(), expected / expected.sum())


def test_token_sampling_is_the_same_in_half_precision_logits_that_are_exact():
    logits, noise = make_logits(50, 30).half(), torch.rand(50, 2)
    assert torch.equal(sample_tokens(logits, noise, 1.3, 5), sample_tokens(logits.float(), noise, 1.3, 5))


def test_cluster_masses_are_sums_over_clusters():
    probabilities, labels = make_logits(2, 3, NUM_IMAGE_TOKENS).softmax(-1), cluster_labels()
    masses = cluster_masses(probabilities, labels, NUM_CLUSTERS)
    assert masses.shape == (2, 3, NUM_CLUSTERS)
    for cluster in range(NUM_CLUSTERS):
        torch.testing.assert_close(masses[..., cluster], probabilities[..., labels == cluster].sum(-1))


@pytest.mark.parametrize(
    "temperature, top_k_clusters, cluster_temperature",
    [(1.0, NUM_CLUSTERS, 1.0), (1.15, 3, 1.0), (1.0, 2, 0.4), (1.6, 1, 0.89), (0.7, 1000, 2.0)],
)
def test_cluster_sampling_follows_the_closed_form(temperature, top_k_clusters, cluster_temperature):
    settings = (temperature, top_k_clusters, cluster_temperature)
    logits, labels, count = make_logits(NUM_IMAGE_TOKENS), cluster_labels(), 300
    noise = torch.cartesian_prod(spaced_noise(count), spaced_noise(count))
    tokens = sample_cluster_tokens(logits.expand(len(noise), -1), noise, labels, *settings)
    expected = cluster_sampling_distribution(logits, labels, *settings)
    frequency = frequencies(tokens, NUM_IMAGE_TOKENS)
    assert (frequency - expected).abs().max() <= 3 / count
    assert (frequency[expected == 0] == 0).all()
    cluster_frequency = cluster_masses(frequency, labels, NUM_CLUSTERS)
    cluster_expected = cluster_masses(expected.float(), labels, NUM_CLUSTERS)
    assert (cluster_frequency - cluster_expected).abs().max() <= 2 / count


def test_cluster_sampling_with_drawn_noise_passes_a_chi_square_test():
    settings = (1.15, 4, 0.89)
    logits, labels, count = make_logits(NUM_IMAGE_TOKENS), cluster_labels(), 20_000
    noise = draw_noise((count, 2), torch.Generator().manual_seed(3))
    tokens = sample_cluster_tokens(logits.expand(count, -1), noise, labels, *settings)
    expected = count * cluster_sampling_distribution(logits, labels, *settings)
    often = expected >= 5  # the rule of thumb for the approximation to hold; the rest is one class
    observed = count * frequencies(tokens, NUM_IMAGE_TOKENS).double()
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # mean and four standard deviations of the distribution


def test_the_temperature_inside_a_cluster_does_not_move_mass_between_clusters():
    logits, labels, count = make_logits(NUM_IMAGE_TOKENS), cluster_labels(), 1000
    noise = torch.stack([spaced_noise(count), torch.rand(count)], -1)
    drawn = [labels[sample_cluster_tokens(logits.expand(count, -1), noise, labels, 1.1, 4, t)] for t in (0.3, 1.0, 3)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_cluster_sampling_keeps_twins_that_top_k_cuts_off():
    """Ten codes of 0.06 in one cluster together outweigh the single code of 0.4: what the sampler is for."""
    probabilities = torch.tensor([0.4] + [0.06] * 10)
    labels = torch.tensor([0] + [1] * 10)
    noise = torch.cartesian_prod(spaced_noise(50), spaced_noise(50))
    logits = probabilities.log().expand(len(noise), -1)
    by_cluster = frequencies(sample_cluster_tokens(logits, noise, labels, top_k_clusters=1), 11)
    assert by_cluster[0] == 0
    assert (by_cluster[1:] - 0.1).abs().max() <= 2 / 50
    assert (sample_tokens(logits, noise, top_k=1) == 0).all()


def test_clusters_that_change_places_leave_the_draws_of_others():
    """Guesses of parallel decoding settle the sooner the less a small change of the logits moves."""
    labels = torch.tensor([0, 1, 2, 3])
    before, after = (torch.tensor(masses).log() for masses in ([0.2, 0.31, 0.29, 0.2], [0.2, 0.29, 0.31, 0.2]))
    noise = spaced_noise(1000)[:, None].expand(-1, 2)
    drawn = [sample_cluster_tokens(logits.expand(1000, -1), noise, labels) for logits in (before, after)]
    moved = drawn[0] != drawn[1]
    assert moved.sum() == 20  # what one lost to the other
    assert set(drawn[0][moved].tolist()) == {1}


def test_a_given_number_of_clusters_changes_nothing():
    logits, labels, noise = make_logits(20, NUM_IMAGE_TOKENS), cluster_labels(), torch.rand(20, 2)
    with_count = sample_cluster_tokens(logits, noise, labels, 1.1, 3, 0.9, num_clusters=NUM_CLUSTERS)
    assert torch.equal(with_count, sample_cluster_tokens(logits, noise, labels, 1.1, 3, 0.9))


@pytest.mark.parametrize("noise", [0.0, LARGEST_NOISE])
def test_extreme_noise_draws_from_a_kept_cluster(noise):
    logits, labels = make_logits(500, NUM_IMAGE_TOKENS, scale=30.0), cluster_labels()
    tokens = sample_cluster_tokens(logits, torch.full((500, 2), noise), labels, top_k_clusters=2)
    masses = cluster_masses(logits.softmax(-1), labels, NUM_CLUSTERS)
    kept = masses.topk(2).indices
    assert (labels[tokens][:, None] == kept).any(-1).all()


def test_noise_of_several_generators_is_that_of_each_alone():
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]

    together = draw_noise((3, 10, 2), generators())
    for row, generator in enumerate(generators()):
        assert torch.equal(together[row : row + 1], draw_noise((1, 10, 2), [generator]))
        assert not torch.equal(together[row], together[row - 1])


def test_noise_of_one_generator_does_not_depend_on_a_list_around_it():
    alone = draw_noise((1, 6), torch.Generator().manual_seed(5))
    assert torch.equal(alone, draw_noise((1, 6), [torch.Generator().manual_seed(5)]))


def test_noise_is_float32_in_the_unit_interval_and_fresh_at_each_call():
    generator = torch.Generator().manual_seed(0)
    first, second = draw_noise((4, 1000), generator), draw_noise((4, 1000), generator)
    assert first.dtype == torch.float32
    assert first.min() >= 0 and first.max() < 1
    assert not torch.equal(first, second)
    assert draw_noise((4, 1000)).shape == (4, 1000)


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_generators_is_an_error(count):
    with pytest.raises(
        ValueError, match=rf"`generator` must be one generator or one per image \(2\), but {count} came"
    ):
        draw_noise((2, 5), [torch.Generator()] * count)
