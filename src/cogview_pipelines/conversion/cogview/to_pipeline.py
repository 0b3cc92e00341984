"""From the released files of CogView to a folder that its pipelines load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...models.cogview.modeling_cogview import CogViewModel
from ...models.cogview.tokenization_cogview import CogViewTokenizer
from ...models.image_tokenizers.modeling_cogview_vq import CogViewVQModel
from ..job import Job, check_file, source_id
from ..reader import ConversionError, LoadedTensor, ReadableTensor, read_module
from ..released_models import ReleasedModel, open_released_model
from ..shapes import expected_shapes
from . import layout


def convert_to_pipeline(
    output: str | Path,
    *,
    base: str | Path | None = None,
    caption: str | Path | None = None,
    super_resolution: str | Path | None = None,
    image_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 2 * 2**30,
    num_image_tokens: int = 8192,
    strict: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """
    Convert any of the released files.

    The folder is a pipeline as soon as text tokenizer, image tokenizer and a transformer are in it;
    `model_index.json` is written last. Parts may come in several calls. Calling again after an interruption goes on
    where it stopped, and parts that are there are kept.

    Args:
        output (`str` or `Path`): The folder of the pipeline.
        base, caption, super_resolution (`str` or `Path`, *optional*): `cogview-base`, `cogview-caption`, `cogview-sr`:
            tar, zip, unpacked folder, or `.pt` file, in one or several model-parallel ranks.
        image_tokenizer (`str` or `Path`, *optional*): The file of the image tokenizer.
        text_tokenizer (`str` or `Path`, *optional*): The SentencePiece model, `cog-pretrain.model`.
        num_attention_heads (`int`, *optional*): Of the transformers, which do not tell; default: width / 64.
        dtype (`torch.dtype`, *optional*): Convert the transformers; by default every tensor stays as it is, bit by
            bit.
        max_shard_size (`int`): Of the safetensors files, in bytes.
        num_image_tokens (`int`): Image codes in the transformers' vocabulary.
        strict (`bool`): Refuse files with tensors that the model does not know, or whose ranks disagree, instead of
            leaving those out.
        say: Called with each line of the report.

    Returns:
        `dict`: What is in the folder, as in its `conversion.json`.

    Raises:
        ConversionError: If a file cannot be converted. What was converted before it stays.
    """
    paths = {"transformer": base, "caption_transformer": caption, "super_resolution_transformer": super_resolution}
    if not any([*paths.values(), image_tokenizer, text_tokenizer]):
        raise ConversionError("Nothing to convert: give at least one of the released files.")
    with Job.start(output, dtype, max_shard_size, strict, say) as job:
        if text_tokenizer is not None:
            job.convert_text_tokenizer(Path(text_tokenizer), CogViewTokenizer, num_image_tokens)
        if image_tokenizer is not None:
            _convert_image_tokenizer(job, Path(image_tokenizer))
        command_token_id = _command_token_id(job)
        for component, path in paths.items():
            if path is not None:
                with open_released_model(path, scratch=job.output, several_ranks=True) as model:
                    _convert_transformer(
                        job, component, model, num_image_tokens, command_token_id, num_attention_heads
                    )
        _write_index(job)
        return job.record


def _convert_image_tokenizer(job: Job, path: Path) -> None:
    check_file(path, "image_tokenizer")
    with path.open("rb") as file:
        released, others, fingerprint = read_module(file, str(path), is_bare=True)
        source = source_id("cogview vqvae", fingerprint, path.stat().st_size, job.max_shard_size)
        if job.is_done("vqvae", source):
            return
        tensors: dict[str, ReadableTensor] = {
            layout.image_tokenizer_key(key): tensor for key, tensor in released.items()
        }
        for key in layout.TRANSPOSED:
            if key in tensors:
                tensors[key] = LoadedTensor(tensors[key].read().T.contiguous())
        config = layout.image_tokenizer_config(tensors, str(path))
        entry = job.write_model("vqvae", CogViewVQModel, tensors, config, source, str(path), dtype=None)
        entry |= {"source": path.name}
        job.enter("vqvae", entry, entry.pop("files"))
        job.report("vqvae", entry, others)


def _command_token_id(job: Job) -> int:
    if not (job.output / "tokenizer").is_dir():
        return layout.RELEASED_COMMAND_TOKEN_ID
    return job.load("tokenizer", CogViewTokenizer).command_token_id


def _convert_transformer(
    job: Job,
    component: str,
    model: ReleasedModel,
    num_image_tokens: int,
    command_token_id: int,
    num_attention_heads: int | None,
) -> None:
    name = str(model.path)
    settings = (str(job.dtype), job.max_shard_size, num_image_tokens, command_token_id, num_attention_heads)
    source = source_id(component, model.fingerprint, model.size, settings)
    if job.is_done(component, source):
        return
    tensors, unequal = layout.join_ranks(model.ranks, name)
    if unequal and job.strict:
        raise ConversionError(f"{name}: its ranks disagree about {', '.join(unequal)}.")
    config = layout.transformer_config(tensors, num_image_tokens, command_token_id, num_attention_heads, name)
    surplus = sorted(set(tensors) - set(expected_shapes(CogViewModel, config)))
    entry = job.write_model(component, CogViewModel, tensors, config, source, name, job.dtype)
    entry |= {
        "source": model.path.name,
        "iteration": model.iteration,
        "num_ranks": len(model.ranks),
        "left_out": [layout.released_transformer_key(key) for key in surplus],
    }
    job.enter(component, entry, entry.pop("files"))
    others = [*model.others, *(f"tensor `{key}`" for key in surplus)]
    others += [f"tensor `{key}` of later ranks, which differs" for key in unequal]
    job.report(component, entry, others)


def _write_index(job: Job) -> None:
    """Write `model_index.json`, if all that a pipeline needs is there and fits together."""
    from ...pipelines.cogview.pipeline_cogview import CogViewPipeline
    from ...pipelines.cogview.pipeline_cogview_caption import CogViewCaptionPipeline
    from ...pipelines.cogview.pipeline_cogview_upscale import CogViewUpscalePipeline

    components = job.record["components"]
    there = [name for name in layout.STAGES if name in components]
    missing = [name for name in ("tokenizer", "vqvae") if name not in components]
    if missing or not there:
        job.say(f"The folder is no pipeline yet: {', '.join(missing or ['a transformer'])} must be converted too.")
        return
    parts: dict[str, Any] = {"tokenizer": job.load("tokenizer", CogViewTokenizer)}
    for name in ("vqvae", *there):
        model_class = CogViewVQModel if name == "vqvae" else CogViewModel
        config = job.load(name, model_class.config_class)
        with torch.device("meta"):
            parts[name] = model_class(config)
    codes, wanted = parts["vqvae"].config.num_embeddings, parts[there[0]].config.num_image_tokens
    if codes != wanted:
        job.say(
            f"The folder is no pipeline: the image tokenizer has {codes} codes, but the transformer writes {wanted}."
        )
        return
    starts = {name: parts[name].config.command_token_id for name in there}
    start = parts["tokenizer"].command_token_id
    if set(starts.values()) != {start}:
        job.say(
            f"The folder is no pipeline: the command tokens begin with {start} for the text tokenizer, but the "
            f"transformers were converted with {starts}. Delete them and convert them again with this tokenizer."
        )
        return
    if "transformer" in there:
        pipe = CogViewPipeline(**parts)
    else:  # one that can do something with what is there
        kind = CogViewUpscalePipeline if "super_resolution_transformer" in there else CogViewCaptionPipeline
        pipe = kind(**{name: part for name, part in parts.items() if name in kind._get_signature_keys(kind)[0]})
    job.write_index(pipe)
