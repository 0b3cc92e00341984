"""What the package imports is what it declares, and its source distribution is whole."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "cogview_pipelines"
# Which extra a file may count on, by the beginning of its path; all others have the dependencies alone.
EXTRAS = {
    "serving/page": ("page", "serve"),
    "serving/ray_serve.py": ("ray", "serve"),
    "serving/": ("serve",),
    "plots/": ("plots",),
    "export/": ("onnx",),
    "training/data/inputs.py": ("parquet",),
    "training/moments.py": ("quantization",),
    "training/": ("training",),
    "loaders/": ("lora",),
    "models/adapters.py": ("lora",),
    "evaluation/": ("evaluation", "inception", "test"),  # networks are the caller's choice
    "cli/evaluate_captions.py": ("evaluation",),
}
PARTS = {"typer-slim": "typer"}  # distributions that another one consisted of for some versions

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the repository")


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name):
    """The name of a distribution, in one of its many spellings."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements):
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imports_of(path):
    """Names of what a file imports from elsewhere, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "cogview_pipelines":
                yield top


@pytest.fixture(scope="module")
def imported():
    """Distributions by what imports them."""
    known = importlib.metadata.packages_distributions()
    found = defaultdict(set)
    for path in sorted(SOURCES.rglob("*.py")):
        for top in imports_of(path):
            names = {normal(name) for name in known.get(top, [top])}
            found[path.relative_to(SOURCES).as_posix()] |= {PARTS.get(name, name) for name in names}
    return found


def test_what_is_imported_is_declared(project, imported):
    assert len(imported) > 80  # or the test looks at nothing
    missing = []
    for path, names in imported.items():
        extras = next((extras for start, extras in EXTRAS.items() if path.startswith(start)), ())
        declared = named(project["dependencies"])
        declared = declared.union(*(named(project["optional-dependencies"][extra]) for extra in extras))
        missing += [f"{path} imports {name}" for name in sorted(names - declared)]
    assert not missing


def test_what_is_declared_is_imported(project, imported):
    used = set().union(*imported.values())
    assert named(project["dependencies"]) - used == set()
    # FastAPI imports it to read forms
    assert named(project["optional-dependencies"]["serve"]) - used == {"python-multipart"}


def test_every_dependency_is_named_once_and_has_a_lowest_version(project):
    assert len(named(project["dependencies"])) == len(project["dependencies"])
    groups = [project["dependencies"], *(project["optional-dependencies"][name] for name in ("serve", "page"))]
    without = [one for group in groups for one in group if ">=" not in one and "cogview_pipelines" not in one]
    assert without == []


@pytest.mark.parametrize("page", ["docs/installation.md", "docs/zh/installation.md"])
def test_the_tables_of_extras_name_all_that_there_are(project, page):
    rows = re.findall(
        r'^\| `pip install "\.\[([\w,-]+)\]"` \| \S', (ROOT / page).read_text("utf-8"), flags=re.MULTILINE
    )
    assert sorted(rows) == sorted(project["optional-dependencies"])


def test_the_source_distribution_holds_what_its_build_needs(tmp_path):
    """Not how: that the kernels of a wheel built from it work is tested by `.ci/packages`, which takes minutes."""
    pytest.importorskip("setuptools", minversion="77")
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "egg_info",
        "--egg-base",
        tmp_path,
        "sdist",
        "--dist-dir",
        tmp_path,
    ]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir() if path.is_file()}
    assert len(sources) > 5
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "constraints.txt"} <= names
    assert "src/cogview_pipelines/demo/models/cogview2-emoji/transformer/model.safetensors" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
