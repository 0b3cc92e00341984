"""What the pipelines of CogView return."""

from dataclasses import dataclass

from ..common.outputs import CaptionsOutput, PicturesOutput, PreviewOutput


@dataclass
class CogViewPreviewOutput(PreviewOutput):
    """A [`PreviewOutput`] of CogView, with `"transformer"` or `"super_resolution_transformer"` as its stage."""


@dataclass
class CogViewPipelineOutput(PicturesOutput):
    """A [`PicturesOutput`] of CogView: `images`, `tokens`, `seeds`, `prompts`, `scores` of self-reranking."""


@dataclass
class CogViewCaptionPipelineOutput(CaptionsOutput):
    """A [`CaptionsOutput`] of CogView, whose `scores` are mean log-probabilities; there are always `seeds`."""


for _public in (CogViewPreviewOutput, CogViewPipelineOutput, CogViewCaptionPipelineOutput):
    _public.__module__ = "cogview_pipelines"
