"""What the tests of the Hub run in processes of their own. Each program prints one line of JSON."""

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path

import torch

import cogview_pipelines
from tests.utils import make_coglm, make_tokenizer, make_vq_model
from tests.utils_cogview import make_cogview, make_cogview_tokenizer, make_cogview_vq

OWNER = "someone"
PICTURE = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(5))
MASK = torch.zeros(60, 60)
MASK[20:40, 10:40] = 1
# What each pipeline is called with.
CALLS = {
    "CogView2Pipeline": ({"prompt": "a cat"}, "tokens"),
    "CogView2InpaintPipeline": (
        {"prompt": "a cat", "image": PICTURE, "mask_image": MASK, "output_type": "pt"},
        "images",
    ),
    "CogView2UpscalePipeline": ({"image": PICTURE[:, :32, :32], "prompt": "a cat"}, "tokens"),
    "CogView2CaptionPipeline": (
        {"image": PICTURE, "strategy": "sample", "max_length": 3, "end": "length"},
        "token_ids",
    ),
    "CogViewPipeline": ({"prompt": "a cat"}, "tokens"),
    "CogViewUpscalePipeline": ({"image": PICTURE, "prompt": "a cat"}, "tokens"),
    "CogViewCaptionPipeline": ({"image": PICTURE, "max_length": 3, "end": "length"}, "token_ids"),
}
MODELS = ("CogLMModel", "CogLMCanvasModel", "CogViewModel", "IcetkVQModel", "CogViewVQModel")


def plain(value):
    """Something that JSON holds."""
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    return [plain(one) for one in value] if isinstance(value, list | tuple) else round(value, 4)


def call(pipe) -> list:
    """What a pipeline makes of a seed."""
    pipe.set_progress_bar_config(disable=True)
    arguments, field = CALLS[type(pipe).__name__]
    return plain(pipe(**arguments, generator=torch.Generator().manual_seed(3))[field])


def weights(model) -> float:
    """A number that depends on all weights."""
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


def build(folder: Path) -> dict:
    """Every pipeline of the package, tiny."""
    from tests.pipelines.conftest import build as build_cogview2

    tokenizer = make_tokenizer(folder)
    (folder / "cogview").mkdir()
    cogview2 = build_cogview2(tokenizer, shares_backbone=True)
    cogview = cogview_pipelines.CogViewPipeline(
        make_cogview_tokenizer(folder / "cogview"), make_cogview_vq(), make_cogview(), make_cogview(1), make_cogview(2)
    )
    pipes = {}
    for name in CALLS:
        source = cogview2 if name.startswith("CogView2") else cogview
        kind = getattr(cogview_pipelines, name)
        pipes[name] = source if isinstance(source, kind) else kind.from_pipe(source)
    return pipes


def push_all() -> dict:
    """Push everything; what is expected of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipes = build(folder)
        expected = {}
        for name, pipe in pipes.items():
            pipe.push_to_hub(f"{OWNER}/{name}")
            expected[name] = call(pipe)
        pipe = pipes["CogView2Pipeline"]
        parts = [make_coglm(), make_coglm("iterative"), make_cogview(), make_vq_model(), make_cogview_vq()]
        for part in parts:
            part.push_to_hub(f"{OWNER}/{type(part).__name__}")
            expected[type(part).__name__] = weights(part)
        for part in (pipe.tokenizer, pipes["CogViewPipeline"].tokenizer):
            part.push_to_hub(f"{OWNER}/{type(part).__name__}")
            expected[type(part).__name__] = part.encode("a cat")
        pipe.iterative_sr_scheduler.push_to_hub(f"{OWNER}/LoPARScheduler")
        expected["LoPARScheduler"] = plain(pipe.iterative_sr_scheduler.config.step_grid)

        pipe.push_to_hub(f"{OWNER}/private", private=True)
        pipe.push_to_hub(f"{OWNER}/sharded", max_shard_size="40KB")
        # a folder with a card, to which a variant and another revision are pushed
        source = folder / "with a card"
        pipe.save_pretrained(source)
        (source / "README.md").write_text("---\nlicense: mit\ntags:\n- tiny\n---\n\n# Tiny\n\nDraws noise.\n")
        (source / "scope.json").write_text('{"things": []}')
        (source / "LICENSE").write_text("Do as you like.")
        pipe = cogview_pipelines.CogView2Pipeline.from_pretrained(source)
        pipe.push_to_hub(f"{OWNER}/card")
        half = cogview_pipelines.CogView2Pipeline.from_pretrained(source, dtype=torch.float16)
        half.save_pretrained(source, variant="fp16")
        half.push_to_hub(f"{OWNER}/card", variant="fp16")
        model = make_coglm(seed=7)
        model.push_to_hub(f"{OWNER}/CogLMModel", revision="seven")
        expected["seven"] = weights(model)
        expected["card"] = weights(pipe.vqvae)
        pipe.vqvae.load_state_dict(make_vq_model(seed=9).state_dict())
        pipe.push_to_hub(f"{OWNER}/card", revision="other")
        expected["other"] = weights(pipe.vqvae)
        return expected


def load_all() -> dict:
    """Load everything that [`push_all`] pushed, by id."""
    found = {}
    for name in CALLS:
        found[name] = call(getattr(cogview_pipelines, name).from_pretrained(f"{OWNER}/{name}"))
    for name in MODELS:
        found[name] = weights(getattr(cogview_pipelines, name).from_pretrained(f"{OWNER}/{name}"))
    for name in ("IcetkTokenizer", "CogViewTokenizer"):
        found[name] = getattr(cogview_pipelines, name).from_pretrained(f"{OWNER}/{name}").encode("a cat")
    scheduler = cogview_pipelines.LoPARScheduler.from_pretrained(f"{OWNER}/LoPARScheduler")
    found["LoPARScheduler"] = plain(scheduler.config.step_grid)
    return found


def load_special() -> dict:
    """Revisions, variants, shards, private models, and what is refused."""
    from huggingface_hub import snapshot_download

    pipeline = cogview_pipelines.CogView2Pipeline
    found = {
        "card": weights(pipeline.from_pretrained(f"{OWNER}/card").vqvae),
        "other": weights(pipeline.from_pretrained(f"{OWNER}/card", revision="other").vqvae),
        "seven": weights(cogview_pipelines.CogLMModel.from_pretrained(f"{OWNER}/CogLMModel", revision="seven")),
    }
    with tempfile.TemporaryDirectory() as cache:
        half = pipeline.from_pretrained(f"{OWNER}/card", variant="fp16", dtype="auto", cache_dir=cache)
        found["variant"] = {str(part.dtype) for part in half._models} == {"torch.float16"}
        found["variant files"] = sorted(path.name for path in Path(cache).rglob("*.safetensors"))
        with tempfile.TemporaryDirectory() as folder:
            half.save_pretrained(folder)
            found["companions"] = {
                name: (Path(folder) / name).read_text() for name in ("README.md", "scope.json", "LICENSE")
            }
    sharded = pipeline.from_pretrained(f"{OWNER}/sharded")
    found["sharded"] = call(sharded)
    found["shards"] = sorted(
        {path.parent.name for path in Path(snapshot_download(f"{OWNER}/sharded")).rglob("*-00002-of-*")}
    )
    with tempfile.TemporaryDirectory() as cache:
        found["private"] = {
            "none": error_of(pipeline.from_pretrained, f"{OWNER}/private", token=False, cache_dir=cache),
            "another": error_of(pipeline.from_pretrained, f"{OWNER}/private", token="hf_another", cache_dir=cache),
            "token": call(pipeline.from_pretrained(f"{OWNER}/private", token="hf_someone", cache_dir=cache)),
        }
    found["unknown"] = error_of(pipeline.from_pretrained, f"{OWNER}/nothing")
    found["unknown revision"] = error_of(pipeline.from_pretrained, f"{OWNER}/card", revision="nowhere")
    found["unknown model"] = error_of(cogview_pipelines.CogLMModel.from_pretrained, f"{OWNER}/nothing")
    found["wrong class"] = error_of(cogview_pipelines.CogViewPipeline.from_pretrained, f"{OWNER}/CogView2Pipeline")
    found["no pipeline"] = error_of(pipeline.from_pretrained, f"{OWNER}/CogLMModel")
    return found


def load_by_auto_classes() -> dict:
    """By the classes of diffusers and transformers that find others."""
    import diffusers
    import transformers

    name = f"{OWNER}/CogView2Pipeline"
    found = {
        "DiffusionPipeline": type(diffusers.DiffusionPipeline.from_pretrained(name)).__name__,
        "caption": type(diffusers.DiffusionPipeline.from_pretrained(f"{OWNER}/CogViewCaptionPipeline")).__name__,
        "AutoPipelineForText2Image": type(diffusers.AutoPipelineForText2Image.from_pretrained(name)).__name__,
        "AutoPipelineForInpainting": type(diffusers.AutoPipelineForInpainting.from_pretrained(name)).__name__,
        "AutoPipelineForImage2Image": type(diffusers.AutoPipelineForImage2Image.from_pretrained(name)).__name__,
        "CogView": type(diffusers.AutoPipelineForText2Image.from_pretrained(f"{OWNER}/CogViewPipeline")).__name__,
        "AutoModel of diffusers": type(diffusers.AutoModel.from_pretrained(name, subfolder="transformer")).__name__,
        "tokenizer": type(transformers.AutoTokenizer.from_pretrained(name, subfolder="tokenizer")).__name__,
    }
    for model in MODELS:
        found[model] = type(transformers.AutoModel.from_pretrained(f"{OWNER}/{model}")).__name__
        found[f"config of {model}"] = type(transformers.AutoConfig.from_pretrained(f"{OWNER}/{model}")).__name__
    for tokenizer in ("IcetkTokenizer", "CogViewTokenizer"):
        found[tokenizer] = type(transformers.AutoTokenizer.from_pretrained(f"{OWNER}/{tokenizer}")).__name__
    return found


def run_cards() -> dict:
    """The examples of the pipelines' model cards."""
    return {name: run_card(name) for name in CALLS}


def run_card(name: str) -> dict:
    """The example of a pipeline's model card, as it stands, in an empty folder."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(f"{OWNER}/{name}")
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        os.chdir(folder)
        for block in blocks:
            exec(block, {})
        files = sorted(os.listdir())
        os.chdir("/")
    return {"blocks": len(blocks), "files": files, "said": said.getvalue(), "data": card.data.to_dict()}


def load_one(name: str) -> list:
    """A pipeline by id."""
    return call(getattr(cogview_pipelines, name).from_pretrained(f"{OWNER}/{name}"))


def load_offline() -> dict:
    """One that is in the cache, and one that is not."""
    kind = cogview_pipelines.CogView2Pipeline
    return {"cached": load_one("CogView2Pipeline"), "other": error_of(kind.from_pretrained, f"{OWNER}/sharded")}


def error_of(function, *arguments, **named) -> str:
    """The class of what is raised, and what it says."""
    try:
        function(*arguments, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
