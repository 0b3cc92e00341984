"""
What a training run will need on each device, before there is a device: bytes, and floating-point operations.

Weights, gradients, moments and averages follow from the shapes of a model on the meta device. What is saved for the
backward pass is counted: the model's own code runs on tensors that have shapes, but no data.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ..models.cogview.modeling_cogview import CogViewModel
from ..models.cogview2.modeling_coglm import CogLMModel
from .arguments import NO_INT8_MUON
from .distribution import PRECISIONS, layers_of
from .moments import moment_bytes

MASTER_BYTES = 4  # weights, gradients and the average are held in float32, and moments as a rule


@dataclass(frozen=True)
class Layout:
    """
    How a model is spread over devices, as the options of [`TrainConfig`] say it.

    Args:
        sharding (`str`): `"none"`, `"full"` or `"hybrid"`.
        shard_size (`int`): Devices that share one copy; 1 without sharding.
        reshard_after_forward (`bool`): Gathered layers are given up after their forward pass.
        gradient_checkpointing (`bool`): Layers are computed again in the backward pass.
    """

    sharding: str
    shard_size: int = 1
    reshard_after_forward: bool = True
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Need:
    """
    Bytes on the fullest device, and the work of a step.

    Args:
        weights, gradients, moments, average (`int`): Kept from step to step (gradients: from backward pass to update).
        activations (`int`): Saved by the forward pass for the backward pass, and what a layer saves that is computed
            again.
        buffers (`int`): Gathered weights, gradients before they are shared out, logits and their gradient.
        operations (`float`): Floating-point operations of a device in a step, those of recomputation included.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    buffers: int
    operations: float

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.gradients + self.moments + self.average + self.activations + self.buffers


@dataclass(frozen=True)
class Saved:
    """
    Bytes that forward passes save: around the layers, in each layer but the last, in the last, which may have less to
    compute, and the states that go from layer to layer.
    """

    around: int
    layer: int
    last: int
    states: int


def layouts_of(devices: int, shard_size: int | None = None) -> list[Layout]:
    """
    All layouts that so many devices allow.

    Args:
        devices (`int`): Of all machines.
        shard_size (`int`, *optional*): Devices of a machine, where there are several machines.

    Raises:
        ValueError: If `shard_size` does not divide the devices.
    """
    if shard_size is not None and (shard_size < 1 or devices % shard_size):
        raise ValueError(f"`shard_size` must divide the {devices} devices, but is {shard_size}.")
    bases = [Layout("none")]
    if devices > 1:
        bases += [Layout("full", devices, reshard) for reshard in (True, False)]
        if shard_size is not None and 1 < shard_size < devices:
            bases += [Layout("hybrid", shard_size, reshard) for reshard in (True, False)]
    return [
        Layout(base.sharding, base.shard_size, base.reshard_after_forward, checkpointing)
        for base in bases
        for checkpointing in (False, True)
    ]


def share(parameter: torch.Tensor, count: int, index: int = 0) -> int:
    """Elements of a parameter that one of `count` devices holds: rows are dealt out evenly, rounded up."""
    if not parameter.ndim:
        return 1
    rows = -(-parameter.shape[0] // count)
    return min(rows, max(0, parameter.shape[0] - index * rows)) * parameter[0].numel()


def plan(
    config,
    layout: Layout,
    batch_size: int,
    optimizer: str = "adamw",
    average: bool = False,
    mixed_precision: str = "no",
    device: str = "cuda",
    moments: str = "float32",
) -> Need:
    """
    What one training step of a CogLM or a CogView needs on each device.

    Args:
        config (`PreTrainedConfig`): Of [`CogLMModel`] or [`CogViewModel`].
        layout ([`Layout`]): How the model is spread.
        batch_size (`int`): Samples of a forward pass on a device.
        optimizer (`str`): `"adamw"` or `"muon"`.
        average (`bool`): Whether a moving average of the weights is kept.
        mixed_precision (`str`): `"no"`, `"bf16"` or `"fp16"`.
        device (`str`): `"cuda"`, whose autocast normalises in float32, or `"cpu"`.
        moments (`str`): `"float32"`, `"bfloat16"` or `"int8"`.

    Returns:
        [`Need`]: Of the fullest device. Allocators need somewhat more: their blocks are not full.

    Raises:
        ValueError: If `config` is of another model, or Muon is to have moments of 8 bits.
    """
    if moments == "int8" and optimizer == "muon":
        raise ValueError(NO_INT8_MUON)
    with torch.device("meta"):
        model = _model_class(config)(config)
    count, compute_bytes = layout.shard_size, 2 if mixed_precision in PRECISIONS else MASTER_BYTES
    own = sum(share(value, count) for value in model.parameters())
    # which shares have 8 bits depends on their sizes: the first device need not be the fullest
    held = [_moments(model, count, index, optimizer, moments) for index in range(count if moments == "int8" else 1)]
    saved = saved_bytes(config, batch_size, mixed_precision, count > 1, device)
    layers = config.num_hidden_layers
    if layout.gradient_checkpointing:
        activations = saved.around + layers * saved.states + saved.layer
    else:
        activations = saved.around + (layers - 1) * saved.layer + saved.last
    tokens, logits, pairs = batch_sizes(config, batch_size)
    buffers = 2 * 4 * logits * config.vocab_size  # logits and their gradient; what is saved of them is counted above
    if count > 1:
        layer = sum(value.numel() for value in layers_of(model)[0].parameters())
        everything = sum(value.numel() for value in model.parameters())
        around = everything - layers * layer
        # a layer that computes, one that is gathered ahead, and the block that it is copied from
        gathered = around + 3 * layer if layout.reshard_after_forward else everything + layer
        buffers += gathered * compute_bytes + max(around, 2 * layer) * (compute_bytes + MASTER_BYTES)
    linear = sum(value.numel() for name, value in model.named_parameters() if _is_linear(model, name))
    in_layers = 2 * tokens * linear + 4 * pairs * config.hidden_size * layers
    if config.model_type == "coglm":  # whose last layer goes on where there are labels
        after = {name: value for name, value in layers_of(model)[-1].named_parameters() if name.endswith(".weight")}
        after = sum(value.numel() for name, value in after.items() if value.ndim == 2 and "query_key" not in name)
        in_layers -= 2 * (tokens - logits) * after
    head = 2 * logits * config.vocab_size * config.hidden_size
    return Need(
        weights=own * MASTER_BYTES,
        gradients=own * MASTER_BYTES,
        moments=max(held),
        average=own * MASTER_BYTES if average else 0,
        activations=activations,
        buffers=buffers,
        operations=float((4 if layout.gradient_checkpointing else 3) * in_layers + 3 * head),
    )


def _moments(model: nn.Module, count: int, index: int, optimizer: str, moments: str) -> int:
    total = 0
    for name, value in model.named_parameters():
        one = moment_bytes(share(value, count, index), moments)
        # AdamW counts steps by parameter
        total += one if optimizer == "muon" and _is_linear(model, name) else 2 * one + MASTER_BYTES
    return total


def report(need: Need, layout: Layout, memory: float | None, rate: float | None) -> dict:
    """
    A plan as numbers to print.

    Args:
        need ([`Need`]), layout ([`Layout`]): The plan.
        memory (`float`, *optional*): Bytes of a device.
        rate (`float`, *optional*): Floating-point operations of matrix products a second on a device.
    """
    return {
        **asdict(layout),
        **asdict(need),
        "total": need.total,
        "fits": None if memory is None else need.total <= memory,
        "seconds_per_step": None if not rate else need.operations / rate,
    }


# Counting what is saved ----------------------------------------------------------------------------------------------


def saved_bytes(config, batch_size: int, mixed_precision: str, sharded: bool, device: str = "cuda") -> Saved:
    """
    Bytes that a forward pass of text-to-image saves for the backward pass, counted on tensors without data.

    Args:
        config (`PreTrainedConfig`): Of [`CogLMModel`] or [x
        batch_size (`int`): Sequences of the longest length.
        mixed_precision (`str`): `"no"`, `"bf16"` or `"fp16"`.
        sharded (`bool`): Weights come to the layers in the type of `mixed_precision`.
        device (`str`): `"cuda"` or `"cpu"`.
    """
    with FakeTensorMode():
        counts = []
        for layers, whole in ((1, False), (2, False), (1, True)):
            shallow = type(config)(**{**config.to_dict(), "num_hidden_layers": layers})
            with _default_dtype(PRECISIONS.get(mixed_precision) if sharded else None):
                model = _model_class(config)(shallow).train()
            with saved_for_backward(model) as found, _Like(device), _autocast(mixed_precision):
                loss, states = _forward(model, batch_size, whole)
            counts.append(sum(found.values()))
            del loss
    layer = counts[1] - counts[0]
    around = counts[2] - layer
    return Saved(around=around, layer=layer, last=counts[0] - around, states=states)


@contextlib.contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """The bytes that are saved for the backward pass meanwhile, by storage; parameters are not counted."""
    found: dict[int, int] = {}
    keep = []  # a storage that is freed would give its number to another one
    parameters = {value.untyped_storage()._cdata for value in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in found:
            found[storage._cdata] = storage.nbytes()
            keep.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


class _Like(TorchFunctionMode):
    """Tensors without data compute as on a device that is not here, and know which positions have a label."""

    def __init__(self, device: str):
        super().__init__()
        self.on_cuda = device == "cuda"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__getitem__ and torch.is_tensor(args[1]) and args[1].dtype == torch.bool:
            values, mask = args
            return values.flatten(0, mask.ndim - 1)[: mask.num_labelled].clone()
        if self.on_cuda and function is torch.Tensor.is_cpu.__get__:
            return False
        if function is torch.Tensor.nonzero and hasattr(args[0], "num_labelled"):
            return tuple(torch.zeros(args[0].num_labelled, dtype=torch.long) for _ in range(args[0].ndim))
        if function is torch.Tensor.ne and hasattr(args[0], "num_labelled"):
            result = function(*args, **kwargs)
            result.num_labelled = args[0].num_labelled
            return result
        if self.on_cuda and function is F.layer_norm and args[0].dtype in PRECISIONS.values():
            args = tuple(value.float() if torch.is_tensor(value) else value for value in args)
            kwargs = {name: value.float() if torch.is_tensor(value) else value for name, value in kwargs.items()}
        if self.on_cuda and function is F.dropout:
            probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return torch.native_dropout(args[0], probability, True)[0] if probability else args[0]
        if self.on_cuda and function is F.scaled_dot_product_attention:  # its dropout is drawn again, not saved
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


def _forward(model: nn.Module, batch_size: int, whole: bool) -> tuple[torch.Tensor, int]:
    """
    The loss as the scripts compute it, and the bytes of the states that go into the last layer; `whole` has that layer
    compute all of them.
    """
    tokens, labelled, _ = batch_sizes(model.config, batch_size)
    length = tokens // batch_size
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    labels = torch.zeros(batch_size, length, dtype=torch.long)
    labels.num_labelled = labelled
    arguments = {"input_ids": ids, "position_ids": ids, "labels": labels, "full_vocabulary": True}
    if model.config.model_type == "coglm":
        arguments["attention_mask"] = torch.ones(batch_size, length, length, dtype=torch.bool)
    states = []
    layer = layers_of(model)[-1]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(next(filter(torch.is_tensor, (*args, *kwargs.values())))),
        with_kwargs=True,
    )
    loss = model(**arguments, output_hidden_states=whole).label_losses.sum()
    handle.remove()
    return loss, states[0].numel() * states[0].element_size()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _autocast(mixed_precision: str) -> torch.autocast:
    precision = PRECISIONS.get(mixed_precision)
    return torch.autocast("cpu", precision, enabled=precision is not None)


def batch_sizes(config, batch_size: int) -> tuple[int, int, int]:
    """Of a batch of text-to-image with the longest texts: positions, labels, and pairs of positions in attention."""
    if config.model_type == "coglm":
        length, labels = config.longest_sequence, config.layout.image_length
    else:
        length = labels = config.max_position_embeddings - 1  # all but the first token are predicted
    return batch_size * length, batch_size * labels, batch_size * length**2


def _model_class(config) -> type[nn.Module]:
    classes: dict[str, type[nn.Module]] = {"coglm": CogLMModel, "cogview": CogViewModel}
    if config.model_type not in classes:
        raise ValueError(f"`config` must be one of {' or '.join(classes)}, but is {config.model_type!r}.")
    if getattr(config, "sparse_attention", None) is not None:
        raise ValueError("`config` has `sparse_attention`, whose memory is not planned. Plan it without.")
    return classes[config.model_type]


def _is_linear(model: nn.Module, name: str) -> bool:
    owner, _, kind = name.rpartition(".")
    return kind == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
