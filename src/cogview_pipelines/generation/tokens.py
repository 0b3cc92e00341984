"""`generate` appends tokens to sequences, one by one or as many at once as are certain. Tensors only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..models.cogview2.modeling_coglm import CogLMModel
from .decoders import Decoder, Decoding, encode_context
from .parallel import ParallelLoop, Window
from .sampling import FiniteCheck, Generators, draw_noise
from .token_sequence import TokenSequence

Sampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TO_GENERATE = -1


@torch.no_grad()
def generate(
    model: CogLMModel,
    context: TokenSequence,
    sampler: Sampler,
    entries: torch.Tensor,
    entry_positions: torch.Tensor,
    *,
    num_images_per_context: int | Sequence[int] = 1,
    text_attention_bias: float = 0.0,
    guidance_scale: float | None = None,
    full_vocabulary: bool = False,
    generator: Generators = None,
    device: torch.device | str | None = None,
    decoding: Decoding | None = None,
    row_length: int = 1,
    callback: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    on_pass: Callable[[], None] | None = None,
) -> torch.Tensor:
    """
    Append tokens to a context, each seeing the whole context and the tokens before it.

    With a `decoding` that predicts several positions at once ([`Decoding`], `parallel`), the tokens are the same, in
    fewer passes, if -1 stands in the same columns of every row, with the same positions: see `generation/parallel.py`.
    In 16 bits, sums of another order may draw another token where two are nearly tied.

    Args:
        model (`CogLMModel`): The model.
        context (`TokenSequence`): What is known, encoded in one forward pass.
        sampler: Function of float32 logits `(batch_size, tokens)` and noise `(batch_size, 2)` that returns tokens
            `(batch_size,)`.
        entries (`torch.Tensor` of shape `(batch_size, num_entries)`): Tokens to append; -1 where one is generated.
        entry_positions (`torch.Tensor` of shape `(num_entries,)` or `(batch_size, num_entries)`): Their position ids.
        num_images_per_context (`int` or one per context): Sequences that continue each context, which is encoded once
            for all of them; `batch_size` counts sequences.
        text_attention_bias (`float`): Added to the scores of the text keys for all rows, in all layers and heads.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance: after the contexts, `context` holds as many again to lead away from (with empty
            texts, say), and the sampler gets the logits of those plus this times the difference to them.
        full_vocabulary (`bool`): Give the sampler logits of all tokens, not of image tokens only.
        generator: One generator, or one per sequence.
        device (`torch.device`, *optional*): Where to compute if hooks move the model; default: where it is.
        decoding (`Decoding`, *optional*): How steps run; it keeps what later calls can use. Default: a new one.
        row_length (`int`): Where several positions are predicted at once: a token is guessed to be like the one so
            many entries before it, the columns of a grid. It changes how many passes are made, and nothing else.
        callback: Called with the number of entries written and all entries, after each generated token, in order. If
            it returns entries, they replace those written, and what follows is predicted from them.
        on_pass: Called after each pass of the model over new tokens.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_entries)`: The entries, filled in. The argument stays as it is.

    Raises:
        ValueError: If `entries` does not have one row per sequence, or the logits are not finite.
    """
    device = model.device if device is None else device
    context, entries, entry_positions = context.to(device), entries.to(device).clone(), entry_positions.to(device)
    batch_size, num_entries = entries.shape
    copies = 1 if guidance_scale is None else 2
    repeats = torch.as_tensor(num_images_per_context).expand(len(context) // copies)
    if batch_size != repeats.sum():
        raise ValueError(
            f"`entries` must have a row for each of the {repeats.sum()} sequences of `num_images_per_context`, but "
            f"has {batch_size}."
        )
    # looked at once, before the loop, which then needs no look at the device
    is_wanted = entries == TO_GENERATE
    columns = is_wanted.any(0).tolist()
    is_alike = bool((is_wanted == is_wanted[:1]).all())
    noise = draw_noise((batch_size, num_entries, 2), generator, device)

    decoding = Decoding() if decoding is None else decoding
    in_parallel = is_alike and entry_positions.ndim == 1
    size = decoding.num_parallel(model, copies * batch_size, device) if in_parallel else 1
    window = Window(size, row_length, decoding.fixed_cost(device))
    repeats = repeats.repeat(copies).to(device)

    def begin() -> tuple[Decoder, torch.Tensor]:
        """A decoder that has read the contexts, and the logits of the first entry."""
        cache, bias, logits = encode_context(model, context, text_attention_bias, full_vocabulary, device)
        longest = cache.length + num_entries + spare
        decoder = decoding.decoder(model, copies * batch_size, longest, full_vocabulary, device, window.size)
        decoder.begin(cache, bias, repeats)
        return decoder, logits.repeat_interleave(repeats, 0)

    check, spare = FiniteCheck(), window.size if window.size > 1 else 0
    if is_alike or decoding.compile or decoding.cuda_graph or not any(columns):
        write = _write_in_parallel if window.size > 1 and any(columns) else _write_one_by_one
    else:
        write, spare = _write_at_own_pace, _longest_piece(is_wanted)

    def draw(logits: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Tokens of entries `(rows, new)` from the logits of all copies, `(copies * rows, new, tokens)`."""
        guided = _guide(logits, guidance_scale).flatten(0, 1)
        check.see(guided)
        return sampler(guided, noise[rows[:, None], indices].flatten(0, 1)).unflatten(0, indices.shape)

    known = None if is_alike else ~is_wanted
    task = _Task(begin, draw, entries, entry_positions, columns, known, copies, callback, on_pass or (lambda: None))
    entries = write(task, window)
    check.finish()
    return entries


@dataclass
class _Task:
    """
    What the loops of [`generate`] have in common.

    `is_wanted` says for each column whether it is generated. Where rows differ, `is_known` marks the entries of these
    columns that are known already.
    """

    begin: Callable[[], tuple[Decoder, torch.Tensor]]
    draw: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    entries: torch.Tensor
    positions: torch.Tensor
    is_wanted: list[bool]
    is_known: torch.Tensor | None
    copies: int
    callback: Callable[[int, torch.Tensor], torch.Tensor | None] | None
    on_pass: Callable[[], None]

    def report(self, entry: int, entries: torch.Tensor) -> torch.Tensor | None:
        """Tell the callback of one more entry; what it wants in place of the entries."""
        return None if self.callback is None else self.callback(entry + 1, entries)


def _write_one_by_one(task: _Task, window: Window) -> torch.Tensor:
    decoder, logits = task.begin()
    entries, rows = task.entries, torch.arange(len(task.entries), device=task.entries.device)
    context_length, num_read = decoder.cache.length, 0
    for entry in (index for index, wanted in enumerate(task.is_wanted) if wanted):
        if entry > num_read:  # the entry written last and the known ones after it, at once
            new = entries[:, num_read:entry]
            positions = task.positions[..., num_read:entry]
            positions = positions if positions.ndim == 1 else torch.cat([positions] * task.copies)
            logits = decoder.append(torch.cat([new] * task.copies), positions)
            num_read = entry
            task.on_pass()
        drawn = task.draw(logits[:, None], rows, torch.full_like(rows, entry)[:, None])[:, 0]
        if task.is_known is not None:
            drawn = torch.where(task.is_known[:, entry], entries[:, entry], drawn)
        entries[:, entry] = drawn
        changed = task.report(entry, entries)
        if changed is not None:
            first = _first_change(entries, changed, entry)
            entries = changed.clone()
            if first < num_read:
                decoder.truncate(context_length + first)
                num_read = first
    return entries


def _longest_piece(is_wanted: torch.Tensor) -> int:
    """The most entries of a row that are read at once: a generated one, and the known ones up to the next."""
    longest = 1
    for row in is_wanted.tolist():
        columns = [0, *(column for column, wanted in enumerate(row) if wanted)]
        longest = max(longest, *(after - before for before, after in pairwise(columns)), 1)
    return longest


def _write_at_own_pace(task: _Task, window: Window) -> torch.Tensor:
    """Each row draws its next wanted entry in every pass, in whichever column that is; those that are done wait."""
    decoder, logits = task.begin()
    entries, context_length = task.entries, decoder.cache.length
    rows = torch.arange(len(entries), device=entries.device)
    assert task.is_known is not None
    is_wanted = ~task.is_known
    counts = is_wanted.sum(1)
    num_steps = int(counts.max())
    # per row the columns of its wanted entries, in order; behind the last, the last again
    targets = is_wanted.long().sort(dim=1, descending=True, stable=True).indices
    num_read = torch.zeros_like(rows)
    padding = decoder.model.config.pad_token_id
    for step in range(num_steps):
        is_active = step < counts
        target = torch.where(is_active, targets[:, step], num_read)
        num_new = target - num_read
        width = int(num_new.max())
        if width:
            columns = num_read[:, None] + torch.arange(width, device=rows.device)
            inside = columns < target[:, None]
            columns = columns.clamp(max=entries.shape[1] - 1)
            new = torch.where(inside, entries.gather(1, columns), padding)
            positions = task.positions.expand_as(entries).gather(1, columns)
            all_logits = decoder.append_all(torch.cat([new] * task.copies), torch.cat([positions] * task.copies))
            last = torch.cat([num_new - 1] * task.copies)
            picked = all_logits[torch.arange(len(all_logits), device=rows.device), last.clamp(min=0)]
            logits = torch.where((last >= 0)[:, None], picked, logits)
            num_read = target
            decoder.truncate(context_length + torch.cat([num_read] * task.copies))
            task.on_pass()
        drawn = task.draw(logits[:, None], rows, target.clamp(max=entries.shape[1] - 1)[:, None])[:, 0]
        entries[rows[is_active], target[is_active]] = drawn[is_active]
        changed = task.report(int(target[is_active].max()), entries)
        if changed is not None:
            differs = entries != changed
            first = torch.where(differs.any(1), differs.long().argmax(1), num_read)
            entries = changed.clone()
            if bool((first < num_read).any()):
                num_read = torch.minimum(first, num_read)
                decoder.truncate(context_length + torch.cat([num_read] * task.copies))
    return entries


def _write_in_parallel(task: _Task, window: Window) -> torch.Tensor:
    wanted = torch.tensor(task.is_wanted, device=task.entries.device)

    def start(entries: torch.Tensor, num_settled: int) -> ParallelLoop:
        decoder, logits = task.begin()
        loop = ParallelLoop(decoder, entries, task.positions, wanted, task.draw, window, task.copies)
        if num_settled:
            loop.begin_after(num_settled)
        else:
            loop.begin(logits)
        return loop

    loop, num_reported = start(task.entries, 0), 0
    while True:
        settled = loop.num_settled
        for entry in range(num_reported, settled):
            if not task.is_wanted[entry]:
                continue
            so_far = loop.entries.clone()
            so_far[:, entry + 1 :][:, wanted[entry + 1 :]] = TO_GENERATE
            changed = task.report(entry, so_far)
            if changed is not None and not torch.equal(changed, so_far):
                loop, settled = start(changed.clone(), entry + 1), entry + 1
                break
        num_reported = settled
        if loop.is_done:
            return loop.entries
        loop.run_pass()
        task.on_pass()


def _first_change(entries: torch.Tensor, changed: torch.Tensor, last: int) -> int:
    """The first entry in which any sequence was changed; the one after `last` if none was."""
    differs = (entries != changed)[:, : last + 1].any(0).nonzero()
    return int(differs[0]) if len(differs) else last + 1


def _guide(logits: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """Classifier-free guidance: the second half of the rows is what the first half leads away from."""
    if guidance_scale is None:
        return logits
    wanted, unwanted = logits.chunk(2)
    return unwanted + guidance_scale * (wanted - unwanted)
