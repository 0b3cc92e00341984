import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from cogview_pipelines import __version__
from cogview_pipelines.cli import app

COMMANDS = (
    *("generate", "inpaint", "upscale", "caption", "score", "evaluate", "attend", "judge", "plot", "finetune"),
    *("export", "plan", "serve", "bench", "models", "doctor"),
)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from cogview_pipelines.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'PIL', 'transformers', 'diffusers', 'sentencepiece', 'gradio', 'fastapi'}\n"
        "heavy |= {'matplotlib', 'sqlite3'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_names_the_commands_and_what_they_do():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    rows = [line.split(maxsplit=1) for line in result.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert [row[0] for row in rows] == list(COMMANDS)
    assert all(len(row) == 2 and not row[1].endswith("...") for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_for(command):
    parameters = typer.main.get_command(app).commands[command].params
    assert parameters
    assert [parameter.name for parameter in parameters if not parameter.help] == []


def test_the_version_is_that_of_the_package():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"cogview_pipelines {__version__}\n"
