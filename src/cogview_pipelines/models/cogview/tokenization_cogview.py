"""
Text to ids and back for CogView: 8,192 image codes, 50,000 SentencePiece pieces, 27 command tokens, in this order.

Source: CogView (https://github.com/THUDM/CogView), its behaviour, not its code.
"""

import os
from collections.abc import Callable, Sequence

from ..tokenization import CodesAndPiecesTokenizer

VOCAB_FILES_NAMES = {"vocab_file": "cog-pretrain.model"}

COMMAND_TOKENS = (
    "[PAD]",
    *(f"[{kind}{index}]" for kind in ("BOI", "EOI", "ROI") for index in (1, 2, 3)),
    "[SEP]",
    "[MASK]",
    "[CLS]",
    "[ENC]",
    "[TINY]",
    "[SMALL]",
    "[BASE]",
    "[BIG]",
    *(f"[POS{index}]" for index in range(9)),
)
# What announces a picture of so many rows and columns of tokens.
SIZE_TOKENS = {8: "[TINY]", 16: "[SMALL]", 32: "[BASE]", 64: "[BIG]"}
TO_GENERATE = -1

# Queries as the released scripts make them; `{}` is filled with what the user gives. The picture of 16 x 16 tokens in
# `low_level_super_resolution` is announced by [BASE], not [SMALL], as the released weights expect.
QUERY_TEMPLATES = {
    "text_to_image": "[ROI1] {} [BASE] [BOI1] [MASK]*1024",
    "image_to_text": "[BASE] [BOI1] [Image]{} [EOI1] [ROI1] [MASK]*20",
    "low_level_super_resolution": "[ROI1] {} [BASE] [BOI1] [Image]{} [EOI1] [ROI2] [POS0] [BASE] [BOI2] [MASK]*1024",
    "super_resolution": "[ROI1] {} [BASE] [BOI1] [Image]{}",
    "post_selection": "[BASE] [BOI1] [Image]{} [EOI1] [ROI1] {}",
}


class CogViewTokenizer(CodesAndPiecesTokenizer):
    """
    Bilingual tokenizer of CogView: image codes first, then SentencePiece pieces, then command tokens.

    A text is encoded exactly as SentencePiece encodes it, and empty text is an empty list. Spaces at the ends and
    repeated spaces are lost, a line break counts as a space, full-width forms become ASCII, and each run of unknown
    characters becomes one `<unk>`. The name of a command token in a text is its letters; only [`encode_query`] takes
    it for the token. Batches are padded on the left with `[PAD]`.

    Args:
        vocab_file (`str` or `os.PathLike`): `cog-pretrain.model`: a SentencePiece model with a piece `<unk>`.
        num_image_tokens (`int`, *optional*, defaults to 8192):
            Number of image codes, which take the ids `0..num_image_tokens - 1` and are named `<image_0>` and so on.
        kwargs: As for [`~transformers.PreTrainedTokenizer`], such as `padding_side` (`"left"` by default).

    Raises:
        TypeError: If an argument has the wrong type.
        FileNotFoundError: If `vocab_file` does not exist.
        ValueError: If `vocab_file` is not a SentencePiece model, or the number makes no sense.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    own_tokens = COMMAND_TOKENS

    def __init__(self, vocab_file: str | os.PathLike, num_image_tokens: int = 8192, **kwargs):
        self.load_model(vocab_file, num_image_tokens)
        super().__init__(
            special_tokens={"unk_token": self.sp_model.id_to_piece(self.sp_model.unk_id()), "pad_token": "[PAD]"},
            extra_special_tokens=COMMAND_TOKENS[1:],
            saved_extra_special_tokens=kwargs.pop("extra_special_tokens", None),
            num_image_tokens=num_image_tokens,
            **kwargs,
        )

    @property
    def command_token_id(self) -> int:
        """Id of the first command token, which is one past the last piece (release: 58,192)."""
        return self.num_image_tokens + self.num_pieces

    def decode_parts(self, ids: Sequence[int]) -> list[str]:
        """
        The texts and command tokens among some ids, one entry for each command and each run of text between them.

        Image codes and `-1` are left out. This is what the released captioning prints.

        Args:
            ids (sequence or one-dimensional tensor of `int`): Any ids.
        """
        parts = []
        for is_text, run in self._runs([int(index) for index in ids]):
            if is_text:
                parts.append(self._spell(run))
            else:
                parts += self.convert_ids_to_tokens([index for index in run if index >= self.num_image_tokens])
        return parts

    def encode_query(self, query: str, read_codes: Callable[[str], Sequence[int]] | None = None) -> list[int]:
        """
        The ids of a query string of the release, in which command names are commands.

        A query is split at single spaces. `[MASK]` is -1, "to be generated", `[MASK]*N` so many of them; `[Image]PATH`
        is the codes of a picture, and `[ImageK]PATH` the first `K` of them with -1 for the rest; another name of a
        command token is that token. What stands between is joined again and encoded as text, each stretch by itself.

        For parity and for those who write queries; the pipelines never take commands out of a user's text.

        Args:
            query (`str`): The query. A path in it has neither spaces nor `]`.
            read_codes (*optional*): Function of a path that returns the codes of the picture.

        Raises:
            TypeError: If `query` is not a string.
            ValueError: If a number in it cannot be read, or it has a picture and `read_codes` is missing.
        """
        if not isinstance(query, str):
            raise TypeError(f"`query` must be a string, but is of type `{type(query).__name__}`.")
        ids: list[int] = []
        words: list[str] = []

        def end_text() -> None:
            ids.extend(self.encode(" ".join(words)))
            words.clear()

        for part in query.split(" "):
            new = self._command_ids(part, read_codes)
            if new is None:
                words.append(part)
                continue
            end_text()
            ids.extend(new)
        end_text()
        return ids

    def _command_ids(self, part: str, read_codes) -> list[int] | None:
        """The ids of one part of a query, or `None` if it is text."""
        if part == "[MASK]":
            return [TO_GENERATE]
        if part in COMMAND_TOKENS:
            return [self._convert_token_to_id(part)]
        if part.startswith("[MASK]*"):
            count = part.removeprefix("[MASK]*")
            if not count.isdecimal() or int(count) < 1:
                raise ValueError(f"`query` must have a positive number after [MASK]*, but has {part!r}.")
            return [TO_GENERATE] * int(count)
        if part.startswith("[Image"):
            known, bracket, path = part.removeprefix("[Image").partition("]")
            if not bracket or (known and not known.isdecimal()):
                raise ValueError(f"`query` must name a picture as [Image]PATH or [Image100]PATH, but has {part!r}.")
            if read_codes is None:
                raise ValueError(f"`read_codes` must be given, because `query` has a picture: {part!r}.")
            codes = [int(code) for code in read_codes(path)]
            first = int(known) if known else len(codes)
            return codes[:first] + [TO_GENERATE] * (len(codes) - first)
        return None


# Saved pipelines name a class by this; the package root holds it, whichever file defines it.
CogViewTokenizer.__module__ = "cogview_pipelines"


def fill_query(template: str, fields: str) -> str:
    """
    A query of one of [`QUERY_TEMPLATES`].

    Args:
        template (`str`): A name of `QUERY_TEMPLATES`, or a template of one's own with `{}` in it.
        fields (`str`): What fills the `{}`, separated by tab characters.

    Raises:
        ValueError: If there are fewer fields than places for them.
    """
    template = QUERY_TEMPLATES.get(template, template)
    values = fields.split("\t")
    if len(values) < template.count("{}"):
        raise ValueError(
            f"`fields` must have {template.count('{}')} parts separated by tabs for {template!r}, but has "
            f"{len(values)}."
        )
    return template.format(*values)
