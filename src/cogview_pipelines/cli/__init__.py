"""The command line. Nothing here imports torch before a command needs it: help is there at once."""

import typer

from .._version import __version__
from ..reports import guard_streams
from . import attend, bench, doctor, evaluate, export, finetune, generate, judge, models, plan, plot, serve
from . import caption_and_score as texts
from . import inpaint_and_upscale as pictures
from .console import say


def _with_hyphens(name: str) -> str:
    return name.replace("_", "-")


app = typer.Typer(
    name="cogview2",
    help="Pictures from Chinese and English prompts with CogView2.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: errors stay on one line, in a terminal and in a log
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"cogview_pipelines {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    guard_streams()


app.command("generate")(generate.generate)
app.command("inpaint")(pictures.inpaint)
app.command("upscale")(pictures.upscale)
app.command("caption")(texts.caption)
app.command("score")(texts.score)
app.command("evaluate")(evaluate.evaluate)
app.command("attend")(attend.attend)
app.command("judge")(judge.judge)
app.command("plot")(plot.plot)
# The scripts that it runs name their options with underscores.
app.command("finetune", context_settings={"token_normalize_func": _with_hyphens})(finetune.finetune)
app.command("export")(export.export)
app.command("plan")(plan.plan)
app.command("serve")(serve.serve)
app.command("bench")(bench.bench)
app.command("models")(models.models)
app.command("doctor")(doctor.doctor)
