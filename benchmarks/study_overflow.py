"""
What keeps a deep transformer in float16 from overflowing: the toy experiment of figure 4 of CogView's paper. Sandwich
or Pre-LN, with and without precision bottleneck relaxation; which of the four overflows, where, and when.

    python benchmarks/study_overflow.py --output_dir runs/overflow                       # 64 layers, 64 wide: minutes
    python benchmarks/study_overflow.py --output_dir runs/overflow --device cuda --hidden_size 1024 --steps 2000

Everything is computed in float16, scores of attention included; float32 copies of the weights get the updates. Without
relaxation, scores are not divided before their largest value is taken away (`pb_relaxation_alpha=1`), and norms are
ordinary (`norm_scale=None`). Drawings of the demo, as tokens of the shipped model, are the data. A combination ends
when something in its forward pass is not finite, or its gradients are in `--patience` steps one after another.

Prints a table (to stderr) and one JSON line, and draws `overflow.svg` (the losses).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from cogview_pipelines import CogViewConfig, CogViewModel, CogViewTokenizer, IcetkVQModel
from cogview_pipelines.demo import Scope, captions, render, sample_scenes
from cogview_pipelines.environment import SHIPPED_MODEL, stamp
from cogview_pipelines.generation.token_sequence import IGNORED_LABEL
from cogview_pipelines.plots.drawing import draw, save
from cogview_pipelines.plots.series import Curve, Panel
from cogview_pipelines.training.data.draws import seeded_generator
from cogview_pipelines.training.data.pictures import to_bytes
from cogview_pipelines.training.samples_cogview import make_inputs_and_labels, position_ids, text_and_picture

RELAXED = {"norm_scale": "sequence", "pb_relaxation_alpha": 32.0}
PLAIN = {"norm_scale": None, "pb_relaxation_alpha": 1.0}
COMBINATIONS = {
    "sandwich, relaxed": {"layer_norm_order": "sandwich", **RELAXED},
    "sandwich, plain": {"layer_norm_order": "sandwich", **PLAIN},
    "pre, relaxed": {"layer_norm_order": "pre", **RELAXED},
    "pre, plain": {"layer_norm_order": "pre", **PLAIN},
}
LARGEST_SCALE, LEAST_SCALE = 2.0**16, 2.0**-10


class Watch:
    """Largest absolute values of the outputs of modules, and the first of them that was not finite."""

    def __init__(self, model: torch.nn.Module):
        self.largest: dict[str, float] = {}
        self.overflow: str | None = None
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.nn.ModuleList):
                module.register_forward_hook(lambda _, inputs, output, name=name: self._look(name, output))

    def _look(self, name: str, output) -> None:
        if not torch.is_tensor(output):
            return
        largest = float(output.detach().abs().amax())
        if not largest < float("inf") and self.overflow is None:  # also false for nan
            self.overflow = name
        kind = name.rpartition(".")[2]
        kind = "layer" if kind.isdecimal() else kind
        self.largest[kind] = max(self.largest.get(kind, 0.0), largest)


def make_data(options: argparse.Namespace) -> tuple[list[list[int]], CogViewTokenizer, tuple[int, int]]:
    """Samples of text and picture, tokens as the shipped model has them."""
    vqvae = IcetkVQModel.from_pretrained(SHIPPED_MODEL / "vqvae", dtype=torch.float32).eval()
    tokenizer = CogViewTokenizer(SHIPPED_MODEL / "tokenizer" / "ice_text.model", vqvae.config.num_embeddings)
    scenes = sample_scenes(Scope.small(), options.num_scenes, options.seed, split_name="train")
    pixels = torch.stack([to_bytes(render(scene, 80)) for scene in scenes]).float() / 255
    with torch.no_grad():
        tokens = torch.cat([vqvae.encode(part, 8).tokens for part in pixels.split(32)])
    grid = tuple(tokens.shape[1:])
    layout = make_config(options, tokenizer, grid, {}).layout
    texts = [tokenizer.encode(captions(scene, "en")[0]) for scene in scenes]
    return (
        [text_and_picture(*pair, layout, "[BASE]") for pair in zip(texts, tokens.flatten(1).tolist())],
        tokenizer,
        grid,
    )


def make_config(options: argparse.Namespace, tokenizer, grid: tuple[int, int], changes: dict) -> CogViewConfig:
    positions = grid[0] * grid[1] + 3 + 40
    return CogViewConfig(
        vocab_size=len(tokenizer),
        num_image_tokens=tokenizer.num_image_tokens,
        command_token_id=tokenizer.command_token_id,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=positions,
        max_super_resolution_length=2 * positions,
        image_grid=grid,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **changes,
    )


def train(options: argparse.Namespace, samples: list[list[int]], config: CogViewConfig) -> dict:
    """Losses of a combination, step by step, and what overflowed."""
    torch.manual_seed(options.seed)
    model = CogViewModel(config).to(options.device)
    master = [parameter.detach().clone() for parameter in model.parameters()]
    model.half()
    watch = Watch(model)
    optimizer = torch.optim.AdamW(master, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scale, skipped, in_a_row, losses, overflow = LARGEST_SCALE, 0, 0, [], None
    length = max(map(len, samples)) - 1
    for step in range(options.steps):
        generator = seeded_generator(options.seed, "step", step)
        chosen = torch.randint(len(samples), (options.batch_size,), generator=generator).tolist()
        input_ids, labels = make_inputs_and_labels([samples[index] for index in chosen], length, config.layout)
        positions = position_ids(input_ids, config.layout)
        inputs = [tensor.to(options.device) for tensor in (input_ids, positions, labels)]
        hidden = model(inputs[0], inputs[1], full_vocabulary=True).logits
        labelled = inputs[2] != IGNORED_LABEL
        loss = F.cross_entropy(hidden[labelled].float(), inputs[2][labelled])
        if watch.overflow is not None or not loss.isfinite():
            overflow = {"step": step, "where": watch.overflow or "loss", "what": "forward pass"}
            break
        losses.append((step, loss.item()))
        model.zero_grad(set_to_none=True)
        (loss * scale).backward()
        gradients = [parameter.grad.float() / scale for parameter in model.parameters()]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients]))
        if not norm.isfinite():
            skipped, in_a_row, scale = skipped + 1, in_a_row + 1, max(scale / 2, LEAST_SCALE)
            if in_a_row >= options.patience:
                overflow = {"step": step, "where": "gradients", "what": f"at a loss scale of {scale:g}"}
                break
            continue
        in_a_row = 0
        for own, gradient in zip(master, gradients):
            own.grad = gradient * min(1.0, options.max_grad_norm / (float(norm) + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup_steps))
        optimizer.step()
        with torch.no_grad():
            for parameter, own in zip(model.parameters(), master):
                parameter.copy_(own)
    return {
        "steps": len(losses),
        "last_loss": round(sum(loss for _, loss in losses[-10:]) / max(1, len(losses[-10:])), 4) if losses else None,
        "skipped_steps": skipped,
        "overflow": overflow,
        "largest": {name: round(value, 1) for name, value in sorted(watch.largest.items())},
        "losses": losses,
    }


def table(results: dict[str, dict]) -> str:
    """The results for people."""
    rows = [("combination", "steps", "last loss", "skipped", "largest state", "overflow")]
    for name, result in results.items():
        overflow = result["overflow"]
        said = "none" if overflow is None else f"step {overflow['step']}, {overflow['where']}"
        largest = result["largest"].get("layer", 0.0)
        rows.append((name, *map(str, (result["steps"], result["last_loss"], result["skipped_steps"], largest)), said))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of the plot")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_layers", type=int, default=64)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="large on purpose")
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--num_scenes", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    samples, tokenizer, grid = make_data(options)
    results = {
        name: train(options, samples, make_config(options, tokenizer, grid, changes))
        for name, changes in COMBINATIONS.items()
    }
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    nothing = [(0.0, math.nan)]  # of a run that overflowed at once: it stands in the legend only
    curves = [Curve(name, result.pop("losses") or nothing) for name, result in results.items()]
    save(draw([Panel("loss in float16", "steps", curves)]), folder / "overflow.svg")
    print(table(results), file=sys.stderr, flush=True)
    print(json.dumps({"results": results, "options": vars(options), **stamp(options.device)}), flush=True)
    return results


if __name__ == "__main__":
    main()
