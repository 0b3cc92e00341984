"""Plans of training runs are what real runs hold: weights, gradients and moments to the byte, activations nearly."""

import importlib.util

import pytest
import torch
from torch.distributed.tensor import DTensor

from cogview_pipelines import CogLMConfig, CogLMModel, CogViewConfig, CogViewModel
from cogview_pipelines.training import planning
from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.distribution import DistributedModel
from cogview_pipelines.training.optimizers import Optimizers
from cogview_pipelines.training.planning import Layout, layouts_of, plan, saved_bytes, saved_for_backward
from cogview_pipelines.training.processes import Processes, make_accelerator

from ..training_scripts.launching import launch

COGLM = {
    "vocab_size": 251,  # odd: shares of rows are rounded up
    "num_image_tokens": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_grid": (4, 4),
    "max_text_tokens": 15,
    "image_position": 16,
    "max_position_embeddings": 41,
    "boi_token_id": 240,
    "start_of_english_token_id": 241,
    "start_of_chinese_token_id": 242,
    "pad_token_id": 131,
}
COGVIEW = {
    "vocab_size": 300,
    "num_image_tokens": 128,
    "command_token_id": 250,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_grid": (4, 4),
    "max_position_embeddings": 40,
    "max_super_resolution_length": 60,
}


def run_step(model, config, batch_size, mixed_precision="no"):
    """The loss of a batch of text-to-image with the longest text, as the scripts compute it, on real numbers."""
    tokens, labelled, _ = planning.batch_sizes(config, batch_size)
    ids = torch.zeros(batch_size, tokens // batch_size, dtype=torch.long)
    labels = ids.clone()
    labels[:, : labels.shape[1] - labelled // batch_size] = -100
    more = {}
    if config.model_type == "coglm":
        more["attention_mask"] = torch.ones(batch_size, *2 * ids.shape[1:], dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
        output = model(input_ids=ids, position_ids=ids, labels=labels, full_vocabulary=True, **more)
        return output.label_losses.sum()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["coglm", "cogview"])
def test_planned_activations_are_those_of_a_real_forward_pass(family, dropout, mixed_precision):
    config_class, model_class, fields = {
        "coglm": (CogLMConfig, CogLMModel, COGLM),
        "cogview": (CogViewConfig, CogViewModel, COGVIEW),
    }[family]
    config = config_class(**fields, hidden_dropout=dropout, attention_dropout=dropout)
    saved = saved_bytes(config, 3, mixed_precision, sharded=False, device="cpu")
    model = model_class(config).train()
    with saved_for_backward(model) as found:
        loss = run_step(model, config, 3, mixed_precision)
    assert saved.around + 2 * saved.layer + saved.last == pytest.approx(sum(found.values()), rel=0.1)
    assert loss.requires_grad


def test_planned_activations_grow_with_batch_and_width_as_those_of_real_passes_do():
    for fields, batch_size in (({}, 1), ({}, 8), ({"hidden_size": 128, "num_attention_heads": 4}, 2)):
        config = CogLMConfig(**{**COGLM, **fields})
        saved = saved_bytes(config, batch_size, "no", sharded=False, device="cpu")
        model = CogLMModel(config).train()
        with saved_for_backward(model) as found:
            loss = run_step(model, config, batch_size)
        assert saved.around + 2 * saved.layer + saved.last == pytest.approx(sum(found.values()), rel=0.1)
        del loss


def held_bytes(runs: list[dict]) -> list[dict]:
    """What this process holds after one step with each of some options, in bytes."""
    torch.compiler.set_stance("force_eager")  # the same moments as compiled, and no minute for each shape
    return [held_bytes_of_one(options) for options in runs]


def held_bytes_of_one(options: dict) -> dict:
    from accelerate.utils import set_seed

    config = TrainConfig(output_dir="", gradient_accumulation_steps=1, **options)
    accelerator = make_accelerator(config)
    processes = Processes(accelerator)
    set_seed(0)
    distributed = DistributedModel(CogLMModel(CogLMConfig(**COGLM)).train(), config, accelerator, processes)
    model = distributed.model
    optimizers = Optimizers(model, config)
    with distributed.synchronizing(True):
        run_step(distributed.forward, model.config, 2).backward()
    optimizers.step()

    def size(tensors):
        local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
        parts = [
            getattr(value, name)
            for value in local
            for name in (value.__tensor_flatten__()[0] if hasattr(value, "codes") else ("data",))
        ]
        return sum(value.numel() * value.element_size() for value in parts)

    states = [state for part in optimizers.parts.values() for state in part.state.values()]

    return {
        "weights": size(model.parameters()),
        "gradients": size(value.grad for value in model.parameters()),
        "moments": size(value for state in states for value in state.values()),
    }


@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_planned_weights_gradients_and_moments_are_those_of_two_processes_to_the_byte(sharding):
    layout = Layout(sharding, 2 if sharding == "full" else 1)
    runs = [
        {"optimizer": optimizer, "moments": moments}
        for optimizer in (("adamw", "muon") if hasattr(torch.optim, "Muon") else ("adamw",))
        for moments in (("float32", "bfloat16", "int8") if importlib.util.find_spec("torchao") else ("float32",))
        if (optimizer, moments) != ("muon", "int8")
    ]
    held = launch(2, held_bytes, [{"sharding": sharding, **run} for run in runs])
    for run, first, second in zip(runs, *held, strict=True):
        need = plan(CogLMConfig(**COGLM), layout, 2, device="cpu", **run)
        for name in ("weights", "gradients"):
            assert getattr(need, name) == first[name] >= second[name], (run, name)
        assert need.moments == max(first["moments"], second["moments"]), run
    assert len({first["moments"] for first in held[0]}) == len(runs)


def test_a_share_is_that_of_a_sharded_tensor():
    for rows in (1, 3, 8, 251):
        for count in (1, 2, 3, 8):
            own = [5 * part.numel() for part in torch.empty(rows).chunk(count)]
            found = [planning.share(torch.empty(rows, 5), count, index) for index in range(count)]
            assert found == own + [0] * (count - len(own))


def test_layouts_are_those_that_devices_allow():
    assert {layout.sharding for layout in layouts_of(1)} == {"none"}
    assert {layout.sharding for layout in layouts_of(8)} == {"none", "full"}
    hybrid = [layout for layout in layouts_of(16, 8) if layout.sharding == "hybrid"]
    assert {layout.shard_size for layout in hybrid} == {8} and len(hybrid) == 4
    with pytest.raises(ValueError, match="`shard_size` must divide the 16 devices, but is 3"):
        layouts_of(16, 3)


def test_what_a_layout_saves_costs_something_else():
    config = CogLMConfig(**COGLM)

    def need(**fields):
        return plan(config, Layout("full", 4, **fields), 8, average=True, mixed_precision="bf16")

    plain, kept, again = need(), need(reshard_after_forward=False), need(gradient_checkpointing=True)
    assert kept.buffers > plain.buffers and kept.weights == plain.weights == plain.average
    assert again.activations < plain.activations and again.operations > plain.operations
    assert plain.total == sum(getattr(plain, name) for name in planning.Need.__dataclass_fields__) - plain.operations


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = CogLMConfig(**COGLM, hidden_dropout=0.0, attention_dropout=0.0)
    need = plan(config, Layout("none"), 2, device="cpu")
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run_step(CogLMModel(config).train(), config, 2).backward()
    assert need.operations == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_is_not_planned_is_said():
    with pytest.raises(ValueError, match="`config` has `sparse_attention`"):
        sparse = {"window_size": 4, "num_windows": 2, "num_pivots": 8}
        plan(CogViewConfig(**COGVIEW, sparse_attention=sparse), Layout("none"), 1)
