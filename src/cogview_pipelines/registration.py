"""
Makes diffusers and transformers know the classes of this package, by name.

`DiffusionPipeline.from_pretrained`, the `AutoPipeline` classes, `AutoModel`, `AutoConfig` and `AutoTokenizer` look
names up in tables of their own library; loading a pipeline from the Hub, too, takes only libraries that diffusers
lists. What this package adds to these tables is all here.

Importing the package must import neither library, which takes seconds, and no order of imports may matter. So each
table is added to when its module has been imported, by a finder that stands before the others of `sys.meta_path`, and
what is added are names, which are looked up in the package root when they are used. A version of a library that keeps
its tables otherwise is left alone: the package's own classes load all the same.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

PACKAGE = __name__.split(".")[0]
# What the loader of diffusers calls on a component, by the base class that it finds in the package root.
_METHODS = ["save_pretrained", "from_pretrained"]
LOADABLE = dict.fromkeys(("PreTrainedModel", "PreTrainedTokenizer", "SchedulerMixin", "DiffusionPipeline"), _METHODS)
# By the name of their configuration, which is also the `model_type` of `config.json`.
MODELS = {
    "coglm": ("CogLMConfig", "CogLMModel"),
    "coglm_canvas": ("CogLMCanvasConfig", "CogLMCanvasModel"),
    "cogview": ("CogViewConfig", "CogViewModel"),
    "icetk_vq": ("IcetkVQConfig", "IcetkVQModel"),
    "cogview_vq": ("CogViewVQConfig", "CogViewVQModel"),
}
TOKENIZERS = ("IcetkTokenizer", "CogViewTokenizer")
PIPELINES = (
    "CogView2Pipeline",
    "CogView2InpaintPipeline",
    "CogView2UpscalePipeline",
    "CogView2CaptionPipeline",
    "CogViewPipeline",
    "CogViewUpscalePipeline",
    "CogViewCaptionPipeline",
)
# Tables of `diffusers.pipelines.auto_pipeline`: pipelines with one name turn into each other.
AUTO_PIPELINES = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": {"cogview2": "CogView2Pipeline", "cogview": "CogViewPipeline"},
    "AUTO_INPAINT_PIPELINES_MAPPING": {"cogview2": "CogView2InpaintPipeline"},
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": {"cogview2": "CogView2UpscalePipeline", "cogview": "CogViewUpscalePipeline"},
}


def register() -> None:
    """Add to the tables of both libraries: now to what is imported already, later to the rest. Once is enough."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, add in ADDITIONS.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            add(module)


def _add_library(module: ModuleType) -> None:
    """The loader of diffusers takes components of this package, from folders and from the Hub."""
    loadable = getattr(module, "LOADABLE_CLASSES", None)
    if isinstance(loadable, dict):
        loadable.setdefault(PACKAGE, LOADABLE)


def _add_pipelines(module: ModuleType) -> None:
    """`DiffusionPipeline` looks the class of a saved pipeline up as `diffusers.NAME`."""
    module = sys.modules[module.__name__]  # which has put another one in its place
    original = type(module)
    find = getattr(original, "__getattr__", None)

    def __getattr__(self, name: str) -> Any:
        if name in PIPELINES:
            return getattr(sys.modules[PACKAGE], name)
        if find is not None:
            return find(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    module.__class__ = type(original.__name__, (original,), {"__getattr__": __getattr__})


def _add_tasks(module: ModuleType) -> None:
    """`AutoPipelineForText2Image` and its like."""
    for table, names in AUTO_PIPELINES.items():
        mapping = getattr(module, table, None)
        if isinstance(mapping, dict):
            for name, pipeline in names.items():
                mapping.setdefault(name, getattr(sys.modules[PACKAGE], pipeline))


def _add_configs(module: ModuleType) -> None:
    """`AutoConfig` and `AutoModel` know the type of a model; its class is looked up in a module: here the root."""
    mapping = getattr(module, "CONFIG_MAPPING", None)
    known, modules = getattr(mapping, "_mapping", None), getattr(mapping, "_modules", None)
    if mapping is None or not isinstance(known, dict) or not isinstance(modules, dict):
        return
    # a copy: the table itself is read by others while they are imported, which expect more of each entry
    mapping._mapping = {**{model_type: config for model_type, (config, _) in MODELS.items()}, **known}
    _look_up_in_root(modules)


def _add_models(module: ModuleType) -> None:
    """`AutoModel` knows the class of a configuration."""
    mapping = getattr(module, "MODEL_MAPPING", None)
    names = ("_config_mapping", "_reverse_config_mapping", "_model_mapping", "_modules")
    if mapping is None or not all(isinstance(getattr(mapping, name, None), dict) for name in names):
        return
    configs = {model_type: config for model_type, (config, _) in MODELS.items()}
    mapping._config_mapping = {**configs, **mapping._config_mapping}
    for model_type, (config, model) in MODELS.items():
        mapping._reverse_config_mapping.setdefault(config, model_type)
        mapping._model_mapping.setdefault(model_type, model)
    _look_up_in_root(mapping._modules)


def _look_up_in_root(modules: dict[str, ModuleType]) -> None:
    for model_type in MODELS:
        modules.setdefault(model_type, sys.modules[PACKAGE])


def _add_tokenizers(module: ModuleType) -> None:
    """`AutoTokenizer` looks the class that `tokenizer_config.json` names up with this function."""
    find = getattr(module, "tokenizer_class_from_name", None)
    if find is None:
        return

    @functools.wraps(find)
    def tokenizer_class_from_name(class_name: str) -> Any:
        return getattr(sys.modules[PACKAGE], class_name) if class_name in TOKENIZERS else find(class_name)

    vars(module)["tokenizer_class_from_name"] = tokenizer_class_from_name


ADDITIONS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers": _add_pipelines,
    "diffusers.pipelines.pipeline_loading_utils": _add_library,
    "diffusers.pipelines.auto_pipeline": _add_tasks,
    "transformers.models.auto.configuration_auto": _add_configs,
    "transformers.models.auto.modeling_auto": _add_models,
    "transformers.models.auto.tokenization_auto": _add_tokenizers,
}


class _Finder:
    """
    Finds the modules with our tables as the other finders do, and has them added to when they have run.

    (Not an `importlib.abc.MetaPathFinder`: that module is slow to import, and nothing asks for it.)
    """

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> "ModuleSpec | None":
        add = ADDITIONS.get(name)
        if add is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast("Loader", _Loader(spec.loader, add))  # in all that is asked of one
                return spec
        return None


class _Loader:
    """A loader, and something to do after it."""

    def __init__(self, loader: Any, add: Callable[[ModuleType], None]):
        self._loader, self._add = loader, add

    def __getattr__(self, name: str) -> Any:  # resources, sources
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._add(module)
