"""
Low-rank adapters (LoRA) on the linear layers of a model: added, loaded, weighed, merged, and kept apart from the
weights that another model borrows.

PEFT puts a layer of its own around each linear layer that it adapts. Merging changes weights in place. Here a merged
model holds its plain layers again, so that all that knows plain layers (fused decoding, saving, compiling) works on
it; and weights that are lent are copied before they are changed.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

# Every linear layer of the transformers of all families.
TARGET_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
DEFAULT_ADAPTER = "default"
_INFIX = ".base_layer"
# Fields of `peft.LoraConfig` that say how the matrices of a file count.
_TAKEN = {
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
}  # fmt: skip
# Those that the file shows anyway, or that are about training and how it began.
_LEFT_OUT = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "peft_type",
    "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "megatron_config", "megatron_core", "ensure_weight_tying", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}  # fmt: skip
# Of PEFT's ways to begin the matrices, those that leave the weights of the model as they are.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
_WORDS = "_adapter_words"  # of a model: by adapter, the words that it has learned


class FusedLayer(NamedTuple):
    """
    A layer of PEFT that was merged and taken out of its model.

    Args:
        parent (`nn.Module`): What it belongs to.
        name (`str`): What it is called there.
        layer (`nn.Module`): The layer.
        scalings (`dict[str, float]`): By adapter, its scaling before.
        dtype (`torch.dtype`): Number format that the weight had.
    """

    parent: nn.Module
    name: str
    layer: nn.Module
    scalings: dict[str, float]
    dtype: torch.dtype


@dataclass
class FusedAdapters:
    """
    What stands in for the adapters of a model while they are merged.

    Args:
        names (`list[str]`): The adapters that are merged.
        layers (list of [`FusedLayer`]): The layers of PEFT.
        kept (`dict`): By module and name, the weights that other models go on to use, as they were before any adapter
            was merged.
        before (`dict`): By module and name, the weights that unfusing puts back; `None` for those in `kept`. They are
            others where adapters were merged and unloaded earlier.
        has_earlier (`bool`): Whether there are such adapters, which stay in the weights.
    """

    names: list[str]
    layers: list[FusedLayer] = field(default_factory=list)
    kept: dict[tuple[nn.Module, str], nn.Parameter] = field(default_factory=dict)
    before: dict[tuple[nn.Module, str], nn.Parameter | None] = field(default_factory=dict)
    has_earlier: bool = False


def require_peft():
    """
    The module `peft`.

    Raises:
        ImportError: If it is missing; the message says how to install it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("Adapters (LoRA) need the package peft: pip install 'cogview_pipelines[lora]'.") from error
    return peft


# Adding --------------------------------------------------------------------------------------------------------------


def add_adapter(
    model: nn.Module,
    name: str = DEFAULT_ADAPTER,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = TARGET_MODULES,
) -> None:
    """
    Put a new adapter on a model, which changes nothing yet; all other weights are frozen.

    Args:
        model (`PreTrainedModel`): The model.
        name (`str`, defaults to `"default"`): Of the adapter.
        rank (`int`, defaults to 8): Rows of its matrices.
        alpha (`float`, *optional*): Its product is multiplied by `alpha / rank`; default: `rank`.
        dropout (`float`, defaults to 0.0): Of its inputs, in training.
        target_modules (sequence of `str`): Names of linear layers, or ends of their names.

    Raises:
        ImportError: If PEFT is missing.
        ValueError: If `rank` is below 1, or the model has no such layers.
    """
    peft = require_peft()
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, but is {rank}.")
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [path for path in linear if any(_is_target(path, target) for target in target_modules)]
    if not found:
        known = sorted({path.rpartition(".")[2] for path in linear})
        raise ValueError(f"`target_modules` must name linear layers, such as {known}, but is {list(target_modules)}.")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=sorted(target_modules),
    )
    require_unfused(model)
    _inject(model, config, name)


def _inject(model: nn.Module, config: "LoraConfig", name: str) -> None:
    with warnings.catch_warnings():
        # PEFT warns of a second adapter; several are what is wanted here.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        model.add_adapter(config, name)


def _is_target(path: str, target: str) -> bool:
    path = path.replace(_INFIX, "")
    return path == target or path.endswith(f".{target}")


def load_adapter(
    model: nn.Module,
    name: str,
    weights: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    known_words: Sequence[str] = (),
) -> None:
    """
    Put a trained adapter on a model.

    Args:
        model (`PreTrainedModel`): The model; its weights may be quantised.
        name (`str`): Of the adapter.
        weights (`Mapping[str, torch.Tensor]`): Its matrices, as [`adapter_weights`] names them.
        config (`dict`): Fields of `peft.LoraConfig`; without `r`, the rank is read from the matrices.
        known_words (sequence of `str`): Words that it has learned.

    Raises:
        ImportError: If PEFT is missing.
        ValueError: If the adapter is there already, or is one of another model.
    """
    peft = require_peft()
    require_unfused(model)
    if name in adapter_names(model):
        raise ValueError(f"`adapter_name` must be a new one, but {name!r} is loaded already. Delete it first.")
    targets = _check_fit(model, name, weights)
    fields = _check_fields(name, config)
    ranks = {path: weights[f"{path}.lora_A.weight"].shape[0] for path in targets}
    if "r" in fields:
        _check_ranks(name, fields, ranks)
    else:
        fields["r"] = max(ranks.values())
        fields["rank_pattern"] = {path: rank for path, rank in ranks.items() if rank != fields["r"]}
        fields.setdefault("lora_alpha", fields["r"])
    fields["target_modules"] = targets  # those that the file has, whatever it says
    active = active_adapters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        # without the hidden arguments that PEFT tests: what is loaded is used, not trained
        _inject(model, peft.LoraConfig(**{**fields, "inference_mode": True}), name)
        result = peft.set_peft_model_state_dict(model, dict(weights), name)
        if result.unexpected_keys:
            raise ValueError(f"the model has no place for its {_few(result.unexpected_keys)}")
        # not `missing_keys`, which hold whatever else the model has
        missing = adapter_weights(model, name).keys() - weights.keys()
        if missing:
            raise ValueError(f"it lacks {_few(sorted(missing))}")
        activate(model, [*active, name])
    except BaseException as error:
        delete_adapters(model, [name])
        activate(model, active)
        for parameter in trained:
            parameter.requires_grad_(True)
        if isinstance(error, (ImportError, MemoryError, torch.OutOfMemoryError)) or not isinstance(error, Exception):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"The adapter {name!r} cannot be put on a {type(model).__name__}: {reason}.") from error
    vars(model).setdefault(_WORDS, {})[name] = list(known_words)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _check_fit(model: nn.Module, name: str, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers that an adapter is for, if its matrices are whole and those of this model."""
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(f"The adapter {name!r} is damaged: its {key} is no tensor of floating-point numbers.")
        if not value.float().isfinite().all():
            raise ValueError(f"The adapter {name!r} is damaged: the numbers of its {key} are not all finite.")
    down, up = (
        {key.removesuffix(end) for key in weights if key.endswith(end)} for end in (".lora_A.weight", ".lora_B.weight")
    )
    targets = sorted(down | up)
    modules = {path.replace(_INFIX, ""): module for path, module in model.named_modules() if not _is_adapter(path)}
    lost = [path for path in targets if path not in modules]
    if lost or not targets:
        raise ValueError(
            f"The adapter {name!r} is not one for a {type(model).__name__} of this size: "
            + (f"it adapts {_few(lost)}, which the model lacks." if lost else "it has no matrices.")
        )
    for path in targets:
        if path not in down or path not in up:
            part = "A" if path not in down else "B"
            raise ValueError(f"The adapter {name!r} is damaged: it lacks {path}.lora_{part}.weight.")
        module = modules[path]
        module = getattr(module, "base_layer", module)
        if not hasattr(module, "in_features"):
            raise ValueError(
                f"The adapter {name!r} is of another model: it adapts {path}, which is no linear layer here, but a "
                f"{type(module).__name__}."
            )
        first, second = weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"]
        if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1] or not first.shape[0]:
            raise ValueError(
                f"The adapter {name!r} is damaged: the matrices of its {path} do not fit together; their shapes are "
                f"{tuple(first.shape)} and {tuple(second.shape)}."
            )
        rows, columns = second.shape[0], first.shape[1]
        if (rows, columns) != (module.out_features, module.in_features):
            raise ValueError(
                f"The adapter {name!r} is of another model: its {path} has {columns} inputs and {rows} outputs, that "
                f"of the model {module.in_features} and {module.out_features}."
            )
    return targets


def _check_fields(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the fields that a file gives, those that PEFT needs; an error for what would be more than low rank."""
    defaults = require_peft().LoraConfig().to_dict()
    begun = config.get("init_lora_weights")
    refused = [] if begun is None or begun in _PLAIN_BEGINNINGS else ["init_lora_weights"]
    for key in sorted(defaults.keys() & config.keys() - _TAKEN - _LEFT_OUT - {"init_lora_weights"}):
        if config[key] and config[key] != defaults[key]:
            refused.append(key)
    if refused:
        key = refused[0]
        raise ValueError(
            f"The adapter {name!r} has `{key}` = {config[key]!r}, which is not supported: adapters may only add "
            "products of matrices to linear layers."
        )
    fields = {key: config[key] for key in sorted(_TAKEN & config.keys()) if config[key] is not None}
    for key, value in fields.items():
        wanted = _wrong(key, value)
        if wanted is not None:
            raise ValueError(f"The adapter {name!r} is damaged: its `{key}` must be {wanted}, but is {value!r}.")
    return fields


def _wrong(key: str, value: Any) -> str | None:
    """What a field of an adapter must be, if it is not that."""
    if key in ("rank_pattern", "alpha_pattern"):
        each = "r" if key == "rank_pattern" else "lora_alpha"
        if isinstance(value, Mapping):
            wrong = next(filter(None, (_wrong(each, number) for number in value.values())), None)
            return wrong and f"an object whose values are each {wrong}"
        return "an object"
    if key.startswith("use_") or key == "lora_bias":
        return None if isinstance(value, bool) else "true or false"
    if key == "r":
        return None if type(value) is int and value >= 1 else "a whole number of at least 1"
    number = type(value) in (int, float) and math.isfinite(value)
    if key == "lora_dropout":
        return None if number and 0 <= value < 1 else "a number from 0 to below 1"
    return None if number else "a finite number"


def _check_ranks(name: str, fields: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Compare the ranks that the fields tell with those of the matrices."""
    from peft.utils.other import get_pattern_key

    pattern = fields.get("rank_pattern", {})
    for path, rank in ranks.items():
        try:
            told = pattern.get(get_pattern_key(pattern, path), fields["r"])
        except re.error as error:
            raise ValueError(
                f"The adapter {name!r} is damaged: its `rank_pattern` holds what is no pattern: {error}."
            ) from error
        if rank != told:
            raise ValueError(
                f"The adapter {name!r} is damaged: the rank of its {path} is {rank} by its matrices, but {told} by "
                "what the file says of them."
            )


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def finite_number(value: object, argument: str) -> float:
    """
    A number that adapters can be multiplied by.

    Raises:
        ValueError: If it is none, naming `argument`.
    """
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(f"`{argument}` must be a finite number, but is {value!r}.")
    return float(number)


# Looking -------------------------------------------------------------------------------------------------------------


def adapter_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The layers that PEFT put around others, each with its parent and its name there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer") and hasattr(child, "merged_adapters"):
                yield parent, name, child


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that a model has, in the order in which they came."""
    names = list(getattr(model, "peft_config", {}))
    return names if names and (fused_adapters(model) or any(True for _ in adapter_layers(model))) else []


def active_adapters(model: nn.Module) -> list[str]:
    """Those that count: where some are merged into the weights, these alone."""
    if _fused_layers(model):
        return [name for name in adapter_names(model) if name in fused_names(model)]
    layers = [entry[2] for entry in adapter_layers(model)]
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    return [name for name in adapter_names(model) if name in active]


def adapter_weights(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The matrices of an adapter, by the names of the model's layers and `lora_A.weight` or `lora_B.weight`."""
    with unfused_layers(model):
        found = require_peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key.removeprefix("base_model.model."): value.detach() for key, value in found.items()}


def adapter_config(model: nn.Module, name: str) -> dict[str, Any]:
    """How an adapter is made: what is not PEFT's default, and its rank, alpha and layers."""
    peft = require_peft()
    config = model.peft_config[name].to_dict()
    defaults = peft.LoraConfig().to_dict()
    kept = {"r", "lora_alpha", "target_modules", "peft_type"}
    fields = {key: value for key, value in config.items() if key in kept or value != defaults.get(key)}
    for key in ("base_model_name_or_path", "inference_mode", "auto_mapping", "task_type", "revision"):
        fields.pop(key, None)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}


def adapter_words(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The words that adapters of a model have learned, each once."""
    words = getattr(model, _WORDS, {})
    return list(dict.fromkeys(word for name in names for word in words.get(name, ())))


def active_words(model: nn.Module) -> list[str]:
    """Those of the adapters that change what it computes now, and are not merged: an adapter of weight 0 does not."""
    # there are none while others are merged: then those that were left out do not count
    layers = [layer for *_, layer in adapter_layers(model)]
    return adapter_words(model, [name for name in active_adapters(model) if _has_weight(layers, name)])


def fused_words(model: nn.Module) -> list[str]:
    """Those of the adapters that are merged into its weights, and were not merged with weight 0."""
    fused = fused_adapters(model)
    if fused is None:
        return []
    layers = [entry.layer for entry in fused.layers]
    return adapter_words(model, [name for name in fused.names if _has_weight(layers, name)])


def _has_weight(layers: Iterable[nn.Module], name: str) -> bool:
    return any(layer.scaling.get(name, 0.0) != 0 for layer in layers)


def adapter_scale(model: nn.Module, name: str) -> float:
    """By how much an adapter counts."""
    layers = [entry.layer for entry in _fused_layers(model)] or [entry[2] for entry in adapter_layers(model)]
    for layer in layers:
        if name in layer.scaling:
            own = layer.lora_alpha[name] / (layer.r[name] ** (0.5 if layer.use_rslora.get(name) else 1))
            return layer.scaling[name] / own if own else 1.0  # an `alpha` of 0 is nothing, however often
    return 1.0


# Choosing ------------------------------------------------------------------------------------------------------------


def activate(model: nn.Module, names: Sequence[str], weights: Sequence[float] | None = None) -> None:
    """
    Let these adapters count, and no others.

    Args:
        model (`PreTrainedModel`): The model.
        names (sequence of `str`): The adapters; none switches all off.
        weights (sequence of `float`, *optional*): By how much each counts; as before by default.
    """
    require_unfused(model)
    for *_, layer in adapter_layers(model):
        own = [name for name in names if name in layer.scaling]
        layer.enable_adapters(bool(own))
        if own:
            layer.set_adapter(own)
        if weights is not None:
            for name, weight in zip(names, weights):
                if name in layer.scaling:
                    layer.set_scale(name, weight)
    for parameter in model.parameters():  # PEFT lets the chosen ones train
        parameter.requires_grad_(False)


def delete_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Remove adapters, and let the others count as before; where none is left, so are the layers of PEFT."""
    require_unfused(model)
    left = [name for name in adapter_names(model) if name not in names]
    if not left:
        return unload_adapters(model)
    # before PEFT lets others count in the place of those that go
    activate(model, [name for name in active_adapters(model) if name not in names])
    for parent, child, layer in adapter_layers(model):
        with warnings.catch_warnings():
            # PEFT warns of the one that it lets count in a layer where others do not; but that one is switched off
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            for name in names:
                layer.delete_adapter(name)  # or nothing, where it is not
        if not layer.scaling:
            setattr(parent, child, layer.base_layer)
    for name in names:
        model.peft_config.pop(name, None)
        getattr(model, _WORDS, {}).pop(name, None)


def unload_adapters(model: nn.Module) -> None:
    """Remove all adapters. Those that are merged stay in the weights."""
    fused = fused_adapters(model)
    if fused is not None:
        fused.layers, fused.names, fused.before = [], [], {}
    for parent, child, layer in adapter_layers(model):
        setattr(parent, child, layer.base_layer)
    vars(model).pop("peft_config", None)
    vars(model).pop(_WORDS, None)
    model._hf_peft_config_loaded = False


# Merging -------------------------------------------------------------------------------------------------------------


def fused_adapters(model: nn.Module) -> FusedAdapters | None:
    """What is merged into a model, if anything is."""
    return getattr(model, "_fused_adapters", None)


def fused_names(model: nn.Module) -> list[str]:
    """The adapters that are merged into a model."""
    fused = fused_adapters(model)
    return [] if fused is None else list(fused.names)


def _fused_layers(model: nn.Module) -> list[FusedLayer]:
    fused = fused_adapters(model)
    return [] if fused is None else fused.layers


def require_unfused(model: nn.Module) -> None:
    """Raise `ValueError` if adapters are merged into a model."""
    fused = fused_adapters(model)
    if fused is not None and fused.layers:
        raise ValueError(f"The adapters {fused.names} are fused into the weights. Call `unfuse_lora` first.")


def fuse_adapters(
    model: nn.Module, names: Sequence[str] | None = None, scale: float = 1.0, safe: bool = False
) -> list[str]:
    """
    Add adapters to the weights that they adapt; the model then is as plain as one without.

    Args:
        model (`PreTrainedModel`): The model. Weights that it lends or borrows are copied first: the other model goes
            on with them as they were.
        names (sequence of `str`, *optional*): Which; by default those that count.
        scale (`float`, defaults to 1.0): By how much more than they count.
        safe (`bool`, defaults to `False`): Raise an error rather than leave NaN in the weights.

    Returns:
        `list[str]`: Which adapters are merged.

    Raises:
        ValueError: If some are merged already, there is no such adapter, `scale` is not finite, or these weights
            cannot be merged into.
    """
    require_unfused(model)
    scale = finite_number(scale, "lora_scale")
    names = active_adapters(model) if names is None else list(names)
    unknown = [name for name in names if name not in adapter_names(model)]
    if unknown or not names:
        raise ValueError(f"`adapter_names` must be of {adapter_names(model)}, but is {names}.")
    earlier = fused_adapters(model)  # of adapters that were unloaded since
    kept = {} if earlier is None else dict(earlier.kept)
    fused = FusedAdapters(names, kept=kept, has_earlier=earlier is not None)
    model._fused_adapters = fused
    try:
        for parent, child, layer in adapter_layers(model):
            own = [name for name in names if name in layer.scaling]
            base = layer.get_base_layer()
            fused.layers.append(FusedLayer(parent, child, layer, dict(layer.scaling), base.weight.dtype))
            if own:
                _keep_lent(model, base, fused)
                for name in own:
                    layer.scaling[name] *= scale
                layer.merge(safe_merge=safe, adapter_names=own)
                for (module, _), parameter in fused.kept.items():
                    if module is base:
                        # not before: PEFT makes the new weights of 4 bits of all that the old ones have
                        parameter.lender_is_fused = True
    except BaseException as error:
        unfuse_adapters(model)
        if isinstance(error, (NotImplementedError, TypeError)):
            raise ValueError(f"Adapters cannot be fused into these weights: {error}") from error
        raise
    for entry in fused.layers:
        setattr(entry.parent, entry.name, entry.layer.get_base_layer())
    return names


def unfuse_adapters(model: nn.Module) -> None:
    """
    Take merged adapters out of the weights; they count as before.

    Raises:
        ValueError: If the adapters have been removed since.
    """
    fused = fused_adapters(model)
    if fused is None:
        return
    if not fused.layers:
        raise ValueError("The fused adapters have been unloaded, and stay in the weights. Load the model again.")
    for parent, child, layer, scalings, dtype in fused.layers:
        setattr(parent, child, layer)
        base = layer.get_base_layer()
        own = [name for name in base._parameters if (base, name) in fused.before]
        _follow(layer, base.weight, dtype)
        if layer.merged:
            if "weight" in own:
                layer.merged_adapters = []
            else:
                layer.unmerge()
        for name in own:
            parameter = fused.before[base, name]
            if parameter is None:
                parameter = fused.kept.pop((base, name))
                vars(parameter).pop("lender_is_fused", None)
            base._parameters[name] = _as_now(parameter, base._parameters[name])
        layer.scaling.update(scalings)
    if fused.has_earlier:
        model._fused_adapters = FusedAdapters([], kept=fused.kept, has_earlier=True)
    else:
        del model._fused_adapters


def _follow(layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Bring the matrices of a layer of PEFT to where its weight, once of this format, was moved without them."""
    changed = weight.dtype if weight.is_floating_point() and weight.dtype != dtype else None
    for name, child in layer.named_children():
        if name != "base_layer":
            child.to(device=weight.device, dtype=changed)


def _as_now(parameter: nn.Parameter, now: torch.Tensor) -> nn.Parameter:
    """
    A weight that was kept, on the device and in the number format of what stands in its place.

    The weight itself stays as it is: another model may use it. One that keeps it, too, gets the same new one.
    """
    plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
    wanted = (now.device, now.dtype if plain else parameter.dtype)  # quantised numbers have a format of their own
    if (parameter.device, parameter.dtype) == wanted:
        return parameter
    moved = getattr(parameter, "moved", None)
    if moved is None or (moved.device, moved.dtype) != wanted:
        with torch.no_grad():
            moved = parameter.to(now.device, now.dtype) if plain else parameter.to(now.device)
        if not isinstance(moved, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=False)
        parameter.moved = moved
    return moved


def _keep_lent(model: nn.Module, base: nn.Module, fused: FusedAdapters) -> None:
    """Give a layer weights of its own, if another model uses those that it has."""
    if not (getattr(model, "lends_weights", False) or getattr(model.config, "shares_backbone", False)):
        return
    for name, parameter in list(base._parameters.items()):
        if parameter is None:
            continue
        # weights that were kept earlier are those of the other model alone by now
        fused.before[base, name] = parameter if (base, name) in fused.kept else None
        fused.kept.setdefault((base, name), parameter)
        if type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor:
            base._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        # of quantised weights, PEFT makes new ones


# A model as it is without adapters -----------------------------------------------------------------------------------


def _is_adapter(path: str) -> bool:
    return ".lora_" in path or ".lora_" in f".{path}"


def plain_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Module, name and path of every parameter of a model, as they would be called without adapters."""
    for path, module in model.named_modules():
        if not _is_adapter(path):
            path = path.replace(_INFIX, "")
            for name in module._parameters:
                yield module, name, f"{path}.{name}" if path else name


def lent_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model lends to others, by path: its weights as they are without adapters, merged ones included."""
    fused = fused_adapters(model)
    kept = {} if fused is None else fused.kept
    return {path: kept.get((module, name), module._parameters[name]) for module, name, path in plain_parameters(model)}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model holds its plain layers meanwhile, as if no adapter had ever been added; what is merged stays."""
    layers = list(adapter_layers(model))
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    for parent, name, layer in layers:
        setattr(parent, name, layer.base_layer)
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model._hf_peft_config_loaded = loaded
        for parent, name, layer in layers:
            setattr(parent, name, layer)


@contextlib.contextmanager
def unfused_layers(model: nn.Module) -> Iterator[None]:
    """The layers of PEFT stand in their places meanwhile, where they are merged, so that PEFT finds them."""
    layers = _fused_layers(model)
    for entry in layers:
        setattr(entry.parent, entry.name, entry.layer)
    try:
        yield
    finally:
        for entry in layers:
            setattr(entry.parent, entry.name, entry.layer.get_base_layer())
