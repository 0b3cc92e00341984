"""
Checkpoints: folders `checkpoint-<step>` that are either complete or absent, for any number of processes.

A folder holds the tensors as torch.distributed.checkpoint writes them, each process its own share, and
`trainer_state.json`: the step, the samples seen, the options of the run, and size and SHA-256 of every other file.
"""

import contextlib
import json
import logging
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ..models.adapters import adapter_layers
from ..models.learned_tokens import LearnedTokens
from .arguments import UNNOTICED, TrainConfig
from .averaging import WeightAverage
from .optimizers import Optimizers
from .processes import Processes
from .run_folder import (
    FINAL,
    disk_errors,
    file_digest,
    partial_path,
    read_run,
    remove,
    require_room,
    take_place,
    write_json,
)

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
FORMAT = 2  # 1: folders of Accelerate, which held random states instead of deriving them from the step


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those that were written; the message names the file."""


@dataclass
class TrainingState:
    """
    All that a run needs to go on.

    Args:
        model (`nn.Module`): The model itself, without wrappers; its tensors may be sharded.
        optimizers ([`Optimizers`]): Of its parameters.
        average ([`WeightAverage`], *optional*): Of its weights.
        step (`int`): Updates so far.
        samples (`int`): Samples seen so far, by all processes together.
        numbers (`dict`): What else is to be kept, such as the loss scale: numbers by name.
    """

    model: nn.Module
    optimizers: Optimizers
    average: WeightAverage | None = None
    step: int = 0
    samples: int = 0
    numbers: dict[str, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name of its own, sharing memory with what is trained; moments of 8 bits are copies."""
        tensors = {f"model.{name}": value for name, value in model_tensors(self.model).items()}
        tensors.update({f"optimizer.{name}": value for name, value in self.optimizers.tensors().items()})
        if self.average is not None:
            tensors.update({f"average.{name}": value for name, value in self.average.tensors.items()})
        return tensors


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, detached; where adapters or new tokens are trained, these alone."""
    tensors = model.state_dict(keep_vars=True)
    learns_tokens = any(isinstance(module, LearnedTokens) for module in model.modules())
    if learns_tokens or any(True for _ in adapter_layers(model)):  # the rest is what the run began with
        tensors = {name: value for name, value in tensors.items() if value.requires_grad}
    return {name: value.detach() for name, value in tensors.items()}


# Saving --------------------------------------------------------------------------------------------------------------


@dataclass
class Save:
    """
    A checkpoint that is being written, under another name until it is whole.

    Args:
        config ([`TrainConfig`]): Of the run.
        folder (`Path`): What it will be called.
        needed (`int`): Bytes on the disk.
        content (`dict`): What its state file says beside the files.
    """

    config: TrainConfig
    folder: Path
    needed: int
    content: dict

    @property
    def partial(self) -> Path:
        """What it is called meanwhile."""
        return partial_path(self.folder)


def save_checkpoint(processes: Processes, config: TrainConfig, state: TrainingState) -> Path:
    """
    Save the state of a run, all processes together.

    Written under another name and renamed at the end; then old checkpoints are removed. What does the same beside the
    training is [`BackgroundSaves`].

    Returns:
        `Path`: The folder `checkpoint-<step>` in `config.output_dir`.

    Raises:
        OSError: If the disk has no room; checkpoints that were there before still are.
    """
    save, tensors = prepare_save(processes, config, state)
    with _quiet():
        return finish_save(
            save, processes, lambda: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(save.partial))
        )


def prepare_save(
    processes: Processes, config: TrainConfig, state: TrainingState
) -> tuple[Save, dict[str, torch.Tensor]]:
    """
    What a checkpoint of a run, as it is now, will be, and its tensors.

    Raises:
        OSError: If the disk has no room.
    """
    root, tensors = Path(config.output_dir), state.tensors()
    needed = int(processes.sum([_local_bytes(tensors, processes)])[0])
    content = {
        "format": FORMAT,
        "step": state.step,
        "samples": state.samples,
        "numbers": dict(state.numbers),
        "options": asdict(config),
    }
    save = Save(config, root / f"checkpoint-{state.step}", needed, content)

    def make_room() -> None:
        remove(save.partial)
        require_room(root, save.folder.name, needed)

    processes.main_first(make_room)
    return save, tensors


def finish_save(save: Save, processes: Processes, write: Callable[[], object]) -> Path:
    """
    Write a checkpoint, note its checksums and give it its name; its folder.

    Args:
        save ([`Save`]): The checkpoint.
        processes ([`Processes`]): Who save it together.
        write (`Callable`): Writes what this process has of the tensors.

    Raises:
        OSError: If the disk has no room.
    """
    try:
        with disk_errors(save.folder.parent, save.folder.name, save.needed), _plain_exceptions():
            write()
        files = _digests(processes, save.partial)
    except BaseException:
        if processes.is_main:
            shutil.rmtree(save.partial, ignore_errors=True)
        raise
    processes.main_first(lambda: _complete(save, files))
    return save.folder


def _complete(save: Save, files: dict[str, dict]) -> None:
    write_json(save.partial / STATE_FILE, save.content | {"files": files})
    take_place(save.partial, save.folder)
    remove_old_checkpoints(save.config, save.folder)


def remove_old_checkpoints(config: TrainConfig, newest: Path) -> None:
    """Keep as many checkpoints as the config says, one of which is the newest."""
    # By age: after going back to an early checkpoint, the later ones of before are the old ones.
    others = [path for path in list_checkpoints(config.output_dir) if path != newest]
    by_age = [*sorted(others, key=lambda path: (path / STATE_FILE).stat().st_mtime_ns), newest]
    for old in by_age[: -config.keep_checkpoints] if config.keep_checkpoints else ():
        unwanted = partial_path(old)  # of which a stop leaves nothing that looks like a checkpoint
        remove(unwanted)
        remove(old.rename(unwanted))


def _local_bytes(tensors: Mapping[str, torch.Tensor], processes: Processes) -> int:
    """Bytes that this process writes: its shards, and on the main process what all hold alike."""
    total = 0
    for value in tensors.values():
        local = value.to_local() if hasattr(value, "to_local") else value
        if local is not value or processes.is_main:
            total += local.numel() * local.element_size()
    return total


@contextlib.contextmanager
def _plain_exceptions() -> Iterator[None]:
    """What a process raised in torch.distributed.checkpoint, instead of a report of all of them."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is said of there being one process; for the main thread alone, as all that changes filters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        yield


def _digests(processes: Processes, folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of the files in a folder, each read by one process."""

    def own() -> dict[str, dict]:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        return {path.name: file_digest(path) for path in paths[processes.index :: processes.count]}

    return {name: digest for part in processes.each(own) for name, digest in part.items()}


# Finding and checking ------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The updates that a checkpoint's name says."""
    return int(path.name.rpartition("-")[2])


def read_state(folder: Path, processes: Processes | None = None) -> dict:
    """
    What `trainer_state.json` of a checkpoint says, after checking all other files against it.

    Args:
        folder (`Path`): The checkpoint.
        processes ([`Processes`], *optional*): Who share the checking; all must call this together.

    Raises:
        DamagedCheckpoint: If a file is missing or has other contents; it is named.
        ValueError: If an earlier version of this package wrote the checkpoint.
    """
    index, count = (processes.index, processes.count) if processes is not None else (0, 1)
    problem = None
    try:
        content = _read_state_file(folder)
        for number, (name, noted) in enumerate(sorted(content["files"].items())):
            if number % count == index and (problem := _file_problem(folder / name, noted)):
                break
    except DamagedCheckpoint as error:
        problem = str(error)
    problems = [problem] if processes is None else processes.gather(problem)
    for problem in problems:
        if problem is not None:
            raise DamagedCheckpoint(problem)
    return content


def _read_state_file(folder: Path) -> dict:
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format", 1) == 1:
            raise ValueError(
                f"{folder} was written by an earlier version of this package, in a format that this one cannot "
                "resume. Start a new run from its final model by `--init_from`."
            )
        if not isinstance(content["step"], int) or not isinstance(content["files"], dict):
            raise KeyError("step")
        return content | {"samples": int(content["samples"])}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error!r})") from error


def _file_problem(path: Path, noted: dict) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != noted["bytes"]:
        return f"{path} is damaged: it has {path.stat().st_size} bytes instead of {noted['bytes']}"
    if file_digest(path) != noted:
        return f"{path} is damaged: it has the right size, but not what was written"
    return None


def find_checkpoint(processes: Processes, config: TrainConfig) -> tuple[Path, dict] | None:
    """
    The checkpoint that the config asks for and what its state file says, or `None` to begin at 0.

    With `"latest"`, a damaged checkpoint is named in a warning and the one before is taken.

    Raises:
        ValueError: If the folder is no checkpoint, is damaged, or lies beyond `max_steps`; if all are damaged; without
            `resume_from_checkpoint`, if `output_dir` has a run already.
    """
    checkpoints = list_checkpoints(config.output_dir)
    final = Path(config.output_dir) / FINAL
    if config.resume_from_checkpoint is None:
        if checkpoints or final.exists():
            what = checkpoints[-1].name if checkpoints else f"{FINAL}/"
            raise ValueError(
                f"`output_dir` {config.output_dir} has a run already ({what}). Go on with it by "
                "--resume_from_checkpoint latest, or choose another folder."
            )
        return None
    if config.resume_from_checkpoint != "latest":
        folder = Path(config.resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be 'latest' or a checkpoint folder, but {folder} has no {STATE_FILE}."
            )
        try:
            return folder, _within(config, folder, read_state(folder, processes))
        except DamagedCheckpoint as error:
            raise ValueError(f"`resume_from_checkpoint`: {error}. Take another checkpoint, or 'latest'.") from error
    damages = []
    for folder in reversed(checkpoints):
        try:
            content = read_state(folder, processes)
        except DamagedCheckpoint as error:
            damages.append(str(error))
            if processes.is_main:
                logger.warning("%s; the checkpoint before it is taken.", error)
            continue
        return folder, _within(config, folder, content)
    if damages:
        raise ValueError(f"`resume_from_checkpoint`: no checkpoint is whole. {'; '.join(damages)}.")
    if final.exists():
        step = read_run(config.output_dir).get("final_step")
        raise ValueError(
            f"`output_dir` {config.output_dir} has a final model{f' of {step} steps' if step else ''}, but no "
            "checkpoint to go on from. Choose another folder, and start from that model by `--init_from`."
        )
    return None


def _within(config: TrainConfig, folder: Path, content: dict) -> dict:
    if content["step"] > config.max_steps:
        raise ValueError(f"`max_steps` is {config.max_steps}, but {folder} has {content['step']} steps already.")
    return content


# Loading -------------------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path, content: dict, state: TrainingState) -> list[str]:
    """
    Put a checkpoint into the state of a run, whatever the number of processes was that wrote it.

    Args:
        folder (`Path`): The checkpoint.
        content (`dict`): What [`read_state`] returned of it.
        state ([`TrainingState`]): Whose tensors are overwritten; every process calls this with its own.

    Returns:
        `list[str]`: What the checkpoint does not hold, a sentence each, and what was done instead.

    Raises:
        ValueError: If the model's tensors have other names or shapes than the checkpoint's.
    """
    reader = dcp.FileSystemReader(folder)
    saved = {name: tuple(value.size) for name, value in reader.read_metadata().state_dict_metadata.items()}
    notes = []
    wanted = {f"model.{name}": value for name, value in model_tensors(state.model).items()}
    for name, value in wanted.items():
        if saved.get(name) != tuple(value.shape):
            raise ValueError(
                f"{folder} is of another model: `{name.partition('.')[2]}` has shape {saved.get(name)} there, and "
                f"{tuple(value.shape)} here. Resume with the model options of the run."
            )
    missing = state.optimizers.prepare([name.partition(".")[2] for name in saved if name.startswith("optimizer.")])
    moments = state.optimizers.tensors()
    wanted.update({f"optimizer.{name}": value for name, value in moments.items()})
    if missing:
        notes.append(f"The checkpoint has no moments of {missing} of the weights; theirs begin at zero.")
    if state.average is not None:
        averages = {f"average.{name}": value for name, value in state.average.tensors.items()}
        if averages.keys() <= saved.keys():
            wanted.update(averages)
        else:
            notes.append("The checkpoint has no average of the weights; it begins with the weights of now.")
    with _quiet(), _plain_exceptions(), torch.no_grad():
        dcp.load(wanted, storage_reader=reader)
        state.optimizers.take(moments)
    if state.average is not None:
        if averages.keys() <= saved.keys():
            state.average.started = True
        else:
            state.average.restart(state.model)
    state.step, state.samples, state.numbers = content["step"], content["samples"], dict(content.get("numbers", {}))
    return notes


def changed_options(config: TrainConfig, before: dict) -> Iterator[str]:
    """A sentence for each option whose value is not that of the run that wrote the checkpoint, and what it does."""
    for item in fields(config):
        effect = item.metadata.get("resume", "the new value counts from the next step on")
        if effect == UNNOTICED:
            continue
        now = getattr(config, item.name)
        now = list(now) if isinstance(now, tuple) else now
        if item.name not in before:
            if now != item.default:
                yield f"`{item.name}` is {now!r}, and was not an option before: {effect}."
        elif before[item.name] != now:
            yield f"`{item.name}` was {before[item.name]!r} and is {now!r}: {effect}."


class Clock:
    """
    Says when a checkpoint is due by time, and when the time of the run is over.

    A process asks its own clock; what it says goes to all others with what they tell each other at each step.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.start = self.last_save = time.monotonic()

    def checkpoint_due(self) -> bool:
        """Whether `checkpoint_every_minutes` have passed since the last one."""
        return self._passed(self.last_save, self.config.checkpoint_every_minutes)

    def saved(self) -> None:
        """Count the minutes anew: a checkpoint was saved."""
        self.last_save = time.monotonic()

    def time_is_over(self) -> bool:
        """Whether `max_minutes` have passed since this start."""
        return self._passed(self.start, self.config.max_minutes)

    @staticmethod
    def _passed(since, minutes):
        return bool(minutes) and time.monotonic() - since >= 60 * minutes
