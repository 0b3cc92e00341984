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
# A file belongs to the longest of these names that its path begins with. It may import from the layers above it in
# this list, and from what has its own name.
LAYERS = (
    {"_version", "json_lines", "model_index", "foreign_files", "short_names", "registration", "reports"},
    {"generation.sampling", "generation.token_sequence", "generation.batching", "ops", "pictures", "environment"},
    {"models"},
    {"schedulers"},
    {"generation"},
    {"loaders"},
    {"evaluation", "training"},
    {"pipelines.common"},
    {"pipelines"},
    {"speed", "demo", "conversion", "serving", "plots", "export"},
    {"cli"},
)
FAMILIES = ("cogview", "cogview2")  # folders under models, pipelines and conversion, which do not import one another


def module_name(path, root):
    """The dotted name of a file below the root: `models/cogview2/sequences.py` is `models.cogview2.sequences`."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path, root):
    """The modules of the package that a file imports, wherever in it the import stands."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = (*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split(".")))
        for alias in node.names:
            whole = root.joinpath(*base, alias.name)
            is_module = whole.is_dir() or whole.with_suffix(".py").is_file()
            yield ".".join((*base, alias.name) if is_module or not base else base)


def layer_of(module):
    """The index in `LAYERS` and the name there that a module falls under."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for index, names in enumerate(LAYERS):
            if name in names:
                return index, name
    raise AssertionError(f"{module} stands in no layer yet: add it to LAYERS")


def family_of(module):
    """The model family in whose folder a module stands, or `None`."""
    return next((part for part in module.split(".")[:-1] if part in FAMILIES), None)


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


@pytest.mark.parametrize(
    "name",
    [name for name in CLASSES if not name.endswith(("Config", "Output", "Interrupted", "KeySet", "PeopleWords"))],
)
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


def all_imports():
    """Every import of the package within itself: who imports, and what."""
    root = Path(cogview_pipelines.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path != root / "__init__.py":
            for imported in imported_modules(path, root):
                yield module_name(path, root), imported


def test_imports_go_downwards_only():
    imports = list(all_imports())
    assert len(imports) > 200  # or the test looks at nothing
    wrong = []
    for importer, imported in imports:
        (own_layer, own), (layer, name) = layer_of(importer), layer_of(imported)
        if own != name and layer >= own_layer:
            wrong.append(f"{importer} imports {imported}")
    assert not wrong


def test_families_do_not_import_one_another():
    imports = [(importer, imported) for importer, imported in all_imports() if family_of(importer)]
    assert len(imports) > 20
    wrong = [pair for pair in imports if family_of(pair[1]) not in (None, family_of(pair[0]))]
    assert not wrong


def test_what_the_pipelines_of_all_families_share_knows_none_of_them():
    imports = [pair for pair in all_imports() if pair[0].startswith("pipelines.common.")]
    assert len(imports) > 10
    assert not [pair for pair in imports if family_of(f"{pair[1]}.")]


def test_only_programs_import_the_demo():
    programs = ("demo", "cli")
    assert not [pair for pair in all_imports() if pair[1].startswith("demo") and not pair[0].startswith(programs)]
