"""The same figures as torch-fidelity's own command, where it is installed (it needs torchvision)."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cogview_pipelines.cli import app
from cogview_pipelines.evaluation.distances import precision_and_recall
from cogview_pipelines.evaluation.networks import Inception, efficientnet_lite0

NUM, SIZE = 24, 64
NETWORK = "cogview_pipelines.evaluation.networks:efficientnet_lite0"


@pytest.fixture(scope="module")
def fidelity():
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # a torchvision of another PyTorch is a RuntimeError
        pytest.skip(f"needs torch-fidelity: {error}")
    return torch_fidelity


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pictures of one size: soft noise, of other colours on each side."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for side, shift in (("true", 0), ("made", 40)):
        (folder / side).mkdir()
        for number in range(NUM):
            noise = torch.randint(0, 216, (8, 8, 3), generator=generator, dtype=torch.uint8) + shift
            image = Image.frombytes("RGB", (8, 8), bytes(noise.flatten().tolist())).resize((SIZE, SIZE))
            image.save(folder / side / f"{number:02d}.png")
    lines = [json.dumps({"id": f"{number:02d}", "caption": "a tiger"}) for number in range(NUM)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_fid_inception_score_precision_and_recall_are_torch_fidelitys(fidelity, folders, tmp_path):
    network = efficientnet_lite0()

    class Extractor(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, pixels):
            given = dict(zip(("features", "logits"), network(pixels)))
            return tuple(given[name] for name in self.features_list)

    fidelity.register_feature_extractor("efficientnet", Extractor)
    theirs = fidelity.calculate_metrics(
        input1=str(folders / "made"),
        input2=str(folders / "true"),
        feature_extractor="efficientnet",
        **dict.fromkeys(("isc", "fid", "prc"), True),
        isc_splits=10,
        samples_shuffle=False,
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        batch_size=8,
    )
    arguments = ["--captions", folders / "captions.jsonl", "--pictures", folders / "made", "--radii", "0"]
    arguments += ["--references", folders / "true", "--network", NETWORK, "--size", SIZE, "--precision", "--json"]
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    figures = {name: figure["value"] for name, figure in json.loads(result.stdout)["figures"].items()}
    assert theirs["frechet_inception_distance"] > 1
    assert figures["fid_0"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    assert figures["inception_score"] == pytest.approx(theirs["inception_score_mean"], abs=1e-3)
    assert (figures["precision"], figures["recall"]) == (theirs["precision"], theirs["recall"])


def test_precision_and_recall_tell_good_from_manifold(fidelity):
    generator = torch.Generator().manual_seed(1)
    true = torch.cat([torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator) + 50])
    half = torch.randn(60, 4, generator=generator)  # good, but of one kind only
    found = precision_and_recall(true, half)
    assert found["precision"] > 0.7 and 0.3 < found["recall"] < 0.5
    assert precision_and_recall(true, true) == {"precision": 1.0, "recall": 1.0}
    with pytest.raises(ValueError, match="4 pictures on each side, but there are 60 and 3"):
        precision_and_recall(true, half[:3])


def test_inception_is_torch_fidelitys_from_a_file_of_weights(fidelity, tmp_path, monkeypatch):
    network = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    path = tmp_path / "weights.pth"
    with monkeypatch.context() as patched:  # random weights: the original ones are in no package
        torch.save({}, path)
        patched.setattr(network, "load_state_dict", lambda self, weights: None)
        torch.manual_seed(0)
        random = network("inception", ["2048"], str(path))
    torch.save(random.state_dict(), path)
    pixels = torch.randint(0, 256, (2, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features, logits = Inception(path)(pixels)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert torch.equal(features, random.eval()(pixels)[0])
    torch.save({"something": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold Inception's weights"):
        Inception(path)
