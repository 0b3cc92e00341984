"""The code of the pages runs, from top to bottom, in an empty folder."""

import pytest
import torch

from ..hub.running import TOKEN
from .pages import (
    PAGES,
    ROOT,
    RUNNABLE,
    check_json,
    check_options,
    read_blocks,
    run_command,
    run_python,
    split_commands,
)
from .stages import FEWER, STAGES

BLOCKS = {page: read_blocks(page) for page in PAGES}
WITH_THE_HUB = "docs/hub.md"


def run_page(page: str, folder) -> int:
    """Run the blocks of a page; how many."""
    names, replacements = STAGES[page](folder) if page in STAGES else ({}, {})
    names["__name__"] = "__main__"
    blocks = [one.changed({**FEWER, **replacements}) for one in BLOCKS[page]]
    wanted = [one for one in blocks if one.language in RUNNABLE and one.reason is None]
    for block in wanted:
        try:
            if block.language == "python":
                run_python(block, names)
            else:
                for words in split_commands(block):
                    run_command(words)
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"in the block at {block}")
            raise
    return len(wanted)


RUN = [
    page
    for page, blocks in BLOCKS.items()
    if page != WITH_THE_HUB and any(one.language in RUNNABLE and one.reason is None for one in blocks)
]
# those that take seconds run with every change, the others with `pytest -m slow tests/docs`
QUICK = ("README.md", "docs/cogview.md", "docs/command_line.md", "docs/lora.md", "docs/original_scripts.md")


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in RUN]
)
@pytest.mark.timeout(1200)  # where many others compute, too
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        assert run_page(page, tmp_path) > 0
    finally:
        torch.set_num_threads(threads)


def test_the_code_of_the_page_on_the_hub_runs_from_top_to_bottom(hub):
    code = (
        "import pathlib; from tests.docs.test_code import run_page; print(run_page('docs/hub.md', pathlib.Path.cwd()))"
    )
    assert hub.json(code, token=TOKEN) == 3


@pytest.mark.parametrize("page", PAGES)
def test_no_block_of_a_page_escapes(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = [number for number, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith("```")]
    assert [one.line - 1 for one in BLOCKS[page]] == fences[::2]
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("name", ["training", "inpainting", "serving"])
def test_chinese_tutorials_have_blocks_of_the_english_ones(name):
    """And in their order, so that they do the same and run with the same files."""
    english = iter([(one.language, one.code) for one in BLOCKS[f"docs/{name}.md"]])
    chinese = [(one.language, one.code) for one in BLOCKS[f"docs/zh/{name}.md"]]
    assert chinese
    assert [code for code in chinese if code not in english] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is_written_in(page):
    """A block without a language would escape: it is neither run nor marked."""
    assert not [str(one) for one in BLOCKS[page] if not one.language]


@pytest.mark.parametrize("page", [page for page in PAGES if any(one.reason for one in BLOCKS[page])])
def test_commands_that_are_not_run_have_options_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in BLOCKS[page]:
        if block.reason and block.language == "bash":
            for words in split_commands(block):
                try:
                    check_options(words)
                except (SystemExit, Exception) as error:
                    raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error


@pytest.mark.parametrize("page", [page for page in PAGES if any(one.language == "json" for one in BLOCKS[page])])
def test_json_of_the_pages_is_json(page):
    for block in BLOCKS[page]:
        if block.language == "json":
            check_json(block)
