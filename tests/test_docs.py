"""The pages for people: what they point to is there, and their code is Python."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for folder in (".", "docs", "training_scripts", "benchmarks", "src/cogview_pipelines")
    for page in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_of_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    broken = [target for target in targets if target and "://" not in target and not (page.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_pages_parses(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        ast.parse(code)


def test_every_page_of_the_docs_is_in_the_table_of_contents():
    contents = (ROOT / "docs" / "index.md", ROOT / "docs" / "zh" / "index.md")
    listed = {
        str((page.parent / target).relative_to(ROOT / "docs"))
        for page in contents
        for target in re.findall(r"\]\(([\w/-]+\.md)\)", page.read_text(encoding="utf-8"))
    }
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").glob("**/*.md")}
    assert pages - {"index.md"} <= listed
