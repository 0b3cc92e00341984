"""Moments in fewer bits: what they cost in accuracy, what a checkpoint keeps of them, what is refused; on a CPU."""

import importlib.util
import json
import shutil

import pytest
import torch
from torch import nn

from cogview_pipelines.training.arguments import MOST_BETA2, TrainConfig
from cogview_pipelines.training.moments import make_adamw, moment_bytes
from cogview_pipelines.training.optimizers import Optimizers, sharded_muon

from .test_loop import Regression, Runner, fresh_accelerate_state, same  # noqa: F401

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


@pytest.fixture
def eager():
    """The same arithmetic, uncompiled: compiling takes seconds for each shape of a weight."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_network() -> nn.Sequential:
    """A matrix that blocks fill, one that they do not, and one that is small."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 63), nn.LayerNorm(63), nn.Linear(63, 3))


def make_optimizers(network, moments, **options) -> Optimizers:
    return Optimizers(network, TrainConfig("unused", moments=moments, learning_rate=1e-2, **options))


def update(network, optimizers, step=0):
    inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
    network(inputs).square().sum().backward()
    optimizers.step()
    optimizers.zero_grad()


@torch.no_grad()
def far(one, other, start) -> float:
    """How far the changes of two networks lie apart, relative to their size."""
    change = torch.cat([(a - b).flatten() for a, b in zip(one.parameters(), start.parameters())])
    difference = torch.cat([(a - b).flatten() for a, b in zip(one.parameters(), other.parameters())])
    return float(difference.norm() / change.norm())


@needs_torchao
def test_steps_in_bfloat16_are_those_of_float32_whose_moments_are_rounded_after_each(eager):
    networks = [make_network() for _ in range(3)]
    for network, kind in zip(networks, ("bfloat16", "float32", "float32")):
        optimizers = make_optimizers(network, kind, weight_decay=0.1)
        for step in range(8):
            update(network, optimizers, step)
            if network is networks[1]:
                for name, value in optimizers.tensors().items():
                    if not name.startswith("step."):
                        value.copy_(value.bfloat16())
    close, rounded, exact = networks
    assert far(rounded, close, make_network()) < 1e-3 < far(rounded, exact, make_network())


@needs_muon
def test_muons_steps_in_bfloat16_are_those_of_float32_whose_momentum_is_rounded_after_each():
    """On given gradients: what is orthogonalised makes a small change of the momentum a large one of the weights."""
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [sharded_muon([w], 1e-2, 0.1, kind) for w, kind in zip(weights, (torch.bfloat16, torch.float32))]
    for step in range(4):
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        held, momentum = (one.state[weight]["momentum_buffer"] for one, weight in zip(optimizers, weights))
        momentum.copy_(momentum.bfloat16())
        assert held.dtype == torch.bfloat16 and torch.equal(held.float(), momentum) and held.any()
    assert not torch.equal(weights[0], start) and torch.equal(*weights)


@needs_torchao
def test_steps_in_8_bits_are_nearly_those_of_float32(eager):
    networks = [make_network(), make_network()]
    for network, moments in zip(networks, ("float32", "int8")):
        optimizers = make_optimizers(network, moments, weight_decay=0.1)
        for step in range(8):
            update(network, optimizers, step)
    assert 0 < far(*networks, make_network()) < 0.05


@needs_torchao
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_step_is_an_eager_one():
    """As users run it; one weight, since each shape is compiled by itself."""
    weights = []
    for stance in ("default", "force_eager"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 64))
        optimizer = make_adamw([{"params": [weight]}], TrainConfig("unused", moments="int8", learning_rate=0.1))
        with torch.compiler.set_stance(stance):
            for rate in (0.1, 0.2):
                weight.grad = torch.randn(64, 64)
                optimizer.param_groups[0]["lr"].fill_(rate)
                optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


@needs_torchao
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_the_learning_rate_of_each_step_counts(eager, moments):
    network = make_network()
    optimizers = make_optimizers(network, moments)
    optimizers.set_learning_rate(0.0)
    update(network, optimizers)
    assert all(map(torch.equal, network.parameters(), make_network().parameters()))
    optimizers.set_learning_rate(1e-2)
    update(network, optimizers)
    assert not any(map(torch.equal, network.parameters(), make_network().parameters()))


@needs_torchao
def test_bytes_are_those_of_what_is_held(eager):
    for moments in ("float32", "bfloat16", "int8"):
        network = make_network()
        optimizers = make_optimizers(network, moments)
        update(network, optimizers)
        for parameter in network.parameters():
            own = optimizers.parts["adamw"].state[parameter]["exp_avg_sq"]
            parts = [own.codes, own.scale, own.qmap] if hasattr(own, "codes") else [own]
            held = sum(part.numel() * part.element_size() for part in parts)
            assert held == moment_bytes(parameter.numel(), moments), (moments, parameter.shape)
    assert moment_bytes(64 * 80, "int8") < 0.5 * moment_bytes(64 * 80, "float32")


@needs_torchao
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_what_is_saved_goes_into_another_optimizer(eager, moments):
    """bfloat16 as it is; of 8 bits, second moments as they are, first ones rounded once more."""
    network = make_network()
    optimizers = make_optimizers(network, moments)
    for step in range(3):
        update(network, optimizers, step)
    saved = {name: value.clone() for name, value in optimizers.tensors().items()}
    assert not any(hasattr(value, "codes") for value in saved.values())
    copied = make_optimizers(make_network(), moments)
    assert copied.prepare(saved) == 0
    wanted = copied.tensors()
    for name, value in wanted.items():
        value.copy_(saved[name])
    copied.take(wanted)
    for name, value in copied.tensors().items():
        if name == "exp_avg.0.weight" and moments == "int8":
            largest = saved[name].view(-1, 256).abs().amax(1, keepdim=True)
            assert ((value - saved[name]).view(-1, 256).abs() <= 0.008 * largest).all()
            assert (value != 0).any()
        else:
            assert torch.equal(value, saved[name]), name


@needs_torchao
@pytest.mark.parametrize("beta2, all_move", [(MOST_BETA2, True), (0.999, False)])
def test_a_second_moment_in_bfloat16_falls_up_to_the_highest_beta2_that_is_allowed(eager, beta2, all_move):
    weight = nn.Parameter(torch.zeros(128))
    optimizer = make_adamw([{"params": [weight]}], TrainConfig("unused", moments="bfloat16", adam_beta2=beta2))
    weight.grad = torch.zeros(128)
    optimizer.step()
    every_mantissa = (1 + torch.arange(128) / 128).bfloat16()
    optimizer.state[weight]["exp_avg_sq"].copy_(every_mantissa)
    optimizer.step()
    assert bool((optimizer.state[weight]["exp_avg_sq"] < every_mantissa).all()) == all_move


@pytest.mark.parametrize(
    "options, message",
    [
        ({"moments": "int8", "optimizer": "muon"}, "`moments` 'int8' is for `optimizer` adamw.*Choose bfloat16"),
        ({"moments": "bfloat16", "adam_beta2": 0.999}, r"`adam_beta2` must be at most 0\.996 .*but is 0\.999"),
    ],
)
def test_what_cannot_work_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("unused", **options).check()
    with pytest.raises(ValueError, match=message):
        Optimizers(make_network(), TrainConfig("unused", **options))


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    TrainConfig("unused").check()
    with pytest.raises(ValueError, match=r"'int8' needs the package torchao: pip install .*\[quantization\]"):
        TrainConfig("unused", moments="int8").check()


# Runs ----------------------------------------------------------------------------------------------------------------


class Wide(Regression):
    """A layer that has blocks of 8 bits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 1024), nn.LayerNorm(1024), nn.Dropout(0.3), nn.Linear(1024, 1))


@needs_torchao
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_resumed_run_has_the_losses_of_one_that_was_let_be(eager, tmp_path, moments):
    """To the last bit in bfloat16."""
    runner = Runner(tmp_path)
    whole = runner("whole", model=Wide(), moments=moments)
    runner("parts", model=Wide(), moments=moments, max_steps=3)
    resumed = runner("parts", model=Wide(), moments=moments, resume_from_checkpoint="latest")
    losses = [[loss for _, loss, _ in runner.metrics(name)] for name in ("parts", "whole")]
    if moments == "bfloat16":
        assert losses[0] == losses[1] and same(whole, resumed)
    else:
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


@needs_torchao
@pytest.mark.parametrize("first, second", [("float32", "int8"), ("int8", "bfloat16"), ("bfloat16", "float32")])
def test_moments_are_rounded_to_what_a_resumed_run_asks_for(eager, tmp_path, caplog, first, second):
    runner = Runner(tmp_path)
    runner("whole", model=Wide(), max_steps=6)
    runner("run", model=Wide(), moments=first, max_steps=3)
    runner("run", model=Wide(), moments=second, max_steps=6, resume_from_checkpoint="latest")
    assert f"`moments` was '{first}' and is '{second}': those of the checkpoint are rounded to it" in caplog.text
    assert "begin at zero" not in caplog.text
    losses = [[loss for _, loss, _ in runner.metrics(name)] for name in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    options = json.loads((tmp_path / "run/run.json").read_text())["options"]
    assert options["moments"] == second
