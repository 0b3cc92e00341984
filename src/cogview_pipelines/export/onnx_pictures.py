"""
Draws with an exported model: onnxruntime runs the graphs, numpy does the rest, in the order of operations of the page
for browsers (`docs/browser/pictures.js`). It stands on neither PyTorch nor transformers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTION = "model.json"
GREEDY_TEMPERATURE = 1e-6  # the lowest that the pipelines take


@dataclass
class OnnxPicture:
    """
    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`): RGB bytes.
        tokens (`dict[str, np.ndarray]`): After each stage, `(rows, columns)`.
    """

    pixels: np.ndarray
    tokens: dict[str, np.ndarray] = field(default_factory=dict)


class OnnxPictures:
    """
    A folder that [`export_onnx`] wrote.

    Args:
        folder (`str` or `Path`): The folder.
        session_options (*optional*): `onnxruntime.SessionOptions` of all graphs.

    Raises:
        FileNotFoundError: If the folder holds no exported model, or not all of it.
        ValueError: If a file has another size than it was written with.
    """

    def __init__(self, folder: str | Path, session_options: Any = None):
        import onnxruntime

        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"`folder` {self.folder} holds no exported model: there is no {DESCRIPTION}.")
        self.description = json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8"))
        for name, file in self.description["files"].items():
            size = (self.folder / name).stat().st_size
            if size != file["bytes"]:
                raise ValueError(
                    f"{self.folder / name} must have {file['bytes']} bytes, but has {size}. Export again."
                )
        self.sessions = {
            name: onnxruntime.InferenceSession(
                self.folder / files["graph"], session_options, providers=["CPUExecutionProvider"]
            )
            for name, files in self.description["graphs"].items()
        }
        self.cluster_labels = np.array(self.description["cluster_labels"])

    def draw(
        self,
        text: Sequence[int],
        negative_text: Sequence[int] = (),
        style: str | None = None,
        seed: int = 0,
        greedy: bool = False,
    ) -> OnnxPicture:
        """
        One picture, that which `CogView2Pipeline` makes with `torch.Generator().manual_seed(seed)`, up to rounding.

        Args:
            text (sequence of `int`): Ids of the prompt with the suffix of its style.
            negative_text (sequence of `int`): Ids of what guidance leads away from.
            style (`str`, *optional*): Whose settings are used; by default those of the default style.
            seed (`int`): Of the noise.
            greedy (`bool`): Draw the likeliest tokens, as all temperatures of 1e-6 do.

        Raises:
            ValueError: If there is no such style, or the text is longer than the model takes.
        """
        known = self.description
        style = known["default_style"] if style is None else style
        if style is not None and style not in known["styles"]:
            raise ValueError(f"`style` must be one of {sorted(known['styles'])}, but is {style!r}.")
        settings = known["plain"] if style is None else known["styles"][style]
        longest = known["text"]["max_text_tokens"]
        if max(len(text), len(negative_text)) > longest:
            raise ValueError(f"`text` may have {longest} tokens, but has {max(len(text), len(negative_text))}.")
        noise, tokens = _Noise(seed), {}
        tokens["transformer"] = self._write(list(text), list(negative_text), settings, noise, greedy)
        canvas = tokens["transformer"]
        for stage in settings["stages"]:
            canvas = tokens[stage["name"]] = self._refine(stage, list(text), canvas, noise, greedy)
        (pixels,) = self.sessions["vqvae"].run(None, {"tokens": canvas[None]})
        pixels = np.rint(pixels[0].transpose(1, 2, 0) * 255).astype(np.uint8)
        return OnnxPicture(pixels, tokens)

    def _write(self, text: list[int], negative: list[int], settings: dict, noise: "_Noise", greedy: bool):
        """Low-resolution tokens, one by one."""
        known, scale = self.description["text"], settings["guidance_scale"]
        texts = [text] if scale == 1 else [text, negative]
        rows, columns = known["image_grid"]
        numbers = noise.draw(rows * columns)
        ids, positions, bias, key_bias = text_to_image(texts, known, settings["text_attention_bias"])
        shape = (2, len(texts), known["num_heads"], 0, known["head_dim"])
        past = [np.zeros(shape, np.float32)] * known["num_layers"]
        tokens: list[int] = []
        for index in range(rows * columns):
            feeds = {"input_ids": ids, "position_ids": positions, "bias": bias}
            feeds |= {f"past.{layer}": values for layer, values in enumerate(past)}
            logits, *past = self.sessions["transformer"].run(None, feeds)
            if len(texts) == 2:
                logits = logits[1:] + np.float32(scale) * (logits[:1] - logits[1:])
            tokens.append(
                int(self._draw(logits, settings, settings["top_k_clusters"], numbers[index : index + 1], greedy)[0])
            )
            ids = np.full((len(texts), 1), tokens[-1])
            positions = np.full((len(texts), 1), known["image_position"] + 1 + index)
            bias = np.concatenate([key_bias, np.zeros((len(texts), index + 1), np.float32)], 1)[:, None]
        return np.array(tokens).reshape(rows, columns)

    def _refine(self, stage: dict, text: list[int], tokens: np.ndarray, noise: "_Noise", greedy: bool) -> np.ndarray:
        """The canvas after all passes of a stage."""
        known, canvas_of = self.description["text"], self.description["canvases"][stage["name"]]
        rows, columns = canvas_of["fine_grid"]
        direct, slots = canvas_of["super_resolution"] == "direct", canvas_of["num_text_slots"]
        numbers = noise.draw(rows * columns)
        if direct:
            context = direct_super_resolution(text, tokens.ravel(), slots, known)
            canvas = np.full(rows * columns, known["boi_token_id"])
        else:
            context = iterative_super_resolution(text, slots)
            canvas = tokens.ravel()
        grid = np.array(stage["step_grid"])
        step_map = np.tile(grid, (rows // grid.shape[0], columns // grid.shape[1])).ravel()
        for step, top_k in enumerate(stage["top_k"], 1):
            cells = np.flatnonzero(step_map == step)
            visible = np.where(step_map >= step, known["boi_token_id"], canvas)
            feeds = dict(zip(("context_ids", "context_positions", "context_mask"), context))
            names = {each.name for each in self.sessions[stage["name"]].get_inputs()}
            feeds = {name: value for name, value in feeds.items() if name in names}
            (logits,) = self.sessions[stage["name"]].run(None, {**feeds, "canvas_ids": visible[None], "cells": cells})
            canvas = canvas.copy()
            canvas[cells] = self._draw(logits[0], stage, top_k, numbers[cells], greedy)
        return canvas.reshape(rows, columns)

    def _draw(self, logits: np.ndarray, settings: dict, top_k: int, noise: np.ndarray, greedy: bool) -> np.ndarray:
        """Tokens of rows of logits."""
        temperature = GREEDY_TEMPERATURE if greedy else settings["temperature"]
        if settings["cluster_temperature"] is None:
            return sample_tokens(logits, noise, temperature, top_k)
        within = 1.0 if greedy else settings["cluster_temperature"]
        clusters = self.description["num_clusters"]
        return sample_cluster_tokens(logits, noise, self.cluster_labels, clusters, temperature, top_k, within)


class _Noise:
    """The numbers that a CPU generator of PyTorch draws: 24 bits of each of those of a Mersenne Twister."""

    def __init__(self, seed: int):
        self._source = np.random.RandomState(seed % 2**32)

    def draw(self, count: int) -> np.ndarray:
        """`(count, 2)` float32 numbers in [0, 1)."""
        bits = self._source.randint(0, 2**32, (count, 2), dtype=np.uint32)
        return (bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


# Sequences: as `models/cogview2/sequences.py`, of single pictures


def _padded(texts: list[list[int]], num_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-aligned ids, positions, and where text is; `(texts, num_slots)` each."""
    ids: np.ndarray = np.zeros((len(texts), num_slots), np.int64)
    positions: np.ndarray = np.zeros_like(ids)
    is_text: np.ndarray = np.zeros((len(texts), num_slots), bool)
    for row, text in enumerate(texts):
        start = num_slots - len(text)
        ids[row, start:], positions[row, start:], is_text[row, start:] = text, np.arange(len(text)), True
    return ids, positions, is_text


def text_to_image(texts: list[list[int]], known: dict, text_attention_bias: float) -> tuple[np.ndarray, ...]:
    """
    Ids, positions and biases of `[padding] text <start_of_image>`: between its tokens, `(texts, length, length)`, and
    of it for what comes later, `(texts, length)`.
    """
    ids, positions, is_text = _padded(texts, max(map(len, texts)))
    start: np.ndarray = np.ones((len(texts), 1), np.int64)
    ids = np.concatenate([ids, known["boi_token_id"] * start], 1)
    positions = np.concatenate([positions, known["image_position"] * start], 1)
    is_text, is_padding = np.pad(is_text, ((0, 0), (0, 1))), np.pad(~is_text, ((0, 0), (0, 1)))
    length = ids.shape[1]
    own: np.ndarray = np.eye(length, dtype=bool)
    seen = (is_text[:, None] & ~is_padding[:, :, None]) | (is_padding[:, :, None] & own)
    seen[:, -1, -1] = True
    bias, masked = is_text * np.float32(text_attention_bias), np.float32(known["masked_score"])
    return ids, positions, np.where(seen, bias[:, None], masked), np.where(is_padding, masked, bias)


def direct_super_resolution(
    text: list[int], tokens: np.ndarray, num_slots: int, known: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions and mask of `padding text` in slots, of which one stays free, and the low-resolution tokens."""
    ids, positions, is_text = _padded([text[: num_slots - 1]], num_slots)
    is_image = np.concatenate([np.zeros_like(is_text), np.ones((1, len(tokens)), bool)], 1)
    is_padding = np.pad(~is_text, ((0, 0), (0, len(tokens))))
    is_text = ~is_image & ~is_padding
    mask = (
        is_text[:, None] | (is_image[:, :, None] & is_image[:, None]) | (is_padding[:, :, None] & is_padding[:, None])
    )
    image_positions = known["image_position"] + 1 + np.arange(len(tokens))
    return np.concatenate([ids, tokens[None]], 1), np.concatenate([positions, image_positions[None]], 1), mask


def iterative_super_resolution(text: list[int], num_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions and mask of the first tokens of the text in slots, all of which see the text only."""
    ids, positions, is_text = _padded([text[:num_slots]], num_slots)
    return ids, positions, np.repeat(is_text[:, None], num_slots, 1)


# Sampling: as `generation/sampling.py`


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def draw(probabilities: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """An index of each row `(rows, choices)`: the first whose cumulative sum is above the share `noise` of all."""
    sums = probabilities.cumsum(-1, dtype=np.float64).astype(np.float32)
    total = sums[:, -1]
    threshold = np.minimum(noise * total, np.nextafter(total, np.float32(0)))
    drawn = (sums <= threshold[:, None]).sum(-1)
    is_possible = np.take_along_axis(probabilities, drawn[:, None], 1)[:, 0] > 0
    return np.where(is_possible, drawn, probabilities.argmax(-1))


def sample_tokens(logits: np.ndarray, noise: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """Top-k sampling of rows of logits."""
    logits = logits / np.float32(temperature)
    least = np.partition(logits, -min(top_k, logits.shape[-1]))[:, -min(top_k, logits.shape[-1])]
    return draw(_softmax(np.where(logits < least[:, None], -np.inf, logits)), noise[:, 1])


def sample_cluster_tokens(
    logits: np.ndarray,
    noise: np.ndarray,
    labels: np.ndarray,
    num_clusters: int,
    temperature: float,
    top_k: int,
    cluster_temperature: float,
) -> np.ndarray:
    """First one of the heaviest clusters, then a code in it."""
    logits = logits / np.float32(temperature)
    masses: np.ndarray = np.zeros((len(logits), num_clusters), np.float32)
    for row, probabilities in zip(masses, _softmax(logits)):
        np.add.at(row, labels, probabilities)
    top_k = min(top_k, num_clusters)
    kept = np.sort(np.argsort(-masses, -1, kind="stable")[:, :top_k], -1)
    cluster = np.take_along_axis(kept, draw(np.take_along_axis(masses, kept, 1), noise[:, 0])[:, None], 1)
    inside = np.where(labels == cluster, logits / np.float32(cluster_temperature), -np.inf)
    return draw(_softmax(inside), noise[:, 1])
