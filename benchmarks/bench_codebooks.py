"""
The four ways to learn the codes of CogView's image tokenizer, as in figure 2 of its paper: loss curves of the same
network on the same pictures with the same seed.

    python benchmarks/bench_codebooks.py --output_dir runs/codebooks                  # emoji scenes, half an hour
    python benchmarks/bench_codebooks.py --output_dir runs/codebooks --max_steps 20   # to try it out

Each way is a run of `training_scripts/train_vq_model.py` in its own folder, which goes on where it was stopped. Prints
one JSON line: the last losses (mean over the last tenth of the run), codes in use, the loss of the worst over that of
the best, and of the worst that learns its codes over the best; and draws `codebooks.svg`.
"""

import argparse
import importlib.util
import json
from pathlib import Path

from cogview_pipelines.environment import stamp
from cogview_pipelines.models.image_tokenizers.modeling_cogview_vq import CODEBOOK_TRAINING
from cogview_pipelines.plots.drawing import draw, save
from cogview_pipelines.plots.series import Curve, Panel

SCRIPT = Path(__file__).parents[1] / "training_scripts" / "train_vq_model.py"
MODEL = {"num_embeddings": 512, "embedding_dim": 32, "hidden_channels": 64}
SMOOTHED = 25  # points of a curve


def load_script():
    """`train_vq_model.py` as a module."""
    spec = importlib.util.spec_from_file_location("train_vq_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(script, method: str, options: argparse.Namespace) -> list[dict]:
    """The lines of the metrics of a run."""
    folder = Path(options.output_dir) / method
    arguments = {
        "family": "cogview",
        "codebook_training": method,
        "model": json.dumps({**MODEL, **json.loads(options.model)}),
        "output_dir": folder,
        "num_scenes": options.num_scenes,
        "max_steps": options.max_steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "warmup_steps": options.max_steps // 20,
        "seed": options.seed,
        "crop_size": options.crop_size,
        "log_every_steps": max(1, options.max_steps // 100),
        "sample_every_steps": 0,
        "checkpoint_every_steps": 0,
        "resume_from_checkpoint": "latest",
    }
    flat = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    script.main([*flat, "--resolutions", *map(str, options.resolutions)])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last_mean(lines: list[dict], name: str) -> float:
    """The mean of a metric over the last tenth of a run."""
    values = [line[name] for line in lines]
    own = values[-max(1, len(values) // 10) :]
    return sum(own) / len(own)


def summarise(runs: dict[str, list[dict]]) -> dict:
    """What is said of the runs: the last losses, and how far they are apart."""
    losses = {method: last_mean(lines, "reconstruction_loss") for method, lines in runs.items()}
    learnt = [loss for method, loss in losses.items() if method != "fixed"]
    return {
        "last_reconstruction_loss": {method: round(loss, 5) for method, loss in losses.items()},
        "codes_in_use": {method: round(last_mean(lines, "codes_in_use"), 1) for method, lines in runs.items()},
        "worst_over_best": round(max(losses.values()) / min(losses.values()), 3),
        "worst_over_best_of_learnt": round(max(learnt) / min(learnt), 3) if learnt else None,
    }


def smoothed(lines: list[dict]) -> list[tuple[float, float]]:
    """Step and loss, neighbouring lines averaged."""
    size = max(1, len(lines) // SMOOTHED)
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [(group[-1]["step"], sum(line["reconstruction_loss"] for line in group) / len(group)) for group in groups]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of the runs and the plot")
    parser.add_argument("--methods", nargs="*", default=list(CODEBOOK_TRAINING), choices=CODEBOOK_TRAINING)
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_scenes", type=int, default=600)
    parser.add_argument("--resolutions", type=int, nargs="*", default=[80])
    parser.add_argument("--crop_size", type=int, default=40)
    parser.add_argument("--model", default="{}", help="JSON: further options of CogViewVQConfig")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    script = load_script()
    runs = {method: train(script, method, options) for method in options.methods}
    curves = [Curve(method, smoothed(lines)) for method, lines in runs.items()]
    save(draw([Panel("reconstruction loss", "steps", curves)]), Path(options.output_dir) / "codebooks.svg")
    line = {**summarise(runs), "max_steps": options.max_steps, "seed": options.seed, **stamp("cpu")}
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
