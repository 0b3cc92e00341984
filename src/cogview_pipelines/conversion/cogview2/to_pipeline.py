"""From the released files to a `CogView2Pipeline` folder."""

import importlib.resources
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.cogview2.modeling_coglm import CogLMConfig
from ...models.cogview2.tokenization_icetk import IcetkTokenizer
from ...schedulers.scheduling_lopar import LoPARScheduler
from ..errors import ConversionError
from ..job import RECORD_FILE, Job, check_file, source_id
from ..reader import LoadedTensor, ReadableTensor, read_module
from ..released_models import ReleasedModel, open_released_model
from ..writer import Tensors, hash_file, hash_tensor
from . import layout
from .layout import STAGES, Stage


def convert_to_pipeline(
    output: str | Path,
    *,
    coglm: str | Path | None = None,
    direct_sr: str | Path | None = None,
    iterative_sr: str | Path | None = None,
    image_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    cluster_labels: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 2 * 2**30,
    share_backbone: bool = True,
    num_image_tokens: int = 20000,
    strict: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """
    Convert any of the released files.

    The folder is a pipeline as soon as text tokenizer, image tokenizer and CogLM are in it; `model_index.json` is
    written last. Parts may come in several calls. Calling again after an interruption goes on where it stopped, and
    parts that are there are kept.

    Args:
        output (`str` or `Path`): The folder of the pipeline.
        coglm, direct_sr, iterative_sr (`str` or `Path`, *optional*): Zip, unpacked folder, or `.pt` file of each
            transformer.
        image_tokenizer (`str` or `Path`, *optional*): `ice_image.pt`.
        text_tokenizer (`str` or `Path`, *optional*): `ice_text.model`.
        cluster_labels (`str` or `Path`, *optional*):
            `cluster_label.npy`, or `"compute"` for clusters of our own, which are not the released ones. Needed with
            `image_tokenizer`.
        dtype (`torch.dtype`, *optional*): Convert the transformers; by default every tensor stays as it is, bit by
            bit.
        max_shard_size (`int`): Of the safetensors files, in bytes.
        share_backbone (`bool`): Store what direct super-resolution has in common with CogLM once, if it is equal.
        num_image_tokens (`int`): Image codes in the transformers' vocabulary.
        strict (`bool`): Refuse files with tensors that the model does not know, instead of leaving those out.
        say: Called with each line of the report.

    Returns:
        `dict`: What is in the folder, as in its `conversion.json`.

    Raises:
        ConversionError: If a file cannot be converted. What was converted before it stays.
    """
    paths = {"transformer": coglm, "direct_sr_transformer": direct_sr, "iterative_sr_transformer": iterative_sr}
    if not any([*paths.values(), image_tokenizer, text_tokenizer]):
        raise ConversionError("Nothing to convert: give at least one of the released files.")
    if image_tokenizer is not None and cluster_labels is None:
        raise ConversionError(
            "`cluster_labels` is missing: cluster sampling needs the `cluster_label.npy` that lies beside the "
            "original scripts. Give "
            '"compute" instead for clusters of our own, which make pictures that are not those of the release.'
        )
    with Job.start(output, dtype, max_shard_size, strict, say) as job:
        if text_tokenizer is not None:
            job.convert_text_tokenizer(Path(text_tokenizer), IcetkTokenizer, num_image_tokens)
        if image_tokenizer is not None and cluster_labels is not None:
            _convert_image_tokenizer(job, Path(image_tokenizer), cluster_labels)
        boi_token_id = _boi_token_id(job)
        for stage in STAGES:
            path = paths[stage.component]
            if path is not None:
                with open_released_model(path, scratch=job.output) as model:
                    _convert_transformer(job, stage, model, boi_token_id, num_image_tokens, share_backbone)
                if stage.scheduler is not None:
                    save = released_scheduler(stage).save_pretrained
                    job.save_constant(stage.scheduler, LoPARScheduler.config_name, save)
        _write_index(job)
        return job.record


# Components ----------------------------------------------------------------------------------------------------------


def _read_cluster_labels(path: str | Path, num_codes: int) -> torch.Tensor:
    labels = _read_integers(Path(path), num_codes)
    if not np.array_equal(np.unique(labels), np.arange(len(np.unique(labels)))):
        raise ConversionError("`cluster_labels` must number the clusters from 0 without gaps.")
    return torch.from_numpy(labels.astype(np.int64))


def _read_integers(path: Path, count: int) -> np.ndarray:
    """A `.npy` file of so many integers; nothing of another size is read."""
    check_file(path, "cluster_labels")
    try:
        with path.open("rb") as file:
            # a header that promises more finds no more
            content = io.BytesIO(file.read(8 * count + 2**16))
        version = np.lib.format.read_magic(content)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](content)
        if dtype.hasobject:
            raise ValueError("a pickle")
    except Exception:  # of the system, and whatever NumPy's reader of headers stumbles over
        raise ConversionError(f"`cluster_labels` {path} is no NumPy file of plain numbers.") from None
    if not np.issubdtype(dtype, np.integer) or shape != (count,):
        raise ConversionError(
            f"`cluster_labels` must be {count} integers, one for each image code, but is {str(dtype)[:40]} of shape "
            f"{str(shape)[:80]}."
        )
    data = content.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise ConversionError(f"`cluster_labels` {path} is cut off. Fetch it again.")
    return np.frombuffer(data, dtype)


def _convert_image_tokenizer(job: Job, path: Path, cluster_labels: str | Path) -> None:
    check_file(path, "image_tokenizer")
    with path.open("rb") as file:
        released, others, fingerprint = read_module(file, str(path))
        tensors: dict[str, ReadableTensor] = {
            layout.image_tokenizer_key(key): tensor for key, tensor in released.items()
        }
        computed = str(cluster_labels) == "compute"
        labels_id = (
            "compute" if computed else hash_file(Path(cluster_labels)) if Path(cluster_labels).is_file() else None
        )
        source = source_id("vqvae", fingerprint, path.stat().st_size, labels_id, job.max_shard_size)
        if job.is_done("vqvae", source):
            return
        config = layout.image_tokenizer_config(tensors, 1, str(path))
        if computed:
            labels = _own_cluster_labels(tensors["quantize.embed.weight"].read(), job.say)
        else:
            labels = _read_cluster_labels(cluster_labels, config.num_embeddings)
        config.num_clusters = int(labels.max()) + 1
        tensors["cluster_labels"] = LoadedTensor(labels)
        entry = job.write_model(
            "vqvae", layout.model_class_of("vqvae"), tensors, config, source, str(path), dtype=None
        )
        entry |= {"source": path.name, "num_clusters": config.num_clusters, "released_clusters": not computed}
        job.enter("vqvae", entry, entry.pop("files"))
        job.report("vqvae", entry, others)


def _own_cluster_labels(codes: torch.Tensor, say: Callable[[str], None]) -> torch.Tensor:
    from ...models.image_tokenizers.modeling_icetk_vq import kmeans_labels

    say(
        "vqvae: clusters are computed here; they are not the released ones, so samples are not distributed as in "
        "the release"
    )
    return kmeans_labels(codes.float(), min(500, len(codes)), seed=0)


def _convert_transformer(
    job: Job,
    stage: Stage,
    model: ReleasedModel,
    boi_token_id: int | None,
    num_image_tokens: int,
    share_backbone: bool,
) -> None:
    name = str(model.path)
    tensors = {layout.transformer_key(key): tensor for key, tensor in model.tensors.items()}
    if boi_token_id is None:
        boi_token_id = layout.RELEASED_BOI_TOKEN_ID
    released_config = model.config
    if "num_attention_heads" not in released_config and (job.output / "transformer/config.json").is_file():
        # the original code, too, reads the sizes of all three from CogLM's file
        heads = job.load("transformer", CogLMConfig).num_attention_heads
        released_config = {**released_config, "num_attention_heads": heads}
    config = layout.transformer_config(tensors, released_config, stage, boi_token_id, num_image_tokens, name)
    settings = (
        str(job.dtype),
        job.max_shard_size,
        boi_token_id,
        num_image_tokens,
        released_config.get("num_attention_heads"),
    )
    lender = (
        job.record["components"].get("transformer") if stage.super_resolution == "direct" and share_backbone else None
    )
    if lender is not None and not {"tensors", "content_hash", "dtype_option"} <= lender.keys():
        raise ConversionError(f"{job.output / RECORD_FILE} does not say what `transformer` is. Convert it again.")
    source = source_id(stage.component, model.fingerprint, model.size, settings, lender and lender["content_hash"])
    if job.is_done(stage.component, source):
        return
    surplus = layout.check_shapes(
        tensors, layout.expected_shapes(layout.model_class_of(stage.component), config), name
    )
    for key in surplus:
        tensors.pop(key)
    if surplus and job.strict:
        raise ConversionError(f"{name} has tensors that the model does not know: {', '.join(surplus)}.")
    shared = False
    if lender is not None and lender["dtype_option"] == str(job.dtype):
        shared = _equal_backbone(tensors, lender["tensors"], job.say)
    if lender is not None and shared:
        config.shares_backbone = True
        tensors = {key: tensor for key, tensor in tensors.items() if key not in lender["tensors"]}
    entry = job.write_model(
        stage.component, layout.model_class_of(stage.component), tensors, config, source, name, job.dtype
    )
    entry |= {
        "source": model.path.name,
        "iteration": model.iteration,
        "dtype_option": str(job.dtype),
        "shares_backbone_of": lender["content_hash"] if lender is not None and shared else None,
        "left_out": [layout.released_transformer_key(key) for key in surplus],
    }
    job.enter(stage.component, entry, entry.pop("files"))
    others = [*model.others, *(f"tensor `{key}`" for key in surplus)]
    job.report(stage.component, entry, others)


def released_scheduler(stage: Stage) -> LoPARScheduler:
    """The scheduler of a super-resolution stage with the released values."""
    if stage.super_resolution == "direct":
        return LoPARScheduler(step_grid=((1,),), top_k=(100,), temperature=1.0, cluster_temperature=0.89)
    return LoPARScheduler()


def _equal_backbone(tensors: Tensors, hashes: Mapping[str, str], say: Callable[[str], None]) -> bool:
    """
    Whether all tensors that CogLM has are the same here, bit by bit; stops at the first that is not, the small ones
    first.
    """
    for key in sorted(hashes, key=lambda key: tensors[key].nbytes if key in tensors else -1):
        if key not in tensors or hash_tensor(tensors[key]) != hashes[key]:
            say(f"direct_sr_transformer: its backbone is not CogLM's (`{key}` differs), so it is stored in full")
            return False
    say("direct_sr_transformer: its backbone is CogLM's, bit by bit, and is not stored again")
    return True


# The pipeline --------------------------------------------------------------------------------------------------------


def _boi_token_id(job: Job) -> int | None:
    if not (job.output / "tokenizer").is_dir():
        return None
    return job.load("tokenizer", IcetkTokenizer).boi_token_id


def released_styles() -> dict:
    """The ten style presets of the release and the name of its default one, as [`CogView2Pipeline`] takes them."""
    folder = importlib.resources.files("cogview_pipelines.pipelines.cogview2")
    return json.loads(folder.joinpath("released_styles.json").read_text("utf-8"))


def _write_index(job: Job) -> None:
    """Write `model_index.json`, if all that a pipeline needs is there and fits together."""
    from ...pipelines.cogview2.pipeline_cogview2 import CogView2Pipeline

    components, output = job.record["components"], job.output
    missing = [name for name in ("tokenizer", "vqvae", "transformer") if name not in components]
    if missing:
        job.say(f"The folder is no pipeline yet: {', '.join(missing)} must be converted too.")
        return
    parts: dict[str, Any] = {"tokenizer": job.load("tokenizer", IcetkTokenizer)}
    for name in ("vqvae", *(stage.component for stage in STAGES)):
        if name in components:
            model_class = layout.model_class_of(name)
            config = job.load(name, model_class.config_class)
            with torch.device("meta"):
                parts[name] = model_class(config)
    for stage in STAGES:
        if stage.scheduler is not None and stage.scheduler in components:
            parts[stage.scheduler] = job.load(stage.scheduler, LoPARScheduler)
    codes, wanted = parts["vqvae"].config.num_embeddings, parts["transformer"].config.num_image_tokens
    if codes != wanted:
        job.say(
            f"The folder is no pipeline: the image tokenizer has {codes} codes, but the transformer writes {wanted}."
        )
        return
    starts = {name: part.config.boi_token_id for name, part in parts.items() if name.endswith("transformer")}
    start = parts["tokenizer"].boi_token_id
    if set(starts.values()) != {start}:
        job.say(
            f"The folder is no pipeline: <start_of_image> is {start} for the text tokenizer, but the transformers "
            "were "
            f"converted with {starts}. Delete them and convert them again with this tokenizer."
        )
        return
    lender = components.get("direct_sr_transformer", {}).get("shares_backbone_of")
    if lender not in (None, components["transformer"].get("content_hash")):
        raise ConversionError(
            f"{output / 'direct_sr_transformer'} shares the backbone of another CogLM. Delete and convert it again."
        )
    job.write_index(CogView2Pipeline(**parts, **released_styles()))
