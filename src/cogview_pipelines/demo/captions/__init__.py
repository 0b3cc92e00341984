"""
The words of a scene, in English and Chinese: fixed templates, by which scores are compared, and sentences as people
type them, from a grammar.
"""

from .requests import Request
from .sentences import WORDINGS, Sentence, held_out_parts, sample_sentence
from .templates import (
    CAPTION_VARIANT_KINDS,
    LANGUAGES,
    caption_variants,
    captions,
    check_language,
    sample_caption,
)
from .words import known_words, load_grammar, nouns, template_words, to_traditional

__all__ = [
    "CAPTION_VARIANT_KINDS",
    "LANGUAGES",
    "WORDINGS",
    "Request",
    "Sentence",
    "caption_variants",
    "captions",
    "check_language",
    "held_out_parts",
    "known_words",
    "load_grammar",
    "nouns",
    "sample_caption",
    "sample_sentence",
    "template_words",
    "to_traditional",
]
