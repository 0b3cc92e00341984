"""
Text to ids and back, in the one id space that images share: image codes first, then the pieces of a SentencePiece
model.

With `num_image_tokens=20000` id `i < 20000` is image code `i`, and id `20000 + i` is SentencePiece piece `i`. Three
start tokens are not in the model file; they are appended to it as ordinary pieces of score 0 when it is loaded. Every
other score is negative, so the literal text `<start_of_image>` anywhere in a string becomes that one piece.

Source: icetk (https://github.com/THUDM/icetk), the tokenizer of CogView2; its behaviour, not its code.
"""

import os
import re
import struct
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model"}

BOI_TOKEN = "<start_of_image>"
START_OF_ENGLISH_TOKEN = "<start_of_english>"
START_OF_CHINESE_TOKEN = "<start_of_chinese>"
START_TOKENS = (BOI_TOKEN, START_OF_ENGLISH_TOKEN, START_OF_CHINESE_TOKEN)
LINE_BREAK_PIECE = "<n>"

# SentencePiece ids of the released model: 100 common pieces come before the English ones, rare pieces after the
# Chinese ones.
RELEASED_LANGUAGE_RANGES = {"en": (100, 63823), "zh": (63823, 125653)}

_IMAGE_TOKEN = re.compile(r"<image_(0|[1-9][0-9]*)>")


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


def _load_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The model with the start tokens appended that it lacks (SentencePiece refuses a piece that is there twice)."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    missing = [token for token in START_TOKENS if processor.id_to_piece(processor.piece_to_id(token)) != token]
    if missing:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model + b"".join(map(_piece_record, missing)))
    return processor


class IcetkTokenizer(PreTrainedTokenizer):
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
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

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
        if isinstance(num_image_tokens, bool) or not isinstance(num_image_tokens, int):
            raise TypeError(f"`num_image_tokens` must be an integer, but is {num_image_tokens!r}.")
        if num_image_tokens < 0:
            raise ValueError(f"`num_image_tokens` must not be negative, but is {num_image_tokens}.")
        self._model = self._read_model(vocab_file)
        try:
            self.sp_model = _load_processor(self._model)
        except RuntimeError as error:
            raise ValueError(
                f"`vocab_file` {str(vocab_file)!r} is not a SentencePiece model, or is damaged ({len(self._model)} "
                "bytes). Fetch it again, or train one with training_scripts/train_tokenizer.py."
            ) from error
        self.vocab_file = os.fspath(vocab_file)
        self.num_image_tokens = num_image_tokens
        self.language_ranges = self._check_language_ranges(language_ranges)

        special = {
            "unk_token": kwargs.pop("unk_token", None) or self.sp_model.id_to_piece(self.sp_model.unk_id()),
            "pad_token": kwargs.pop("pad_token", None) or "<pad>",
        }
        for name, token in special.items():
            if not self._is_piece(str(token)):
                raise ValueError(f"`vocab_file` {str(vocab_file)!r} has no piece {str(token)!r} for `{name}`.")
        extra = kwargs.pop("extra_special_tokens", None) or ()
        extra = [*START_TOKENS, *(token for token in extra if str(token) not in START_TOKENS)]
        for name in ("is_local", "local_files_only"):  # how the file was found says nothing about the tokenizer
            kwargs.pop(name, None)
        # The special pieces are looked up again: their saved ids are wrong if `num_image_tokens` is another one now.
        added = kwargs.pop("added_tokens_decoder", {})
        kwargs["added_tokens_decoder"] = {i: token for i, token in added.items() if not self._is_piece(token.content)}
        super().__init__(
            num_image_tokens=num_image_tokens,
            language_ranges=self.language_ranges,
            extra_special_tokens=extra,
            **special,
            **kwargs,
        )

    @staticmethod
    def _read_model(vocab_file) -> bytes:
        name = VOCAB_FILES_NAMES["vocab_file"]
        if vocab_file is None:
            raise ValueError(f"`vocab_file` is missing: the folder of an `IcetkTokenizer` must hold `{name}`.")
        if not isinstance(vocab_file, (str, os.PathLike)):
            raise TypeError(
                f"`vocab_file` must be the path of `{name}`, but is of type `{type(vocab_file).__name__}`."
            )
        path = Path(vocab_file)
        if path.is_dir():
            raise ValueError(
                f"`vocab_file` {str(path)!r} is a folder, but must be the path of `{name}`. To load a saved tokenizer "
                "call `IcetkTokenizer.from_pretrained(folder)`."
            )
        if not path.is_file():
            raise FileNotFoundError(f"`vocab_file` {str(path)!r} does not exist; it must be the path of `{name}`.")
        return path.read_bytes()

    def _check_language_ranges(self, language_ranges) -> dict[str, tuple[int, int]]:
        if language_ranges is None:
            shift = self.num_image_tokens
            return {key: (low + shift, high + shift) for key, (low, high) in RELEASED_LANGUAGE_RANGES.items()}
        try:
            ranges = {key: tuple(map(int, language_ranges[key])) for key in ("en", "zh")}
            (english, english_end), (chinese, chinese_end) = ranges["en"], ranges["zh"]
        except (TypeError, KeyError, ValueError):
            english, english_end, chinese, chinese_end = 1, 0, 0, 0
        if not (self.num_image_tokens <= english <= english_end <= chinese <= chinese_end):
            raise ValueError(
                '`language_ranges` must be like {"en": (first, end), "zh": (first, end)}, in ids from '
                f"`num_image_tokens` ({self.num_image_tokens}) on, English before Chinese, but is {language_ranges!r}."
            )
        return ranges

    # The vocabulary --------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids: image codes, pieces and start tokens."""
        return self.num_image_tokens + self.sp_model.get_piece_size()

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

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids: image codes, pieces, start tokens, and what `add_tokens` added."""
        vocab = {f"<image_{code}>": code for code in range(self.num_image_tokens)}
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.get_piece_size())))
        vocab.update((piece, self.num_image_tokens + index) for index, piece in enumerate(pieces))
        vocab.update(self._added_tokens_encoder)
        return vocab

    def _update_total_vocab_size(self):
        self.total_vocab_size = self.vocab_size + sum(index >= self.vocab_size for index in self._added_tokens_decoder)

    def _is_piece(self, token: str) -> bool:
        return self.sp_model.id_to_piece(self.sp_model.piece_to_id(token)) == token

    def _convert_token_to_id(self, token: str) -> int:
        image = _IMAGE_TOKEN.fullmatch(token)
        if image and int(image[1]) < self.num_image_tokens:
            return int(image[1])
        return self.num_image_tokens + self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"`ids` must lie in 0..{len(self) - 1}, but there is {index}.")
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return self.sp_model.id_to_piece(index - self.num_image_tokens)

    # Text to ids -----------------------------------------------------------------------------------------------------

    def _update_trie(self, unique_no_split_tokens=None):
        # Only what `add_tokens` added is cut out of a text before SentencePiece sees it, not the model's own special
        # pieces: it finds the start tokens itself, and in the release the text "<pad>" is five ordinary characters.
        tokens = [token.content for index, token in self._added_tokens_decoder.items() if index >= self.vocab_size]
        for token in [*tokens, *(unique_no_split_tokens or [])]:
            self.tokens_trie.add(token)

    def tokenize(self, text: str, keep_linebreaks: bool = False, **kwargs) -> list[str]:
        """
        The pieces of a text. A run of unknown characters is one entry, spelled as in the text, with the id of `<unk>`.

        Args:
            text (`str`): Any text, also empty.
            keep_linebreaks (`bool`, *optional*, defaults to `False`): Encode a line break as `<n>`, not as a space.

        Raises:
            TypeError: If `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string, but is of type `{type(text).__name__}`.")
        if not self.tokens_trie.data:
            return self._tokenize(text, keep_linebreaks)
        pieces = []
        for part in self.tokens_trie.split(text):
            is_added = self._added_tokens_encoder.get(part, -1) >= self.vocab_size
            pieces += [part] if is_added else self._tokenize(part, keep_linebreaks)
        return pieces

    def _tokenize(self, text: str, keep_linebreaks: bool = False) -> list[str]:
        if keep_linebreaks:
            text = text.replace("\n", LINE_BREAK_PIECE)
        ids, pieces = self.sp_model.encode(text), self.sp_model.encode(text, out_type=str)
        # An unknown run may spell a piece that no text gives: "<pad>", where the model does not know "<", "p", ...
        return [
            piece if self._convert_token_to_id(piece) == self.num_image_tokens + index else self.unk_token
            for index, piece in zip(ids, pieces)
        ]

    # Ids to text -----------------------------------------------------------------------------------------------------

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that the pieces spell; `<n>` is a line break."""
        return self.sp_model.decode_pieces(list(tokens)).replace(LINE_BREAK_PIECE, "\n")

    def _decode(
        self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None, **kwargs
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens:
            skipped = set(self.all_special_ids)
            ids = [index for index in ids if index not in skipped]
        text = ""
        for is_piece, run in groupby(ids, key=lambda index: self.num_image_tokens <= index < self.vocab_size):
            if is_piece:
                pieces = self.sp_model.decode([index - self.num_image_tokens for index in run])
                text += pieces.replace(LINE_BREAK_PIECE, "\n")
            else:
                text += "".join(self.convert_ids_to_tokens(list(run)))
        clean_up = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean_up else text

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

    # Files -----------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """
        Write the SentencePiece model as it was loaded, byte for byte: the start tokens are not part of the file.

        Args:
            save_directory (`str`): An existing folder.
            filename_prefix (`str`, *optional*): Put before the file name, with a hyphen.

        Returns:
            `tuple[str]`: The path of the file.
        """
        name = VOCAB_FILES_NAMES["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        path.write_bytes(self._model)
        return (str(path),)

    def __getstate__(self) -> dict:
        # The model is kept once: the processor is rebuilt from the bytes of the file.
        return {name: value for name, value in self.__dict__.items() if name != "sp_model"}

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self.sp_model = _load_processor(self._model)


# Saved pipelines name a class by this; the package root holds it, whichever file defines it.
IcetkTokenizer.__module__ = "cogview_pipelines"
