"""Tiny real components of CogView that the tests share: 4 x 4 tokens a picture, 48 codes, ids that fit together."""

import io
from pathlib import Path

import sentencepiece
import torch

from cogview_pipelines.models.cogview.modeling_cogview import CogViewConfig, CogViewModel
from cogview_pipelines.models.cogview.sequences import SequenceLayout
from cogview_pipelines.models.cogview.tokenization_cogview import COMMAND_TOKENS, CogViewTokenizer
from cogview_pipelines.models.image_tokenizers.modeling_cogview_vq import CogViewVQConfig, CogViewVQModel

from .utils import captions, randomize

IMAGE_GRID = (4, 4)
NUM_IMAGE_TOKENS = 48
NUM_PIECES = 54
COMMANDS = NUM_IMAGE_TOKENS + NUM_PIECES
VOCAB_SIZE = COMMANDS + len(COMMAND_TOKENS) + 5  # a few rows to spare, as in the release
MAX_LENGTH, MAX_SUPER_RESOLUTION_LENGTH = 40, 46


def make_layout(**changes) -> SequenceLayout:
    """Where things stand in the tiny model's sequences."""
    fields = {
        "image_grid": IMAGE_GRID,
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "command_token_id": COMMANDS,
        "max_length": MAX_LENGTH,
        "max_super_resolution_length": MAX_SUPER_RESOLUTION_LENGTH,
    }
    return SequenceLayout(**{**fields, **changes})


def make_cogview(seed: int = 0, **config) -> CogViewModel:
    """A CogView of two layers for pictures of 4 x 4 tokens."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "command_token_id": COMMANDS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "max_super_resolution_length": MAX_SUPER_RESOLUTION_LENGTH,
        "image_grid": IMAGE_GRID,
    }
    return randomize(CogViewModel(CogViewConfig(**{**fields, **config})), seed)


def make_cogview_vq(seed: int = 0, **config) -> CogViewVQModel:
    """An image tokenizer with as many codes as the tiny CogView has image tokens."""
    fields = {"num_embeddings": NUM_IMAGE_TOKENS, "embedding_dim": 8, "hidden_channels": 8}
    return randomize(CogViewVQModel(CogViewVQConfig(**{**fields, **config})), seed)


def make_cogview_tokenizer(folder: Path) -> CogViewTokenizer:
    """A text model of 54 pieces, trained on the tests' captions."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions() * 4),
        model_writer=file,
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path = Path(folder) / "cog-pretrain.model"
    path.write_bytes(file.getvalue())
    return CogViewTokenizer(path, num_image_tokens=NUM_IMAGE_TOKENS)


def make_texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random text ids, one list per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(NUM_IMAGE_TOKENS, COMMANDS, (length,), generator=generator).tolist() for length in lengths]


def make_image_tokens(batch_size: int, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random image tokens of shape `(batch_size, length)`."""
    return torch.randint(NUM_IMAGE_TOKENS, (batch_size, length), generator=torch.Generator().manual_seed(seed))
