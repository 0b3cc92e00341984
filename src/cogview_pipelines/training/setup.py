"""What a training script sets up before its loop: Accelerate, optimizer, learning rate, average of the weights."""

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_wsd_schedule

from .arguments import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An `Accelerator` for the config; also seeds weights and dropout (the same seed on every process)."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.log_with,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        step_scheduler_with_optimizer=False,
    )
    set_seed(config.seed)
    return accelerator


def make_optimizer(model: nn.Module, config: TrainConfig, adamw_names: tuple[str, ...] = ()) -> torch.optim.Optimizer:
    """
    The optimizer of all parameters that require a gradient.

    Args:
        model (`nn.Module`): The model.
        config ([`TrainConfig`]): Its `optimizer`, `learning_rate`, `weight_decay` and `adam_beta2` count.
        adamw_names (`tuple[str, ...]`):
            With Muon, parts of names of linear layers that AdamW keeps, such as an output head.

    Returns:
        `torch.optim.Optimizer`: With `optimizer="muon"` a [`CombinedOptimizer`]; both parts then run at the same
        learning rate, since Muon's updates are scaled to the size of AdamW's.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise ValueError("No parameter of `model` requires a gradient.")
    muon = []
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"`optimizer` 'muon' needs torch 2.9 or newer, but this is {torch.__version__}; use 'adamw'."
            )
        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        chosen = [name for name in parameters if name in linear and not any(part in name for part in adamw_names)]
        muon = [parameters.pop(name) for name in chosen]
    groups = [
        {"params": [value for value in parameters.values() if value.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [value for value in parameters.values() if value.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2)))
    if muon:
        optimizers.append(
            torch.optim.Muon(
                muon, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(*optimizers)


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, to step, schedule, save and load them together."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict):
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"]):
            optimizer.load_state_dict(state)
        # Loading replaces the groups; the schedule must see the new ones.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, a constant stretch, then a late decay (1 - sqrt) to zero; steps are updates of the weights."""
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_decay_steps=config.decay_steps,
        # One more, so that the rate of the last update is above zero.
        num_training_steps=max(config.max_steps + 1, config.warmup_steps + config.decay_steps),
        decay_type="1-sqrt",
    )


def make_averaged_model(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The moving average of the weights (in `.module`), or `None` if `ema_decay` is 0; buffers are copied."""
    if not config.ema_decay:
        return None
    average = get_ema_multi_avg_fn(config.ema_decay)
    return AveragedModel(model, multi_avg_fn=average).requires_grad_(False)
