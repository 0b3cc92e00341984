"""The processes that train together: who they are, what they agree on, and how `accelerate config` set them up."""

import copy
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType, ProjectConfiguration, set_seed
from torch import distributed, nn

from .adapters import warn_of_adapters
from .arguments import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)
Model = TypeVar("Model", bound=nn.Module)


TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others before it gives up


def start_processes() -> PartialState:
    """This process among those that a launcher started (`accelerate launch`, `torchrun`), or alone."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return PartialState(cpu=not torch.accelerator.is_available(), **({} if alone else {"timeout": TIMEOUT}))


def make_model_once(make_model: Callable[[], Model]) -> Model:
    """
    A model whose weights are read or drawn by the main process alone; on the others it has shapes, but no weights.

    [`DistributedModel`] gives each process what it needs of them. So they are the same for any number of processes,
    and no more than one holds all of them.

    Args:
        make_model (`Callable`): Makes the model on the default device; what reads weights is [`load_model`].
    """
    if start_processes().is_main_process:
        return make_model()
    with torch.device("meta"):
        return make_model()


def load_model(model_class: type[Model], folder: str, option: str | None = None, **config) -> Model:
    """
    A trained model in float32; on the processes where [`make_model_once`] wants none, its shapes alone.

    Args:
        model_class (`type`): A `PreTrainedModel`.
        folder (`str`): Folder or Hub id.
        option (`str`, *optional*): What the script calls it, for a warning of adapters that were saved with it.
        config: Fields of its config to change.
    """
    if torch.get_default_device().type == "meta":
        return model_class(model_class.config_class.from_pretrained(folder, **config))
    if option is not None:
        warn_of_adapters(option, folder)
    return model_class.from_pretrained(folder, dtype=torch.float32, **config)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """
    An `Accelerator` for the config, which also seeds weights (the same on every process).

    What the options leave open is as `accelerate config` says.

    Raises:
        ValueError: If a tracker is unknown or not installed, or the Accelerate config asks for what this package does
            not do.
    """
    check_tracker(config.log_with)
    start_processes()
    refuse_other_engines()
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(
            f"`mixed_precision` {precision!r} of the Accelerate config is not supported; pass --mixed_precision bf16, "
            "fp16 or no."
        )
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.accelerator.is_available(),
        log_with=config.log_with,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    set_seed(config.seed)
    return accelerator


def check_tracker(name: str | None) -> None:
    """Raise `ValueError` if there is no such tracker, or its package is missing: Accelerate would log nothing."""
    if name is None:
        return
    known = sorted(str(kind.value) for kind in LoggerType if kind != LoggerType.ALL)
    if name not in known:
        raise ValueError(f"`log_with` must be one of {known}, but is {name!r}.")
    packages = {"comet_ml": ("comet_ml",), "tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,))
    if name not in LOGGER_TYPE_TO_CLASS or not any(map(importlib.util.find_spec, packages)):
        raise ValueError(f"`log_with` {name!r} needs the package {packages[0]}: pip install {packages[0]}.")


def refuse_other_engines() -> None:
    """Raise `ValueError` where the Accelerate config asks for an engine that would train something else than asked."""
    engines = {
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    }
    for variable, engine in engines.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"The Accelerate config asks for {engine}, which owns weights, optimizer and checkpoints: Muon, the "
                "average of the weights and resuming on another number of processes would not work with it, and a "
                "model saved from it may lack parameters. Choose another `distributed_type` in `accelerate config`."
            )


def resolve(config: Config) -> Config:
    """
    The config with what `accelerate config` says where it leaves that: forward passes per update, and sharding.

    Raises:
        ValueError: If the Accelerate config asks for weights in the memory of the CPU.
    """
    passes = config.gradient_accumulation_steps
    if passes is None:
        given = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        passes = int(given) if given.isdecimal() and int(given) else 1
    sharding, reshard = config.sharding, config.reshard_after_forward
    if sharding is None:
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        sharding = "full" if wanted else "none"
        if wanted:
            if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
                raise ValueError(
                    "The Accelerate config keeps weights on the CPU (`fsdp_offload_params`), which is not supported. "
                    "Switch it off, or pass --sharding none."
                )
            strategy = (
                os.environ.get("FSDP_SHARDING_STRATEGY", "").upper()
                or os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").upper()
            )
            reshard = strategy not in ("FALSE", "SHARD_GRAD_OP", "2")
            sharding = "hybrid" if strategy in ("HYBRID_SHARD", "4") else sharding
    return dataclasses.replace(
        config, gradient_accumulation_steps=passes, sharding=sharding, reshard_after_forward=reshard
    )


class Processes:
    """
    What the processes tell each other outside of the model.

    Small numbers go over gloo where it is there: the CPU does not wait for what the device is still computing.

    Args:
        accelerator (`Accelerator`): Of this process.
    """

    def __init__(self, accelerator: Accelerator):
        self.count, self.index = accelerator.num_processes, accelerator.process_index
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self.group, self.group_device = None, self.device
        if self.count > 1 and self.device.type != "cpu" and distributed.is_gloo_available():
            self.group, self.group_device = distributed.new_group(backend="gloo"), torch.device("cpu")

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum over all processes of each of some numbers, in float64 where the device has it."""
        if self.count == 1:
            return list(values)
        dtype = torch.float32 if self.group_device.type == "mps" else torch.float64
        total = torch.tensor(list(values), dtype=dtype, device=self.group_device)
        distributed.all_reduce(total, group=self.group)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether a flag is up on any process."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value) -> list:
        """What each process has, in order: a small object that can be pickled."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def beside(self) -> "Processes":
        """
        The same processes over a gloo group of their own, for threads that work beside the training.

        All processes must call this together.

        Raises:
            ValueError: If torch has no gloo.
        """
        other = copy.copy(self)
        if distributed.is_initialized():
            if not distributed.is_gloo_available():
                raise ValueError("`async_checkpoints` needs gloo, which this torch was built without. Switch it off.")
            other.group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
            other.group_device = torch.device("cpu")
        return other

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.sum([0.0])

    def each(self, work: Callable[[], object]) -> list:
        """
        Do something on every process, and give what each made of it to all, in order.

        Raises:
            Exception: What the first process that failed raised, on all.
        """
        try:
            result = (True, work())
        except Exception as error:
            result = (False, error)
        results = self.gather(result)
        for succeeded, value in results:
            if not succeeded:
                raise value
        return [value for _, value in results]

    def main_first(self, work: Callable[[], object]):
        """
        Do something on the main process, and give its result to all.

        Raises:
            Exception: What the main process raised, on all.
        """
        return self.each(lambda: work() if self.is_main else None)[0]
