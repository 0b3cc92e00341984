"""Distances between sets of features: against the original code's numbers and definitions written out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cogview_pipelines.evaluation.distances import (
    frechet_distance,
    frechet_distance_with_error,
    inception_score,
    jackknife_error,
    mean_with_error,
)

FIXTURE = np.load(Path(__file__).parent / "data" / "fid.npz")


def features(seed: int, num: int = 60, width: int = 4) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_frechet_distance_is_that_of_the_release():
    a, b = (torch.from_numpy(FIXTURE[name]) for name in ("a_f64", "b_f64"))
    assert frechet_distance([a], [b]) == pytest.approx(float(FIXTURE["fid_f64"]), abs=1e-6)
    assert frechet_distance(a.split(7), b.split(64)) == pytest.approx(float(FIXTURE["fid_f64"]), abs=1e-6)


def test_equal_sets_have_no_distance_and_a_shift_has_its_square():
    a = features(0)
    assert frechet_distance([a], [a]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance([a], [a + 3]) == pytest.approx(4 * 9, abs=1e-6)


def test_distances_of_other_features_do_not_remain():
    value = frechet_distance([features(0)], [features(1)])
    frechet_distance([features(2, width=6)], [features(3, width=6) * 5])
    with pytest.raises(ValueError, match="there are 60 and 1"):
        frechet_distance([features(4)], [features(5)[:1]])
    assert frechet_distance([features(0)], [features(1)]) == value


def test_two_features_are_needed_on_each_side():
    with pytest.raises(ValueError, match="two pictures on each side, but there are 60 and 1"):
        frechet_distance([features(0)], [features(1)[:1]])
    with pytest.raises(ValueError, match="there are 0 and 0"):
        frechet_distance([], [])


def test_the_error_is_that_of_leaving_out_groups():
    a, b = features(0), features(1) + 0.5
    value, error = frechet_distance_with_error(lambda: a.split(16), lambda: b.split(16))
    keep = [torch.arange(60) % 10 != group for group in range(10)]
    parts = [frechet_distance([a[rows]], [b[rows]]) for rows in keep]
    assert value == pytest.approx(frechet_distance([a], [b]))
    assert error == pytest.approx(np.sqrt(0.9 * np.sum((np.array(parts) - np.mean(parts)) ** 2)))
    assert frechet_distance_with_error(lambda: [a[:19]], lambda: [b[:19]])[1] is None


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = features(2, 30, 1).flatten()
    parts = [float(values[torch.arange(30) != left].mean()) for left in range(30)]
    assert jackknife_error(parts) == pytest.approx(mean_with_error(values)[1])
    assert mean_with_error(values[:1])[1] is None


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_the_inception_score_is_its_definition_over_splits(chunk):
    logits = features(3, 50, 6)
    value, deviation = inception_score(logits.split(chunk), 50, num_splits=5)
    scores = []
    for part in logits.split(10):
        p = part.softmax(1)
        scores.append(float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp()))
    assert value == pytest.approx(np.mean(scores))
    assert deviation == pytest.approx(np.std(scores, ddof=1))


def test_splits_of_the_inception_score_have_two_pictures_at_least():
    logits = features(4, 3, 6)
    assert inception_score([logits], 3) == (inception_score([logits], 3, 1)[0], None)
    with pytest.raises(ValueError, match="two pictures, but there are 1"):
        inception_score([logits[:1]], 1)
