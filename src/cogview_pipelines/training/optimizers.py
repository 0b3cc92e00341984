"""AdamW and Muon over weights that may be sharded, the learning rate, clipping, and the scale of float16 losses."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..ops.processor import multiplies
from .arguments import TrainConfig
from .moments import as_saved, make_adamw, new_moment, take

STATE_NAMES = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "muon": ("momentum_buffer",)}


class Optimizers:
    """
    The optimizers of the parameters of a model that require a gradient, as one.

    Args:
        model (`nn.Module`): The model.
        config ([`TrainConfig`]): Its `optimizer`, `moments`, `weight_decay` and `adam_beta2` count.
        adamw_names (`tuple[str, ...]`):
            With Muon, parts of names of linear layers that AdamW keeps, such as an output head.

    Raises:
        ValueError: If no parameter requires a gradient, torch has no Muon, or `moments` cannot be what it is.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, adamw_names: tuple[str, ...] = ()):
        config.check_moments()
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise ValueError("No parameter of `model` requires a gradient.")
        rest, muon = dict(self.parameters), {}
        if config.optimizer == "muon":
            if not hasattr(torch.optim, "Muon"):
                raise ValueError(
                    f"`optimizer` 'muon' needs torch 2.9 or newer, but this is {torch.__version__}; use 'adamw'."
                )
            linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            chosen = [name for name in rest if name in linear and not any(part in name for part in adamw_names)]
            muon = {name: rest.pop(name) for name in chosen}
        groups = [
            {"params": [value for value in rest.values() if value.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [value for value in rest.values() if value.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if groups:
            self.parts["adamw"] = make_adamw(groups, config)
        if muon:
            # both parts run at one learning rate: Muon's updates are scaled to the size of AdamW's
            self.parts["muon"] = sharded_muon(
                muon.values(), config.learning_rate, config.weight_decay, getattr(torch, config.moments)
            )

    def step(self) -> None:
        """Update the weights by their gradients."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next step, the same for all parameters."""
        for part in self.parts.values():
            for group in part.param_groups:
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that are there."""
        return [value.grad for value in self.parameters.values() if value.grad is not None]

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        The moments that there are, by `<moment>.<parameter>`, sharded as the parameters are.

        Those of 8 bits are copies in float32, which [`Optimizers.take`] puts back.
        """
        return {name: as_saved(value) for name, value in self._moments().items()}

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what [`Optimizers.tensors`] gave, after a checkpoint was loaded into it."""
        for name, value in self._moments().items():
            take(value, tensors[name])

    def _moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{key}.{name}": value
            for name, parameter in self.parameters.items()
            for part in self.parts.values()
            for key, value in part.state.get(parameter, {}).items()
            if torch.is_tensor(value)
        }

    def prepare(self, names: Iterable[str]) -> int:
        """
        Make room for saved moments, as [`Optimizers.tensors`] names them, to be loaded into.

        Returns:
            `int`: How many parameters have none among them: their optimizer is another one, or they are new.
        """
        names, missing = set(names), 0
        name_of = {id(parameter): name for name, parameter in self.parameters.items()}
        for part_name, part in self.parts.items():
            for group in part.param_groups:
                for parameter in group["params"]:
                    name = name_of[id(parameter)]
                    keys = [key for key in STATE_NAMES[part_name] if f"{key}.{name}" in names]
                    part.state[parameter].clear()
                    if len(keys) < len(STATE_NAMES[part_name]):
                        missing += 1
                        continue
                    for key in keys:
                        part.state[parameter][key] = (
                            torch.zeros(())
                            if key == "step"
                            else new_moment(part, parameter, signed=key != "exp_avg_sq")
                        )
        return missing


def sharded_muon(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    momentum_type: torch.dtype = torch.float32,
):
    """
    Muon for matrices that may be sharded: `torch.optim.Muon`, with the update of each gathered to be orthogonalised.

    Momentum stays sharded. Each process orthogonalises the whole matrix and keeps its share of the result: more
    arithmetic than if they took turns, but no memory beyond one matrix, and the same numbers on any number of them.

    Source: Muon (https://kellerjordan.github.io/posts/muon/), with updates scaled as in "Muon is Scalable for LLM
    Training" (https://arxiv.org/abs/2502.16982).
    """

    class ShardedMuon(torch.optim.Muon):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)

        def _new_buffer(self, parameter, signed=True):  # named as in torchao's optimizers
            return torch.zeros_like(parameter.detach(), dtype=momentum_type)

        def _update(self, parameter, group):
            state, gradient = self.state[parameter], parameter.grad
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = self._new_buffer(parameter)
            momentum = state["momentum_buffer"].float().lerp_(gradient, 1 - group["momentum"])
            state["momentum_buffer"].copy_(momentum)
            update = gradient.lerp(momentum, group["momentum"])
            whole = update.full_tensor() if isinstance(update, DTensor) else update
            change = orthogonalised(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
            change *= -group["lr"] * 0.2 * math.sqrt(max(change.shape))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if isinstance(parameter, DTensor):
                change = distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.add_(change)

    return ShardedMuon(list(parameters), lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def orthogonalised(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, epsilon: float
) -> torch.Tensor:
    """
    About the orthogonal matrix that is nearest, by Newton-Schulz iteration: singular values go to around 1.

    It runs in bfloat16, as Muon's does, but in float32 on a processor that has no arithmetic for that.

    Args:
        matrix (`torch.Tensor` of shape `(rows, columns)`): Float32.
        coefficients (`tuple[float, float, float]`): Of the polynomial `a x + b x^3 + c x^5`.
        num_steps (`int`): How often it is applied.
        epsilon (`float`): The smallest norm that the matrix is divided by.

    Returns:
        `torch.Tensor` of shape `(rows, columns)`: In the dtype of `matrix`.
    """
    in_float32 = matrix.device.type == "cpu" and not multiplies(torch.bfloat16)
    first, third, fifth = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x.to(torch.float32 if in_float32 else torch.bfloat16)
    x = x / x.norm().clamp(min=epsilon)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return (x.T.contiguous() if is_tall else x).to(matrix.dtype)


def learning_rate(config: TrainConfig, step: int) -> float:
    """
    The rate of the update after `step` updates: linear warm-up, and then as `config.lr_scheduler` says.

    `"constant"` stays there, and falls late, over `decay_steps` (1 - sqrt). `"linear"` and `"cosine"` fall from the
    warm-up on, to zero and to a tenth, as in CogView's release: at a pace that would take `max_steps` from there, so
    that a run ends a little above that.

    The rate of the first update is 0 where there is a warm-up, that of the last is above 0. It is a function of the
    step alone, so that a run resumed with another `learning_rate` goes on with that one.
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_scheduler != "constant":
        done = (step - config.warmup_steps) / config.max_steps
        if config.lr_scheduler == "linear":
            return config.learning_rate * max(0.0, 1 - done)
        return config.learning_rate * (1 + 4.5 * (1 + math.cos(math.pi * min(1.0, done)))) / 10
    # one more, so that the rate of the last update is above zero
    end = max(config.max_steps + 1, config.warmup_steps + config.decay_steps)
    begin = end - config.decay_steps
    if config.decay_steps and step >= begin:
        return config.learning_rate * (1 - math.sqrt((step - begin) / config.decay_steps))
    return config.learning_rate


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together, over all shards: a scalar, the same on every process."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients of this norm down to `max_norm`, if it is larger."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)


class LossScale:
    """
    The factor that keeps gradients in float16 above zero: halved at each overflow, doubled after a while without one.

    Unlike `torch.amp.GradScaler` it is told whether the norm over all shards and optimizers is finite, so that all of
    them skip a step or none does.

    Args:
        scale (`float`): To begin with.
        interval (`int`): Steps without an overflow until it is doubled.
        patience (`int`): Overflows until it is halved; all of them are left again after it was doubled.
        least (`float`): The smallest scale.
    """

    def __init__(self, scale: float = 2.0**16, interval: int = 2000, patience: int = 1, least: float = 2.0**-14):
        self.scale, self.interval, self.good_steps, self.least = scale, interval, 0, least
        self.patience = self.overflows_left = patience

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {
            "loss_scale": self.scale,
            "loss_scale_steps": self.good_steps,
            "loss_scale_overflows_left": self.overflows_left,
        }

    def load(self, numbers: dict[str, float]) -> None:
        """Go on as a checkpoint says, if it says something."""
        self.scale = numbers.get("loss_scale", self.scale)
        self.good_steps = int(numbers.get("loss_scale_steps", self.good_steps))
        self.overflows_left = int(numbers.get("loss_scale_overflows_left", self.overflows_left))

    def update(self, finite: bool) -> None:
        """
        Count a step.

        Raises:
            FloatingPointError: If the gradients overflow at any scale.
        """
        if not finite:
            self.good_steps = 0
            if self.overflows_left > 1:
                self.overflows_left -= 1
                return
            self.scale /= 2
            if self.scale < self.least:
                raise FloatingPointError("Gradients overflow in float16 at any loss scale; train in bf16, or slower.")
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale, self.good_steps, self.overflows_left = 2 * self.scale, 0, self.patience


def unscale(gradients: Iterator[torch.Tensor] | list[torch.Tensor], scale: float) -> None:
    """Divide gradients by the scale of their loss."""
    for gradient in gradients:
        gradient.div_(scale)
