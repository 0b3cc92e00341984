"""The knobs that every training script has, and how they are read from the command line and a YAML file."""

import argparse
import difflib
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from ..json_lines import read_lines
from ..reports import guard_streams

Config = TypeVar("Config")

INTERRUPTED = 75  # exit status of a run that saved a checkpoint and stopped: EX_TEMPFAIL, "try again"

# What `metadata["resume"]` says of an option that may change when a run is resumed.
UNNOTICED = ""  # it changes nothing that is learned

MOST_BETA2 = 0.996  # bfloat16 has numbers 2^-7 apart, relatively: a smaller change than half of that is lost
NO_INT8_MUON = (
    "`moments` 'int8' is for `optimizer` adamw: no library has Muon with a momentum of 8 bits. Choose bfloat16."
)


@dataclass
class TrainConfig:
    """
    Common knobs. A script's own config inherits from this one and adds fields with `metadata={"help": ...}`.

    A step is one update of the weights: `batch_size` samples on each process, `gradient_accumulation_steps` times.
    `metadata["resume"]` says what a changed value does to a run that is resumed; without it, the value counts from
    the next step on.
    """

    output_dir: str = field(
        metadata={"help": "Folder for checkpoints, metrics.jsonl, samples and the final model.", "resume": UNNOTICED}
    )
    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with any of these options; the command line wins over it.",
            "resume": UNNOTICED,
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of weights and data order.", "resume": "other samples are drawn from here on"},
    )
    max_steps: int = field(default=1000, metadata={"help": "Updates of the weights in the whole run."})
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Save a checkpoint and stop after so many minutes of this start.", "resume": UNNOTICED},
    )
    batch_size: int = field(default=32, metadata={"help": "Samples per process and forward pass."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Forward passes per update; by default as `accelerate config` says, else 1."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "adamw, or muon: Muon for the weights of linear layers, AdamW for the rest.",
            "choices": ["adamw", "muon"],
            "resume": "its moments begin at zero where the checkpoint has none of its kind",
        },
    )
    moments: str = field(
        default="float32",
        metadata={
            "help": "How the moments of adamw and the momentum of muon are held: float32; bfloat16, half as large; "
            "int8 (adamw alone), a quarter. Others than float32 need torchao.",
            "choices": ["float32", "bfloat16", "int8"],
            "resume": "those of the checkpoint are rounded to it",
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay of matrices and kernels."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Decay of AdamW's second moment."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    lr_scheduler: str = field(
        default="constant",
        metadata={
            "help": "The learning rate after the warm-up: constant until `decay_steps` before the end; or from "
            "there on falling as in CogView's release, linear to zero or cosine to a tenth.",
            "choices": ["constant", "linear", "cosine"],
        },
    )
    decay_steps: int = field(
        default=0, metadata={"help": "Last steps of the run, in which a constant learning rate falls to zero."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the norm of all gradients at this; 0: never."})
    non_finite: str = field(
        default="stop",
        metadata={
            "help": "What happens at a loss or gradient that is NaN or infinite: stop the run, before a checkpoint is "
            "saved; or skip the step, which is counted in metrics.jsonl and makes the device wait at each step.",
            "choices": ["stop", "skip"],
        },
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "Autocast type of the forward pass; by default as `accelerate config` says, else no.",
            "choices": ["no", "bf16", "fp16"],
        },
    )
    loss_scale_interval: int = field(
        default=2000, metadata={"help": "fp16: steps without an overflow until the loss scale is doubled."}
    )
    loss_scale_patience: int = field(
        default=1, metadata={"help": "fp16: overflows until the loss scale is halved; CogView's release: 2."}
    )
    compile: bool = field(
        default=False, metadata={"help": "Run the model's layers through torch.compile.", "resume": UNNOTICED}
    )
    sharding: str | None = field(
        default=None,
        metadata={
            "help": "none: a copy of the model on each process. full: weights, gradients, moments and average are "
            "shared out over all processes (FSDP2). hybrid: over `shard_size` of them, with copies between such "
            "groups. By default full where `accelerate config` asks for FSDP, else none.",
            "choices": ["none", "full", "hybrid"],
            "resume": UNNOTICED,
        },
    )
    shard_size: int | None = field(
        default=None,
        metadata={
            "help": "With `--sharding hybrid`: processes that share one copy; by default those of a machine.",
            "resume": UNNOTICED,
        },
    )
    reshard_after_forward: bool = field(
        default=True,
        metadata={
            "help": "With sharding: give up the gathered weights of a layer after its forward pass, and gather them "
            "again for the backward pass. Without, a third less communication for more memory.",
            "resume": UNNOTICED,
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of the moving average of the weights that is saved; 0: none.",
            "resume": "an average that the checkpoint lacks begins with its weights",
        },
    )
    checkpoint_every_steps: int = field(
        default=1000, metadata={"help": "Steps between checkpoints; 0: only at the end.", "resume": UNNOTICED}
    )
    checkpoint_every_minutes: float = field(
        default=10.0, metadata={"help": "Minutes between checkpoints; 0: never by time.", "resume": UNNOTICED}
    )
    async_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Write checkpoints while the training goes on, which takes memory of the CPU for a copy of each "
            "process's weights, moments and average.",
            "resume": UNNOTICED,
        },
    )
    keep_checkpoints: int = field(
        default=2, metadata={"help": "How many checkpoints to keep; 0: all.", "resume": UNNOTICED}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint-<step> folder, or 'latest': the last one that is whole, if there is any.",
            "resume": UNNOTICED,
        },
    )
    log_every_steps: int = field(
        default=20, metadata={"help": "Steps between lines of metrics.jsonl.", "resume": UNNOTICED}
    )
    sample_every_steps: int = field(
        default=500, metadata={"help": "Steps between sample pictures; 0: never.", "resume": UNNOTICED}
    )
    evaluate_every_steps: int = field(
        default=100,
        metadata={
            "help": "Steps between losses of validation data, where there is some; 0: only before and after.",
            "resume": UNNOTICED,
        },
    )
    log_with: str | None = field(
        default=None,
        metadata={
            "help": "Tracker of Accelerate, such as tensorboard or wandb, beside metrics.jsonl.",
            "resume": UNNOTICED,
        },
    )
    data_workers: int = field(
        default=1, metadata={"help": "Threads that prepare batches ahead; 0: none.", "resume": UNNOTICED}
    )
    data_processes: bool = field(
        default=False,
        metadata={
            "help": "Processes instead of threads for that: where a fast device would wait for batches.",
            "resume": UNNOTICED,
        },
    )

    def check(self) -> None:
        """Raise `ValueError` for a number that cannot work, before anything is loaded."""
        least = {"max_steps": 1, "batch_size": 1, "log_every_steps": 1, "gradient_accumulation_steps": 1}
        least.update({"loss_scale_interval": 1, "loss_scale_patience": 1})
        least.update(dict.fromkeys(("warmup_steps", "decay_steps", "checkpoint_every_steps", "keep_checkpoints"), 0))
        least.update(
            dict.fromkeys(
                ("sample_every_steps", "evaluate_every_steps", "data_workers", "max_grad_norm", "learning_rate"), 0
            )
        )
        for name, value in least.items():
            own = getattr(self, name)
            if own is not None and not value <= own < math.inf:
                raise ValueError(f"`{name}` must be at least {value}, but is {own}.")
        if os.fsencode(self.output_dir).decode("utf-8", "ignore") != self.output_dir:
            raise ValueError(
                f"`output_dir` must be a name in UTF-8, which {self.output_dir} is not: weights would find no file."
            )
        if self.lr_scheduler != "constant" and self.decay_steps:
            raise ValueError(
                f"`decay_steps` must be 0 with `lr_scheduler` {self.lr_scheduler}, whose rate falls all along, but is "
                f"{self.decay_steps}."
            )
        for name in ("ema_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, but is {getattr(self, name)}.")
        self.check_moments()

    def check_moments(self) -> None:
        """Raise `ValueError` if the moments cannot be held as `moments` says."""
        if self.moments == "float32":
            return
        if self.moments == "int8" and self.optimizer == "muon":
            raise ValueError(NO_INT8_MUON)
        if self.moments == "bfloat16" and self.adam_beta2 > MOST_BETA2:
            raise ValueError(
                f"`adam_beta2` must be at most {MOST_BETA2} with `moments` bfloat16, but is {self.adam_beta2}: a "
                "second moment that shrinks by less in a step is rounded back to what it was. Choose float32 or int8."
            )
        if importlib.util.find_spec("torchao") is None:
            raise ValueError(
                f"`moments` {self.moments!r} needs the package torchao: pip install 'cogview_pipelines[quantization]'."
            )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it was written, and the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """A parser of fields whose metadata say more than argparse knows."""

    def add_argument(self, *args, resume: str | None = None, **kwargs):
        return super().add_argument(*args, **kwargs)


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
        ValueError: If there is no such file, it has an unknown option or a value that is no choice, or a number is
            out of bounds.
        SystemExit: With status 2 and a sentence on stderr, if the command line has an unknown option, lacks one, or
            has a value of another type.
    """
    parser = _Parser(config_class, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    path = first_look.parse_known_args(arguments)[0].config
    if path is not None:
        _set_defaults_from_file(parser, config_class, Path(path))
    config, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        _fail_at_unknown(parser, unknown)
    if hasattr(config, "check"):
        config.check()
    return config


def json_option(config: Any, name: str) -> dict | None:
    """
    The object that an option holds as JSON; `None` where the option is left out.

    Raises:
        ValueError: If it is no JSON, or no object.
    """
    text = getattr(config, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` must be JSON, but is {text[:200]!r}: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a JSON object, but is {text[:200]!r}.")
    return value


def files_option(config: Any, name: str = "files") -> dict[str, str]:
    """
    Files to copy, by their names there, from an option that holds them as JSON.

    Raises:
        ValueError: If one is no file, or a name leads elsewhere.
    """
    files = json_option(config, name) or {}
    for target, source in files.items():
        if not isinstance(source, str) or not os.path.isfile(source):
            raise ValueError(f"`{name}` names {source}, which is no file.")
        if not target or os.path.basename(target) != target:
            raise ValueError(f"`{name}` must hold names of files, but has {target!r}.")
    return files


def read_words(path: str | Path) -> list[str]:
    """
    The words of a text file, parted by white space.

    Raises:
        ValueError: If it cannot be read, or is not UTF-8 text.
    """
    return [word for _, line in read_lines(path) for word in line.split()]


def run_script(main: Callable[[], Any], resumable: bool = False) -> NoReturn:
    """
    Run a script's `main` as a program, and end with its exit status.

    That is 0 when it is done, 1 or 2 with one sentence on stderr where something cannot work (`COGVIEW_TRACEBACK=1` in
    the environment puts a traceback before it), 75 (`INTERRUPTED`) when a checkpoint was saved and the run goes on
    with `--resume_from_checkpoint latest`, and 130 when Ctrl-C ended it at once.

    Args:
        main (`Callable`): Does the work.
        resumable (`bool`): Whether a result of `None` says that the run was interrupted.
    """
    guard_streams()
    name = Path(sys.argv[0]).name
    try:
        result = main()
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("COGVIEW_TRACEBACK"):
            traceback.print_exc()
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        print(f"{name}: stopped.", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(INTERRUPTED if resumable and result is None else 0)


def _fail_at_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    names = [name for name in unknown if name.startswith("-")]
    if not names:
        parser.error(f"nothing takes these: {' '.join(unknown)}")
    known = [option for action in parser._actions for option in action.option_strings]
    hints = [difflib.get_close_matches(name.partition("=")[0], known, 1) for name in names]
    said = [f"{name} (did you mean {hint[0]}?)" if hint else name for name, hint in zip(names, hints)]
    parser.error(f"no such option: {', '.join(said)}; --help lists all of them")


def _set_defaults_from_file(parser, config_class, path):
    import yaml

    if not path.is_file():
        raise ValueError(f"`--config` must be a YAML file, but there is none at {path}.")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`--config` {path} is no YAML file: {error}.") from error
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
