"""Training adapters (LoRA) instead of the weights of a model: the options of the scripts, and what is saved."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..loaders.lora import read_saved_adapters
from ..loaders.lora_files import write_lora
from ..models.adapters import (
    DEFAULT_ADAPTER,
    TARGET_MODULES,
    adapter_config,
    adapter_weights,
    add_adapter,
    require_peft,
)

logger = logging.getLogger(__name__)

# Goes on from the names of adapters.
LEFT_OUT = (
    "are left out: they were saved beside the weights of the model, which do not have what they learned. To keep it, "
    "load the pipeline, call `fuse_lora()` and `save_pretrained(folder)`, and name that folder instead."
)


def warn_of_adapters(option: str, component: str) -> None:
    """
    Say which adapters were saved with a component of a pipeline, and are not read with it.

    Args:
        option (`str`): What names the component.
        component (`str`): Its folder, in that of the pipeline; others, and Hub ids, have no adapters.

    Raises:
        ValueError: If the list of them is damaged.
    """
    if not os.path.isdir(component):
        return
    folder = Path(os.path.abspath(component))
    names = [name for name, counts in read_saved_adapters(folder.parent)[0].items() if folder.name in counts]
    if names:
        logger.warning("The adapters %s of `%s` %s", names, option, LEFT_OUT)


@dataclass
class LoraOptions:
    """What every script that trains a transformer has; a base class of its config."""

    lora_rank: int | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "Train an adapter (LoRA) of this rank on frozen weights; only the adapter is saved, in "
            "final/pytorch_lora_weights.safetensors. 8 is a good start, with a learning rate of 1e-3 to 5e-3."
        },
    )
    lora_alpha: float | None = field(
        default=None, kw_only=True, metadata={"help": "The adapter counts alpha / rank times; default: the rank."}
    )
    lora_dropout: float = field(default=0.0, kw_only=True, metadata={"help": "Dropout of what the adapter reads."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(TARGET_MODULES),
        kw_only=True,
        metadata={"help": "Which linear layers are adapted, by the ends of their names."},
    )

    def put_adapter(self, model: nn.Module, trained: bool) -> None:
        """
        Put the adapter on a model, if one is asked for; then nothing else is trained.

        Args:
            model (`PreTrainedModel`): The model.
            trained (`bool`): Whether its weights are those of a trained model of this stage.

        Raises:
            ValueError: If the weights are new, or PEFT is missing.
        """
        if self.lora_rank is None:
            return
        if not trained:
            raise ValueError("`lora_rank` adapts a trained model. Name it: the same stage of a model that works.")
        try:
            require_peft()
        except ImportError as error:
            raise ValueError(str(error)) from error
        add_adapter(
            model, DEFAULT_ADAPTER, self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_target_modules
        )

    def saving(self, component: str, words: Sequence[str] = ()) -> Callable[[nn.Module, Path], object] | None:
        """
        What saves the trained model in a folder: an adapter alone, or `None` for all of the model.

        Args:
            component (`str`): What the model is called in a pipeline.
            words (sequence of `str`): Words that the adapter learns, which its model does not know.
        """
        if self.lora_rank is None:
            return None

        def save(model: nn.Module, folder: Path) -> None:
            write_lora(
                folder,
                {component: adapter_weights(model, DEFAULT_ADAPTER)},
                {component: adapter_config(model, DEFAULT_ADAPTER)},
                known_words=words,
            )

        return save
