"""Adapters with random numbers for the tiny pipelines."""

import pytest
import torch

from cogview_pipelines.loaders.lora_files import write_lora
from cogview_pipelines.models.adapters import adapter_config, adapter_weights, add_adapter

from ..pipelines.conftest import build

STAGES = ("transformer", "direct_sr_transformer", "iterative_sr_transformer")


def random_adapter(models, folder, seed=0, rank=4, scale=0.4, **options):
    """Write an adapter with random numbers for these models, by component; the models stay without it."""
    weights, configs = {}, {}
    for part, model in models.items():
        add_adapter(model, "new", rank, **options)
        weights[part], configs[part] = adapter_weights(model, "new"), adapter_config(model, "new")
        model.delete_adapter("new")
        generator = torch.Generator().manual_seed(seed)
        for name, value in weights[part].items():
            weights[part][name] = scale * torch.randn(value.shape, generator=generator)
    return write_lora(folder, weights, configs)


@pytest.fixture
def pipe(tokenizer):
    """A pipeline of its own for each test, whose direct super-resolution borrows CogLM's weights."""
    return build(tokenizer, shares_backbone=True)


@pytest.fixture(scope="session")
def adapters(tokenizer, tmp_path_factory):
    """Folders of adapters: `draft` of CogLM, `sr` of both other stages, `all` of all three."""
    pipe, root = build(tokenizer, shares_backbone=True), tmp_path_factory.mktemp("adapters")
    models = {stage: getattr(pipe, stage) for stage in STAGES}
    kinds = {"draft": STAGES[:1], "sr": STAGES[1:], "all": STAGES}
    for seed, (name, stages) in enumerate(kinds.items()):
        random_adapter({stage: models[stage] for stage in stages}, root / name, seed)
    return {name: root / name for name in kinds}
