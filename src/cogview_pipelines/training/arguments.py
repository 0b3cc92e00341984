"""The knobs that every training script has, and how they are read from the command line and a YAML file."""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from transformers import HfArgumentParser

Config = TypeVar("Config")


@dataclass
class TrainConfig:
    """
    Common knobs. A script's own config inherits from this one and adds fields with `metadata={"help": ...}`.

    A step is one update of the weights: `batch_size` samples on each process, `gradient_accumulation_steps` times.
    """

    output_dir: str = field(metadata={"help": "Folder for checkpoints, metrics.jsonl, samples and the final model."})
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights and data order."})
    max_steps: int = field(default=1000, metadata={"help": "Updates of the weights in the whole run."})
    max_minutes: float | None = field(
        default=None, metadata={"help": "Save a checkpoint and stop after so many minutes of this start."}
    )
    batch_size: int = field(default=32, metadata={"help": "Samples per process and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "adamw, or muon: Muon for the weights of linear layers, AdamW for the rest.",
            "choices": ["adamw", "muon"],
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay of matrices and kernels."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Decay of AdamW's second moment."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    decay_steps: int = field(
        default=0, metadata={"help": "Last steps of the run, in which the learning rate falls to zero."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the norm of all gradients at this; 0: never."})
    mixed_precision: str = field(
        default="no",
        metadata={"help": "Autocast type of the forward pass.", "choices": ["no", "bf16", "fp16"]},
    )
    compile: bool = field(default=False, metadata={"help": "Run the model through torch.compile."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Decay of the moving average of the weights that is saved; 0: none."}
    )
    checkpoint_every_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints; 0: never."})
    checkpoint_every_minutes: float = field(default=10.0, metadata={"help": "Minutes between checkpoints; 0: never."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep; 0: all."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint-<step> folder, or 'latest': the last one, if there is any."}
    )
    log_every_steps: int = field(default=20, metadata={"help": "Steps between lines of metrics.jsonl."})
    sample_every_steps: int = field(default=500, metadata={"help": "Steps between sample pictures; 0: never."})
    log_with: str | None = field(
        default=None, metadata={"help": "Tracker of Accelerate, such as tensorboard or wandb, beside metrics.jsonl."}
    )
    data_workers: int = field(default=1, metadata={"help": "Threads that prepare batches ahead; 0: none."})
    data_processes: bool = field(
        default=False,
        metadata={"help": "Processes instead of threads for that: where a fast device would wait for batches."},
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it was written, and the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def parse_config(
    config_class: type[Config], arguments: list[str] | None = None, description: str | None = None
) -> Config:
    """
    Read a config from the command line and, with `--config FILE`, from a YAML file; the command line wins.

    Args:
        config_class (`type`): A dataclass with a field `config`, such as one that inherits from [`TrainConfig`].
        arguments (`list[str]`, *optional*): The command line, by default that of this process.
        description (`str`, *optional*): What `--help` says first.

    Returns:
        An instance of `config_class`.

    Raises:
        ValueError: If there is no such file, or it has an unknown option or a value that is no choice.
    """
    parser = HfArgumentParser(config_class, description=description, formatter_class=_HelpFormatter)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    path = first_look.parse_known_args(arguments)[0].config
    if path is not None:
        _set_defaults_from_file(parser, config_class, Path(path))
    (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return config


def _set_defaults_from_file(parser, config_class, path):
    import yaml

    if not path.is_file():
        raise ValueError(f"`--config` must be a YAML file, but there is none at {path}.")
    options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"`--config` {path} must hold `option: value` lines, but holds a {type(options).__name__}.")
    known = {item.name for item in fields(config_class) if item.init}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"`--config` {path} has options that {config_class.__name__} lacks: {', '.join(unknown)}.")
    for action in parser._actions:
        if action.dest in options:
            action.required = False
            value = options[action.dest]
            if value is False and action.choices and "no" in action.choices:  # as YAML reads a bare `no`
                value = options[action.dest] = "no"
            if action.choices and value not in action.choices:  # argparse does not check defaults
                raise ValueError(f"`{action.dest}` must be one of {list(action.choices)} in {path}, but is {value!r}.")
            # YAML reads 1e-3 as a string; argparse converts string defaults only outside of lists.
            if isinstance(value, list) and action.type is not None:
                options[action.dest] = [action.type(item) for item in value]
            if isinstance(value, dict):
                options[action.dest] = json.dumps(value)
    parser.set_defaults(**options)
