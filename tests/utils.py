"""Tiny real components that the tests share. Their ids and grids fit together, as those of a pipeline do."""

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2

from cogview_pipelines.models.cogview2.modeling_coglm import CogLMConfig, CogLMModel
from cogview_pipelines.models.cogview2.modeling_coglm_canvas import CogLMCanvasConfig, CogLMCanvasModel
from cogview_pipelines.models.cogview2.sequences import text_to_image
from cogview_pipelines.models.cogview2.tokenization_icetk import IcetkTokenizer
from cogview_pipelines.models.image_tokenizers.modeling_icetk_vq import IcetkVQConfig, IcetkVQModel

IMAGE_GRID = (4, 4)
FINE_GRID = (12, 12)
NUM_IMAGE_TOKENS = 48
VOCAB_SIZE = 112
MAX_TEXT_TOKENS = 30
BOI, START_OF_ENGLISH, START_OF_CHINESE = 108, 109, 110
NUM_CLUSTERS = 6

NOUNS = {"tiger": "一只老虎", "cat": "一只猫", "apple": "一个苹果", "car": "一辆汽车", "tree": "一棵树"}
COLOURS = {"blue": "蓝色", "green": "绿色", "white": "白色", "red": "红色"}


def skip_or_fail(reason: str) -> None:
    """Skip a test of a page, unless this is where pages must be tested."""
    if os.environ.get("COGVIEW_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """Draw every parameter anew, biases and norms too, so that leaving any of them out changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def make_coglm(super_resolution: str | None = None, seed: int = 0, **config) -> CogLMModel | CogLMCanvasModel:
    """A CogLM of two layers for a 4 x 4 grid, or one of its super-resolution stages to 12 x 12."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 56,
        "image_position": 32,
        "image_grid": IMAGE_GRID,
        "max_text_tokens": MAX_TEXT_TOKENS,
        "boi_token_id": BOI,
        "start_of_english_token_id": START_OF_ENGLISH,
        "start_of_chinese_token_id": START_OF_CHINESE,
        "pad_token_id": NUM_IMAGE_TOKENS + 3,
    }
    if super_resolution is None:
        return randomize(CogLMModel(CogLMConfig(**{**fields, **config})), seed)
    canvas = {
        "super_resolution": super_resolution,
        "fine_grid": FINE_GRID,
        "num_text_slots": {"direct": MAX_TEXT_TOKENS, "iterative": 4}[super_resolution],
        "kernel_size": (5, 3),
        "cross_kernel_size": (3, 3),
    }
    return randomize(CogLMCanvasModel(CogLMCanvasConfig(**{**canvas, **fields, **config})), seed)


def make_vq_model(seed: int = 0, **config) -> IcetkVQModel:
    """An image tokenizer of one level, 8x, with as many codes as the tiny CogLM has image tokens."""
    fields = {
        "num_embeddings": NUM_IMAGE_TOKENS,
        "embedding_dim": 8,
        "base_channels": 8,
        "encoder_channel_multipliers": (1, 1, 1),
        "decoder_channel_multipliers": {8: (1, 1, 1, 1)},
        "compression_rates": (8,),
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "num_clusters": NUM_CLUSTERS,
    }
    model = randomize(IcetkVQModel(IcetkVQConfig(**{**fields, **config})), seed)
    model.cluster_labels.copy_(cluster_labels())
    return model


def cluster_labels() -> torch.Tensor:
    """A cluster of each image code; the clusters differ in size and none is empty."""
    labels = torch.randint(NUM_CLUSTERS, (NUM_IMAGE_TOKENS,), generator=torch.Generator().manual_seed(0))
    labels[:NUM_CLUSTERS] = torch.arange(NUM_CLUSTERS)
    return labels


def make_texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random text ids, one list per length."""
    source = random.Random(seed)
    return [[source.randrange(NUM_IMAGE_TOKENS + 5, BOI) for _ in range(length)] for length in lengths]


def make_image_tokens(batch_size: int, length: int = IMAGE_GRID[0] * IMAGE_GRID[1], seed: int = 0) -> torch.Tensor:
    """Random image tokens of shape `(batch_size, length)`."""
    return torch.randint(NUM_IMAGE_TOKENS, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def text_to_image_arguments(model: CogLMModel, lengths: list[int], bias: float = 1.4) -> dict:
    """Arguments of one forward pass over texts of these lengths and random pictures."""
    texts, image = make_texts(lengths), make_image_tokens(len(lengths))
    sequence = text_to_image(texts, model.config.layout, image)
    return {
        "input_ids": sequence.input_ids,
        "position_ids": sequence.position_ids,
        "attention_mask": sequence.attention_mask,
        "text_mask": sequence.text_mask,
        "text_attention_bias": bias,
    }


def build_mask(length: int, may_attend: Callable[[int, int], bool]) -> torch.Tensor:
    """A mask by its definition: `may_attend(row, column)` for every pair of positions."""
    return torch.tensor([[bool(may_attend(row, column)) for column in range(length)] for row in range(length)])


def hole(*cells: tuple[int, int]) -> torch.Tensor:
    """A completion mask with these cells."""
    mask = torch.zeros(IMAGE_GRID, dtype=torch.bool)
    for row, column in cells:
        mask[row, column] = True
    return mask


def captions() -> list[str]:
    """English and Chinese texts, which the tiny tokenizer knows every word of."""
    texts = []
    for noun, noun_zh in NOUNS.items():
        for colour, colour_zh in COLOURS.items():
            texts += [f"a {noun} on a {colour} background.", f"{noun_zh},{colour_zh}背景。"]
    return texts


def make_tokenizer(folder: Path) -> IcetkTokenizer:
    """Train a text model on [`captions`] and put its pieces in the order of the release: common, English, Chinese."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions() * 4),
        model_writer=file,
        vocab_size=90,
        hard_vocab_limit=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["<n>"],
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    groups = [list(model.pieces[:5]), [], [], []]
    for entry in model.pieces[5:]:
        letters = entry.piece.strip("▁")
        groups[1 if not letters.isalpha() else 2 if letters.isascii() else 3].append(entry)
    del model.pieces[:]
    model.pieces.extend(entry for group in groups for entry in group)
    path = Path(folder) / "ice_text.model"
    path.write_bytes(model.SerializeToString())
    common, english, chinese = len(groups[0]) + len(groups[1]), len(groups[2]), len(groups[3])
    first = NUM_IMAGE_TOKENS + common
    ranges = {"en": (first, first + english), "zh": (first + english, first + english + chinese)}
    return IcetkTokenizer(path, num_image_tokens=NUM_IMAGE_TOKENS, language_ranges=ranges)


def token_config(tokenizer: IcetkTokenizer) -> dict[str, int]:
    """Fields of a `CogLMConfig` that fit a tokenizer."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "num_image_tokens": tokenizer.num_image_tokens,
        "boi_token_id": tokenizer.boi_token_id,
        "start_of_english_token_id": tokenizer.start_of_english_id,
        "start_of_chinese_token_id": tokenizer.start_of_chinese_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_clip():
    """A random CLIP of one layer, and its processor with a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({piece: index for index, piece in enumerate(pieces)}, [], model_max_length=12)
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(pieces), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**sides, **words, "pad_token_id": 1},
        vision_config={**sides, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    size = {"height": 16, "width": 16}
    torch.manual_seed(0)
    return CLIPModel(config).eval(), CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer)
