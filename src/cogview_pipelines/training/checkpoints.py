"""Checkpoints: folders `checkpoint-<step>` that are either complete or absent."""

import json
import re
import shutil
import time
from pathlib import Path

from accelerate import Accelerator

from .arguments import TrainConfig

STATE_FILE = "trainer_state.json"


def save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int) -> Path:
    """
    Save all that Accelerate knows (models, optimizers, registered objects, random states) after `step` updates.

    Written under another name and renamed at the end; then old checkpoints are removed.

    Returns:
        `Path`: The folder `checkpoint-<step>` in `config.output_dir`.
    """
    folder = Path(config.output_dir) / f"checkpoint-{step}"
    partial = folder.with_name(f".partial-{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        if config.keep_checkpoints:
            # By age: after going back to an early checkpoint, the later ones of before are the old ones.
            others = [path for path in list_checkpoints(config.output_dir) if path != folder]
            by_age = [*sorted(others, key=lambda path: (path / STATE_FILE).stat().st_mtime_ns), folder]
            for old in by_age[: -config.keep_checkpoints]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def resume(accelerator: Accelerator, config: TrainConfig) -> int:
    """
    Load the checkpoint that the config asks for.

    Returns:
        `int`: The updates done so far, which is the next step; 0 without a checkpoint.

    Raises:
        ValueError: If the folder is no checkpoint, or lies beyond `max_steps`; without `resume_from_checkpoint`, if
            `output_dir` has checkpoints.
    """
    if config.resume_from_checkpoint is None:
        if checkpoints := list_checkpoints(config.output_dir):
            raise ValueError(
                f"`output_dir` {config.output_dir} has a run already ({checkpoints[-1].name}). Go on with it by "
                "--resume_from_checkpoint latest, or choose another folder."
            )
        return 0
    if config.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(config.output_dir)
        if not checkpoints:
            return 0
        folder = checkpoints[-1]
    else:
        folder = Path(config.resume_from_checkpoint)
    if not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"`resume_from_checkpoint` must be 'latest' or a checkpoint folder, but {folder} has no {STATE_FILE}."
        )
    step = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["step"]
    if step > config.max_steps:
        raise ValueError(f"`max_steps` is {config.max_steps}, but {folder} has {step} steps already.")
    accelerator.load_state(str(folder))
    return step


class Clock:
    """Says when a checkpoint is due and when the time of the run is over; the same on all processes."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig):
        self.accelerator, self.config = accelerator, config
        self.start = self.last_save = time.monotonic()

    def checkpoint_due(self, step: int) -> bool:
        """Whether to save after `step` updates, by steps or by minutes."""
        by_step = self.config.checkpoint_every_steps and step % self.config.checkpoint_every_steps == 0
        due = self._agree(self._passed(self.last_save, self.config.checkpoint_every_minutes)) or bool(by_step)
        if due:
            self.last_save = time.monotonic()
        return due

    def time_is_over(self) -> bool:
        """Whether `max_minutes` have passed since this start."""
        return self._agree(self._passed(self.start, self.config.max_minutes))

    @staticmethod
    def _passed(since, minutes):
        return bool(minutes) and time.monotonic() - since >= 60 * minutes

    def _agree(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        if flag:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
