"""
Text to image as the original system computes it, on the weights of one of our pipelines, to compare the time.

The pictures have the same distribution. What differs is how they are computed: keys and values grow by concatenation;
attention is scores, mask and softmax one after the other, with masks of full size; logits are made at every position
that is read, from a copy of the token embedding in float32; tokens are drawn in a Python loop over the pictures;
super-resolution reads text and low-resolution tokens anew in each pass, works on four pictures at a time, draws all
unknown cells in each pass, and begins with a copy of the weights of the stage from main memory.
"""

import time

import torch
import torch.nn.functional as F

from cogview_pipelines import CogLMCanvasModel, CogLMModel, CogView2Pipeline
from cogview_pipelines.generation.sampling import sample_cluster_tokens, sample_tokens
from cogview_pipelines.generation.token_sequence import TokenSequence
from cogview_pipelines.models.cogview2.sequences import direct_super_resolution, iterative_super_resolution
from cogview_pipelines.models.cogview2.sequences import text_to_image as text_to_image_context
from cogview_pipelines.ops.key_set import KeySet
from cogview_pipelines.ops.local_attention import local_attention

CHUNK = 4  # pictures of super-resolution at a time
HIDDEN = -10000.0

Past = list[tuple[torch.Tensor, torch.Tensor]]


def attend(query, key, value, mask, bias):
    """Heads first; masked scores get -10000."""
    scores = (query / query.shape[-1] ** 0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores * mask + HIDDEN * (1 - mask)
    return scores.softmax(-1) @ value


def project(attention, states):
    parts = attention.query_key_value(states).chunk(3, -1)
    return [part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts]


def feed_forward(layer, states, attended):
    states = states + layer.attention_output_layernorm(attended)
    mlp = layer.mlp.dense_4h_to_h(F.gelu(layer.mlp.dense_h_to_4h(layer.mlp_layernorm(states)), approximate="tanh"))
    return states + layer.mlp_output_layernorm(mlp)


def dense_layer(layer, states, mask, bias, past):
    """The states after a layer, and all keys and values that it has seen."""
    query, key, value = project(layer.attention, layer.attention_layernorm(states))
    if past is not None:
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    attended = attend(query, key, value, mask, bias).transpose(1, 2).flatten(2)
    return feed_forward(layer, states, layer.attention.dense(attended)), key, value


def all_logits(model: CogLMModel | CogLMCanvasModel, states: torch.Tensor) -> torch.Tensor:
    """Of the image tokens, at every position."""
    states, weight = model.final_layernorm(states), model.word_embeddings.weight[: model.config.num_image_tokens]
    if isinstance(model, CogLMCanvasModel) and model.config.super_resolution == "iterative":
        return (states @ weight.T).float()
    return states.float() @ weight.float().T


def forward(model, ids, positions, mask, bias, past: Past | None):
    states = model.word_embeddings(ids) + model.position_embeddings(positions)
    new: Past = []
    for index, layer in enumerate(model.layers):
        states, key, value = dense_layer(layer, states, mask, bias, None if past is None else past[index])
        new.append((key, value))
    return all_logits(model, states), new


def draft(pipe: CogView2Pipeline, texts: list[list[int]], settings: dict, noise: torch.Tensor) -> torch.Tensor:
    """Low-resolution tokens of pictures whose texts are of one length, `(batch_size, image_length)`."""
    model, layout, device = pipe.transformer, pipe.layout, pipe._execution_device
    labels, num_clusters = pipe.vqvae.cluster_labels, pipe.vqvae.config.num_clusters
    scale = settings["guidance_scale"]

    def read(text: list[int], batch_size: int):
        context = text_to_image_context([text], layout).to(device)
        length = len(text) + 1 + layout.image_length
        whole = torch.ones(length, length, device=device).tril()
        whole[:, : len(text)] = 1
        whole[: len(text), len(text) :] = 0
        mask = whole.to(model.dtype)[None, None]
        bias = torch.zeros(length, device=device, dtype=model.dtype)
        bias[: len(text)] = settings["text_attention_bias"]
        start = len(text) + 1
        logits, past = forward(
            model, context.input_ids, context.position_ids, mask[..., :start, :start], bias[:start], None
        )
        past = [(key.repeat(batch_size, 1, 1, 1), value.repeat(batch_size, 1, 1, 1)) for key, value in past]
        return {"mask": mask, "bias": bias, "past": past, "logits": logits.expand(batch_size, -1, -1), "start": start}

    runs = [read(texts[0], len(texts))] + ([read([], len(texts))] if scale != 1 else [])
    tokens = torch.full((len(texts), layout.image_length), -1, device=device)
    for index in range(layout.image_length):
        logits = runs[0]["logits"][:, -1]
        if scale != 1:
            unwanted = runs[1]["logits"][:, -1]
            logits = unwanted + scale * (logits - unwanted)
        for row in range(len(texts)):
            tokens[row, index] = sample_cluster_tokens(
                logits[row],
                noise[row, index],
                labels,
                settings["temperature"],
                settings["top_k_clusters"],
                settings["cluster_temperature"],
                num_clusters,
            )
        if index + 1 == layout.image_length:
            break
        for run in runs:
            slot = run["start"] + index
            position = torch.full((len(texts), 1), layout.image_position + 1 + index, device=device)
            run["logits"], run["past"] = forward(
                model,
                tokens[:, index : index + 1],
                position,
                run["mask"][..., slot : slot + 1, : slot + 1],
                run["bias"][: slot + 1],
                run["past"],
            )
    return tokens


def canvas_forward(model: CogLMCanvasModel, context: TokenSequence, canvas: torch.Tensor) -> torch.Tensor:
    """Logits at every cell, of context and canvas read together."""
    config = model.config
    states = model.word_embeddings(context.input_ids) + model.position_embeddings(context.position_ids)
    cells = model.word_embeddings(canvas) + model.canvas_position_embeddings.weight
    mask = context.attention_mask[:, None].to(model.dtype)
    direct = config.super_resolution == "direct"
    hidden = None if direct else HIDDEN * (~context.key_mask).float()
    length = states.shape[1]
    states = torch.cat([states, cells], 1)
    for layer in model.layers:
        normed = layer.attention_layernorm(states)
        query, key, value = project(layer.attention, normed[:, :length])
        attended = attend(query, key, value, mask, None).transpose(1, 2).flatten(2)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        own = layer.canvas_attention if direct else layer.attention
        slots = config.num_text_slots
        seen = (
            KeySet(key[:, slots:], value[:, slots:], config.image_grid, config.cross_kernel_size)
            if direct
            else KeySet(key, value, bias=hidden)
        )
        query, key, value = (part.transpose(1, 2) for part in project(own, normed[:, length:]))
        canvas = KeySet(key, value, config.fine_grid, config.kernel_size)
        windows = local_attention(query, [canvas, seen], config.fine_grid, backend="reference")
        attended = torch.cat([layer.attention.dense(attended), own.dense(windows.flatten(2))], 1)
        states = feed_forward(layer, states, attended)
    return all_logits(model, states)[:, length:]


def super_resolve(pipe, stage, texts, tokens, noise) -> torch.Tensor:
    """Tokens `(batch_size, rows, columns)`, of a few pictures."""
    model, scheduler = getattr(pipe, stage), getattr(pipe, stage.replace("transformer", "scheduler"))
    config, device = model.config, pipe._execution_device
    rows, columns = config.fine_grid
    if config.super_resolution == "direct":
        context = direct_super_resolution(texts, tokens.cpu(), config.num_text_slots, config.layout)
        canvas = torch.full((len(texts), rows, columns), config.boi_token_id, device=device)
    else:
        context, canvas = iterative_super_resolution(texts, config.num_text_slots), tokens
    context = context.to(device)
    for timestep in scheduler.timesteps.tolist():
        unknown = scheduler.masked_positions(timestep, rows, columns).to(device)
        visible = canvas.masked_fill(unknown, config.boi_token_id).flatten(1)
        logits = canvas_forward(model, context, visible).unflatten(1, (rows, columns))
        top_k, settings = scheduler._top_k(timestep), scheduler.config
        drawn = []
        for row in range(len(texts)):
            if settings.cluster_temperature is None:
                drawn.append(sample_tokens(logits[row], noise[row], settings.temperature, top_k))
            else:
                drawn.append(
                    sample_cluster_tokens(
                        logits[row],
                        noise[row],
                        pipe.vqvae.cluster_labels,
                        settings.temperature,
                        top_k,
                        settings.cluster_temperature,
                    )
                )
        canvas = torch.where(unknown, torch.stack(drawn), canvas)
    return canvas


class OriginalWay:
    """
    Make pictures of one prompt as the original does.

    Args:
        pipe (`CogView2Pipeline`): Whose weights and settings are used. All weights are on the device.
    """

    def __init__(self, pipe: CogView2Pipeline):
        self.pipe = pipe
        self.stages = [
            stage
            for stage in ("direct_sr_transformer", "iterative_sr_transformer")
            if getattr(pipe, stage) is not None
        ]
        # what the original keeps in main memory, of each stage
        self.copies = {
            stage: [parameter.detach().to("cpu", copy=True) for parameter in getattr(pipe, stage).parameters()]
            for stage in self.stages
        }

    @torch.no_grad()
    def __call__(self, prompt: str, batch_size: int, generators: list[torch.Generator], limit: float) -> dict:
        """
        Returns:
            `dict`: `tokens`, and `seconds` by stage; `None` instead of both where `limit` seconds have passed between
                stages.
        """
        pipe, device = self.pipe, self.pipe._execution_device
        texts = [pipe.tokenizer.encode(prompt)] * batch_size
        settings, seconds = pipe.check_inputs(prompt), {}

        def noise(*shape):
            return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators]).to(device)

        def timed(stage, function):
            start = time.perf_counter()
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[stage] = time.perf_counter() - start
            if sum(seconds.values()) > limit:
                raise TimeoutError(f"more than {limit} s after {stage}")
            return result

        def refine(stage, tokens):
            model = getattr(pipe, stage)
            for parameter, copy in zip(model.parameters(), self.copies[stage]):
                parameter.copy_(copy)
            own = noise(*model.config.fine_grid, 2)
            parts = [slice(start, start + CHUNK) for start in range(0, batch_size, CHUNK)]
            return torch.cat([super_resolve(pipe, stage, texts[p], tokens[p], own[p]) for p in parts])

        own = noise(pipe.layout.image_length, 2)
        tokens = timed("transformer", lambda: draft(pipe, texts, settings, own))
        for stage in self.stages:
            tokens = timed(stage, lambda stage=stage, tokens=tokens: refine(stage, tokens))
        if tokens.ndim == 2:
            tokens = tokens.unflatten(1, pipe.layout.image_grid)
        timed("vqvae", lambda: pipe.vqvae.decode(tokens, pipe.config.compression_rate))
        return {"tokens": tokens, "seconds": seconds}
