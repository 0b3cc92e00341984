"""New tokens of a trained model (textual inversion): their embeddings are learned, all weights stay as they are."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizer

from .layers import TokenEmbedding
from .tokenization import CodesAndPiecesTokenizer


class LearnedTokens(nn.Module):
    """
    Stands in for the token embedding of a model while the embeddings of new tokens are learned.

    Args:
        table ([`TokenEmbedding`]): The embeddings that the model has.
        first_id (`int`): Id of the first new token; the table may be longer.
        rows (`torch.Tensor` of shape `(num_tokens, hidden_size)`): What the new embeddings begin with.
    """

    def __init__(self, table: TokenEmbedding, first_id: int, rows: torch.Tensor):
        super().__init__()
        self.table, self.first_id = table, first_id
        self.rows = nn.Parameter(rows.detach().clone())

    @property
    def weight(self) -> nn.Parameter:
        """The embeddings that the model has."""
        return self.table.weight

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        num_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """As [`TokenEmbedding`], with the new tokens."""
        if hidden_states is None:
            assert input_ids is not None
            is_new = input_ids >= self.first_id
            old = self.table(input_ids.masked_fill(is_new, 0))
            new = F.embedding((input_ids - self.first_id).clamp(0, len(self.rows) - 1), self.rows)
            return torch.where(is_new[..., None], new.to(old.dtype), old)
        scores = self.table(hidden_states=hidden_states, num_tokens=num_tokens, dtype=dtype)
        if num_tokens is not None:
            return scores
        new = F.linear(hidden_states.to(dtype), self.rows.to(dtype))
        rest = scores[..., self.first_id + len(self.rows) :]
        return torch.cat([scores[..., : self.first_id], new, rest], -1)


def check_new_token(tokenizer: PreTrainedTokenizer, token: str, name: str = "token") -> None:
    """
    See that a token is one word, and new.

    Raises:
        ValueError: If not; the message calls it `name`.
    """
    if not isinstance(token, str) or token.split() != [token] or not token.isprintable():
        raise ValueError(f"`{name}` must be one word of visible letters, but is {token!r:.100}.")
    if tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id:
        raise ValueError(f"`{name}` must be a new one, but the tokenizer has {token!r}. Choose another.")


def initial_row(model: nn.Module, tokenizer: CodesAndPiecesTokenizer, text: str) -> torch.Tensor:
    """
    What the embedding of a new token begins with: the mean of those of a text, `(hidden_size,)`.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer ([`CodesAndPiecesTokenizer`]): Of the model.
        text (`str`): The text; if it is empty, the mean is that of all pieces.
    """
    table = model.get_input_embeddings().weight.detach()
    first = tokenizer.num_image_tokens
    return table[tokenizer.encode(text) or slice(first, first + tokenizer.num_pieces)].float().mean(0)


def learn_token(model: nn.Module, token_id: int, tokenizer: CodesAndPiecesTokenizer, text: str) -> LearnedTokens:
    """
    Freeze a model but for the embedding of a new token.

    Args:
        model (`PreTrainedModel`): The model; trainable adapters on it stay trainable.
        token_id (`int`): Of the new token.
        tokenizer, text: Of [`initial_row`], which it begins with.
    """
    row = initial_row(model, tokenizer, text)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and parameter.requires_grad)
    # shrunk gradients keep a whole table steady; a single row would learn how it is written rather than what it means
    model.config.embedding_gradient_scale = 1.0
    learned = LearnedTokens(model.get_input_embeddings(), token_id, row[None])
    model.set_input_embeddings(learned)
    return learned


@torch.no_grad()
def set_token(model: nn.Module, token_id: int, row: torch.Tensor) -> None:
    """
    Give a token of a model an embedding; a table that is too short grows.

    Args:
        model (`PreTrainedModel`): The model.
        token_id (`int`): The token.
        row (`torch.Tensor` of shape `(hidden_size,)`): Its embedding.
    """
    if token_id >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    table = model.get_input_embeddings().weight
    table[token_id] = row.to(table)
