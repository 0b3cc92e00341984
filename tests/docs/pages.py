"""
The fenced blocks of the pages, and how they are run.

A block is run unless the line before it says `<!-- not run: WHY -->`. Blocks of a page share a namespace and a folder,
as if somebody followed the page from top to bottom. Of commands that are not run, the options are checked anyway.
"""

import argparse
import json
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import typer
from accelerate.state import AcceleratorState, GradientState
from transformers import HfArgumentParser
from typer.testing import CliRunner

from cogview_pipelines.cli import app, finetune
from cogview_pipelines.training import arguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "training_scripts/**/*.md",
        "benchmarks/*.md",
        "src/cogview_pipelines/**/*.md",
    )
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"
)
BLOCK = (
    re.compile(  # lists may indent it; a comment ends on its line, or it would swallow the blocks up to the last one
        r"(?P<before>(?:^ *<!--[^\n]*-->\n)*)^(?P<indent> *)```(?P<language>[\w{}-]*)\n(?P<code>.*?)^(?P=indent)```$",
        re.DOTALL | re.MULTILINE,
    )
)
LOOP = re.compile(r"^for (\w+) in ([^;\n]*); do\n(.*?)^done$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.{10,}) -->")
RUNNABLE = ("python", "bash")
INTO_DATACLASSES = "parse_args_into_dataclasses"


@dataclass
class Block:
    """
    A fenced block of a page.

    Args:
        page (`str`): Its path in the repository.
        line (`int`): Where its code begins.
        language (`str`): What the fence says.
        code (`str`): What stands in it.
        reason (`str`, *optional*): Why it is not run.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def changed(self, replacements: dict[str, str]) -> "Block":
        """The block with other texts in some places."""
        code = self.code
        for old, new in replacements.items():
            code = code.replace(old, new)
        return Block(self.page, self.line, self.language, code, self.reason)


def read_blocks(page: str) -> list[Block]:
    """All blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        reason = NOT_RUN.search(match["before"])
        line = text[: match.start("code")].count("\n") + 1
        code = textwrap.dedent(match["code"])
        blocks.append(Block(page, line, match["language"], code, reason and reason["reason"]))
    return blocks


def run_python(block: Block, names: dict) -> None:
    """Run a block in the namespace of its page. Errors name the line of the page."""
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, str(ROOT / block.page), "exec"), names)


def split_commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block of bash, each as a list of words, without comments; those of a loop once a value."""
    code = LOOP.sub(unroll, block.code.replace("\\\n", " "))
    pending = ""
    for line in code.splitlines(keepends=True):
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quoted text goes on in the next line
            continue
        pending = ""
        while words and re.fullmatch(r"\w+=.*", words[0]):  # variables of the command
            computed = words.pop(0).partition("=")[2].startswith("$(")
            while computed and not words.pop(0).endswith(")"):
                pass
        if words:
            yield words
    assert not pending, f"{block} ends within a quoted text"


def unroll(loop: re.Match) -> str:
    """The lines of a loop for each of its values."""
    name, values, body = loop.groups()
    return "".join(re.sub(rf"\$({name}\b|{{{name}}})", value, body) for value in values.split())


def run_command(words: list[str]) -> str:
    """Run a command of ours, in this process; what it prints, if it is no script."""
    if words[0] == "python":
        run_script(words[1], words[2:])
        return ""
    assert words[0] == "cogview2", f"Only commands of the package are run here: {shlex.join(words)}"
    with mock.patch.object(finetune.Job, "_run", run_finetuning_script):
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    return result.stdout


def run_script(path: str, arguments: list[str]) -> None:
    """Run a script of the repository to its end."""
    script = ROOT / path
    with (
        mock.patch.object(sys, "argv", [str(script), *arguments]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.dict(sys.modules),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{path} {shlex.join(arguments)} ended with {end.code}"
        finally:  # each begins without what the one before told Accelerate
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def run_finetuning_script(job: finetune.Job, launcher: list[str], script: str, options: dict) -> None:
    """What `cogview2 finetune` starts."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    run_script(f"training_scripts/{script}", arguments)


class Parsed(BaseException):
    """Arguments were read, and nothing else was done."""


def then_stop(function):
    """The function, at whose end a script ends."""

    def parse_and_stop(*args, **kwargs):
        found = function(*args, **kwargs)
        if kwargs.get("return_remaining_strings"):  # by `parse_config`, which goes on with them
            return found
        raise Parsed

    return parse_and_stop


def check_options(words: list[str]) -> bool:
    """
    Have a command read its arguments, and do nothing else.

    Returns:
        `bool`: Whether it is one of ours.

    Raises:
        SystemExit: If the command does not take them.
    """
    if words[0] == "cogview2":
        group = typer.main.get_command(app)
        context = group.make_context("cogview2", words[1:2])
        group.get_command(context, words[1]).make_context(words[1], words[2:], parent=context)
        return True
    if words[0] == "bash" and words[1].endswith("launch/one_machine.sh"):
        words = [f"training_scripts/{words[2]}.py", *words[3:]]
    scripts = [number for number, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)]
    if not scripts:
        return False
    path = ROOT / words[scripts[0]]
    source = path.read_text(encoding="utf-8")
    if "typer.run(main)" in source:
        command = typer.Typer()
        command.command()(runpy.run_path(str(path))["main"])
        typer.main.get_command(command).make_context(path.name, words[scripts[0] + 1 :])
        return True
    if not re.search("parse_config|parse_args|make_parser|run_to_release", source):
        assert len(words) == scripts[0] + 1, f"{path.name} takes no options"
        return True
    given = ["training_scripts/emoji/coglm_small.yaml" if word == "CONFIG.yaml" else word for word in words]
    with (
        mock.patch.object(arguments, "parse_config", then_stop(arguments.parse_config)),
        mock.patch.object(HfArgumentParser, INTO_DATACLASSES, then_stop(getattr(HfArgumentParser, INTO_DATACLASSES))),
        mock.patch.object(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args)),
        mock.patch.object(sys, "argv", [str(path), *given[scripts[0] + 1 :]]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsed:
            return True
    raise AssertionError(f"{path.name} did not read its arguments")


def check_json(block: Block) -> None:
    """A block of JSON is one value, or one a line."""
    try:
        json.loads(block.code)
    except json.JSONDecodeError:
        for line in block.code.splitlines():
            json.loads(line)
