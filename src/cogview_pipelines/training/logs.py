"""What a run tells while it trains: metrics.jsonl, a progress bar, a tracker, sample pictures."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from .arguments import TrainConfig


class MetricsLog:
    """
    Averages what the steps report; every `log_every_steps` a line goes to `metrics.jsonl`, progress bar and tracker.

    Lines after `start_step`, left by a run that was interrupted after its last checkpoint, are dropped.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, start_step: int = 0):
        self.accelerator, self.config = accelerator, config
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.bar = tqdm(
            total=config.max_steps, initial=start_step, disable=not accelerator.is_main_process, unit="step"
        )
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(encoding="utf-8").splitlines() if start_step and self.path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= start_step]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        if config.log_with is not None:
            simple = {
                key: value for key, value in asdict(config).items() if isinstance(value, (str, int, float, bool))
            }
            accelerator.init_trackers("cogview_pipelines", config=simple)
        self._reset()

    def _reset(self):
        self.sums, self.counts, self.num_samples, self.time = {}, {}, 0, time.monotonic()

    def add(self, num_samples: int, **values: torch.Tensor | float):
        """Report one forward pass: its samples on this process and any scalars."""
        self.num_samples += num_samples
        for name, value in values.items():
            value = value.detach().float() if torch.is_tensor(value) else torch.tensor(float(value))
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def end_step(self, step: int, learning_rate: float):
        """Call after each update with the number of updates so far."""
        self.bar.update(1)
        if step % self.config.log_every_steps and step != self.config.max_steps:
            return
        seconds = max(time.monotonic() - self.time, 1e-9)
        line = {"step": step}
        for name, value in self.sums.items():
            mean = self.accelerator.reduce(value.to(self.accelerator.device) / self.counts[name], reduction="mean")
            line[name] = float(mean)
        line["learning_rate"] = learning_rate
        line["samples_per_second"] = round(self.num_samples * self.accelerator.num_processes / seconds, 2)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in line.items() if name not in ("step",)})
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        self._reset()

    def close(self):
        self.bar.close()
        self.accelerator.end_training()


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
