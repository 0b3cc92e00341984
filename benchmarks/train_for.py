#!/usr/bin/env python
"""
Train for a given time: how many steps a machine can do is measured there, not guessed before.

    python benchmarks/train_for.py steady --minutes 5 train_coglm --config CONFIG.yaml --output_dir runs/coglm
    python benchmarks/train_for.py cooldown --minutes 3 train_coglm --config CONFIG.yaml --output_dir runs/coglm

`steady` runs a training script at a constant learning rate, stops after the minutes (loading comes on top) and notes
the speed in `pace.json`. `cooldown` goes on with as many steps as the minutes are good for at this speed, in which the
learning rate falls to zero, and leaves `final/`. Both go on from the last checkpoint; `cooldown` keeps its number of
steps when it is run again, and does nothing once there is a final model. What follows the script's name is passed on.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from cogview_pipelines.training.checkpoints import list_checkpoints

SCRIPTS = Path(__file__).resolve().parents[1] / "training_scripts"
ENDLESS = 10_000_000  # steps, more than any time is enough for


def run(script: str, options: list[str]) -> None:
    """Run a training script in this process."""
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module  # its dataclasses travel to other processes by this name
    spec.loader.exec_module(module)
    module.main([*options, "--resume_from_checkpoint", "latest"])


def steps_done(folder: Path) -> int:
    """Steps of the last checkpoint."""
    checkpoints = list_checkpoints(folder)
    return int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0


def steady(script: str, options: list[str], folder: Path, minutes: float) -> None:
    """Train at a constant rate, and note the steps a minute."""
    before = steps_done(folder)
    endless = ["--max_steps", str(ENDLESS), "--decay_steps", "0"]
    run(script, [*options, *endless, "--max_minutes", str(minutes)])
    pace = {"steps_per_minute": (steps_done(folder) - before) / minutes}
    (folder / "pace.json").write_text(json.dumps(pace) + "\n", encoding="utf-8")


def cooldown(script: str, options: list[str], folder: Path, minutes: float) -> None:
    """Let the rate fall to zero over the steps that the minutes are good for."""
    pace_file = folder / "pace.json"
    if not pace_file.is_file():
        raise SystemExit(f"{pace_file} is missing: `steady` leaves it.")
    pace = json.loads(pace_file.read_text(encoding="utf-8"))
    if "decay_steps" not in pace:
        pace["decay_steps"] = max(1, round(minutes * pace["steps_per_minute"]))
        pace["max_steps"] = steps_done(folder) + pace["decay_steps"]
        pace_file.write_text(json.dumps(pace) + "\n", encoding="utf-8")
    run(script, [*options, "--max_steps", str(pace["max_steps"]), "--decay_steps", str(pace["decay_steps"])])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("part", choices=("steady", "cooldown"))
    parser.add_argument("--minutes", type=float, required=True, help="of training, without loading")
    parser.add_argument("script", help="such as train_coglm")
    parser.add_argument("--output_dir", required=True, help="of the script, which gets it too")
    options, passed_on = parser.parse_known_args(arguments)
    folder = Path(options.output_dir)
    if (folder / "final" / "config.json").is_file():
        print(f"{folder}/final is there already.")
        return
    part = {"steady": steady, "cooldown": cooldown}[options.part]
    part(options.script, ["--output_dir", options.output_dir, *passed_on], folder, options.minutes)


if __name__ == "__main__":
    main()
