"""The settings of CogView's pipelines: the one place for their names, defaults and bounds. Standard library only."""

from dataclasses import dataclass

from ..common.settings import Settings, setting

# From as good as greedy to as good as uniform; logits are divided by it.
_TEMPERATURES = (1e-6, 1e6)
_COUNTS = (1, 2**31)
_DRAWING, _UPSCALING, _CAPTIONS = (("CogViewPipeline",), ("CogViewUpscalePipeline",), ("CogViewCaptionPipeline",))
_TOP_K, _TOP_P = "Tokens to draw from.", "Draw from the likeliest tokens that together have more than this."


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How pictures are drawn. The defaults are the released values."""

    temperature: float = setting(1.0, *_TEMPERATURES, "Lower is more regular.", _DRAWING)
    top_k: int | None = setting(200, *_COUNTS, _TOP_K, _DRAWING, is_whole=True)
    top_p: float | None = setting(None, 0, 1, _TOP_P, _DRAWING)


@dataclass(frozen=True)
class UpscaleSettings(Settings):
    """How finer tokens are drawn. The defaults are the released values."""

    temperature: float = setting(1.02, *_TEMPERATURES, "Lower is more regular.", _UPSCALING)
    top_k: int | None = setting(200, *_COUNTS, _TOP_K, _UPSCALING, is_whole=True)
    top_p: float | None = setting(None, 0, 1, _TOP_P, _UPSCALING)


@dataclass(frozen=True)
class CaptionSettings(Settings):
    """How captions are drawn. The defaults are the released values."""

    temperature: float = setting(1.0, *_TEMPERATURES, "Lower is more regular.", _CAPTIONS)
    top_k: int | None = setting(200, *_COUNTS, _TOP_K, _CAPTIONS, is_whole=True)
    top_p: float | None = setting(None, 0, 1, _TOP_P, _CAPTIONS)
