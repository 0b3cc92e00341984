"""
Training on several processes is training on one: gradients, losses, checkpoints, what is saved.

Tiny models over gloo on a CPU, without dropout, whose masks differ between processes.
"""

import importlib.util
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogview_pipelines import CogLMModel, IcetkVQModel
from cogview_pipelines.training.checkpoints import list_checkpoints
from cogview_pipelines.training.run_folder import read_run

from ..utils_cogview import make_cogview
from .conftest import COGLM, COGVIEW, WINDOWS, as_arguments
from .launching import (
    first_gradients,
    killed_in_second_save,
    launch,
    recorded,
    run_script,
    run_uncompiled,
    shares,
    spoiled,
    told_to_stop,
    traced,
    types_of_weights,
    with_16_bits,
)

NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
TOLERANCE = 1e-5  # of the largest element of each gradient, in float32

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.timeout(900),
]


@pytest.fixture
def options(tokenizer_folder, coglm_folder, token_folder, cogview_tokenizer_folder, cogview_token_folder, tmp_path):
    """Options of a script, and a folder by name."""
    own = {
        "train_coglm": {"model": {**COGLM, **NO_DROPOUT}, "caption_probability": 0.5, "text_loss_weight": 3.0},
        "train_direct_sr": {"transformer": coglm_folder, "model": {"num_text_slots": 30, **WINDOWS, **NO_DROPOUT}},
        "train_iterative_sr": {"transformer": coglm_folder, "model": {"num_text_slots": 4, **WINDOWS, **NO_DROPOUT}},
    }
    own["train_coglm"]["patch_size"] = 2
    own["train_cogview"] = {
        "data": cogview_token_folder,
        "tokenizer": cogview_tokenizer_folder,
        "model": {**COGVIEW, **NO_DROPOUT},
        "caption_probability": 0.3,
        "super_resolution_probability": 0.3,
        "text_loss_weight": 3.0,
    }

    def make(script, name, **more):
        common = {
            "output_dir": tmp_path / name,
            "data": token_folder,
            "tokenizer": tokenizer_folder,
            "data_workers": 0,
            "warmup_steps": 0,
            "sample_every_steps": 0,
            "log_every_steps": 1,
            "checkpoint_every_minutes": 0,
        }
        return as_arguments({**common, **own[script], **more})

    return make


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def worst(one, other):
    """The largest difference of a gradient, relative to its largest element."""
    assert one.keys() == other.keys()
    return max(
        float(np.abs(value - other[name]).max() / max(np.abs(value).max(), 1e-12)) for name, value in one.items()
    )


LAYOUTS = {
    "accumulated": (1, {"batch_size": 1, "gradient_accumulation_steps": 4}),
    "copies": (2, {"batch_size": 2, "sharding": "none"}),
    "sharded": (
        2,
        {"batch_size": 1, "sharding": "full", "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ),
    "gathered once": (2, {"batch_size": 2, "sharding": "full", "reshard_after_forward": False}),
    "two groups of two": (4, {"batch_size": 1, "sharding": "hybrid", "shard_size": 2}),
}


@pytest.mark.parametrize("script", ["train_coglm", "train_direct_sr", "train_iterative_sr", "train_cogview"])
def test_the_gradient_of_every_parameter_is_that_of_one_process(options, script):
    layouts = LAYOUTS if script == "train_coglm" else {"sharded": LAYOUTS["sharded"]}
    (alone,) = launch(1, first_gradients, script, options(script, "one", batch_size=4))
    for name, (count, more) in layouts.items():
        together = launch(count, first_gradients, script, options(script, name, **more))
        for gradients in together:
            assert worst(alone, gradients) <= TOLERANCE, name


def test_a_mean_of_the_means_of_processes_would_be_seen(options):
    """The control of the test above: with this mistake it fails by far."""
    (alone,) = launch(1, first_gradients, "train_coglm", options("train_coglm", "one", batch_size=4))
    arguments = options("train_coglm", "wrong", batch_size=2, sharding="full")
    wrong = launch(2, first_gradients, "train_coglm", arguments, True)
    assert worst(alone, wrong[0]) > 1000 * TOLERANCE


@pytest.mark.parametrize("script", ["train_coglm", "train_iterative_sr", "train_cogview"])
def test_gradients_of_embeddings_shrink_over_processes_as_in_one(options, script):
    def gradients(count, name, scale, **more):
        model = {**(COGVIEW if script == "train_cogview" else COGLM), **NO_DROPOUT}
        if script == "train_iterative_sr":
            model = {"num_text_slots": 4, **WINDOWS, **NO_DROPOUT}
        more["model"] = {**model, "embedding_gradient_scale": scale}
        return launch(count, first_gradients, script, options(script, name, **more))[0]

    whole, alone = (gradients(1, f"one {scale}", scale, batch_size=4) for scale in (1.0, 0.1))
    together = gradients(2, "two", 0.1, **LAYOUTS["sharded"][1])
    assert worst(alone, together) <= TOLERANCE
    embeddings = {name for name, value in whole.items() if np.abs(value - alone[name]).max() > TOLERANCE}
    assert embeddings == {"word_embeddings.weight"}


@pytest.mark.parametrize("count, sharding", [(1, "none"), (2, "none"), (2, "full")])
def test_a_tracker_is_told_once_what_the_metrics_say(options, tmp_path, count, sharding):
    arguments = options("train_coglm", "run", batch_size=4 // count, max_steps=4, log_every_steps=2, sharding=sharding)
    assert all(launch(count, recorded, "train_coglm", arguments))
    begin, *seen, end = map(json.loads, (tmp_path / "run/logs/seen.jsonl").read_text().splitlines())
    assert begin["options"]["max_steps"] == 4 and begin["options"]["output_dir"] == str(tmp_path / "run")
    assert [{"step": line["step"], **line["values"]} for line in seen] == metrics(tmp_path / "run")
    assert [line["step"] for line in seen] == [2, 4] and all(line["values"]["loss"] > 0 for line in seen)
    assert end == {"finished": True}


def test_tensorboard_shows_what_the_metrics_say(options, token_folder, tmp_path):
    """The real one, of shared-out weights, with validation on the way."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = {"validation_data": token_folder, "validation_samples": 8, "evaluate_every_steps": 2}
    more |= {"max_steps": 4, "log_every_steps": 2, "log_with": "tensorboard", "sharding": "full"}
    arguments = options("train_coglm", "run", batch_size=2, **more)
    assert all(launch(2, run_script, "train_coglm", arguments))
    (events,) = (tmp_path / "run/logs").rglob("events.out.tfevents.*.0")
    shown = reading.EventAccumulator(str(events)).Reload()
    for name in ("loss", "validation_loss"):
        lines = [line for line in metrics(tmp_path / "run") if name in line]
        assert [event.step for event in shown.Scalars(name)] == [line["step"] for line in lines] == [2, 4]
        assert [event.value for event in shown.Scalars(name)] == pytest.approx([line[name] for line in lines])


def error_of(gradients, exact):
    """The largest error of a parameter's gradient, relative to its norm."""
    assert gradients.keys() == exact.keys() and exact
    return max(
        float(np.linalg.norm(gradients[name] - value) / max(np.linalg.norm(value), 1e-12))
        for name, value in exact.items()
    )


@pytest.mark.parametrize("script", ["train_coglm", "train_direct_sr", "train_iterative_sr", "train_cogview"])
def test_in_16_bits_gradients_over_processes_are_as_exact_as_those_of_one(options, script):
    """None is twice as far from that in float32 as the worst of one process, and all are of 16 bits indeed."""
    (exact,) = launch(1, first_gradients, script, options(script, "exact", batch_size=4))
    layouts = ("copies", "sharded", "gathered once") if script == "train_coglm" else ("sharded",)
    for precision, least, most in (("bf16", 1e-3, 5e-2), ("fp16", 1e-4, 1e-2)):
        arguments = options(script, f"one {precision}", batch_size=4, mixed_precision=precision)
        (alone,) = launch(1, with_16_bits, first_gradients, script, arguments)
        expected = error_of(alone, exact)
        assert least < expected < most, precision
        for name in layouts:
            count, more = LAYOUTS[name]
            arguments = options(script, f"{name} {precision}", mixed_precision=precision, **more)
            first, second = launch(count, with_16_bits, first_gradients, script, arguments)
            assert least < error_of(first, exact) < 2 * expected, (name, precision)
            assert worst(first, second) == 0, (name, precision)


@pytest.mark.parametrize("precision, dtype", [("bf16", "torch.bfloat16"), ("fp16", "torch.float16")])
def test_layers_are_gathered_in_16_bits_and_kept_in_32(options, precision, dtype):
    arguments = options("train_coglm", "run", batch_size=1, max_steps=1, mixed_precision=precision, sharding="full")
    for computing, kept in launch(2, with_16_bits, types_of_weights, "train_coglm", arguments):
        assert computing == {dtype} and kept == {"torch.float32"}


@pytest.mark.parametrize("precision, within", [("bf16", 5e-3), ("fp16", 2e-3)])
def test_a_run_in_16_bits_goes_on_on_another_number_of_processes(options, tmp_path, precision, within):
    """Weights, moments and, in float16, the scale of the loss are those of one process."""
    common = {"mixed_precision": precision, "learning_rate": 1e-3, "loss_scale_interval": 2}

    def run(count, name, max_steps, **more):
        arguments = options("train_coglm", name, batch_size=4 // count, max_steps=max_steps, **common, **more)
        assert all(launch(count, with_16_bits, run_script, "train_coglm", arguments))

    run(1, "alone", 9)
    for count, max_steps, sharding in ((2, 3, "full"), (1, 6, "none"), (2, 9, "none")):
        run(count, "parts", max_steps, sharding=sharding, resume_from_checkpoint="latest")
    found, expected = metrics(tmp_path / "parts"), metrics(tmp_path / "alone")
    assert [line["step"] for line in found] == list(range(1, 10))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=within)
    numbers = [
        json.loads((list_checkpoints(tmp_path / name)[-1] / "trainer_state.json").read_text())["numbers"]
        for name in ("parts", "alone")
    ]
    assert numbers[0] == numbers[1] and ("loss_scale" in numbers[0]) is (precision == "fp16")


@pytest.mark.parametrize("name, precision", [("copies", "no"), ("sharded", "no"), ("sharded", "bf16")])
def test_compiled_layers_have_the_gradients_of_one_process(options, name, precision):
    """Layers are traced by themselves, whatever gathers their weights."""
    arguments = options("train_coglm", "one", batch_size=4, mixed_precision=precision)
    (alone,) = launch(1, with_16_bits, first_gradients, "train_coglm", arguments)
    count, more = LAYOUTS[name]
    arguments = options("train_coglm", name, mixed_precision=precision, compile=True, **more)
    for graphs, gradients in launch(count, with_16_bits, traced, first_gradients, "train_coglm", arguments):
        assert graphs >= 1
        if precision == "no":
            assert worst(alone, gradients) <= TOLERANCE
        else:
            assert error_of(gradients, alone) < 5e-2


def test_gradients_are_clipped_at_their_norm_over_all_shards(options):
    (whole,) = launch(1, first_gradients, "train_coglm", options("train_coglm", "one", batch_size=4))
    norm = float(np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in whole.values())))
    for name in ("copies", "sharded", "two groups of two"):
        count, more = LAYOUTS[name]
        for limit, scale in ((norm / 10, 0.1), (10 * norm, 1.0)):
            arguments = options("train_coglm", f"{name} {limit}", max_grad_norm=limit, **more)
            for clipped in launch(count, first_gradients, "train_coglm", arguments):
                assert worst({key: scale * value for key, value in whole.items()}, clipped) <= TOLERANCE, name


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("how", ["nan", "inf"])
def test_a_loss_that_is_not_finite_on_one_process_stops_all_or_is_skipped_by_all(options, tmp_path, sharding, how):
    more = {"batch_size": 2, "max_steps": 5, "sharding": sharding, "checkpoint_every_steps": 2, "learning_rate": 1e-3}
    with pytest.raises(RuntimeError) as caught:
        launch(2, spoiled, "train_coglm", options("train_coglm", "stopped", **more), 2, how)
    for rank in (0, 1):
        assert f"process {rank}:\n" in str(caught.value)
    assert str(caught.value).count("is not finite (NaN or infinite) at step 3") == 2
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["checkpoint-2"]
    assert read_run(tmp_path / "stopped")["state"] == "failed"
    more["non_finite"] = "skip"
    assert launch(2, spoiled, "train_coglm", options("train_coglm", "skipped", **more), 2, how) == [True, True]
    alone = options("train_coglm", "alone", **{**more, "batch_size": 4})
    assert launch(1, spoiled, "train_coglm", alone, 2, how) == [True]
    found, expected = metrics(tmp_path / "skipped"), metrics(tmp_path / "alone")
    assert [line.get("skipped_steps", 0) for line in found] == [0, 0, 1, 0, 0]
    for line, other in zip(found, expected, strict=True):
        assert line.get("loss") == (None if "loss" not in other else pytest.approx(other["loss"], rel=1e-4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")
def test_a_run_goes_on_on_any_number_of_processes_with_the_losses_of_one(options, tmp_path):
    """
    From two processes to one, to four, and to two again, sharded, in one folder; and all of it on one.

    Muon for linear layers, whose updates are orthogonalised in bfloat16, AdamW for the rest, and an average of both.
    """
    common = {"optimizer": "muon", "learning_rate": 1e-3, "ema_decay": 0.9, "weight_decay": 0.1}

    def run(count, name, batch_size, max_steps, **more):
        more = {"batch_size": batch_size, "max_steps": max_steps, **common, **more}
        assert all(launch(count, run_script, "train_coglm", options("train_coglm", name, **more)))

    run(1, "alone", 4, 30)
    for count, max_steps, more in (
        (2, 8, {"sharding": "full"}),
        (1, 14, {}),
        (4, 20, {"sharding": "hybrid", "shard_size": 2, "async_checkpoints": True}),
        (2, 30, {"sharding": "full"}),
    ):
        run(count, "parts", 4 // count, max_steps, resume_from_checkpoint="latest", **more)
    found, expected = metrics(tmp_path / "parts"), metrics(tmp_path / "alone")
    assert [line["step"] for line in found] == list(range(1, 31))
    for key in ("loss", "image_loss", "text_loss"):
        assert [line[key] for line in found if key in line] == pytest.approx(
            [line[key] for line in expected if key in line], rel=5e-3
        )
    average, whole = (CogLMModel.from_pretrained(tmp_path / each / "final") for each in ("parts", "alone"))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(average.state_dict()[key], value, rtol=0, atol=2e-3, msg=key)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("moments, within", [("bfloat16", 5e-3), ("int8", 2e-2)])
def test_moments_of_fewer_bits_go_on_on_another_number_of_processes(options, tmp_path, moments, within):
    """From two processes, sharded, to one, to two copies; blocks of 8 bits are others each time."""
    common = {"moments": moments, "learning_rate": 1e-3, "model": {**COGLM, **NO_DROPOUT, "hidden_size": 64}}

    def run(count, name, max_steps, **more):
        arguments = options("train_coglm", name, batch_size=4 // count, max_steps=max_steps, **{**common, **more})
        assert all(launch(count, run_uncompiled, "train_coglm", arguments))

    run(1, "alone", 9, moments="float32")
    for count, max_steps, sharding in ((2, 3, "full"), (1, 6, "none"), (2, 9, "none")):
        run(count, "parts", max_steps, sharding=sharding, resume_from_checkpoint="latest")
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("parts", "alone")]
    assert len(losses[0]) == 9 and losses[0] == pytest.approx(losses[1], rel=within)
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_a_model_as_deep_as_the_released_trains_on_four_processes_as_on_one(options, tmp_path):
    """Forty-eight layers, which all but the main process make without weights; each holds a quarter of each matrix."""
    more = {"model": {**COGLM, **NO_DROPOUT, "hidden_size": 16, "num_hidden_layers": 48}, "learning_rate": 1e-3}
    (alone,) = launch(1, first_gradients, "train_coglm", options("train_coglm", "one", batch_size=4, **more))
    sharded = {"batch_size": 1, "sharding": "full", "gradient_checkpointing": True, **more}
    together = launch(4, first_gradients, "train_coglm", options("train_coglm", "four", **sharded))
    assert len(alone) > 48 * 10 and max(worst(alone, gradients) for gradients in together) <= TOLERANCE
    launch(1, run_script, "train_coglm", options("train_coglm", "alone", batch_size=4, max_steps=3, **more))
    found = launch(4, shares, "train_coglm", options("train_coglm", "sharded", max_steps=3, **sharded))
    assert [had_weights for had_weights, _ in found] == [True, False, False, False]
    for _, held in found:
        assert all(share == whole // 4 for name, (share, whole) in held.items() if "layers." in name)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("sharded", "alone")]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sample_pictures_and_validation_of_sharded_weights_are_of_the_average_and_leave_no_trace(
    options,
    token_folder,
    vqvae_folder,
    tmp_path,
):
    common = {"batch_size": 2, "max_steps": 2, "ema_decay": 0.5, "learning_rate": 1e-2, "vqvae": vqvae_folder}
    shown = {
        "sample_every_steps": 1,
        "validation_data": token_folder,
        "validation_samples": 5,
        "evaluate_every_steps": 1,
    }
    for name, more in (
        ("quiet", {"sharding": "full"}),
        ("shown", {"sharding": "full", "reshard_after_forward": False, **shown}),
        ("copies", {"sharding": "none", **shown}),
    ):
        launch(2, run_script, "train_coglm", options("train_coglm", name, **common, **more))
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("quiet", "shown", "copies")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-4)
    for step in (1, 2):
        pictures = [(tmp_path / name / f"samples/{step:07d}.png").read_bytes() for name in ("shown", "copies")]
        assert pictures[0] == pictures[1]
    validation = [
        [{key: value for key, value in line.items() if key.startswith("validation_loss")} for line in metrics(folder)]
        for folder in (tmp_path / "shown", tmp_path / "copies")
    ]
    assert len(validation[0]) == 2 and len(validation[0][0]) > 2  # also by task and language
    for sharded, copied in zip(*validation, strict=True):
        assert sharded == pytest.approx(copied, rel=1e-4)


def test_only_one_process_reads_the_weights_and_each_holds_its_share(options):
    arguments = options("train_coglm", "run", batch_size=1, max_steps=1, sharding="full")
    found = launch(2, shares, "train_coglm", arguments)
    assert [had_weights for had_weights, _ in found] == [True, False]
    for own in zip(*(held.values() for _, held in found)):
        assert sum(share for share, _ in own) == own[0][1]
    totals = [sum(share for share, _ in held.values()) for _, held in found]
    assert abs(totals[0] - totals[1]) < 0.1 * sum(totals)


@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "beside the training"])
def test_a_process_that_is_killed_in_the_middle_of_a_save_ends_the_others_and_loses_no_checkpoint(
    options, tmp_path, beside
):
    more = {"batch_size": 1, "sharding": "full", "checkpoint_every_steps": 2, "keep_checkpoints": 1, "max_steps": 6}
    more["async_checkpoints"] = beside
    with pytest.raises(RuntimeError, match="process 1 ended without a result") as caught:
        arguments = options("train_coglm", "run", **more)
        launch(2, killed_in_second_save, "train_coglm", arguments, tmp_path / "killed_at", timeout=300)
    seconds = time.time() - float((tmp_path / "killed_at").read_text())
    assert seconds < 60  # the others hear of it at once: that is what matters where a machine is paid for by the hour
    assert "process 0:" in str(
        caught.value
    )  # which failed, too, with an error, before the group's patience of ten minutes
    assert "it took too long" not in str(caught.value)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert read_run(tmp_path / "run")["state"] == "failed"
    more["resume_from_checkpoint"] = "latest"
    assert all(launch(2, run_script, "train_coglm", options("train_coglm", "run", **more)))
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 7))
    assert not list((tmp_path / "run").glob(".partial*")) and (tmp_path / "run/final/config.json").is_file()


@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "beside the training"])
def test_a_signal_to_one_process_stops_all_with_one_checkpoint(options, tmp_path, beside):
    more = {"batch_size": 1, "max_steps": 50, "sharding": "full", "async_checkpoints": beside}
    arguments = options("train_coglm", "run", **more)
    assert launch(2, told_to_stop, "train_coglm", arguments, 2) == [False, False]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert read_run(tmp_path / "run")["state"] == "interrupted"


def test_what_cannot_be_shared_out_is_said(options):
    arguments = options("train_coglm", "run", batch_size=1, max_steps=1, sharding="hybrid", shard_size=3)
    with pytest.raises(RuntimeError, match="`shard_size` must divide the 2 processes, but is 3"):
        launch(2, run_script, "train_coglm", arguments)


def test_the_image_tokenizer_trains_by_copies_and_says_that_it_cannot_be_shared_out(tmp_path):
    for index in range(4):
        Image.new("RGB", (32, 32), (60 * index, 255 - 60 * index, 128)).save(tmp_path / f"{index}.png")
    model = {
        "num_embeddings": 16,
        "embedding_dim": 8,
        "base_channels": 8,
        "norm_num_groups": 4,
        "mid_attention": False,
        "compression_rates": [8],
        "num_clusters": 4,
    }
    common = {"image_folder": tmp_path, "model": model, "resolutions": [16], "max_steps": 2, "batch_size": 2}
    common |= {"data_workers": 0, "sample_every_steps": 2, "warmup_steps": 0}
    assert all(launch(2, run_script, "train_vq_model", as_arguments({"output_dir": tmp_path / "run", **common})))
    assert IcetkVQModel.from_pretrained(tmp_path / "run/final").cluster_labels.numel() == 16
    sharded = as_arguments({"output_dir": tmp_path / "other", **common, "sharding": "full"})
    with pytest.raises(
        RuntimeError, match=r"IcetkVQModel does not say what its layers are. Train it with --sharding none"
    ):
        launch(2, run_script, "train_vq_model", sharded)


@pytest.mark.parametrize("script", ["train_coglm", "train_direct_sr", "train_cogview"])
def test_a_sharded_adapter_is_that_of_one_process(options, coglm_folder, tmp_path, script):
    """Frozen weights and trained matrices lie side by side in a layer; an adapter alone is saved and checkpointed."""
    from cogview_pipelines import CogLMCanvasModel
    from cogview_pipelines.loaders.lora_files import WEIGHT_NAME

    more = {"lora_rank": 4, "max_steps": 3, "learning_rate": 0.01, "ema_decay": 0.5}
    if script == "train_coglm":
        more |= {"init_from": coglm_folder, "model": NO_DROPOUT}
    elif script == "train_cogview":
        make_cogview(**NO_DROPOUT).save_pretrained(tmp_path / "cogview")
        more |= {"init_from": tmp_path / "cogview", "model": {}}
    else:
        transformer = CogLMModel.from_pretrained(coglm_folder)
        CogLMCanvasModel.from_transformer(
            transformer, "direct", (12, 12), shares_backbone=True, num_text_slots=30, **WINDOWS, **NO_DROPOUT
        ).save_pretrained(tmp_path / "direct")
        more |= {"init_from": tmp_path / "direct", "model": {}}
    launch(1, run_script, script, options(script, "one", batch_size=4, **more))
    launch(2, run_script, script, options(script, "two", batch_size=2, sharding="full", **more))
    one, two = (load_file(tmp_path / name / "final" / WEIGHT_NAME) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) >= 16
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    assert moved > 0
    assert all((one[name] - two[name]).abs().max() <= 0.01 * moved for name in one)
