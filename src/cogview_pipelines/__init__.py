"""
CogView2 for PyTorch: bilingual text-to-image with a transformer over text and image tokens.

Names are imported on first use (PEP 562), so that the command line starts at once. To diffusers and transformers this
module is where every public class lives, whichever file defines it: a saved pipeline names only `cogview_pipelines`.
Importing it is also what makes these libraries find the classes by name (`registration.py`).
"""

import importlib

from . import registration
from ._version import __version__

_EXPORTS = {
    "CogLMCanvasConfig": ".models.cogview2.modeling_coglm_canvas",
    "CogLMCanvasModel": ".models.cogview2.modeling_coglm_canvas",
    "CogLMConfig": ".models.cogview2.modeling_coglm",
    "CogLMModel": ".models.cogview2.modeling_coglm",
    "CogView2CaptionPipeline": ".pipelines.cogview2.pipeline_cogview2_caption",
    "CogView2CaptionPipelineOutput": ".pipelines.cogview2.outputs",
    "CogView2InpaintPipeline": ".pipelines.cogview2.pipeline_cogview2_inpaint",
    "CogView2InpaintPipelineOutput": ".pipelines.cogview2.outputs",
    "CogView2Pipeline": ".pipelines.cogview2.pipeline_cogview2",
    "CogView2PipelineOutput": ".pipelines.cogview2.outputs",
    "CogView2PreviewOutput": ".pipelines.cogview2.outputs",
    "CogView2UpscalePipeline": ".pipelines.cogview2.pipeline_cogview2_upscale",
    "CogViewConfig": ".models.cogview.modeling_cogview",
    "CogViewModel": ".models.cogview.modeling_cogview",
    "CogViewPipeline": ".pipelines.cogview.pipeline_cogview",
    "CogViewCaptionPipeline": ".pipelines.cogview.pipeline_cogview_caption",
    "CogViewUpscalePipeline": ".pipelines.cogview.pipeline_cogview_upscale",
    "CogViewPipelineOutput": ".pipelines.cogview.outputs",
    "CogViewCaptionPipelineOutput": ".pipelines.cogview.outputs",
    "CogViewPreviewOutput": ".pipelines.cogview.outputs",
    "CogViewTokenizer": ".models.cogview.tokenization_cogview",
    "CogViewVQConfig": ".models.image_tokenizers.modeling_cogview_vq",
    "CogViewVQModel": ".models.image_tokenizers.modeling_cogview_vq",
    "DiffusersVQConfig": ".models.image_tokenizers.modeling_diffusers_vq",
    "DiffusersVQModel": ".models.image_tokenizers.modeling_diffusers_vq",
    "GenerationInterrupted": ".pipelines.common.calls",
    "IcetkTokenizer": ".models.cogview2.tokenization_icetk",
    "IcetkVQConfig": ".models.image_tokenizers.modeling_icetk_vq",
    "IcetkVQModel": ".models.image_tokenizers.modeling_icetk_vq",
    "KeySet": ".ops.key_set",
    "LoPARScheduler": ".schedulers.scheduling_lopar",
    "PeopleWords": ".pipelines.common.people_words",
    "local_attention": ".ops.local_attention",
    "three_region_attention": ".ops.three_region_attention",
    # The base classes by which the diffusers loader recognises how to load a component.
    "PreTrainedModel": "transformers",
    "PreTrainedTokenizer": "transformers",
    "SchedulerMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
}

__all__ = [*(name for name, module in _EXPORTS.items() if module.startswith(".")), "__version__"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


registration.register()
