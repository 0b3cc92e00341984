"""`cogview2 finetune`: pictures and captions to a model that knows them, over the training scripts."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer

from ..json_lines import dump_file
from .console import FAILURE, bad_input, expand, fail, failures, finite, first_line, say
from .families import pipeline_for
from .finetune_families import REPORT, Family, Stage, read_family
from .loading import MODEL_OPTION, find_model

INTERRUPTED = 75  # exit status of a script that can be resumed
PRECISIONS = ("no", "bf16", "fp16")
CONTENTS = ("captions_sha256", "num_pictures", "picture_bytes")  # of what was asked, what is in the files


# Peak learning rates by the width of the model, of all weights and of adapters: small models take larger steps.
SMALL = 1024
LEARNING_RATES = {"small": (5e-4, 5e-3), "large": (1e-5, 1e-4)}


def find_scripts() -> Path | None:
    """The folder of the training scripts: beside the package in a checkout, inside of it where it is installed."""
    places = [Path(__file__).resolve().parents[3], Path(__file__).resolve().parents[1]]
    return next(
        (place / "training_scripts" for place in places if (place / "training_scripts/train_coglm.py").is_file()), None
    )


def finetune(
    pictures: Path = typer.Argument(..., help="Folder of pictures."),
    captions: Path = typer.Option(
        None, help="JSONL file: file and captions of each picture.  [default: captions.jsonl in the folder]"
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the new model, or of the adapter."),
    model: str = MODEL_OPTION,
    stages: list[Stage] = typer.Option(
        None,
        "--stage",
        help="What to train; may be given several times: coglm, direct-sr, iterative-sr of a CogView2; base, "
        "super-resolution, caption of a CogView.  [default: all that the model has]",
    ),
    lora_rank: int = typer.Option(
        None, min=1, help="Train adapters (LoRA) of this rank; --output then is an adapter of all stages, no model."
    ),
    steps: int = typer.Option(300, min=1, help="Updates of the weights of each stage."),
    batch_size: int = typer.Option(16, min=1, help="Pictures in a forward pass, on each process."),
    learning_rate: float = typer.Option(
        None,
        min=0,
        callback=finite,
        help="Peak learning rate.  [default: by the size of the model, and whether weights or adapters]",
    ),
    held_out: float = typer.Option(
        0.1,
        min=0,
        max=0.9,
        callback=finite,
        help="Share of the pictures that is not trained on: their loss tells how well it goes.",
    ),
    noise: float = typer.Option(
        None,
        min=0,
        max=1,
        callback=finite,
        help="Share of image tokens that what draws reads wrong while it is trained, so that it goes by the text "
        "instead of knowing pictures by heart; held-out ones are read so, too.  [default: 0.5 for a small CogView2, "
        "else 0]",
    ),
    style_probability: float = typer.Option(
        None,
        min=0,
        max=1,
        callback=finite,
        help="Of a CogView: share of the pictures with a `style` whose text, for the base, names the style instead.",
    ),
    fit: str = typer.Option("crop", help="How pictures become squares: crop takes the middle, pad adds white."),
    skip_unreadable: bool = typer.Option(
        False,
        "--skip-unreadable",
        help="Leave out, with a warning, pictures that are missing or cannot be read.",
        show_default=False,
    ),
    mixed_precision: str = typer.Option(None, help="no, bf16 or fp16.  [default: bf16 on a GPU that has it, else no]"),
    gradient_checkpointing: bool = typer.Option(
        False,
        "--gradient-checkpointing",
        help="Compute layers again in the backward pass: takes less memory, and more time.",
        show_default=False,
    ),
    max_minutes: float = typer.Option(
        None,
        min=0,
        callback=finite,
        help="Stop training so many minutes after the command began; the same command goes on. Pictures become tokens "
        "whatever the time: it is looked at before each stage, and after each step of one.",
    ),
    launcher: str = typer.Option(
        shlex.quote(sys.executable),
        help='What starts the training scripts, such as "accelerate launch --num_processes 8".',
        show_default="this Python",
    ),
    work: Path = typer.Option(
        None, help="Folder for tokens and runs, which can be removed at the end.  [default: OUTPUT.work]"
    ),
    seed: int = typer.Option(0, min=0, help="Of what is held out, of samples and of sample pictures."),
) -> None:
    """
    Finetune a model on your pictures.

    A line of the captions is {"file": "cat.jpg", "en": "a cat", "zh": ["一只猫", "猫"]}, with either language or both.
    The steps are those of docs/training.md: pictures to tokens, training of each stage, one pipeline, and at the end
    the losses of held-out pictures and sample pictures. Run the same command again to go on where it was stopped, also
    among the pictures that were becoming tokens.

    \b
    Examples:
      cogview2 finetune PICTURES --output my_model
      cogview2 finetune PICTURES --lora-rank 8 --output my_style
      cogview2 finetune PICTURES --model cogview2 --steps 2000 --batch-size 8 --output my_model \\
          --launcher "accelerate launch --num_processes 8"
    """
    scripts = find_scripts()
    if scripts is None:
        fail("The training scripts are not here. Install the package from a checkout, or run this there.")
    if fit not in ("crop", "pad"):
        fail(f"`--fit` must be crop or pad, but is {fit}.")
    if mixed_precision not in (None, *PRECISIONS):
        fail(f"`--mixed-precision` must be {', '.join(PRECISIONS)}, but is {mixed_precision!r}.")
    pictures = expand(pictures, "PICTURES")
    captions = pictures / "captions.jsonl" if captions is None else expand(captions, "--captions")
    if not os.path.isdir(pictures):
        fail(f"There is no folder of pictures at {pictures}.")
    if not os.path.isfile(captions):
        fail(f'`--captions`: there is no file {captions}. A line of it is {{"file": "cat.jpg", "en": "a cat"}}.')
    output = expand(output, "--output")
    if output.name in ("", ".."):  # of the folder that we are in, and those around it
        output = Path(os.path.abspath(output))
    for option, path in (("--output", output), ("--work", work)):
        if path is not None and os.fsencode(path).decode("utf-8", "ignore") != os.fspath(path):
            fail(f"`{option}` must be a name in UTF-8, which {path} is not: weights cannot be written there.")
    if not output.name:
        fail(f"`--output` must be a folder of its own, but is {output}.")
    job = Job(
        scripts=scripts,
        launcher=_read_launcher(launcher),
        family=read_family(_on_this_machine(find_model(model))),
        output=output,
        work=output.with_name(f"{output.name}.work") if work is None else expand(work, "--work"),
        minutes=max_minutes,
    )
    chosen = job.family.choose(stages or ())
    if style_probability and Stage.base not in chosen:
        fail("`--style-probability` is for the base of a CogView, which is not trained here. Leave it out.")
    if noise and not {Stage.coglm, Stage.base} & {*chosen}:
        fail("`--noise` is for coglm or base, which is not trained here. Leave it out.")
    asked = {
        "model": model,
        "pictures": os.fspath(pictures.absolute()),
        "captions": os.fspath(captions.absolute()),
        "stages": [stage.value for stage in chosen],
        "lora_rank": lora_rank,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": job.learning_rate(lora_rank is not None) if learning_rate is None else learning_rate,
        "held_out": held_out,
        "style_probability": style_probability or None,
        "noise": job.noise() if noise is None else noise,
        "fit": fit,
        "seed": seed,
        **_contents(captions, pictures),
    }
    job.begin(asked)
    if job.is_done(asked):
        say("It is done already.", err=True)
        say(output)
        return
    job.warn_of_adapters()
    with job.interruptions():
        job.prepare(asked, skip_unreadable)
        for stage in chosen:
            job.train(stage, asked, mixed_precision, gradient_checkpointing)
        with failures():
            job.assemble(asked)
            job.evaluate(asked)


class Job:
    """A finetuning, whose folder `work` says what is done."""

    def __init__(
        self, scripts: Path, launcher: list[str], family: Family, output: Path, work: Path, minutes: float | None
    ):
        self.scripts, self.launcher, self.family, self.model = scripts, launcher, family, family.folder
        self.output, self.work, self.minutes = output, work, minutes
        # what is made is put together here, so that `output` is whole or is not there
        self.part = output.with_name(f".{output.name}.part")
        self.started = time.monotonic()

    def noise(self) -> float:
        """What was found good for a small model; a large one is trained as its authors did."""
        return self.family.usual_noise if self.family.width() <= SMALL else 0.0

    def learning_rate(self, adapters: bool) -> float:
        """What fits the size of the model."""
        return LEARNING_RATES["small" if self.family.width() <= SMALL else "large"][adapters]

    # Steps -----------------------------------------------------------------------------------------------------------

    def begin(self, asked: dict) -> None:
        """Make the work folder; one of another finetuning is an error, and an output that is something else."""
        from ..pictures.png import write_whole

        try:
            there = os.listdir(self.output) if os.path.lexists(self.output) else []
            if there and REPORT not in there:
                fail(f"`--output`: {self.output} is there already. Name another folder, or remove it.")
            if not os.path.lexists(self.part):  # rather fail now than after hours of training
                self.part.mkdir(parents=True)
                self.part.rmdir()
        except OSError as error:
            fail(f"`--output`: {self.output} cannot be made: {error.strerror or error}. Name another folder.")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            note = self.work / "asked.json"
            before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else asked
            if not isinstance(before, dict):
                raise ValueError(f"{note} is damaged")
            if not (self.work / "data.done").exists():  # captions may be mended until pictures are tokens
                before |= {name: asked[name] for name in CONTENTS}
        except (OSError, ValueError, RecursionError) as error:
            fail(f"`--work`: {self.work} cannot be used: {first_line(error)}. Name another folder, or remove it.")
        changes = _changes(before, asked)
        if changes:
            what = "Name another folder, or remove it"
            if there:  # both would be asked for, one after the other
                what = f"Name another `--output` and `--work`, or remove {self.output}, too"
            fail(f"`--work`: {self.work} is of another finetuning ({changes}). {what}.")
        with failures():
            write_whole(note, dump_file(asked).encode())

    def warn_of_adapters(self) -> None:
        """Say which adapters of the model are not trained with it."""
        from ..loaders.lora import read_saved_adapters
        from ..training.adapters import LEFT_OUT

        with bad_input():
            names = [*read_saved_adapters(self.model)[0]]
        if names:
            say(f"Warning: the adapters {names} of `--model` {LEFT_OUT}", err=True)

    def is_done(self, asked: dict) -> bool:
        """Whether the output is there; that of another finetuning is an error."""
        if not os.path.lexists(self.output / REPORT):
            return False
        try:
            report = json.loads((self.output / REPORT).read_text(encoding="utf-8"))
            changes = _changes(report, asked)
        except (OSError, ValueError, AttributeError, RecursionError):
            changes = f"{REPORT} is damaged"
        if changes:
            fail(f"`--output`: {self.output} is of another finetuning ({changes}). Name another folder, or remove it.")
        return True

    def prepare(self, asked: dict, skip_unreadable: bool) -> None:
        """Pictures to tokens, unless they are."""
        data = self.work / "data"
        if (self.work / "data.done").exists():
            return
        say("Pictures to tokens", err=True)
        options = {
            "like": self.model,
            "image_folder": asked["pictures"],
            "captions": asked["captions"],
            "held_out_share": asked["held_out"],
            "fit": asked["fit"],
            "skip_unreadable": skip_unreadable,
            "seed": asked["seed"],
            "output_dir": data,
        }
        is_stopped = self._run([sys.executable], "prepare_tokens.py", options)
        (self.work / "data.done").touch()
        if is_stopped:
            self._stop()

    def train(self, stage: Stage, asked: dict, mixed_precision: str | None, gradient_checkpointing: bool) -> None:
        """A stage, from where it stands to its last step."""
        from ..training.run_folder import read_run

        folder, steps = self.work / stage.value, asked["steps"]
        if read_run(folder).get("state") == "finished":
            return
        say(f"Training {stage.value}: {steps} steps", err=True)
        held_out = self.work / "data" / "held_out"
        options = {
            "data": self.work / "data",
            "tokenizer": f"{self.model}/tokenizer",
            "output_dir": folder,
            "resume_from_checkpoint": "latest",
            "max_steps": steps,
            "warmup_steps": max(1, steps // 20),
            "decay_steps": steps // 2,
            "batch_size": asked["batch_size"],
            "learning_rate": asked["learning_rate"],
            "mixed_precision": mixed_precision or _best_precision(),
            "gradient_checkpointing": gradient_checkpointing,
            "seed": asked["seed"],
            "evaluate_every_steps": max(1, steps // 5),
            "log_every_steps": max(1, steps // 20),
            "checkpoint_every_steps": 0,
            "sample_every_steps": 0,
        }
        if held_out.is_dir():
            options["validation_data"] = held_out
        if asked["lora_rank"] is not None:
            options["lora_rank"] = asked["lora_rank"]
        script, own = self.family.training(stage, asked, self.work)
        if self.minutes is not None:
            left = self.minutes - (time.monotonic() - self.started) / 60
            if left <= 0:
                self._stop()
            options["max_minutes"] = round(left, 3)
        if self._run(self.launcher, script, options | own):
            self._stop()

    def assemble(self, asked: dict) -> None:
        """One pipeline of all parts, or one adapter, not yet under its name."""
        if os.path.lexists(self.part):  # a stop came before
            shutil.rmtree(self.part)
        if asked["lora_rank"] is not None:
            return self._join_adapters(asked)
        say("One pipeline of all parts", err=True)
        options = {"like": self.model, "output_dir": self.part}
        if self.family.learns_words(asked["stages"]):
            options["data"] = self.work / "data"
        for stage in asked["stages"]:
            options[self.family.components[Stage(stage)]] = self.work / stage / "final"
        if self._run([sys.executable], self.family.assembled_by, options):
            self._stop()

    def _join_adapters(self, asked: dict) -> None:
        from ..loaders.lora_files import read_lora, write_lora

        weights: dict[str, dict] = {}
        configs: dict[str, dict] = {}
        words: list[str] = []
        for stage in asked["stages"]:
            own = read_lora(self.work / stage / "final", [*self.family.components.values()])
            weights, configs, words = weights | own.weights, configs | own.configs, words + own.known_words
        write_lora(self.part, weights, configs, known_words=list(dict.fromkeys(words)))

    def evaluate(self, asked: dict) -> None:
        """
        Losses of held-out pictures before and after, and sample pictures from held-out captions; then all is whole,
        and gets its name.
        """
        losses = {stage: _losses(self.work / stage) for stage in asked["stages"]}
        report = {**asked, "held_out_losses": losses, **self.family.notes(asked)}
        (self.part / REPORT).write_text(dump_file(report), encoding="utf-8")
        for stage, (before, after) in losses.items():
            if None not in (before, after):
                say(f"{stage}: loss of held-out pictures {before:.3f} before, {after:.3f} after", err=True)
        self._write_samples(asked)
        if os.path.lexists(self.output):  # and empty
            self.output.rmdir()
        os.replace(self.part, self.output)
        say(self.output)
        if asked["lora_rank"] is not None:
            say(f"Use it by `pipe.load_lora_weights({os.fspath(self.output)!r})`.", err=True)

    def _write_samples(self, asked: dict, most: int = 9) -> None:
        """
        What the new model draws of captions of held-out pictures, or else of those that were trained on, and what it
        says of these pictures; of such captions as it reads whole.
        """
        import torch
        from safetensors.torch import load_file

        from ..training.data.tokens import TOKENS_FILE

        pipes = self._load_pipelines(asked)
        folder = self.work / "data" / "held_out"
        folder = folder if folder.is_dir() else self.work / "data"
        texts = _read_prompts(folder, [pipe for work, pipe in pipes.items() if work != "caption"])
        rows = [*texts][:: max(1, -(-len(texts) // most))]
        if not rows:
            return
        prompts, true_tokens = [texts[row] for row in rows], load_file(folder / TOKENS_FILE)["low"][rows].long()
        generators = [torch.Generator().manual_seed(asked["seed"] + index) for index in range(len(rows))]
        images, tokens = [], true_tokens
        if "generate" in pipes:
            drawn = pipes["generate"](prompts, generator=generators)
            images, tokens = drawn.images, drawn.tokens
        if "upscale" in pipes:
            images = pipes["upscale"](prompt=prompts, tokens=tokens, generator=generators).images
        if images:
            _save_grid(images, self.part / "samples.png")
        _write_texts(prompts, self.part / "samples.txt")
        if "caption" in pipes:
            said = pipes["caption"](tokens=true_tokens, generator=generators).captions
            _write_texts(said, self.part / "captions.txt")

    def _load_pipelines(self, asked: dict) -> dict[str, Any]:
        """The new model as pipelines, by what they do."""
        from .loading import load_pipeline

        first, *others = self.family.works(asked["stages"])
        is_adapter = asked["lora_rank"] is not None
        pipe = load_pipeline(self.model if is_adapter else os.fspath(self.part), work=first)
        if is_adapter:
            pipe.load_lora_weights(self.part)
            pipe.fuse_lora()
        pipes = {first: pipe, **{work: pipeline_for(pipe, work) for work in others}}
        for each in pipes.values():
            each.set_progress_bar_config(disable=True)
        return pipes

    # Programs --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def interruptions(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end what is done here as they end scripts; once all is done, they change nothing."""

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        except KeyboardInterrupt:
            if not os.path.lexists(self.output / REPORT):
                self._stop()
            say(self.output)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _run(self, launcher: list[str], script: str, options: dict) -> bool:
        """Run a script to its end, or end as it does; whether a signal came that it had nothing left to do for."""
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        process = subprocess.Popen([*launcher, os.fspath(self.scripts / script), *arguments])
        stopped = False

        def pass_on(number: int, frame: object) -> None:
            # Ctrl-C reaches both, SIGTERM only this: the script saves and ends, and this waits for it
            nonlocal stopped
            stopped = True
            if number == signal.SIGTERM:
                process.send_signal(number)

        # Nothing is raised while it waits: how the script ended would be lost where both come at once.
        taken = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in taken}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code == INTERRUPTED or (code and stopped):  # what saves nothing on the way ends by the signal itself
            self._stop()
        if code:
            fail(f"{script} ended with exit code {code}; what it said is above. The same command goes on.", FAILURE)
        return stopped

    def _stop(self) -> NoReturn:
        say("Stopped. The same command goes on.", err=True)
        raise typer.Exit(INTERRUPTED)


def _contents(captions: Path, pictures: Path) -> dict[str, str | int]:
    """What tells whether captions and pictures are the same: a digest, and how many pictures of how many bytes."""
    from ..json_lines import read_whole_rows
    from ..pictures.files import find_file
    from ..training.run_folder import file_digest

    try:
        digest = str(file_digest(captions)["sha256"])
        names = {row["file"] for row in read_whole_rows(captions) if isinstance(row.get("file"), str)}
    except OSError as error:
        fail(f"`--captions`: {captions} cannot be read: {error.strerror or error}.")
    sizes = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # preparing says what is missing
            sizes.append(find_file(pictures / name).stat().st_size)
    return dict(zip(CONTENTS, (digest, len(sizes), sum(sizes)), strict=True))


def _changes(before: dict, asked: dict) -> str:
    """What is not as it was, in words; empty if all is."""
    changed = [name for name in asked if before.get(name) != asked[name]]
    said = [f"{name} was {before.get(name)!r}" for name in changed if name not in CONTENTS]
    if "captions_sha256" in changed and "captions" not in changed:
        said.append(f"{asked['captions']} has changed since")
    if "num_pictures" in changed:
        said.append(f"its pictures were {before.get('num_pictures')} and are {asked['num_pictures']}")
    elif "picture_bytes" in changed:
        said.append("some of its pictures have changed since")
    return ", ".join(said)


def _on_this_machine(model: str) -> str:
    """The folder of a model, fetched from the Hub if it is an id there: scripts read parts from their folders."""
    if os.path.isdir(model):
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model)
    except Exception as error:  # no network, no such model, no room
        fail(f"`--model`: {model} could not be fetched from the Hub: {first_line(error)}")


def _read_launcher(text: str) -> list[str]:
    try:
        parts = shlex.split(text)
    except ValueError as error:
        fail(f"`--launcher` must be a command, but is {text!r}: {error}.")
    if not parts or shutil.which(parts[0]) is None:
        fail(f"`--launcher` must begin with a program, but is {text!r}.")
    return parts


def _losses(folder: Path) -> tuple[float | None, float | None]:
    """Held-out loss of a run before its first step and after its last."""
    from ..json_lines import read_whole_rows

    before = after = None
    for row in read_whole_rows(folder / "metrics.jsonl"):
        before, after = row.get("validation_loss_before", before), row.get("validation_loss", after)
    return before, after


def _best_precision() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _read_prompts(folder: Path, pipes: list) -> dict[int, str]:
    """Captions of a token folder by their rows; of each row the first one, where all of these pipelines read it."""
    from ..json_lines import parse_object, read_lines
    from ..training.data.tokens import CAPTIONS_FILE

    texts = {}
    for row, (_, line) in enumerate(read_lines(folder / CAPTIONS_FILE)):
        captions = parse_object(line)
        text = next((captions[language][0] for language in ("en", "zh") if captions.get(language)), "")
        with contextlib.suppress(ValueError):
            for pipe in pipes:
                pipe.check_inputs(text)
            texts[row] = text
    return texts


def _write_texts(texts: list[str], path: Path) -> None:
    """Write each on a line."""
    path.write_text("".join(f"{' '.join(text.split())}\n" for text in texts), encoding="utf-8")


def _save_grid(images: list, path: Path) -> None:
    from diffusers.utils import make_image_grid
    from PIL import Image

    columns = max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    blank = Image.new("RGB", images[0].size, "white")
    make_image_grid([*images, *[blank] * (rows * columns - len(images))], rows=rows, cols=columns).save(path)
