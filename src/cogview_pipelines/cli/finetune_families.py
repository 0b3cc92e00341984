"""What `cogview2 finetune` does for each family in its own way: stages, scripts and their options, samples."""

import enum
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..model_index import has_component
from .console import fail, first_line
from .families import SAVED_AS

REPORT = "finetuning.json"
KEEPS_BACKBONE = "direct_sr_keeps_backbone"  # of the report
# Where no model does nothing but describe, what draws also describes, and is trained for it: CogView's shipped model.
CAPTION_SHARE = 0.25


class Stage(str, enum.Enum):
    """Transformers of a pipeline that can be trained."""

    coglm = "coglm"
    direct_sr = "direct-sr"
    iterative_sr = "iterative-sr"
    base = "base"
    super_resolution = "super-resolution"
    caption = "caption"


class Family(ABC):
    """
    A saved model that is to be finetuned.

    Args:
        folder (`str`): Where it is.
        index (mapping): What its `model_index.json` says.

    Attributes:
        stages (list of [`Stage`]): What it has, in the order in which they are trained.
    """

    title: ClassVar[str]
    components: ClassVar[Mapping[Stage, str]]
    assembled_by: ClassVar[str]
    usual_noise: ClassVar[float] = 0.0  # of small models

    def __init__(self, folder: str, index: Mapping[str, Any]):
        self.folder, self.index = folder, index
        self.stages = [stage for stage, name in self.components.items() if self.has(name)]

    def has(self, component: str) -> bool:
        """Whether the model has a component."""
        return has_component(self.index, component)

    def choose(self, stages: Collection[Stage]) -> list[Stage]:
        """Those of these stages to train, in order; all that there are if none is named."""
        missing = [stage.value for stage in stages if stage not in self.stages]
        if missing:
            there = ", ".join(stage.value for stage in self.stages)
            fail(f"`--stage`: the model, a {self.title}, has no {', '.join(missing)}; it has {there}.")
        return [stage for stage in self.stages if not stages or stage in stages]

    def width(self) -> int:
        """The size of its states, which tells small models from large ones."""
        component = self.components[self.stages[0]]
        try:
            config = json.loads((Path(self.folder) / component / "config.json").read_text(encoding="utf-8"))
            return int(config["hidden_size"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            fail(f"`--model`: the {component} of {self.folder} cannot be read: {first_line(error)}")

    @abstractmethod
    def training(self, stage: Stage, asked: Mapping[str, Any], work: Path) -> tuple[str, dict[str, Any]]:
        """The script that trains a stage, and those of its options that say what is trained."""

    @abstractmethod
    def learns_words(self, stages: Collection[Stage]) -> bool:
        """Whether what reads the prompts is among these stages: super-resolution alone knows no new words."""

    def notes(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What the report says of the new model for finetunings that go on from it."""
        return {}

    def works(self, stages: Collection[Stage]) -> list[str]:
        """
        The kinds of work that show what the new model can do, in the order in which they are done: `"generate"`,
        `"upscale"`, `"caption"`.

        Args:
            stages (collection of [`Stage`]): What was trained.
        """
        return ["generate"]


class CogView2Family(Family):
    """A CogView2. Its direct super-resolution may borrow the weights of CogLM, with which it was trained."""

    title = "CogView2"
    components: ClassVar[Mapping[Stage, str]] = {
        Stage.coglm: "transformer",
        Stage.direct_sr: "direct_sr_transformer",
        Stage.iterative_sr: "iterative_sr_transformer",
    }
    assembled_by = "assemble_pipeline.py"
    usual_noise = 0.5  # docs/style_learning.md and docs/new_thing.md say what it does

    def training(self, stage: Stage, asked: Mapping[str, Any], work: Path) -> tuple[str, dict[str, Any]]:
        """See [`Family.training`]."""
        component = f"{self.folder}/{self.components[stage]}"
        if stage is Stage.coglm:
            return "train_coglm.py", {"init_from": component, "noise_probability": asked["noise"]}
        if stage is Stage.iterative_sr:
            return "train_iterative_sr.py", {"transformer": component}
        # an adapter leaves the weights that this stage borrows as they were
        options: dict[str, Any] = {"init_from": component, "transformer": f"{self.folder}/transformer"}
        if asked["lora_rank"] is None:
            trained = work / Stage.coglm.value / "final"
            if trained.is_dir():
                options["transformer"] = trained
            if self._keeps_backbone():
                options["lend_backbone"] = True
        return "train_direct_sr.py", options

    def learns_words(self, stages: Collection[Stage]) -> bool:
        """See [`Family.learns_words`]."""
        return Stage.coglm in stages

    def notes(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See [`Family.notes`]."""
        return {KEEPS_BACKBONE: self._leaves_backbone(asked)}

    def _keeps_backbone(self) -> bool:
        """
        Whether this command finetuned CogLM without direct super-resolution, which keeps a copy of what it borrowed.

        Then it can borrow again, as if both had been trained at once. A backbone of its own may also be one that was
        trained, or that adapters are fused into: the canvas needs it.
        """
        try:
            report = json.loads((Path(self.folder) / REPORT).read_text(encoding="utf-8"))
            return report[KEEPS_BACKBONE] is True
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # made otherwise
            return False

    def _leaves_backbone(self, asked: Mapping[str, Any]) -> bool:
        """Whether direct super-resolution of the new model keeps a copy of what it borrowed."""
        from ..models.cogview2.modeling_coglm_canvas import CogLMCanvasConfig

        name = self.components[Stage.direct_sr]
        if asked["lora_rank"] is not None or Stage.direct_sr.value in asked["stages"] or not self.has(name):
            return False
        borrows = CogLMCanvasConfig.from_pretrained(self.folder, subfolder=name).shares_backbone
        return self._keeps_backbone() or (borrows and Stage.coglm.value in asked["stages"])


class CogViewFamily(Family):
    """A CogView, which may have any of its three models."""

    title = "CogView"
    components: ClassVar[Mapping[Stage, str]] = {
        Stage.base: "transformer",
        Stage.super_resolution: "super_resolution_transformer",
        Stage.caption: "caption_transformer",
    }
    assembled_by = "assemble_cogview_pipeline.py"

    def training(self, stage: Stage, asked: Mapping[str, Any], work: Path) -> tuple[str, dict[str, Any]]:
        """See [`Family.training`]."""
        options: dict[str, Any] = {"init_from": f"{self.folder}/{self.components[stage]}"}
        if stage is Stage.super_resolution:
            # positions as they will be while it enlarges, whatever those of the release's training were
            options |= {"super_resolution_probability": 1, "restart_on_roi2": False}
        elif stage is Stage.caption:
            options["caption_probability"] = 1
        else:
            if Stage.caption not in self.stages:
                options["caption_probability"] = CAPTION_SHARE
            options["noise_probability"] = asked["noise"]
            if asked["style_probability"] is not None:
                options["style_probability"] = asked["style_probability"]
        return "train_cogview.py", options

    def learns_words(self, stages: Collection[Stage]) -> bool:
        """See [`Family.learns_words`]."""
        return (Stage.base if Stage.base in self.stages else Stage.caption) in stages

    def works(self, stages: Collection[Stage]) -> list[str]:
        """See [`Family.works`]."""
        describes = Stage.caption if Stage.caption in self.stages else Stage.base
        shown = {
            "generate": Stage.base in self.stages,
            "upscale": Stage.super_resolution in self.stages,
            "caption": describes in stages,
        }
        return [work for work, is_shown in shown.items() if is_shown]


KINDS: dict[str, type[Family]] = {"cogview2": CogView2Family, "cogview": CogViewFamily}


def read_family(folder: str) -> Family:
    """The model in a folder, as its family is trained; what is none ends the command."""
    from ..pipelines.common.base import PipelineBase

    try:
        index = dict(PipelineBase.load_config(folder))
    except Exception as error:  # whatever a damaged file makes the loaders raise
        fail(f"`--model`: {folder} cannot be read: {first_line(error)}")
    family = SAVED_AS.get(str(index.get("_class_name")))
    if family is None:
        fail(
            f"`--model`: {folder} holds a {index.get('_class_name')}; this command takes a CogView2Pipeline or a "
            "pipeline of CogView."
        )
    found = KINDS[family](folder, index)
    if not found.stages:
        fail(f"`--model`: {folder} has none of {', '.join(found.components.values())}: there is nothing to train.")
    return found
