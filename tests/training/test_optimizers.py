"""Which optimizer takes which weights, the learning rate, the loss scale; sharded: test_sharding.py."""

import pytest
import torch
from torch import nn

from cogview_pipelines.training import optimizers as module
from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.averaging import make_average
from cogview_pipelines.training.optimizers import (
    LossScale,
    Optimizers,
    clip_gradients,
    gradient_norm,
    learning_rate,
    orthogonalised,
)

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


def make_config(**options) -> TrainConfig:
    return TrainConfig(output_dir="unused", **options)


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def update(network, optimizers):
    network(torch.arange(5)).square().sum().backward()
    optimizers.step()
    optimizers.zero_grad()


@needs_muon
def test_muon_takes_linear_weights_and_adamw_the_rest():
    network = make_network()
    parts = Optimizers(network, make_config(optimizer="muon", weight_decay=0.1), adamw_names=("3.",)).parts
    muon = [tuple(value.shape) for group in parts["muon"].param_groups for value in group["params"]]
    assert muon == [(4, 6)]
    decay = {
        tuple(value.shape): group["weight_decay"] for group in parts["adamw"].param_groups for value in group["params"]
    }
    assert decay == {(5, 6): 0.1, (3, 4): 0.1, (4,): 0.0, (3,): 0.0}


@needs_muon
def test_muon_is_that_of_torch(monkeypatch):
    monkeypatch.setattr(module, "multiplies", lambda dtype: True)  # in bfloat16
    networks = make_network(), make_network()
    ours = Optimizers(networks[0], make_config(optimizer="muon", weight_decay=0.1))
    linear = [module.weight for module in networks[1] if isinstance(module, nn.Linear)]
    theirs = torch.optim.Muon(linear, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [value for value in networks[1].parameters() if all(value is not each for each in linear)]
    groups = [{"params": [v for v in rest if v.ndim >= 2], "weight_decay": 0.1}]
    groups.append({"params": [v for v in rest if v.ndim < 2], "weight_decay": 0.0})
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        update(networks[0], ours)
        networks[1](torch.arange(5)).square().sum().backward()
        theirs.step()
        adamw.step()
        networks[1].zero_grad()
    for one, other in zip(*(network.parameters() for network in networks)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_without_arithmetic_in_bfloat16_updates_are_orthogonalised_in_float32(monkeypatch, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given, options = matrix.clone(), ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    # what the polynomial makes of the singular values, in float64
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    exact, found = left @ values.diag() @ right, {}
    for has in (False, True):
        monkeypatch.setattr(module, "multiplies", lambda dtype, has=has: has)
        found[has] = orthogonalised(matrix, *options)
        assert found[has].dtype == torch.float32 and found[has].is_contiguous() and torch.equal(matrix, given)
    torch.testing.assert_close(found[False].double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[True].double(), exact, rtol=0, atol=0.1)
    assert not torch.equal(*found.values())


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_moments_go_into_another_optimizer_by_name(optimizer):
    config = make_config(optimizer=optimizer, learning_rate=1e-2)
    network = make_network()
    optimizers = Optimizers(network, config)
    for _ in range(3):
        update(network, optimizers)
    copy = make_network()
    copy.load_state_dict(network.state_dict())
    copied = Optimizers(copy, config)
    saved = optimizers.tensors()
    assert copied.prepare(saved) == 0
    for name, value in copied.tensors().items():
        value.copy_(saved[name])
    for _ in range(2):
        update(network, optimizers)
        update(copy, copied)
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in network.state_dict().items())


@needs_muon
def test_moments_that_another_optimizer_left_are_counted_and_begin_anew():
    network = make_network()
    adamw = Optimizers(network, make_config())
    update(network, adamw)
    muon = Optimizers(network, make_config(optimizer="muon"))
    assert muon.prepare(adamw.tensors()) == 2  # the two linear layers
    assert not any(name.startswith("momentum_buffer") for name in muon.tensors())
    update(network, muon)


def test_the_learning_rate_warms_up_stays_and_decays_late():
    config = make_config(learning_rate=1.0, warmup_steps=4, decay_steps=4, max_steps=12)
    rates = [learning_rate(config, step) for step in range(12)]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and set(rates[4:9]) == {1.0}
    assert all(rates[i] > rates[i + 1] > 0 for i in range(9, 11))
    constant = make_config(learning_rate=0.5, warmup_steps=0, max_steps=3)
    assert [learning_rate(constant, step) for step in range(3)] == [0.5] * 3


def test_the_schedule_is_that_of_transformers():
    from transformers import get_wsd_schedule

    config = make_config(learning_rate=0.3, warmup_steps=3, decay_steps=5, max_steps=14)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.3)
    theirs = get_wsd_schedule(
        optimizer, num_warmup_steps=3, num_decay_steps=5, num_training_steps=15, decay_type="1-sqrt"
    )
    for step in range(14):
        assert learning_rate(config, step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_norm_is_over_all_gradients_and_clipping_keeps_their_direction():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norm = gradient_norm(gradients)
    assert norm.item() == pytest.approx(5.0)
    clip_gradients(gradients, norm, 10.0)
    assert gradients[0].tolist() == [3.0, 0.0]
    clip_gradients(gradients, norm, 1.0)
    assert gradients[0].tolist() == pytest.approx([0.6, 0.0]) and gradients[1].item() == pytest.approx(0.8)


def test_the_loss_scale_falls_at_overflows_and_recovers():
    scale = LossScale(8.0, interval=2)
    for finite in (True, True, False, True, True):
        scale.update(finite)
    assert scale.scale == 16.0
    with pytest.raises(FloatingPointError, match="overflow in float16 at any loss scale"):
        for _ in range(40):
            scale.update(False)


def test_the_moving_average_lags_behind():
    network = make_network()
    assert make_average(network, 0.0) is None
    average = make_average(network, 0.75)
    average.update(network)
    with torch.no_grad():
        network[1].bias.add_(1.0)
    before = average.tensors["1.bias"].clone()
    average.update(network)
    torch.testing.assert_close(average.tensors["1.bias"] - before, torch.full((4,), 0.25))
    weights = network[1].bias.clone()
    with average.in_place_of_weights(network):
        torch.testing.assert_close(network[1].bias.detach(), before + 0.25)
    assert torch.equal(network[1].bias, weights)
    torch.testing.assert_close(average.tensors["1.bias"], before + 0.25)


def test_weights_decay_and_norms_and_biases_do_not(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    config = TrainConfig(str(tmp_path), learning_rate=0.1, weight_decay=0.5)
    optimizers = Optimizers(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    for name, value in model.named_parameters():
        assert torch.allclose(value, before[name] * (0.95 if name == "0.weight" else 1)), name
