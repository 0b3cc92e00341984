"""
What the text tokenizers of all families are built of: one id space, in which image codes come first, then the pieces
of a SentencePiece model, then tokens of the family's own.
"""

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

from ..json_lines import is_unicode
from .known_words import KnownWords, has_chinese

SENTENCE_ENDS = (".", "。", "!", "?", "！", "？")
DRAWS = "transformer"  # what the model that reads texts to draw them is called in a pipeline
_IMAGE_TOKEN = re.compile(r"<image_(0|[1-9][0-9]*)>")


class CodesAndPiecesTokenizer(PreTrainedTokenizer):
    """
    Base of tokenizers whose SentencePiece ids start where the image codes end.

    With `num_image_tokens=20000` id `i < 20000` is image code `i`, named `<image_i>`, and id `20000 + i` is piece `i`;
    the names in `own_tokens` follow. A text is encoded exactly as SentencePiece encodes it: the name of an image code
    or of an own token in it means no more than its letters.

    A subclass calls [`load_model`][CodesAndPiecesTokenizer.load_model] before the constructor of this class.

    Args:
        special_tokens (`dict[str, str]`): Tokens that must be there, by their names in transformers.
        extra_special_tokens (sequence of `str`): More tokens that `skip_special_tokens` leaves out.
        known_words (sequence of `str`, *optional*):
            All words that the model was trained on, where those are few: others are parts of a text that it does not
            know, although they have pieces. Saved with the tokenizer.
        component_words (`dict[str, list[str]]`, *optional*):
            By component of the pipeline, words that this one knows, and others do not; those of the one that draws are
            among `known_words`, too. Saved with the tokenizer.
        kwargs: As for [`~transformers.PreTrainedTokenizer`].
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    own_tokens: tuple[str, ...] = ()
    # A piece that stands for a line break, if the family has one.
    line_break_piece: str | None = None

    def __init__(
        self,
        *,
        special_tokens: dict[str, str],
        extra_special_tokens: Sequence[str] = (),
        known_words: Sequence[str] | None = None,
        component_words: Mapping[str, Sequence[str]] | None = None,
        **kwargs,
    ):
        special = {name: kwargs.pop(name, None) or token for name, token in special_tokens.items()}
        for name, token in special.items():
            if not self._is_own(str(token)):
                raise ValueError(f"`vocab_file` {self.vocab_file!r} has no piece {str(token)!r} for `{name}`.")
        extra = kwargs.pop("saved_extra_special_tokens", None) or ()
        extra = [*extra_special_tokens, *(token for token in extra if str(token) not in extra_special_tokens)]
        for name in ("is_local", "local_files_only"):  # how the file was found says nothing about the tokenizer
            kwargs.pop(name, None)
        # The special pieces are looked up again: their saved ids are wrong if `num_image_tokens` is another one now.
        added = kwargs.pop("added_tokens_decoder", {})
        kwargs["added_tokens_decoder"] = {i: token for i, token in added.items() if not self._is_own(token.content)}
        self._component_words = {name: list(words) for name, words in (component_words or {}).items()}
        alone = set(self._component_words.get(DRAWS, ()))
        self._own_words = None if known_words is None else [word for word in known_words if word not in alone]
        # By component, words of adapters that count, and of those that are part of the weights.
        self._active_words: dict[str, list[str]] = {}
        self._fused_words: dict[str, list[str]] = {}
        self._lists: dict[str, KnownWords] = {}
        if known_words is not None:
            kwargs["known_words"] = list(known_words)  # saved by this name
        super().__init__(extra_special_tokens=extra, **special, **kwargs)
        self._keep_words()

    @property
    def known_words(self) -> list[str] | None:
        """All words that the weights that draw know, fused adapters among them; `None` where there is no list."""
        return None if self._own_words is None else _once(self._own_words, self._words_of(DRAWS))

    def unknown_words(self, texts: Iterable[str], component: str = DRAWS) -> list[str]:
        """
        Words of these texts that are not in the list `known_words`, nor tokens that were added, each once; none where
        there is no list.

        Args:
            texts (iterable of `str`): Such as captions.
            component (`str`): What the model that reads them is called in a pipeline.
        """
        return [] if self._own_words is None else self._words_outside(self._known_to(component), texts)

    def add_known_words(self, texts: Iterable[str], component: str | None = None) -> list[str]:
        """
        Say that the model knows the words of these texts now, because it was trained on them.

        Args:
            texts (iterable of `str`): Such as captions.
            component (`str`, *optional*): The one that does, by its name in a pipeline; default: all of the model.

        Returns:
            `list[str]`: The words that were not in its list before, whatever adapters know. Nothing is done, and the
            list is empty, if there is none: then no word counts as unknown.
        """
        if self._own_words is None:
            return []
        more = [] if component is None else self._component_words.setdefault(component, [])
        added = self._words_outside(KnownWords([*self._own_words, *more]), texts)
        (self._own_words if component is None else more).extend(added)
        self._keep_words()
        return added

    def set_adapter_words(self, active: Iterable[str] = (), fused: Iterable[str] = (), component: str = DRAWS) -> None:
        """
        Say which words the adapters of a model bring, in place of what was said of it before; nothing is done where
        there is no list `known_words`.

        Args:
            active (iterable of `str`): Words of adapters that count: known, but not saved with the tokenizer.
            fused (iterable of `str`): Words of adapters that are part of the weights: they are saved.
            component (`str`): What the model is called in a pipeline.
        """
        self._active_words[component], self._fused_words[component] = list(active), list(fused)
        self._keep_words()

    def _keep_words(self) -> None:
        self._lists.clear()  # made again when they are asked for
        if self._own_words is None:
            return
        self.init_kwargs["known_words"] = self.known_words  # what is saved
        self.init_kwargs.pop("component_words", None)
        words = {name: self._words_of(name) for name in (*self._component_words, *self._fused_words)}
        if any(words.values()):
            self.init_kwargs["component_words"] = {name: own for name, own in words.items() if own}

    def _words_of(self, component: str) -> list[str]:
        """Words that the weights of a component know, and those of others do not."""
        words = _once(self._component_words.get(component, ()), self._fused_words.get(component, ()))
        known_to_all = set(self._own_words or ())
        return [word for word in words if word not in known_to_all]

    def _known_to(self, component: str) -> KnownWords:
        """All words that a component knows now, where there is a list."""
        if component not in self._lists:
            active = self._active_words.get(component, ())
            self._lists[component] = KnownWords([*(self._own_words or ()), *self._words_of(component), *active])
        return self._lists[component]

    def _words_outside(self, known: KnownWords, texts: Iterable[str]) -> list[str]:
        """Words of texts that are not in a list, nor added tokens, each once."""
        found: dict[str, None] = {}
        for text in texts:
            whole, left = self._split_by(known, text)
            found.update(dict.fromkeys(word for word in whole if any(part in word for part in left)))
        return list(found)

    def _split_by(self, known: KnownWords, text: str) -> tuple[list[str], list[str]]:
        """Words of a text that are not in a list, and what added tokens leave of them."""
        # A token that was added since is known, whatever the list says, and a word of the list whatever is added.
        own = [part for part in self.tokens_trie.split(text) if not self.is_added(part)]
        return known.unknown(text), known.unknown(" ".join(own))

    def load_model(self, vocab_file: str | os.PathLike, num_image_tokens: int) -> None:
        """Read the SentencePiece model and check the number of image codes."""
        if isinstance(num_image_tokens, bool) or not isinstance(num_image_tokens, int):
            raise TypeError(f"`num_image_tokens` must be an integer, but is {num_image_tokens!r}.")
        if num_image_tokens < 0:
            raise ValueError(f"`num_image_tokens` must not be negative, but is {num_image_tokens}.")
        self._model = self._read_model(vocab_file)
        try:
            self.sp_model = self.load_processor(self._model)
        except RuntimeError as error:
            raise ValueError(
                f"`vocab_file` {str(vocab_file)!r} is not a SentencePiece model, or is damaged ({len(self._model)} "
                "bytes). Fetch it again, or train one with training_scripts/train_tokenizer.py."
            ) from error
        self.vocab_file = os.fspath(vocab_file)
        self.num_image_tokens = num_image_tokens

    @classmethod
    def load_processor(cls, model: bytes) -> sentencepiece.SentencePieceProcessor:
        """The SentencePiece processor of the bytes of a file."""
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        return processor

    @classmethod
    def _read_model(cls, vocab_file) -> bytes:
        name, own = cls.vocab_files_names["vocab_file"], cls.__name__
        if vocab_file is None:
            raise ValueError(f"`vocab_file` is missing: the folder of `{own}` must hold `{name}`.")
        if not isinstance(vocab_file, (str, os.PathLike)):
            raise TypeError(
                f"`vocab_file` must be the path of `{name}`, but is of type `{type(vocab_file).__name__}`."
            )
        path = Path(vocab_file)
        if path.is_dir():
            raise ValueError(
                f"`vocab_file` {str(path)!r} is a folder, but must be the path of `{name}`. To load a saved tokenizer "
                f"call `{own}.from_pretrained(folder)`."
            )
        if not path.is_file():
            raise FileNotFoundError(f"`vocab_file` {str(path)!r} does not exist; it must be the path of `{name}`.")
        return path.read_bytes()

    # The vocabulary --------------------------------------------------------------------------------------------------

    @property
    def num_pieces(self) -> int:
        """Number of SentencePiece pieces."""
        return self.sp_model.get_piece_size()

    @property
    def vocab_size(self) -> int:
        """Number of ids: image codes, pieces and the family's own tokens."""
        return self.num_image_tokens + self.num_pieces + len(self.own_tokens)

    @property
    def sentence_end_ids(self) -> list[int]:
        """Ids of the pieces that end a sentence, with and without the mark of a word's beginning."""
        pieces = [mark + end for end in SENTENCE_ENDS for mark in ("", "▁")]
        ids = {piece: self.convert_tokens_to_ids(piece) for piece in pieces}
        return sorted(index for piece, index in ids.items() if self.convert_ids_to_tokens(index) == piece)

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids: image codes, pieces, the family's own, and what `add_tokens` added."""
        vocab = {f"<image_{code}>": code for code in range(self.num_image_tokens)}
        names = [*self.sp_model.id_to_piece(list(range(self.num_pieces))), *self.own_tokens]
        vocab.update((name, self.num_image_tokens + index) for index, name in enumerate(names))
        vocab.update(self._added_tokens_encoder)
        return vocab

    def _update_total_vocab_size(self):
        self.total_vocab_size = self.vocab_size + sum(index >= self.vocab_size for index in self._added_tokens_decoder)

    def _is_own(self, token: str) -> bool:
        return token in self.own_tokens or self.sp_model.id_to_piece(self.sp_model.piece_to_id(token)) == token

    def _convert_token_to_id(self, token: str) -> int:
        image = _IMAGE_TOKEN.fullmatch(token)
        if image and int(image[1]) < self.num_image_tokens:
            return int(image[1])
        if token in self.own_tokens:
            return self.num_image_tokens + self.num_pieces + self.own_tokens.index(token)
        return self.num_image_tokens + self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise IndexError(f"`ids` must lie in 0..{len(self) - 1}, but there is {index}.")
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        index -= self.num_image_tokens
        if index < self.num_pieces:
            return self.sp_model.id_to_piece(index)
        return self.own_tokens[index - self.num_pieces]

    # Text to ids -----------------------------------------------------------------------------------------------------

    def _update_trie(self, unique_no_split_tokens=None):
        # Only what `add_tokens` added is cut out of a text before SentencePiece sees it, not the special tokens: of
        # those that are pieces SentencePiece finds what it should, and in the releases the text "<pad>" is letters.
        tokens = [token.content for index, token in self._added_tokens_decoder.items() if index >= self.vocab_size]
        for token in [*tokens, *(unique_no_split_tokens or [])]:
            self.tokens_trie.add(token)

    def encode(self, text, *args, **kwargs) -> list[int]:
        """
        The ids of a text; arguments as of `PreTrainedTokenizer.encode`.

        A text alone goes to SentencePiece once and its numbers are used as they come, in a twentieth of the time.
        """
        if args or kwargs or not isinstance(text, str) or self.tokens_trie.data:
            return super().encode(text, *args, **kwargs)
        ids, first = self._numbers(text), self.num_image_tokens
        if not self._read_otherwise.isdisjoint(ids):
            return super().encode(text)
        return [first + index for index in ids]

    @functools.cached_property
    def _read_otherwise(self) -> frozenset[int]:
        """Pieces called like an image code or a token of the family's own: their ids are not their numbers."""
        names = [*(f"<image_{code}>" for code in range(self.num_image_tokens)), *self.own_tokens]
        return frozenset(self.sp_model.piece_to_id(names)) - {self.sp_model.unk_id()} if names else frozenset()

    def tokenize(self, text: str, keep_linebreaks: bool = False, **kwargs) -> list[str]:
        """
        The pieces of a text. A run of unknown characters is one entry, spelled as in the text, with the id of `<unk>`.

        Args:
            text (`str`): Any text, also empty.
            keep_linebreaks (`bool`, *optional*, defaults to `False`):
                Encode a line break as the piece for it, not as a space.

        Raises:
            TypeError: If `text` is not a string.
            ValueError: If line breaks are to be kept by a family that has no piece for them, or the text holds half of
                a surrogate pair.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string, but is of type `{type(text).__name__}`.")
        if keep_linebreaks and self.line_break_piece is None:
            raise ValueError(
                f"`keep_linebreaks` must be False for `{type(self).__name__}`, which has no piece for line breaks."
            )
        if not self.tokens_trie.data:
            return self._tokenize(text, keep_linebreaks)
        pieces: list[str] = []
        for part in self.tokens_trie.split(text):
            pieces += [part] if self.is_added(part) else self._tokenize(part, keep_linebreaks)
        return pieces

    def is_added(self, part: str) -> bool:
        """Whether a part of a text is a token that `add_tokens` added, such as a learned word."""
        return self._added_tokens_encoder.get(part, -1) >= self.vocab_size

    def _tokenize(self, text: str, keep_linebreaks: bool = False) -> list[str]:
        if keep_linebreaks:
            text = text.replace("\n", self.line_break_piece or "\n")
        ids, pieces = self._numbers(text), self.sp_model.encode(text, out_type=str)
        # An unknown run may spell a token that no text gives: "<pad>", where the model does not know "<", "p", ...
        return [
            piece if self._convert_token_to_id(piece) == self.num_image_tokens + index else self.unk_token
            for index, piece in zip(ids, pieces)
        ]

    def _numbers(self, text: str) -> list[int]:
        """The numbers of the pieces, as SentencePiece counts them."""
        try:
            return self.sp_model.encode(text)
        except (RuntimeError, UnicodeError):
            if is_unicode(text):
                raise
            raise ValueError(
                f"`text` must be Unicode text, but {text[:60]!r} holds half of a surrogate pair."
            ) from None

    def unknown_parts(self, text: str, component: str = DRAWS) -> list[str]:
        """
        The parts of a text that are lost on a model, each once: runs of characters that have no piece, and where the
        model brings the list of its words (`known_words`), words that are not among them.

        Args:
            text (`str`): Any text, also empty.
            component (`str`): What the model that reads it is called in a pipeline.

        Raises:
            TypeError: If `text` is not a string.
            ValueError: If it holds half of a surrogate pair.
        """
        whole, left = ([], []) if self._own_words is None else self._split_by(self._known_to(component), text)
        words = [word for word in left if any(word in one for one in whole)]
        parts = self.parts_without_piece(text)
        return words + [part for part in parts if not any(part.casefold() in word for word in words)]

    def known_text(self, text: str) -> str:
        """
        A text without what [`unknown_parts`][CodesAndPiecesTokenizer.unknown_parts] names, where the model brings the
        list of its words: what a pipeline draws. Words that training never showed are noise to such a model, and it
        draws something else because of them.

        Args:
            text (`str`): Any text, also empty.

        Returns:
            `str`: The text as it is, if there is no such list, nothing is unknown, or nothing else would be left.

        Raises:
            TypeError, ValueError: As [`unknown_parts`][CodesAndPiecesTokenizer.unknown_parts].
        """
        unknown = set(self.unknown_parts(text))
        if self._own_words is None or not unknown:
            return text
        known = self._known_part(text, unknown)
        return known if _says_something(known) else text

    def knows_some(self, text: str) -> bool:
        """
        Whether anything is left of a text without what [`unknown_parts`][CodesAndPiecesTokenizer.unknown_parts] names.

        Args:
            text (`str`): Any text, also empty.

        Raises:
            TypeError, ValueError: As [`unknown_parts`][CodesAndPiecesTokenizer.unknown_parts].
        """
        return _says_something(self._known_part(text, set(self.unknown_parts(text))))

    def _known_part(self, text: str, unknown: set[str]) -> str:
        words = self._known_to(DRAWS)
        parts = self.tokens_trie.split(text)
        kept = [part if self.is_added(part) else self._without(part, words, unknown) for part in parts]
        return " ".join(kept).strip()

    def _without(self, text: str, words: KnownWords, unknown: set[str]) -> str:
        text = words.without(text, unknown)
        for part in sorted(self.parts_without_piece(text), key=len, reverse=True):
            text = text.replace(part, "" if has_chinese(part) else " ")
        return words.without(text, unknown)  # what hangs in the air now

    def parts_without_piece(self, text: str) -> list[str]:
        """
        The parts of a text that no training can teach, each once: runs of characters that have no piece.

        Args:
            text (`str`): Any text, also empty.

        Raises:
            TypeError, ValueError: As [`unknown_parts`][CodesAndPiecesTokenizer.unknown_parts].
        """
        space = "\u2581"  # as SentencePiece writes it; by itself it says nothing
        unknown = [part for part in self.tokenize(text) if self.convert_tokens_to_ids(part) == self.unk_token_id]
        stripped = dict.fromkeys(part.strip(space) for part in unknown)
        return [part for part in stripped if part and part != self.unk_token]

    # Ids to text -----------------------------------------------------------------------------------------------------

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that the pieces spell."""
        return self._mend_linebreaks(self.sp_model.decode_pieces(list(tokens)))

    def _mend_linebreaks(self, text: str) -> str:
        return text if self.line_break_piece is None else text.replace(self.line_break_piece, "\n")

    def _runs(self, ids: Sequence[int]) -> list[tuple[bool, list[int]]]:
        """The ids in runs: whether they are all pieces, and which they are."""
        end = self.num_image_tokens + self.num_pieces
        runs = groupby(ids, key=lambda index: self.num_image_tokens <= index < end)
        return [(is_text, list(run)) for is_text, run in runs]

    def _spell(self, ids: Sequence[int]) -> str:
        """The text of ids of pieces."""
        return self._mend_linebreaks(self.sp_model.decode([index - self.num_image_tokens for index in ids]))

    def _decode(
        self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None, **kwargs
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens:
            skipped = set(self.all_special_ids)
            ids = [index for index in ids if index not in skipped]
        text = "".join(
            self._spell(run) if is_text else "".join(self.convert_ids_to_tokens(run))
            for is_text, run in self._runs(ids)
        )
        clean_up = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean_up else text

    # Files -----------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """
        Write the SentencePiece model as it was loaded, byte for byte.

        Args:
            save_directory (`str`): An existing folder.
            filename_prefix (`str`, *optional*): Put before the file name, with a hyphen.

        Returns:
            `tuple[str]`: The path of the file.
        """
        name = self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        path.write_bytes(self._model)
        return (str(path),)

    def __getstate__(self) -> dict:
        # The model is kept once: the processor is rebuilt from the bytes of the file.
        return {name: value for name, value in self.__dict__.items() if name != "sp_model"}

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self.sp_model = self.load_processor(self._model)


def _once(*lists: Iterable[str]) -> list[str]:
    """What is in several lists, each once."""
    return list(dict.fromkeys(chain(*lists)))


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))
