import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview_pipelines import CogViewVQModel, IcetkVQConfig, IcetkVQModel
from cogview_pipelines.demo import Scope, sample_scenes
from cogview_pipelines.evaluation.reconstruction import psnr
from cogview_pipelines.training import distribution
from cogview_pipelines.training.data.selection import to_square

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "train_vq_model.py"
MODEL = {
    "num_embeddings": 32,
    "embedding_dim": 8,
    "base_channels": 8,
    "norm_num_groups": 4,
    "mid_attention": False,
    "compression_rates": [4, 8],
    "num_clusters": 4,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_vq_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).resize((48, 40), Image.Resampling.BILINEAR).save(tmp_path / f"pictures/{index}.png")

    def call(name, **options):
        options = {
            "output_dir": tmp_path / name,
            "image_folder": tmp_path / "pictures",
            "model": json.dumps(MODEL),
            "resolutions": (16, 32),
            "crop_size": 16,
            "batch_size": 2,
            "max_steps": 4,
            "warmup_steps": 1,
            "decay_steps": 2,
            "log_every_steps": 1,
            "sample_every_steps": 4,
            "gradient_accumulation_steps": 2,
            **options,
        }
        arguments = []
        for key, value in options.items():
            arguments += [f"--{key}", *map(str, value if isinstance(value, tuple) else (value,))]
        return script.main(arguments)

    return call


def metrics(folder: Path, *names: str) -> list[tuple]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in ("step", *names)) for line in lines]


@pytest.mark.parametrize("mixed_precision, ema_decay", [("no", 0.0), ("bf16", 0.5)])
def test_an_interrupted_run_continues_exactly(run, tmp_path, mixed_precision, ema_decay, monkeypatch):
    monkeypatch.setattr(distribution, "multiplies", lambda dtype: True)  # autocast in any case
    options = {"mixed_precision": mixed_precision, "ema_decay": ema_decay}
    whole = run("whole", **options)
    run("parts", max_minutes=1e-9, **options)  # stops after one step
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "parts/final").exists()
    resumed = run("parts", resume_from_checkpoint="latest", **options)

    names = ("loss", "commitment_loss", "learning_rate")
    assert metrics(tmp_path / "parts", *names) == metrics(tmp_path / "whole", *names)
    assert len(metrics(tmp_path / "whole")) == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_final_model_loads_and_has_clusters(run, tmp_path):
    run("run")
    model = IcetkVQModel.from_pretrained(tmp_path / "run/final")
    assert set(model.cluster_labels.tolist()) == {0, 1, 2, 3}
    assert model.decode(model.encode(torch.rand(1, 3, 16, 16), 4).tokens, 4).sample.shape == (1, 3, 16, 16)
    pictures = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    assert pictures == ["0000004_16px.png", "0000004_32px.png"]


COGVIEW = {"num_embeddings": 32, "embedding_dim": 8, "hidden_channels": 8, "num_halvings": 3}


@pytest.mark.parametrize("method", ["moving_average", "nearest", "gumbel", "fixed"])
def test_the_image_tokenizer_of_cogview_learns_in_all_four_ways_and_resumes(run, tmp_path, method):
    options = {"family": "cogview", "codebook_training": method, "model": json.dumps(COGVIEW), "max_steps": 3}
    options |= {"decay_steps": 0, "sample_every_steps": 0}
    whole = run("whole", **options)
    run("parts", max_minutes=1e-9, **options)
    resumed = run("parts", resume_from_checkpoint="latest", **options)
    assert whole.config.codebook_training == method
    codes = CogViewVQModel.from_pretrained(tmp_path / "whole/final").quantize.embed.weight
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    untrained = run("untrained", **{**options, "learning_rate": 0.0, "codebook_training": "fixed"})
    assert torch.equal(codes, untrained.quantize.embed.weight) == (method == "fixed")
    assert {"reconstruction_loss", "commitment_loss", "codes_in_use"} <= set(
        json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0])
    )


def test_the_temperature_of_gumbel_softmax_falls_and_is_not_saved(script):
    options = {"family": "cogview", "codebook_training": "gumbel", "model": json.dumps(COGVIEW), "max_steps": 4}
    config = script.VQTrainConfig(output_dir="out", **options)
    model, seen = script.make_model(config), []
    for step in range(4):
        script.begin_step(config, model, step)
        seen.append(model.quantize.gumbel_temperature)
    assert seen == pytest.approx([1.0, 0.5, 0.25, 0.125]) and model.config.gumbel_temperature == 1.0


def test_codes_stay_where_they_are_late_in_the_run(script):
    model = IcetkVQModel(IcetkVQConfig(**MODEL))
    config = script.VQTrainConfig(output_dir="out", max_steps=10, decay_steps=4)
    thresholds = []
    for step in range(10):
        script.begin_step(config, model, step)
        thresholds.append(model.quantize.dead_code_threshold)
    assert thresholds == [model.config.dead_code_threshold] * 8 + [0.0] * 2 and thresholds[0] > 0


def test_scenes_drawn_by_several_processes_are_the_same(script):
    def draw(**options):
        config = script.VQTrainConfig(output_dir="out", num_scenes=40, resolutions=[40, 80], **options)
        return [source.pictures for source in script.make_sources(config)]

    alone, together = draw(), draw(data_workers=2)
    assert [pictures.shape for pictures in alone] == [(40, 3, 40, 40), (40, 3, 80, 80)]
    assert all(torch.equal(one, other) for one, other in zip(alone, together))


def test_single_objects_are_as_frequent_as_asked_for(script):
    scenes = [*sample_scenes(Scope.small(), 20, 0, "single"), *sample_scenes(Scope.small(), 300, 0, "pair")]
    for share in (0.25, 0.5, 0.8):
        chosen = script.with_single_share(scenes, share)
        assert set(chosen) == set(scenes)
        assert sum(scene.relation is None for scene in chosen) / len(chosen) == pytest.approx(share, abs=0.05)
    assert len(script.with_single_share(scenes, 0.01)) == len(scenes)  # none is left out
    with pytest.raises(ValueError, match="with one object and with two, but there are 0 and"):
        script.with_single_share([scene for scene in scenes if scene.relation], 0.5)
    config = script.VQTrainConfig(output_dir="out", num_scenes=60, resolutions=[16], single_share=0.9)
    (pool,) = script.make_sources(config)
    plain = sum(scene.relation is not None for scene in sample_scenes(Scope.small(), 60, 0, split_name="train"))
    assert len(pool.pictures) == pytest.approx(plain / 0.1, rel=0.1)


def test_training_lowers_the_reconstruction_loss(run, tmp_path):
    run("run", max_steps=40, decay_steps=0, learning_rate=3e-3, sample_every_steps=0)
    losses = [loss for _, loss in metrics(tmp_path / "run", "reconstruction_loss")]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_a_perceptual_distance_given_by_name_is_part_of_the_loss(run, tmp_path, monkeypatch):
    (tmp_path / "my_distance.py").write_text(
        "def make():\n    return lambda sample, target: (sample.mean((2, 3)) - target.mean((2, 3))).abs() + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"max_steps": 1, "decay_steps": 0, "sample_every_steps": 0}
    run("plain", **options)
    run("perceptual", perceptual_network="my_distance:make", perceptual_weight=2.0, **options)
    (_, plain), (_, perceptual) = metrics(tmp_path / "plain", "loss") + metrics(tmp_path / "perceptual", "loss")
    assert perceptual > plain + 2


def test_a_config_file_is_read_and_the_command_line_wins(script, tmp_path):
    from cogview_pipelines.training.arguments import parse_config

    path = tmp_path / "config.yaml"
    path.write_text(
        "max_steps: 7\nlearning_rate: 1e-4\nresolutions: [40]\nmodel: {decoder_channel_multipliers: {8: [1, 2]}}\n"
    )
    config = parse_config(script.VQTrainConfig, ["--config", str(path), "--output_dir", "out", "--max_steps", "9"])
    assert (config.max_steps, config.learning_rate, config.resolutions) == (9, 1e-4, [40])
    assert json.loads(config.model) == {"decoder_channel_multipliers": {"8": [1, 2]}}
    path.write_text("max_step: 7\n")
    with pytest.raises(ValueError, match="VQTrainConfig lacks: max_step"):
        parse_config(script.VQTrainConfig, ["--config", str(path), "--output_dir", "out"])


def test_losses_of_other_pictures_are_told_by_resolution_and_rate_without_a_trace_in_the_run(run, tmp_path):
    (tmp_path / "held_out").mkdir()
    for index in range(3):
        Image.new("RGB", (50, 40), (80 * index, 0, 200)).save(tmp_path / f"held_out/{index}.png")
    options = {"decay_steps": 0, "sample_every_steps": 0, "learning_rate": 3e-3, "max_steps": 6}
    plain = run("plain", **options)
    watched = run("watched", **options, validation_data=tmp_path / "held_out", evaluate_every_steps=2)
    assert all(torch.equal(value, watched.state_dict()[name]) for name, value in plain.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "watched/metrics.jsonl").read_text().splitlines()]
    kinds = [f"validation_loss/{resolution}px/{rate}x" for resolution in (16, 32) for rate in (4, 8)]
    found = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in found] == [2, 4, 6] and "validation_loss_before" in lines[0]
    for line in found:
        assert line["validation_loss"] == pytest.approx(sum(line[kind] for kind in kinds) / 4)
    assert found[-1]["validation_loss"] < lines[0]["validation_loss_before"]
    few = run("few", **options, validation_data=tmp_path / "held_out", validation_samples=1, evaluate_every_steps=0)
    assert all(torch.equal(value, few.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_data": "/nowhere"}, "`/nowhere` has no pictures"),
        ({"validation_samples": 0}, "`validation_samples` must be at least 1, but is 0"),
        ({"image_folder": "/nowhere"}, "`/nowhere` has no pictures"),
        ({"single_share": 0.5}, "`single_share` is about emoji scenes"),
        ({"single_share": 1.0}, "`single_share` must be between 0 and 1, but is 1.0"),
        ({"perceptual_network": "no_such_module:make"}, "`perceptual_network` 'no_such_module:make'"),
        ({"codebook_training": "gumbel"}, "`codebook_training` must be left out for `family` cogview2"),
        ({"perceptual_network": "vgg"}, "'lpips' or 'module:factory'"),
        ({"resume_from_checkpoint": "/nowhere"}, "`resume_from_checkpoint`"),
    ],
)
def test_wrong_options_are_named(run, options, message):
    with pytest.raises(ValueError, match=message):
        run("run", **options)


def test_a_broken_picture_is_found_before_the_training_begins_or_left_out_and_counted(
    run, tmp_path, monkeypatch, capsys
):
    (tmp_path / "pictures/._0.png").write_bytes(b"what macOS leaves beside a picture")
    (tmp_path / "pictures/broken.png").write_bytes((tmp_path / "pictures/0.png").read_bytes()[:-30])
    with monkeypatch.context() as patch:
        patch.setattr(IcetkVQModel, "forward", lambda *_, **__: pytest.fail("the training began"))
        with pytest.raises(
            ValueError, match=r"1 of 7 pictures cannot be read: .*broken\.png is damaged.*--skip_unread"
        ):
            run("run")
    capsys.readouterr()
    run("run", skip_unreadable=True)
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 7 pictures were left out: they cannot be read."
    assert len(metrics(tmp_path / "run", "loss")) == 4
    assert len((tmp_path / "run/pictures.jsonl").read_text().splitlines()) == 6


# A trained one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A tokenizer as a converted release brings it: with codes, but without their averages."""
    torch.manual_seed(3)
    model = IcetkVQModel(IcetkVQConfig(**MODEL))
    model.compute_cluster_labels()
    assert not model.quantize.cluster_size.any()
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_the_decoder_alone_is_trained_and_pictures_keep_their_tokens(run, trained, tmp_path):
    before = IcetkVQModel.from_pretrained(trained).eval()
    after = run("decoder", init_from=trained, decoder_only=True, model="{}", learning_rate=0.01, max_steps=20)
    for name, value in after.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]) is not name.startswith("decoders"), name
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = before.encode(pixels, 8).tokens
        assert torch.equal(after.eval().encode(pixels, 8).tokens, tokens)
    losses = metrics(tmp_path / "decoder", "reconstruction_loss")
    assert sum(loss for _, loss in losses[-5:]) < sum(loss for _, loss in losses[:5])
    assert [line for line in metrics(tmp_path / "decoder", "psnr") if 0 < line[1] < 60]


def test_training_goes_on_from_the_codes_of_a_release_instead_of_new_ones(run, trained):
    before = IcetkVQModel.from_pretrained(trained)
    after = run(
        "on", init_from=trained, model=json.dumps({"dead_code_threshold": 0.0}), max_steps=2, learning_rate=1e-5
    )
    codes = before.quantize.embed.weight
    moved = (after.quantize.embed.weight - codes).norm(dim=1) / codes.norm(dim=1)
    assert 0 < moved.max() < 0.5


def test_what_to_go_on_from_must_be_of_the_family(run, trained):
    with pytest.raises(ValueError, match="`init_from` must be a CogViewVQModel, for `family` cogview, but is a Icetk"):
        run("wrong", init_from=trained, family="cogview", model="{}")
    with pytest.raises(ValueError, match="`decoder_only` trains the decoder of a trained model"):
        run("wrong", decoder_only=True)


def test_an_adversary_learns_beside_the_tokenizer_resumes_with_it_and_is_not_part_of_the_model(run, tmp_path):
    options = {
        "adversarial_weight": 0.1,
        "adversarial_start": 1,
        "resolutions": (32,),
        "crop_size": 32,
        "max_steps": 3,
    }
    options |= {"learning_rate": 1e-3, "warmup_steps": 0}
    model = run("whole", **options)
    assert isinstance(model, IcetkVQModel)
    loaded = IcetkVQModel.from_pretrained(tmp_path / "whole/final")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert run("parts", **{**options, "max_minutes": 1e-9}) is None
    run("parts", **options, resume_from_checkpoint="latest")
    assert metrics(tmp_path / "parts", "loss") == metrics(tmp_path / "whole", "loss")
    plain = {**options, "adversarial_weight": 0.0}
    del plain["adversarial_start"]
    run("plain", **plain)
    assert metrics(tmp_path / "plain", "loss") != metrics(tmp_path / "whole", "loss")
    with pytest.raises(ValueError, match="needs pictures of at least 32 pixels, but the smallest have 16"):
        run("small", adversarial_weight=0.1)


def test_the_gradients_of_the_two_sides_do_not_mix():
    from cogview_pipelines.training.adversary import PatchDiscriminator, WithAdversary

    torch.manual_seed(0)
    both = WithAdversary(IcetkVQModel(IcetkVQConfig(**MODEL)), PatchDiscriminator(8)).train()
    pixels = torch.rand(2, 3, 32, 32)
    _, fooling, telling = both(pixels, 8)
    fooling.backward()
    assert all(parameter.grad is None for parameter in both.discriminator.parameters())
    assert any(p.grad is not None and p.grad.any() for p in both.tokenizer.decoders.parameters())
    both.zero_grad()
    telling.backward()
    assert all(parameter.grad is None for parameter in both.tokenizer.parameters())
    assert all(p.grad is not None for p in both.discriminator.parameters())


def test_a_tokenizer_is_measured_on_pictures(run, trained, tmp_path, capsys, monkeypatch):
    from .conftest import load_script

    (tmp_path / "nets.py").write_text(
        "def distance():\n    return lambda one, other: (one - other).abs().flatten(1).mean(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    script = load_script("evaluate_vq_model")
    arguments = ["--vqvae", str(trained), "--image_folder", str(tmp_path / "pictures"), "--resolution", "32"]
    report = script.main([*arguments, "--perceptual_network", "nets:distance", "--batch_size", "4"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert report["pictures"] == 6 and report["compression_rate"] == 8
    assert 0 < report["psnr"] < 40 and -1 < report["ssim"] < 1 and report["lpips"] > 0
    assert report["codes_used"].endswith("of 32") and report["fit"] == "crop"


def measured(tmp_path, trained, *more):
    from .conftest import load_script

    arguments = ["--vqvae", str(trained), "--image_folder", str(tmp_path / "pictures"), "--resolution", "32"]
    return load_script("evaluate_vq_model").main([*arguments, "--batch_size", "4", *map(str, more)])


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pictures_are_saved_as_the_tokenizer_gives_them_back(run, trained, tmp_path, fit):
    (tmp_path / "pictures/more").mkdir()
    (tmp_path / "pictures/5.png").rename(tmp_path / "pictures/more/5.png")
    saved = tmp_path / "recovered"
    for _ in range(2):  # what it wrote itself is written again
        report = measured(tmp_path, trained, "--save", saved, "--fit", fit)
    names = sorted(str(path.relative_to(saved)) for path in saved.rglob("*.png"))
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "more/5.png"] and report["fit"] == fit
    model, seen = IcetkVQModel.from_pretrained(trained).eval(), []
    for name in names:
        target = torch.from_numpy(np.array(to_square(Image.open(tmp_path / "pictures" / name), 32, fit)))
        target = target.movedim(-1, 0)[None].float() / 255
        with torch.no_grad():
            sample = model.decode(model.encode(target, 8).tokens, 8).sample.clamp(0, 1)
        pixels = torch.from_numpy(np.array(Image.open(saved / name))).movedim(-1, 0)
        assert ((sample[0] * 255).round() - pixels.float()).abs().max() <= 1
        seen.append(float(psnr(sample, target)[0]))
    assert report["psnr"] == pytest.approx(np.mean(seen), abs=1e-3)


def test_saved_pictures_replace_none_of_others(run, trained, tmp_path):
    saved = tmp_path / "recovered"
    saved.mkdir()
    (saved / "3.png").write_bytes((tmp_path / "pictures/3.png").read_bytes())
    with pytest.raises(ValueError, match=r"3\.png is there already, and not of this script"):
        measured(tmp_path, trained, "--save", saved)
    assert [path.name for path in saved.iterdir()] == ["3.png"]
    with pytest.raises(ValueError, match="`save` must be outside of `image_folder`"):
        measured(tmp_path, trained, "--save", tmp_path / "pictures/recovered")
    (tmp_path / "pictures/3.png").rename(tmp_path / "pictures/2.webp")
    with pytest.raises(ValueError, match=r"2\.png and .*2\.webp would both become .*2\.png"):
        measured(tmp_path, trained, "--save", saved)


def test_the_tokenizer_can_be_trained_on_whole_pictures_on_white(run, script, tmp_path):
    run("run", fit="pad", max_steps=1)
    config = script.VQTrainConfig(output_dir=str(tmp_path), image_folder=str(tmp_path / "pictures"), fit="pad")
    (low, _) = script.make_sources(config)
    square = low.squares([0])[0]
    assert (square[:, :6] == 255).all() and (square[:, -6:] == 255).all()  # of 48 x 40 pixels
    assert not (square[:, 7:-7] == 255).all()
