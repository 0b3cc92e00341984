"""What the pipelines of all families share: loading, devices, offload, calls and what they tell, pixels."""

import contextlib
import inspect
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.image_processor import VaeImageProcessor
from transformers import PreTrainedModel

from ...generation.decoders import Decoding
from ...loaders.lora import LoraLoaderMixin
from ...loaders.textual_inversion import TextualInversionLoaderMixin
from ...models.adapters import without_adapters
from .calls import Call, RunningCalls
from .hub import copy_companions, explain, fetch, push
from .memory import execution_device, pictures_that_fit
from .notifier import Callback
from .offloading import offload_stages
from .outputs import PreviewOutput
from .unknown_words import MESSAGES, find_unknown

# A logger of its own: programs that tell their users in another way, as the command line does, switch it off.
unknown_words = logging.getLogger("cogview_pipelines.unknown_words")


class PipelineBase(LoraLoaderMixin, TextualInversionLoaderMixin, DiffusionPipeline):
    """
    A pipeline of models that write and read image tokens, and of an image tokenizer, `vqvae`.

    A family's own base class says what its stages are (`model_cpu_offload_seq`), and what they need
    (`_memory_per_picture`). All pipelines of a family can be made from one another by `from_pipe`, which shares the
    components.
    """

    _optional_components: Sequence[str] = ()
    _callback_tensor_inputs = ("tokens",)
    # What folders may hold for other pipelines of the family.
    _passed_over: Collection[str] = ()
    _preview_output = PreviewOutput
    # Which of the examples of `model_card.py` the page of a pushed pipeline shows.
    _made_for = "text to image"
    # Offload leaves the image tokenizer on the device: it is small, and previews need it while another model works.
    _exclude_from_cpu_offload = ["vqvae"]  # noqa: RUF012 - diffusers takes a list

    def __init__(self):
        super().__init__()
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)
        self._calls = RunningCalls()
        self._decoding = Decoding()
        self._loaded_from: str | os.PathLike | None = None
        self._told: dict[str, set[str]] = {}  # by what it is about, what warnings have said

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "PipelineBase":
        """
        This pipeline with the components of another one: the same objects, so that nothing is loaded or copied.

        Unlike that of diffusers, which makes everything float32 by default, this leaves the number format of the
        shared weights alone.

        Args:
            pipeline (`DiffusionPipeline`): One of this package's pipelines.
            kwargs: Components and settings to replace.

        Raises:
            ValueError: If the other pipeline lacks a component that this one needs.
        """
        names, settings = cls._get_signature_keys(cls)
        config = dict(pipeline.config)
        # what an earlier `from_pipe` had no use for is kept with an underscore, and taken up again
        found = {name.removeprefix("_"): value for name, value in config.items()}
        found.update(pipeline.components)
        given = {name: found[name] for name in (*names, *settings) if name in found} | kwargs
        missing = [name for name in names if given.get(name) is None and name not in cls._optional_components]
        if missing:
            raise ValueError(
                f"`pipeline` must have {names} for a `{cls.__name__}`, but this `{type(pipeline).__name__}` lacks "
                f"{missing}. Pass them by name."
            )
        new = cls(**given)
        new._decoding = getattr(pipeline, "_decoding", new._decoding)
        new._loaded_from = getattr(pipeline, "_loaded_from", None)
        unused = {name for name in config if name not in given and name not in pipeline.components}
        new.register_to_config(**{f"_{name.removeprefix('_')}": config[name] for name in unused})
        return new

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "PipelineBase":
        """
        Load a saved pipeline, as [`DiffusionPipeline.from_pretrained`] does.

        Args:
            pretrained_model_name_or_path (`str` or path): A folder, or an id on the Hub.
            dtype (`torch.dtype`, `dict` or `"auto"`, defaults to `torch.float32`): Number format of the weights,
                whatever that of the files: one for all, or one for each component by name. `"auto"` takes that of the
                files.
            quantization_config (*optional*): How the weights of the stages are quantised: a `TorchAoConfig` or
                `BitsAndBytesConfig` of transformers for all of them, or a `PipelineQuantizationConfig` of diffusers.
            kwargs: Further arguments of diffusers: `revision`, `variant`, `token`, `cache_dir`, `local_files_only`;
                `device_map="cuda"` loads straight to the GPU.

        Raises:
            OSError: If there is no such folder or model, or the Hub cannot be reached and it is not in the cache.
            ValueError: If what is there is no pipeline of this package, or damaged.
        """
        quantization = kwargs.get("quantization_config")
        if quantization is not None and not isinstance(quantization, PipelineQuantizationConfig):
            stages = dict.fromkeys(cls.model_cpu_offload_seq.split("->"), quantization)
            kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping=stages)
        dtype = kwargs.pop("dtype", None)
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        dtype = torch.float32 if dtype is None else dtype
        folder, name = pretrained_model_name_or_path, None
        if not os.path.isdir(folder) and os.fspath(folder).count("/") <= 1:
            name = os.fspath(folder)
            folder = fetch(cls.download, name, **kwargs)
        if isinstance(dtype, str) and dtype == "auto":
            dtype = _saved_dtypes(folder)
        pipe = super().from_pretrained(folder, dtype=dtype, **kwargs)
        pipe._loaded_from = folder
        pipe._load_saved_adapters(folder)
        if name is not None:
            pipe.register_to_config(_name_or_path=name)
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Save all components and `model_index.json`, as diffusers does, and what lay beside them where they came from:
        model card, scope, licences.

        Adapters are saved beside the weights, in the folder `lora`, and [`PipelineBase.from_pretrained`] loads them
        again; those that are fused are part of the weights that are saved. Both are told in a warning.

        Args:
            save_directory (path): The folder.
            safe_serialization (`bool`): Must be True: weights are saved as safetensors only.
            variant (`str`, *optional*): Goes into the names of the weights' files, such as `"fp16"`; several variants
                can be in one folder.
            max_shard_size (`int` or `str`, *optional*): Files of weights are not larger, such as `"5GB"`.
            push_to_hub (`bool`): Push the pipeline afterwards.
            kwargs: Arguments of `push_to_hub`; `repo_id` is by default the name of the folder.

        Raises:
            ValueError: If `safe_serialization` is False.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: weights are saved as safetensors only.")
        with contextlib.ExitStack() as stack:
            self._save_adapters(save_directory)
            for model in self._lora_models().values():
                stack.enter_context(without_adapters(model))
            super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        copy_companions(self._loaded_from, save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, variant=variant, max_shard_size=max_shard_size, **kwargs)
        elif kwargs:
            raise TypeError(f"`save_pretrained` has no argument `{next(iter(kwargs))}` without `push_to_hub=True`.")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """
        Save the pipeline on the Hub, with a model card that says how to use it.

        Args:
            repo_id (`str`): `owner/name`; it is made if it is not there.
            commit_message (`str`, *optional*): Of the commit.
            private (`bool`, *optional*): Whether others may see a repository that is made.
            token (`str`, *optional*): By default that of `hf auth login`.
            create_pr (`bool`): Propose the change instead of making it.
            safe_serialization (`bool`): Must be True.
            variant, max_shard_size: As for `save_pretrained`.
            subfolder (`str`, *optional*): Where in the repository; there is no model card then.
            revision (`str`, *optional*): The branch; it is made if it is not there.

        Returns:
            `str`: The address of the commit.
        """
        return push(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
            revision=revision,
            subfolder=subfolder,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
        )

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As diffusers does.

        Raises:
            OSError: If there is no such folder or model, or the Hub cannot be reached and it is not in the cache.
            ValueError: If `model_index.json` is damaged, or names a class of anything but this package. Some versions
                of diffusers look for other modules in the folder of the model, and run what they find.
        """
        try:
            loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            name = os.fspath(pretrained_model_name_or_path)
            sentence = None if os.path.exists(name) else explain(name, kwargs.get("revision"), error)
            if sentence is None:
                raise
            raise OSError(sentence) from error
        except (RecursionError, AttributeError, TypeError) as error:  # JSON, but none of a pipeline
            raise ValueError(
                f"`model_index.json` of {pretrained_model_name_or_path} is damaged ({type(error).__name__}). Copy or "
                "save the model again."
            ) from error
        _check_components(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As diffusers does, but without a warning for what only other pipelines of the family have a use for."""
        own = inspect.signature(cls.__init__).parameters
        config_dict = {
            name: value for name, value in config_dict.items() if name in own or name not in cls._passed_over
        }
        return super().extract_init_dict(config_dict, **kwargs)

    # Speed -----------------------------------------------------------------------------------------------------------

    def set_decoding(
        self, compile: bool = False, cuda_graph: bool = False, fused: bool = True, parallel: int | None = None
    ) -> None:
        """
        How tokens are written, in text to image, completion and captions: the same tokens in every way.

        A step is small, and what surrounds its matrix products can take longer than they do. `compile` and
        `cuda_graph` give a step fixed shapes and keep its memory (keys and values of the last batch size) until this
        is called again. Pipelines that `from_pipe` makes of this one later share it.

        Args:
            compile (`bool`): Run the step through `torch.compile`. It takes a C++ compiler, on a GPU Triton, and a
                minute or so for each new batch size.
            cuda_graph (`bool`): Capture the step and replay it, with one launch for all of its kernels. It takes a
                CUDA device, on which all weights stay, and a fraction of a second for each new batch size.
            fused (`bool`, defaults to `True`): On a CPU, without the other two, run all of a step in one kernel where
                there is one for it: built, for plain weights without hooks. It sums in float32 whatever the weights
                are, so that 16-bit models may draw another token where two are nearly tied.
            parallel (`int`, *optional*): How many positions a pass predicts at once, in all but beam search. As many
                of them are kept as are certain to be the tokens of one by one, so that the picture or the text stays
                the same and takes fewer passes. 1 writes them one by one. Default: 1 for captions, whose words are
                seldom guessed, else 32; on a CPU fewer in batches, so that a pass reads about 64 tokens, but at least
                8. In 16 bits, other than in one kernel on a CPU, sums of another order may
                draw another token where two are nearly tied.

        Raises:
            ValueError: If `parallel` is below 1.
        """
        self._decoding = Decoding(compile, cuda_graph, fused, parallel)

    # Memory ----------------------------------------------------------------------------------------------------------

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """
        Keep the weights in main memory, and those of one stage at a time on the GPU, as diffusers does.

        A backbone that two stages share goes there once for both.
        """
        super().enable_model_cpu_offload(gpu_id, device)
        offload_stages(self._models)

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        *args,
        exclude_modules: str | Sequence[str] | None = None,
        offload_to_disk_path: str | None = None,
        **kwargs,
    ) -> None:
        """
        Keep the weights in main memory, and a few layers on the GPU at a time, as diffusers does.

        Args:
            onload_device (`torch.device`): The GPU.
            exclude_modules (list of `str`, *optional*): Components that stay on the GPU, besides the image tokenizer.
            args, offload_to_disk_path, kwargs: Further arguments of diffusers.

        Raises:
            ValueError: If the weights are to be kept on disk: diffusers would give the layers of all stages the same
                names there.
        """
        if offload_to_disk_path is not None:
            raise ValueError(
                f"`offload_to_disk_path` must be left out, but is {str(offload_to_disk_path)!r}: one stage would read "
                "the files of another. Without a backbone that two share, call "
                "`diffusers.hooks.apply_group_offloading` for each component, with a folder of its own."
            )
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        excluded += [name for name in self._exclude_from_cpu_offload if name not in excluded]
        super().enable_group_offload(torch.device(onload_device), *args, exclude_modules=excluded, **kwargs)

    def _device_of(self, model: PreTrainedModel) -> torch.device:
        """Where a component computes."""
        return execution_device(model, lambda: self._execution_device)

    def _memory_per_picture(self, model: PreTrainedModel) -> tuple[int, int]:
        """Bytes that a stage needs for each picture, and how many pictures at a time keep it busy."""
        raise NotImplementedError

    def _batch_size(self, max_batch_size: int | None, model: PreTrainedModel, copies: int = 1) -> int:
        """How many pictures a stage works on at a time, `copies` sequences each: as the caller says, or as fit."""
        if max_batch_size is not None:
            return max_batch_size
        bytes_each, most = self._memory_per_picture(model)
        return pictures_that_fit(model, self._device_of(model), self._models, copies * bytes_each, most)

    @property
    def _models(self) -> list[torch.nn.Module]:
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    # Calls -----------------------------------------------------------------------------------------------------------

    @property
    def interrupt(self) -> bool:
        """
        Set it to True to stop at the next step; the call then raises [`GenerationInterrupted`].

        From a callback this stops the call that the callback belongs to, from another thread all calls of this
        pipeline that run at the time. A new call begins with False.
        """
        return self._calls.interrupted

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._calls.interrupted = value

    @contextlib.contextmanager
    def _running(
        self,
        *,
        total: int | None = None,
        return_statistics: bool = False,
        callback: Callback | None = None,
        tensor_inputs: Sequence[str] = (),
    ) -> Iterator[Call]:
        """
        The computing part of a call, with a state of its own; after the last one, all is as before.

        Args:
            total (`int`, *optional*): Steps that are known beforehand; there is no progress bar without.
            return_statistics, callback, tensor_inputs: Arguments of the call.
        """
        for name, part in self.components.items():
            if getattr(part, "dtype", None) == torch.float64:
                raise ValueError(
                    f"`{name}` must be float32, bfloat16 or float16, but is float64. Call `pipe.to(torch.float32)`."
                )
        try:
            with contextlib.nullcontext() if total is None else self.progress_bar(total=total) as progress:
                call = Call(self, progress, return_statistics, callback, tensor_inputs)
                with self._calls.enter(call):
                    yield call
        finally:
            if not self._calls:  # offloaded weights stay where another call needs them
                self.maybe_free_model_hooks()

    @property
    def caption_component(self) -> str:
        """Name of the component that writes captions, and reads those that are scored."""
        return "transformer"

    def find_unknown(self, texts: Sequence[str], name: str, scored: bool = False) -> dict[str, list[str]]:
        """
        What is to be told of texts that the model does not know all of, each part once in the life of this pipeline.

        Args:
            texts (sequence of `str`): The texts.
            name (`str`): What they are: what was told of others does not count.
            scored (`bool`): Whether they are scored, rather than drawn.

        Returns:
            `dict[str, list[str]]`: By a key of `unknown_words.MESSAGES`, the parts.
        """
        told = self._told.setdefault(name, set())
        return find_unknown(self.tokenizer, texts, self.caption_component if scored else None, told)

    def _tell_unknown(self, texts: Sequence[str], name: str = "`prompt`", scored: bool = False) -> None:
        """Warn of the words and characters that the model does not know."""
        for kind, parts in self.find_unknown(texts, name, scored).items():
            unknown_words.warning(f"{MESSAGES[kind].format(name=name, parts=parts)}.")

    def _require_embeddings(self, texts: Sequence[Sequence[int]], name: str) -> None:
        """Raise `ValueError` if the tokenizer got tokens since, for which the models have no embedding."""
        largest = max((token for text in texts for token in text), default=-1)
        for model in self._text_models():
            count = len(model.get_input_embeddings().weight)
            if largest >= count:
                raise ValueError(
                    f"{name} holds {self.tokenizer.convert_ids_to_tokens(largest)!r}, a token that was added to the "
                    f"tokenizer: it has {len(self.tokenizer)}, but a {type(model).__name__} of this pipeline has "
                    f"embeddings of {count}. Call `resize_token_embeddings(len(pipe.tokenizer))` of each transformer, "
                    "and train them."
                )

    def _check_tensor_inputs(self, tensor_inputs: Sequence[str]) -> None:
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may name {self._callback_tensor_inputs}, but names {unknown}."
            )

    # Pixels ----------------------------------------------------------------------------------------------------------

    def _decode_pixels(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(num_images, rows, columns)` tokens to float32 pixels in [0, 1], `(num_images, 3, height, width)`."""
        rate, device = self.config.compression_rate, self._device_of(self.vqvae)
        # one by one: rounding depends on the size of a batch, and a pixel could differ from that of the picture alone
        images = torch.cat([self.vqvae.decode(part.to(device), rate).sample for part in tokens.split(1)])
        return images.float().clamp(0, 1)

    def _decode(self, tokens: torch.Tensor, output_type: str):
        """Pictures of tokens, as the caller wants them."""
        if output_type == "latent":
            return tokens
        return self.image_processor.postprocess(self._decode_pixels(tokens), output_type)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], `(num_images, 3, height, width)`, to `(num_images, rows, columns)` tokens."""
        pixels = pixels.to(self._device_of(self.vqvae), self.vqvae.dtype)
        return self.vqvae.encode(pixels, self.config.compression_rate).tokens


def _saved_dtypes(folder: str | os.PathLike) -> dict[str, torch.dtype | str]:
    """The number format of each component of a saved pipeline; what does not say so is left to transformers."""
    found: dict[str, torch.dtype | str] = {"default": "auto"}
    for path in Path(folder).glob("*/config.json"):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype"))
        except (OSError, ValueError, TypeError, AttributeError):  # loading will tell what is wrong with it
            continue
        if isinstance(dtype, torch.dtype):
            found[path.parent.name] = dtype
    return found


def _check_components(config_dict: dict) -> None:
    """Of what a `model_index.json` names, everything must be this package's own."""
    package = __name__.split(".")[0]
    if not isinstance(config_dict, dict):
        raise ValueError("`model_index.json` must hold an object. Copy or save the model again.")
    pipeline = config_dict.get("_class_name")
    if pipeline is not None and not isinstance(pipeline, str):
        raise ValueError(
            f"`model_index.json` must name a pipeline under `_class_name`, but has {str(pipeline)[:100]}: a pipeline "
            "whose code comes with the model is not run."
        )
    for name, value in config_dict.items():
        if not isinstance(value, list | tuple) or name.startswith("_") or not value:
            continue
        if not all(part is None or isinstance(part, str) for part in value) or value[0] in (None, package):
            continue
        raise ValueError(
            f"`model_index.json` must name classes of `{package}`, but says {str(list(value))[:100]} for `{name}`: "
            "code that is not this package's is not run. Save the model again with this package."
        )
