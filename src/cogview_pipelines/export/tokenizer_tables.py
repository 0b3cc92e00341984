"""The text tokenizer as tables: pieces with their scores, and what SentencePiece rewrites before it looks for them."""

import base64
from typing import Any

from ..models.cogview2.tokenization_icetk import IcetkTokenizer

UNIGRAM = 1
KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused"}


def tokenizer_tables(tokenizer: IcetkTokenizer) -> dict[str, Any]:
    """
    All that encoding a text takes, in a form that needs no SentencePiece.

    Args:
        tokenizer ([`IcetkTokenizer`]): The tokenizer.

    Returns:
        `dict`: What goes into `tokenizer.json`; the page on exporting describes it.

    Raises:
        ValueError: If its SentencePiece model is not of the kind that CogView2 has (unigram, without bytes).
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    if model.trainer_spec.model_type != UNIGRAM or model.trainer_spec.byte_fallback:
        raise ValueError(
            "`tokenizer` must have a unigram model of SentencePiece without byte pieces to be exported, but its model "
            f"is of type {model.trainer_spec.model_type}, byte_fallback {model.trainer_spec.byte_fallback}."
        )
    added = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if index >= tokenizer.vocab_size
    }
    return {
        "pieces": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "kinds": [KINDS[piece.type] for piece in model.pieces],
        # the size of a trie as four bytes, the trie (of Darts-clone), texts that each end with a zero byte
        "charsmap": base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode(),
        "add_dummy_prefix": model.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        "escape_whitespaces": model.normalizer_spec.escape_whitespaces,
        "treat_whitespace_as_suffix": model.trainer_spec.treat_whitespace_as_suffix,
        "first_id": tokenizer.num_image_tokens,
        "added_tokens": added,
        "boi_token": str(tokenizer.boi_token),
        "start_token_ids": [tokenizer.boi_token_id, tokenizer.start_of_english_id, tokenizer.start_of_chinese_id],
        "vocab_size": tokenizer.vocab_size,
        "first_chinese_id": tokenizer.language_ranges["zh"][0],
        "known_words": tokenizer.known_words,
    }
