"""
The demo data: captioned pictures composed from four emoji artwork sets, in English and Chinese, and a scorer that
reads them back.

A [`Scene`] says what a picture shows; `captions`, `render` and `split` are functions of a scene; a [`Scope`] is the
set of scenes that a model was trained on; the [`Scorer`] judges a picture against a scene without a neural network.
"""

from .caption_reader import CaptionReading, read_caption
from .captions import (
    CAPTION_VARIANT_KINDS,
    LANGUAGES,
    WORDINGS,
    Request,
    Sentence,
    caption_variants,
    captions,
    sample_caption,
    sample_sentence,
)
from .rendering import NATIVE_SIZE, SpriteSet, render, slot_boxes
from .scenes import (
    BACKGROUNDS,
    LAYOUTS,
    RELATIONS,
    SPLITS,
    STYLES,
    Concept,
    Scene,
    Scope,
    is_usable,
    iterate_scenes,
    load_concepts,
    sample_scene,
    sample_scenes,
    split,
)
from .scorer import Reading, Scorer

__all__ = [
    "BACKGROUNDS",
    "CAPTION_VARIANT_KINDS",
    "LANGUAGES",
    "LAYOUTS",
    "NATIVE_SIZE",
    "RELATIONS",
    "SPLITS",
    "STYLES",
    "WORDINGS",
    "CaptionReading",
    "Concept",
    "Reading",
    "Request",
    "Scene",
    "Scope",
    "Scorer",
    "Sentence",
    "SpriteSet",
    "caption_variants",
    "captions",
    "is_usable",
    "iterate_scenes",
    "load_concepts",
    "read_caption",
    "render",
    "sample_caption",
    "sample_scene",
    "sample_scenes",
    "sample_sentence",
    "slot_boxes",
    "split",
]
