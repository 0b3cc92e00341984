"""What a run tells while it trains: metrics.jsonl, a progress bar, a tracker, sample pictures."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from ..json_lines import dump_line, read_whole_rows, write_lines
from .arguments import TrainConfig
from .processes import Processes
from .run_folder import replacing

Number: TypeAlias = torch.Tensor | float


class MetricsLog:
    """
    Averages what the steps report; every `log_every_steps` a line goes to `metrics.jsonl`, progress bar and tracker.

    Lines after `start_step`, left by a run that was interrupted after its last checkpoint, are dropped.
    """

    def __init__(self, accelerator: Accelerator, processes: Processes, config: TrainConfig, start_step: int = 0):
        self.accelerator, self.processes, self.config = accelerator, processes, config
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.bar = tqdm(total=config.max_steps, initial=start_step, disable=not processes.is_main, unit="step")
        self.is_empty = True  # of lines; known where they are written
        if processes.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = kept_lines(self.path, start_step)
            self.is_empty = not kept
            with replacing(self.path) as partial:
                partial.write_text("".join(map(dump_line, kept)), encoding="utf-8")
        if config.log_with is not None:
            simple = {
                key: value for key, value in asdict(config).items() if isinstance(value, (str, int, float, bool))
            }
            accelerator.init_trackers("cogview_pipelines", config=simple)
        self._reset()

    def _reset(self):
        self.sums, self.num_samples, self.skipped, self.time = {}, 0, 0, time.monotonic()
        self.notes: dict[str, float] = {}

    def add(self, num_samples: int, **values: tuple[Number, Number]):
        """Report one forward pass: its samples on this process, and sum and count of each scalar that is averaged."""
        self.num_samples += num_samples
        for name, pair in values.items():
            total, count = (each.detach().double() if isinstance(each, torch.Tensor) else each for each in pair)
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + total, before[1] + count)

    def skip(self):
        """Report a step whose update was left out."""
        self.skipped += 1

    def note(self, **values: float):
        """Put numbers that are the same on all processes into the next line."""
        self.notes.update(values)

    def end_step(self, step: int, learning_rate: float):
        """Call after each update with the number of updates so far."""
        self.bar.update(1)
        if step % self.config.log_every_steps and step != self.config.max_steps:
            return
        seconds = max(time.monotonic() - self.time, 1e-9)
        local = [float(each) for pair in self.sums.values() for each in pair]
        *totals, samples = self.processes.sum([*local, self.num_samples])
        line: dict[str, float] = {"step": step}
        for name, total, count in zip(self.sums, totals[::2], totals[1::2]):
            if count:  # what no sample had, such as a caption, has no mean
                line[name] = total / count
        line |= self.notes
        line["learning_rate"] = learning_rate
        line["samples_per_second"] = round(samples / seconds, 2)
        if self.skipped:
            line["skipped_steps"] = self.skipped
        if self.processes.is_main:
            finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
            with self.path.open("a", encoding="utf-8") as file:
                write_lines(file, [finite])
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in line.items() if name != "step"})
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        self._reset()

    def close(self):
        self.bar.close()
        for tracker in self.accelerator.trackers:  # `end_training` would end the group of processes, too
            tracker.finish()


def kept_lines(path: Path, last_step: int) -> list[dict]:
    """The lines of a metrics file up to a step; one that is cut off or damaged, as a killed run leaves it, is not."""
    if not last_step or not path.is_file():
        return []
    return [row for row in read_whole_rows(path) if isinstance(row.get("step"), int) and row["step"] <= last_step]


def save_samples(
    images: torch.Tensor | list[Image.Image] | dict[str, torch.Tensor | list[Image.Image]],
    config: TrainConfig,
    step: int,
) -> None:
    """
    Save pictures as a grid, as square as possible, `samples/<step>.png` in the output folder.

    Args:
        images (`torch.Tensor` of shape `(num, 3, height, width)` in 0..1, or a list of PIL images):
            Equally large; or several such sets by name, each of which becomes `samples/<step>_<name>.png`.
        step (`int`): Updates so far.
    """
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for name, pictures in images.items() if isinstance(images, dict) else [("", images)]:
        _make_grid(pictures).save(folder / f"{step:07d}{'_' * bool(name)}{name}.png")


def _make_grid(images) -> Image.Image:
    if torch.is_tensor(images):
        arrays = (images.detach().float().clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
        images = [Image.fromarray(array) for array in arrays]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = Image.new("RGB", images[0].size, "white")
    return make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows=rows, cols=columns)
