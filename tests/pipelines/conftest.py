"""A tiny pipeline of real components: 4 x 4 to 12 x 12 tokens, 32 to 96 pixels."""

import pytest

from cogview_pipelines.pipelines.cogview.pipeline_cogview import CogViewPipeline
from cogview_pipelines.pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline
from cogview_pipelines.schedulers.scheduling_lopar import LoPARScheduler

from ..utils import make_coglm, make_vq_model, randomize, token_config
from ..utils_cogview import make_cogview, make_cogview_tokenizer, make_cogview_vq

LOW, FINE = 32, 96  # pixels


def build(tokenizer, stages: tuple[str, ...] = ("direct", "iterative"), shares_backbone: bool = False, **config):
    """A pipeline with the super-resolution stages asked for."""
    tokens = token_config(tokenizer)
    transformer = make_coglm(seed=1, **tokens)
    parts = {}
    if "direct" in stages:
        model = make_coglm("direct", seed=2, **tokens)
        if shares_backbone:
            model = type(model).from_transformer(
                transformer, "direct", model.config.fine_grid, True, num_text_slots=model.config.num_text_slots
            )
            randomize_canvas(model)
        parts["direct_sr_transformer"] = model
        parts["direct_sr_scheduler"] = LoPARScheduler([[1]], top_k=(4,), cluster_temperature=0.9)
    if "iterative" in stages:
        parts["iterative_sr_transformer"] = make_coglm("iterative", seed=3, **tokens)
        parts["iterative_sr_scheduler"] = LoPARScheduler([[0, 1], [2, 1]], top_k=(10, 5))
    styles = {"none": {}, "cool": {"suffix": {"en": " blue", "zh": "蓝色"}, "temperature": 0.8}}
    pipe = CogView2Pipeline(
        tokenizer, transformer, make_vq_model(), **parts, styles=styles, default_style="none", **config
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomize_canvas(model):
    """New weights for what a model with a shared backbone has of its own."""
    own = {id(parameter) for name, parameter in model.named_parameters() if "canvas_" not in name}
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in own}
    randomize(model, 2)
    for name, parameter in model.named_parameters():
        if name in saved:
            parameter.data.copy_(saved[name])


@pytest.fixture(scope="session")
def pipe(tokenizer):
    """All three stages."""
    return build(tokenizer)


@pytest.fixture(scope="session")
def shared_pipe(tokenizer):
    """Direct super-resolution with CogLM's backbone, as in the shipped model."""
    return build(tokenizer, shares_backbone=True)


@pytest.fixture(scope="session")
def low_pipe(tokenizer):
    """No super-resolution."""
    return build(tokenizer, stages=())


def build_cogview(tokenizer) -> CogViewPipeline:
    """All three models of the first CogView."""
    pipe = CogViewPipeline(tokenizer, make_cogview_vq(), make_cogview(), make_cogview(1), make_cogview(2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def cogview_tokenizer(tmp_path_factory):
    """CogView's tiny tokenizer."""
    return make_cogview_tokenizer(tmp_path_factory.mktemp("cogview_tokenizer"))


@pytest.fixture(scope="session")
def cogview_pipe(cogview_tokenizer):
    """All three models of the first CogView."""
    return build_cogview(cogview_tokenizer)
