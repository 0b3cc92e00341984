"""
Would the parity suite notice an error? Makes deliberate one-line errors, one at a time, and expects each to be caught.

    python tests/mutations/run_mutations.py                # all of them; one line for each, then a JSON line
    python tests/mutations/run_mutations.py --only window  # those whose description has the word

Every error is made in a temporary copy of the package; the checkout stays as it is. Each trial is a fork of a process
that has imported torch already (so this does not run on Windows) and ends at the first test that notices. The copy
has no compiled kernels: their errors are not lines of Python, and tests of their own compare them with the reference.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "cogview_pipelines"


@dataclass(frozen=True)
class Mutation:
    """
    One error.

    Args:
        what (`str`): In words.
        file (`str`): Path in the package.
        old, new (`str`): `old` stands there exactly once, on one line.
        first (`str`): The test file that should notice; it runs first, the rest of the suite after it.
    """

    what: str
    file: str
    old: str
    new: str
    first: str


SEQUENCES, COGLM = "models/cogview2/sequences.py", "models/cogview2/modeling_coglm.py"
LAYERS, CANVAS = "models/layers.py", "models/cogview2/modeling_coglm_canvas.py"
TOKEN_SEQUENCE, SAMPLES = "generation/token_sequence.py", "training/samples_cogview2.py"
LOPAR, ATTENTION, SAMPLING = "schedulers/scheduling_lopar.py", "ops/local_attention.py", "generation/sampling.py"
VQ = "models/image_tokenizers/modeling_icetk_vq.py"
GEOMETRY, LAYOUT = "pipelines/cogview2/completion_geometry.py", "conversion/cogview2/layout.py"

MUTATIONS = [
    # positions
    Mutation(
        "position: image tokens start at that of <start_of_image>",
        SEQUENCES,
        "return self.image_position + 1 + torch.arange(self.image_length)",
        "return self.image_position + torch.arange(self.image_length)",
        "test_text_to_image",
    ),
    Mutation(
        "position: <start_of_image> one further",
        SEQUENCES,
        "torch.full((batch_size, 1), layout.image_position)",
        "torch.full((batch_size, 1), layout.image_position + 1)",
        "test_text_to_image",
    ),
    Mutation(
        "position: text counts from one",
        TOKEN_SEQUENCE,
        "(mask.long().cumsum(-1) - 1).clamp(min=0)",
        "mask.long().cumsum(-1)",
        "test_text_to_image",
    ),
    Mutation(
        "position: captions count from one",
        SEQUENCES,
        "torch.arange(ids.shape[1]).expand(batch_size, -1)",
        "torch.arange(1, ids.shape[1] + 1).expand(batch_size, -1)",
        "test_text_to_image",
    ),
    Mutation(
        "position: canvas cells without positions",
        CANVAS,
        "self.dropout(self.word_embeddings(canvas_ids) + positions)",
        "self.dropout(self.word_embeddings(canvas_ids))",
        "test_super_resolution",
    ),
    # masks and orders
    Mutation(
        "mask: text is causal",
        SEQUENCES,
        "isolate_padding(prefix_causal_mask(text, ~padding & ~text), padding)",
        "isolate_padding(prefix_causal_mask(text & False, ~padding), padding)",
        "test_text_to_image",
    ),
    Mutation(
        "mask: tokens do not see themselves",
        TOKEN_SEQUENCE,
        "torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril()",
        "torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril(-1)",
        "test_text_to_image",
    ),
    Mutation(
        "mask: captions see their future",
        SEQUENCES,
        "isolate_padding(prefix_causal_mask(image, text), padding)",
        "isolate_padding(prefix_causal_mask(image | text, text), padding)",
        "test_text_to_image",
    ),
    Mutation(
        "mask: low-resolution tokens see the padding",
        SEQUENCES,
        "mask = text[:, None, :] | (image[:, :, None] & image[:, None, :])",
        "mask = (text | padding)[:, None, :] | (image[:, :, None] & image[:, None, :])",
        "test_super_resolution",
    ),
    Mutation(
        "mask: the canvas sees padded text slots",
        CANVAS,
        '~context.key_mask, float("-inf")',
        '~context.key_mask, float("0")',
        "test_super_resolution",
    ),
    Mutation(
        "mask: completion context is causal",
        SEQUENCES,
        "context_mask[:, before:] = extend_mask(start.key_mask, len(known), True)[:, None]",
        "context_mask[:, before:] = extend_mask(start.key_mask, len(known), False)[:, None]",
        "test_completion",
    ),
    Mutation(
        "order: holes follow their right neighbours",
        SEQUENCES,
        "left_of_hole[:, :-1] = mask[:, 1:] & ~mask[:, :-1]",
        "left_of_hole[:, 1:] = mask[:, :-1] & ~mask[:, 1:]",
        "test_completion",
    ),
    Mutation(
        "order: iterative super-resolution reads the end of the text",
        SEQUENCES,
        "list(text)[:num_text_slots]",
        "list(text)[-num_text_slots:]",
        "test_super_resolution",
    ),
    # the bias
    Mutation(
        "bias: on everything but the text",
        LAYERS,
        "(text_mask * text_attention_bias)[:, None, None]",
        "(~text_mask * text_attention_bias)[:, None, None]",
        "test_text_to_image",
    ),
    Mutation(
        "bias: forgotten after the prompt",
        "generation/decoders.py",
        "attention_bias(context.key_mask[:, None], context.text_mask, text_attention_bias, cache.dtype)",
        "attention_bias(context.key_mask[:, None], context.text_mask, 0.0, cache.dtype)",
        "test_text_to_image",
    ),
    # the transformer
    Mutation(
        "norms: after the residual addition",
        LAYERS,
        "hidden_states + self.attention_output_layernorm(self.dropout(attended))",
        "self.attention_output_layernorm(hidden_states + self.dropout(attended))",
        "test_text_to_image",
    ),
    Mutation(
        "norms: none before the feed-forward layer",
        LAYERS,
        "self.mlp(self.mlp_layernorm(hidden_states))",
        "self.mlp(hidden_states)",
        "test_text_to_image",
    ),
    Mutation(
        "norms: the fourth in the place of the third",
        LAYERS,
        "self.attention_output_layernorm(self.dropout(attended))",
        "self.mlp_output_layernorm(self.dropout(attended))",
        "test_text_to_image",
    ),
    Mutation(
        "norms: a larger epsilon",
        COGLM,
        "layer_norm_eps: float = 1e-5,",
        "layer_norm_eps: float = 1e-3,",
        "test_text_to_image",
    ),
    Mutation(
        "activation: exact GELU",
        "ops/gelu.py",
        'approximate="tanh"',
        'approximate="none"',
        "test_text_to_image",
    ),
    Mutation(
        "heads: query, key and value of each head side by side",
        LAYERS,
        "unflatten(-1, (3, self.num_heads, -1))",
        "unflatten(-1, (self.num_heads, 3, -1)).transpose(2, 3)",
        "test_text_to_image",
    ),
    Mutation(
        "projections: the canvas uses the layer's own",
        CANVAS,
        'self.canvas_attention if self.config.super_resolution == "direct" else self.attention',
        "self.attention",
        "test_super_resolution",
    ),
    # windows
    Mutation(
        "window: five rows by nine columns",
        CANVAS,
        "kernel_size: Sequence[int] = (9, 5),",
        "kernel_size: Sequence[int] = (5, 9),",
        "test_super_resolution",
    ),
    Mutation(
        "window: three by three on the low-resolution tokens",
        CANVAS,
        "cross_kernel_size: Sequence[int] = (5, 5),",
        "cross_kernel_size: Sequence[int] = (3, 3),",
        "test_super_resolution",
    ),
    Mutation(
        "window: centred one row too far down",
        ATTENTION,
        "center_row = query_row // (query_grid[0] // key_grid[0])",
        "center_row = 1 + query_row // (query_grid[0] // key_grid[0])",
        "test_local_attention",
    ),
    Mutation(
        "window: one column short",
        ATTENTION,
        "(key_column - center_column).abs() <= kernel_size[1] // 2",
        "(key_column - center_column).abs() < kernel_size[1] // 2",
        "test_local_attention",
    ),
    Mutation(
        "window: keys outside the grid count as zeros",
        ATTENTION,
        "return inside & near",
        "return near",
        "test_local_attention",
    ),
    # the schedule
    Mutation(
        "schedule: one cell of the grid differs",
        LOPAR,
        "(2, 3, 4, 5, -1, 1),",
        "(2, 3, 4, 5, -1, 2),",
        "test_super_resolution",
    ),
    Mutation(
        "schedule: the unused first top-k is used",
        LOPAR,
        "RELEASED_TOP_K = (40, 40, 40, 20, 20, 10)",
        "RELEASED_TOP_K = (60, 40, 40, 40, 20, 20)",
        "test_super_resolution",
    ),
    Mutation(
        "schedule: cells of a pass are visible in it",
        LOPAR,
        "return self.step_map(height, width) >= timestep",
        "return self.step_map(height, width) > timestep",
        "test_super_resolution",
    ),
    # sampling
    Mutation(
        "sampling: the temperature inside clusters changes their masses",
        SAMPLING,
        "masses, clusters = cluster_masses(logits.softmax(-1),",
        "masses, clusters = cluster_masses((logits / cluster_temperature).softmax(-1),",
        "test_sampling",
    ),
    Mutation(
        "sampling: the first temperature is lost inside clusters",
        SAMPLING,
        "inside = (logits / cluster_temperature)",
        "inside = (logits * temperature / cluster_temperature)",
        "test_sampling",
    ),
    # the image tokenizer
    Mutation(
        "image tokenizer: zeros at the left and the top",
        VQ,
        "F.pad(hidden_states, (0, 1, 0, 1))",
        "F.pad(hidden_states, (1, 0, 1, 0))",
        "test_image_tokenizer",
    ),
    Mutation(
        "image tokenizer: decoders in the opposite order",
        LAYOUT,
        '_DECODER_RATES = {"0": "16", "1": "8", "2": "4"}',
        '_DECODER_RATES = {"0": "4", "1": "8", "2": "16"}',
        "test_image_tokenizer",
    ),
    # training samples
    Mutation(
        "training: the last column of a patch is predicted from outside",
        SAMPLES,
        "predicts[patch_rows, corner_column : corner_column + patch_size - 1] = True",
        "predicts[patch_rows, corner_column : corner_column + patch_size] = True",
        "test_training_samples",
    ),
    Mutation(
        "training: the token after a span is open",
        SAMPLES,
        "before = start + length + 1",
        "before = start + length",
        "test_training_samples",
    ),
    # pictures
    Mutation(
        "completion: crops with less around the mask",
        GEOMETRY,
        "MASK_SHARE = 14 / 20",
        "MASK_SHARE = 15 / 20",
        "test_completion",
    ),
]


def check_places() -> None:
    """Every mutation must have exactly one place; a source line that was rewritten needs its mutation rewritten."""
    lost = []
    for mutation in MUTATIONS:
        count = (PACKAGE / mutation.file).read_text("utf-8").count(mutation.old)
        if count != 1:
            lost.append(f"{mutation.what}: {mutation.old!r} stands {count} times in {mutation.file}")
    if lost:
        sys.exit("These mutations have no place:\n  " + "\n  ".join(lost))


def preload() -> None:
    """Import what is slow and not under test, once: every trial is a fork of this process."""
    for name in ("numpy", "sentencepiece", "torch", "transformers", "diffusers", "pytest"):
        importlib.import_module(name)
    from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin  # noqa: F401 - resolves lazy modules
    from transformers import PreTrainedModel, PreTrainedTokenizer  # noqa: F401


class FirstFailure:
    """A pytest plugin that remembers which test noticed."""

    def __init__(self):
        self.name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid.split("::")[-1]

    def pytest_collectreport(self, report):
        if report.failed and not self.name:
            self.name = f"{report.nodeid} cannot be imported"


def run_suite(source: Path, first: str | None) -> tuple[bool, str]:
    """Whether the parity suite passes on the package in `source`, and the first test that fails; ends at that one."""
    import pytest

    sys.path.insert(0, str(source))
    sys.dont_write_bytecode = True
    assert not any(name.split(".")[0] == PACKAGE.name for name in sys.modules), "the package is loaded already"
    folder = ROOT / "tests" / "parity" / "cogview2"
    targets = [str(folder / f"{first}.py")] if first else []
    # the release's own numbers only: bounds on bfloat16 would notice much, but say little
    skipped = (f"{first}.py", "test_bfloat16.py")
    targets += [str(path) for path in sorted(folder.glob("test_*.py")) if path.name not in skipped]
    failure = FirstFailure()
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *targets], plugins=[failure])
    import cogview_pipelines

    assert Path(cogview_pipelines.__file__).is_relative_to(source), "another copy of the package was tested"
    return status == 0, failure.name


def try_mutation(package: Path, mutation: Mutation | None) -> tuple[bool, str]:
    """
    Run the suite on a copy of the package with one error in it (or none), in a process of its own; whether it passed.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        source = Path(folder)
        shutil.copytree(package, source / PACKAGE.name)
        if mutation is not None:
            path = source / PACKAGE.name / mutation.file
            path.write_text(path.read_text("utf-8").replace(mutation.old, mutation.new), "utf-8")
        child = os.fork()
        if child == 0:
            try:
                log = os.open(source / "log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                result = run_suite(source, mutation.first if mutation else None)
                (source / "result.json").write_text(json.dumps(result))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        if not (source / "result.json").is_file():
            sys.exit(f"A trial ended without a result:\n{(source / 'log').read_text()[-2000:]}")
        return tuple(json.loads((source / "result.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Only errors whose description has this word.")
    parser.add_argument("--list", action="store_true", help="Name the errors and stop.")
    args = parser.parse_args()
    check_places()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.what]
    if args.list:
        print("\n".join(mutation.what for mutation in chosen))
        return 0
    start = time.monotonic()
    preload()
    survivors = []
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        package = Path(folder) / PACKAGE.name  # as it is now, whoever edits it meanwhile
        shutil.copytree(
            PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "cogview2-emoji", "*.webp", "*.so")
        )
        passes, failure = try_mutation(package, None)
        if not passes:
            sys.exit(f"The suite fails without any error: {failure}")
        for mutation in chosen:
            passes, failure = try_mutation(package, mutation)
            print(f"SURVIVED  {mutation.what}" if passes else f"caught    {mutation.what}  ({failure})", flush=True)
            if passes:
                survivors.append(mutation.what)
    seconds = round(time.monotonic() - start)
    print(json.dumps({"mutations": len(chosen), "caught": len(chosen) - len(survivors), "seconds": seconds}))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
