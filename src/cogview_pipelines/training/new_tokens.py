"""Training one new word on frozen weights (textual inversion): the options of the scripts, and what is saved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..loaders.textual_inversion import write_learned_token
from ..models.learned_tokens import check_new_token, learn_token
from ..models.tokenization import CodesAndPiecesTokenizer
from .adapters import LoraOptions
from .data.tokens import TokenData


@dataclass
class NewTokenOptions(LoraOptions):
    """What every script has that trains the model that draws prompts; a base class of its config."""

    new_token: str | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "Textual inversion: a new word of the captions, such as '<my-cat>'. Its embedding is learned, all "
            "weights stay as they are, and final/ holds the embedding alone."
        },
    )
    initializer: str = field(
        default="", kw_only=True, metadata={"help": "Known words that the new one begins with; default: all of text."}
    )

    def add_new_token(self, tokenizer: CodesAndPiecesTokenizer, trained: bool) -> None:
        """
        Let the tokenizer know the word that is to be learned, if there is one.

        Args:
            tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
            trained (`bool`): Whether the model is a trained one.

        Raises:
            ValueError: If it is no new word, or the model is new, or does not know what the word begins with.
        """
        if self.new_token is None:
            if self.initializer:
                raise ValueError(
                    f"`initializer` is what a new word begins with, but there is none, and it is "
                    f"{self.initializer!r:.100}. Name the word by `new_token`."
                )
            return
        if not trained:
            raise ValueError("`new_token` is learned by a trained model. Name it by `init_from`.")
        check_new_token(tokenizer, self.new_token, "new_token")
        unknown = tokenizer.unknown_parts(self.initializer)
        if unknown:
            raise ValueError(
                f"`initializer` must be words that the model knows, but is {self.initializer!r:.100}, of which it "
                f"does not know {', '.join(unknown)}. Name what is like {self.new_token!r}, or leave it out."
            )
        tokenizer.add_tokens([self.new_token])

    def require_new_token(self, data: TokenData, styles: bool = False) -> None:
        """
        See that the word that is to be learned stands in a caption, if there is one.

        Args:
            data ([`TokenData`]): What is trained on.
            styles (`bool`): Whether what pictures are called by their style is trained on, too.

        Raises:
            ValueError: If it stands in none: nothing could be learned of it.
        """
        if self.new_token is not None and not any(self.new_token in text for text in data.texts(styles)):
            raise ValueError(
                f"`new_token` must be a word of the captions in `data`, but none of them has {self.new_token!r}. "
                f"Write captions such as 'a {self.new_token} on a blue background'."
            )

    def learn_new_token(self, model: nn.Module, tokenizer: CodesAndPiecesTokenizer) -> None:
        """Freeze a model but for the embedding of the new word, and an adapter, if there is such a word."""
        if self.new_token is not None:
            learn_token(model, tokenizer.convert_tokens_to_ids(self.new_token), tokenizer, self.initializer)

    def saving(self, component: str, words: Sequence[str] = ()) -> Callable[[nn.Module, Path], object] | None:
        """As [`LoraOptions.saving`]; where a new word is learned, it is saved, beside the adapter if there is one."""
        save_adapter, token = super().saving(component, words), self.new_token
        if token is None:
            return save_adapter

        def save(model: nn.Module, folder: Path) -> None:
            write_learned_token(folder, token, model.get_input_embeddings().rows[0], self.initializer)
            if save_adapter is not None:
                save_adapter(model, folder)

        return save
