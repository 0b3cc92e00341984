"""What the package root promises: its names, and that they cost nothing until they are used."""

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizer

import cogview_pipelines
from cogview_pipelines import _EXPORTS

CLASSES = [name for name, module in _EXPORTS.items() if module.startswith(".") and name[0].isupper()]
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "sentencepiece", "PIL", "numpy")
# what stands in one layer may import from the layers above it in this list, and from its own folder
LAYERS = (
    {"_version"},
    {"sampling", "sequences", "ops", "tokenization_icetk", "environment", "png", "picture_files", "batching"},
    {"models", "schedulers"},
    {"decoding"},
    {"captioning", "generation", "scoring", "training"},
    {"pipelines"},
    {"bench", "emoji", "conversion", "serving"},
    {"cli"},
)


def imported_parts(path, root):
    """The files and folders directly under the root from which a module imports, wherever in it the import stands."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            names = [base[0]] if base[0] else [alias.name for alias in node.names]
            yield from names


def run_python(code):
    """Run code in a new interpreter and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = f"import cogview_pipelines, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_importing_the_command_line_imports_nothing_heavy():
    code = f"import cogview_pipelines.cli, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", _EXPORTS)
def test_every_name_of_the_root_is_that_of_its_module(name):
    module = importlib.import_module(_EXPORTS[name], "cogview_pipelines")
    assert getattr(cogview_pipelines, name) is getattr(module, name)
    assert name in dir(cogview_pipelines)


def test_star_import_gives_the_public_names():
    names = {}
    exec("from cogview_pipelines import *", names)
    assert set(names) - {"__builtins__"} == set(cogview_pipelines.__all__)
    assert {"CogLMModel", "CogView2Pipeline", "IcetkTokenizer", "__version__"} <= set(names)
    assert "PreTrainedModel" not in names


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="`cogview_pipelines` has no attribute `CogView3Pipeline`"):
        cogview_pipelines.CogView3Pipeline  # noqa: B018
    with pytest.raises(ImportError):
        exec("from cogview_pipelines import CogView3Pipeline")


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_class_lives_in_the_root(name):
    """Saved pipelines name the module of a class, so that files may move as long as the root holds the name."""
    assert getattr(cogview_pipelines, name).__module__ == "cogview_pipelines"


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith(("Config", "Output", "Interrupted"))])
def test_what_is_saved_has_a_base_class_that_diffusers_finds_in_the_root(name):
    """The loader of diffusers looks the base class up by name in the module that `model_index.json` names."""
    bases = {
        "PreTrainedModel": PreTrainedModel,
        "PreTrainedTokenizer": PreTrainedTokenizer,
        "SchedulerMixin": SchedulerMixin,
        "DiffusionPipeline": DiffusionPipeline,
    }
    found = [base for base, kind in bases.items() if issubclass(getattr(cogview_pipelines, name), kind)]
    assert len(found) == 1
    assert getattr(cogview_pipelines, found[0]) is bases[found[0]]


@pytest.mark.parametrize("name", [name for name in _EXPORTS if _EXPORTS[name].startswith(".")])
def test_every_public_name_is_documented(name):
    assert inspect.getdoc(getattr(cogview_pipelines, name))


def test_the_version_is_that_of_the_installed_package():
    assert cogview_pipelines.__version__ == importlib.metadata.version("cogview_pipelines")


def test_imports_go_downwards_only():
    root = Path(cogview_pipelines.__file__).parent
    rank = {name: index for index, names in enumerate(LAYERS) for name in names}
    wrong, count = [], 0
    for path in root.rglob("*.py"):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in rank, f"{own} stands in no layer yet: add it to LAYERS"
        for part in imported_parts(path, root):
            count += 1
            if part != own and rank[part] >= rank[own]:
                wrong.append(f"{path.relative_to(root)} imports {part}")
    assert not wrong
    assert count > 20  # or the test looks at nothing
