"""
Text to ids and back, in the one id space that images share: image codes first, then the pieces of a SentencePiece
model.

With `num_image_tokens=20000` id `i < 20000` is image code `i`, and id `20000 + i` is SentencePiece piece `i`. Three
start tokens are not in the model file; they are appended to it as ordinary pieces of score 0 when it is loaded. Every
other score is negative, so the literal text `<start_of_image>` anywhere in a string becomes that one piece.

Source: icetk (https://github.com/THUDM/icetk), the tokenizer of CogView2; its behaviour, not its code.
"""

import os
import struct
from collections.abc import Sequence

import sentencepiece

from ..tokenization import CodesAndPiecesTokenizer

VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model"}

BOI_TOKEN = "<start_of_image>"
START_OF_ENGLISH_TOKEN = "<start_of_english>"
START_OF_CHINESE_TOKEN = "<start_of_chinese>"
START_TOKENS = (BOI_TOKEN, START_OF_ENGLISH_TOKEN, START_OF_CHINESE_TOKEN)

# SentencePiece ids of the released model: 100 common pieces come before the English ones, rare pieces after the
# Chinese ones.
RELEASED_LANGUAGE_RANGES = {"en": (100, 63823), "zh": (63823, 125653)}


def _piece_record(piece: str) -> bytes:
    """
    One more entry for the `pieces` of a serialised SentencePiece model, with score 0, in protobuf's wire format.

    A protobuf message is a list of tagged fields, and entries of a repeated field may stand anywhere in it, so that a
    piece is added by appending its bytes to the file. A tag byte is `field number * 8 + wire type` (2: length and
    bytes, 5: four bytes): `ModelProto.pieces` is field 1; in it, `piece` (text) is field 1 and `score` (float32) is
    field 2.
    """
    text = piece.encode("utf-8")
    record = bytes([1 * 8 + 2, len(text)]) + text + bytes([2 * 8 + 5]) + struct.pack("<f", 0.0)
    assert len(record) < 128, "longer lengths need more than one byte"
    return bytes([1 * 8 + 2, len(record)]) + record


class IcetkTokenizer(CodesAndPiecesTokenizer):
    """
    Bilingual tokenizer of CogView2: SentencePiece unigram pieces, whose ids start where the image codes end.

    Text is encoded exactly as SentencePiece encodes it, nothing is added before or after it, and empty text is an
    empty list. Spaces at the ends and repeated spaces are lost, a line break counts as a space unless
    `keep_linebreaks=True` is passed to `encode`, `tokenize` or a call, and each run of unknown characters becomes one
    `<unk>`. Batches are padded on the left: a call with `padding=True, return_tensors="pt"` gives `input_ids` and
    `attention_mask` (0 on padding), both of shape `(batch_size, longest)`.

    Args:
        vocab_file (`str` or `os.PathLike`):
            `ice_text.model`: a SentencePiece model with the pieces `<unk>`, `<pad>` and `<n>`.
        num_image_tokens (`int`, *optional*, defaults to 20000):
            Number of image codes, which take the ids `0..num_image_tokens - 1` and are named `<image_0>` and so on.
        language_ranges (`dict[str, tuple[int, int]]`, *optional*):
            First id and one past the last id of the English (`"en"`) and of the Chinese (`"zh"`) pieces. By
            default those of the released model: `{"en": (20100, 83823), "zh": (83823, 145653)}` with 20,000 codes.
        kwargs: As for [`~transformers.PreTrainedTokenizer`], such as `padding_side` (`"left"` by default).

    Raises:
        TypeError: If an argument has the wrong type.
        FileNotFoundError: If `vocab_file` does not exist.
        ValueError: If `vocab_file` is not a SentencePiece model, lacks a piece, or the numbers make no sense.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    line_break_piece = "<n>"

    boi_token = BOI_TOKEN
    start_of_english_token = START_OF_ENGLISH_TOKEN
    start_of_chinese_token = START_OF_CHINESE_TOKEN

    def __init__(
        self,
        vocab_file: str | os.PathLike,
        num_image_tokens: int = 20000,
        language_ranges: dict[str, Sequence[int]] | None = None,
        **kwargs,
    ):
        self.load_model(vocab_file, num_image_tokens)
        self.language_ranges = self._check_language_ranges(language_ranges)
        super().__init__(
            special_tokens={"unk_token": self.sp_model.id_to_piece(self.sp_model.unk_id()), "pad_token": "<pad>"},
            extra_special_tokens=START_TOKENS,
            saved_extra_special_tokens=kwargs.pop("extra_special_tokens", None),
            num_image_tokens=num_image_tokens,
            language_ranges=self.language_ranges,
            **kwargs,
        )

    @classmethod
    def load_processor(cls, model: bytes) -> sentencepiece.SentencePieceProcessor:
        """The model with the start tokens added that it lacks (SentencePiece refuses a piece that is there twice)."""
        processor = super().load_processor(model)
        missing = [token for token in START_TOKENS if processor.id_to_piece(processor.piece_to_id(token)) != token]
        return super().load_processor(model + b"".join(map(_piece_record, missing))) if missing else processor

    def _check_language_ranges(self, language_ranges) -> dict[str, tuple[int, int]]:
        if language_ranges is None:
            shift = self.num_image_tokens
            return {key: (low + shift, high + shift) for key, (low, high) in RELEASED_LANGUAGE_RANGES.items()}
        try:
            english, english_end = map(int, language_ranges["en"])
            chinese, chinese_end = map(int, language_ranges["zh"])
        except (TypeError, KeyError, ValueError):
            english, english_end, chinese, chinese_end = 1, 0, 0, 0
        if not (self.num_image_tokens <= english <= english_end <= chinese <= chinese_end):
            raise ValueError(
                '`language_ranges` must be like {"en": (first, end), "zh": (first, end)}, in ids from '
                f"`num_image_tokens` ({self.num_image_tokens}) on, English before Chinese, but is {language_ranges!r}."
            )
        return {"en": (english, english_end), "zh": (chinese, chinese_end)}

    @property
    def boi_token_id(self) -> int:
        """Id of `<start_of_image>`."""
        return self._convert_token_to_id(BOI_TOKEN)

    @property
    def start_of_english_id(self) -> int:
        """Id of `<start_of_english>`, which stands before an English caption that the model is to write or score."""
        return self._convert_token_to_id(START_OF_ENGLISH_TOKEN)

    @property
    def start_of_chinese_id(self) -> int:
        """Id of `<start_of_chinese>`, which stands before a Chinese caption that the model is to write or score."""
        return self._convert_token_to_id(START_OF_CHINESE_TOKEN)

    def encode_before_image(self, text: str) -> list[int]:
        """
        Ids of a text as they stand before `<start_of_image>`.

        These are those of [`encode`], but for a text that ends in white space: the space is a piece of its own there,
        since the original encodes both as one string.
        """
        ids = self.encode(text + BOI_TOKEN) if text.strip() and text[-1].isspace() else []
        return ids[:-1] if ids and ids[-1] == self.boi_token_id else self.encode(text)

    # Language --------------------------------------------------------------------------------------------------------

    def language(self, text: str | Sequence[int]) -> str:
        """
        `"zh"` if the text has any piece from the first Chinese one on (so a Chinese or a rare one), else `"en"`.

        Args:
            text (`str`, or a sequence or one-dimensional tensor of `int`):
                A text or its ids. Image codes, start tokens and padding say nothing about the language and are passed
                over.

        Raises:
            TypeError: If `text` is neither.
        """
        if isinstance(text, str):
            text = self.encode(text)
        try:
            ids = [int(index) for index in text]
        except (TypeError, ValueError) as error:
            raise TypeError(f"`text` must be a string or a sequence of ids, but is {text!r}.") from error
        start_tokens = {self.boi_token_id, self.start_of_english_id, self.start_of_chinese_id}
        chinese, _ = self.language_ranges["zh"]
        return "zh" if any(chinese <= index < self.vocab_size and index not in start_tokens for index in ids) else "en"


# Saved pipelines name a class by this; the package root holds it, whichever file defines it.
IcetkTokenizer.__module__ = "cogview_pipelines"
