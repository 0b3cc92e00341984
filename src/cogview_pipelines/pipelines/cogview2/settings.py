"""The settings of CogView2's pipelines: the one place for their names, defaults and bounds. Standard library only."""

from dataclasses import dataclass

from ..common.settings import Settings, setting

_DRAWING = ("CogView2Pipeline", "CogView2InpaintPipeline")
_ALL = (*_DRAWING, "CogView2UpscalePipeline")
_CAPTIONS = ("CogView2CaptionPipeline",)
# From practically greedy to practically uniform. A logit is divided by up to two of them and must not overflow.
_TEMPERATURES = (1e-6, 1e6)
_COUNTS = (1, 2**31)


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """
    How pictures are drawn. The defaults are the released values; a style preset or an argument of the call overrides
    them. Those of super-resolution are `None`: its schedulers have their own.
    """

    guidance_scale: float = setting(1.0, 0, 100, "Classifier-free guidance, 1 is none; twice the time.", _DRAWING)
    text_attention_bias: float = setting(1.4, -100, 100, "How closely to follow the prompt.", _DRAWING)
    temperature: float = setting(
        1.15, *_TEMPERATURES, "Of the low-resolution tokens: lower is more regular.", _DRAWING
    )
    top_k_clusters: int = setting(
        16, *_COUNTS, "Of the low-resolution tokens: clusters to draw from.", _DRAWING, is_whole=True
    )
    cluster_temperature: float = setting(
        1.0, *_TEMPERATURES, "Of the low-resolution tokens, inside a cluster.", _DRAWING
    )
    direct_sr_temperature: float | None = setting(None, *_TEMPERATURES, "Of direct super-resolution.", _ALL)
    direct_sr_top_k_clusters: int | None = setting(
        None, *_COUNTS, "Of direct super-resolution: clusters to draw from.", _ALL, is_whole=True
    )
    direct_sr_cluster_temperature: float | None = setting(
        None, *_TEMPERATURES, "Of direct super-resolution, inside a cluster.", _ALL
    )
    iterative_sr_temperature: float | None = setting(None, *_TEMPERATURES, "Of iterative super-resolution.", _ALL)
    iterative_sr_top_k: int | list[int] | None = setting(  # noqa: RUF009 - the default is no list
        None,
        *_COUNTS,
        "Of iterative super-resolution: tokens to draw from; one per pass: 60,40,20",
        _ALL,
        is_whole=True,
        is_per_pass=True,
    )
    num_lopar_steps: int | None = setting(
        None, 0, 1000, "Passes of iterative super-resolution; 0 leaves it out.", _ALL, is_whole=True
    )


@dataclass(frozen=True)
class CaptionSettings(Settings):
    """How captions are drawn, by the strategies that draw."""

    temperature: float = setting(1.0, *_TEMPERATURES, "Of drawn captions: lower is more regular.", _CAPTIONS)
    top_k: int | None = setting(
        None, *_COUNTS, "Of drawn captions: tokens to draw from, by default all.", _CAPTIONS, is_whole=True
    )
