"""The loops that write captions: greedy and sampled ones by settling windows, beam search step by step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models.cogview2.modeling_coglm import CogLMModel
from .decoders import Decoder, Decoding, encode_context
from .parallel import ParallelLoop, Window
from .sampling import FiniteCheck, Generators, draw_noise
from .token_sequence import TokenSequence

Choice = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class WrittenText:
    """
    Args:
        token_ids (`list[int]`): The text, without the token that ended it.
        log_probabilities (`list[float]`): Of each token, and of the one that ended the text, if one did.
        is_complete (`bool`): Whether it ended by itself, and not by its length.
    """

    token_ids: list[int]
    log_probabilities: list[float]
    is_complete: bool

    @property
    def mean_log_probability(self) -> float:
        """Mean over all tokens, the last one included; 0 for no token."""
        return sum(self.log_probabilities) / max(len(self.log_probabilities), 1)


def _begin(
    model: CogLMModel,
    context: TokenSequence,
    max_length: int,
    num_copies: int,
    device: torch.device | str,
    decoding: Decoding,
    width: int,
) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    """A decoder that continues each context in `num_copies` ways, the logits of what comes next, and positions."""
    context = context.to(device)
    cache, bias, logits = encode_context(model, context, 0.0, True, device)
    longest = cache.length + max_length + (width if width > 1 else 0)
    decoder = decoding.decoder(model, len(context) * num_copies, longest, True, device, width)
    decoder.begin(cache, bias, torch.full((len(context),), num_copies, device=device))
    # every context ends with its start token
    positions = context.position_ids[0, -1] + 1 + torch.arange(max_length, device=device)
    return decoder, logits.repeat_interleave(num_copies, 0), positions


@torch.no_grad()
def write_texts(
    model: CogLMModel,
    context: TokenSequence,
    choose: Choice,
    allowed: torch.Tensor,
    ends: torch.Tensor,
    max_length: int,
    *,
    num_texts_per_context: int = 1,
    generator: Generators = None,
    device: torch.device | str | None = None,
    decoding: Decoding | None = None,
    on_pass: Callable[[], None] | None = None,
) -> list[WrittenText]:
    """
    Write texts; those that have ended leave the batch.

    With a `decoding` that is told to predict several positions at once, the texts are the same, in no more passes: see
    `generation/parallel.py`.

    Args:
        model (`CogLMModel`): The model.
        context (`TokenSequence`): Of `sequences.caption`; encoded once for all texts of a picture.
        choose: Function of float32 logits `(batch_size, tokens)` and noise `(batch_size, 2)` that returns tokens
            `(batch_size,)`: the way to sample.
        allowed (`torch.Tensor` of shape `(vocab_size,)`): boolean, True = may be written.
        ends (`torch.Tensor` of shape `(vocab_size,)`): boolean, True = ends the text.
        max_length (`int`): The most tokens a text gets.
        num_texts_per_context (`int`): They come context by context.
        generator: One generator, or one per text.
        device (`torch.device`, *optional*): Where to compute if hooks move the model; default: where it is.
        decoding (`Decoding`, *optional*): How steps run; it keeps what later calls can use. Default: a new one.
        on_pass: Called after each pass of the model over new tokens.
    """
    device = model.device if device is None else device
    decoding = Decoding() if decoding is None else decoding
    allowed, ends = allowed.to(device), ends.to(device)
    # unless asked for: of words, unlike of pictures, a repetition is a poor guess
    window = Window(min(decoding.parallel or 1, max_length))
    arguments = (model, context, max_length, num_texts_per_context, device, decoding, window.size)
    decoder, logits, positions = _begin(*arguments)
    batch_size = len(logits)
    noise = draw_noise((batch_size, max_length, 2), generator, device)
    tokens = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
    scores, latest = torch.zeros(batch_size, max_length, device=device), torch.zeros(0)
    lengths = torch.full((batch_size,), max_length, device=device)
    may_be_written = torch.stack([allowed & ~ends, allowed])  # the first token does not end a text
    check = FiniteCheck()

    def draw(logits: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        nonlocal latest
        check.see(logits)
        logits = logits[..., : len(allowed)].masked_fill(~may_be_written[(indices > 0).long()], float("-inf"))
        drawn = choose(logits.flatten(0, 1), noise[rows[:, None], indices].flatten(0, 1)).unflatten(0, indices.shape)
        latest = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        return drawn

    def keep(rows: torch.Tensor, indices: torch.Tensor, is_settled: torch.Tensor) -> torch.Tensor:
        at = rows[:, None].expand_as(indices)[is_settled], indices[is_settled]
        scores[at] = latest[is_settled]
        is_end = ends[tokens[rows[:, None], indices]] & is_settled
        first = torch.where(is_end, indices, max_length).amin(1)
        lengths[rows] = lengths[rows].minimum(first)
        return first < max_length

    is_wanted = torch.ones(max_length, dtype=torch.bool, device=device)
    loop = ParallelLoop(decoder, tokens, positions, is_wanted, draw, window, on_settled=keep)
    loop.begin(logits)
    while not loop.is_done:
        loop.run_pass()
        if on_pass is not None:
            on_pass()
    check.finish()
    texts = []
    for ids, own, length in zip(tokens.tolist(), scores.tolist(), lengths.tolist()):
        is_complete = length < max_length
        texts.append(WrittenText(ids[:length], own[: length + is_complete], is_complete))
    return texts


@torch.no_grad()
def search_texts(
    model: CogLMModel,
    context: TokenSequence,
    allowed: torch.Tensor,
    ends: torch.Tensor,
    max_length: int,
    *,
    num_beams: int = 4,
    device: torch.device | str | None = None,
    decoding: Decoding | None = None,
    on_pass: Callable[[], None] | None = None,
) -> list[list[WrittenText]]:
    """
    Beam search: of each picture, up to `num_beams` texts of the highest mean log-probability, best first.

    A text that has ended leaves its beam. If fewer than `num_beams` have ended at `max_length`, those that have not
    fill up the list.

    Args:
        model, context, allowed, ends, max_length, device, decoding, on_pass: As for [`write_texts`].
        num_beams (`int`): Texts that are followed at a time, for each picture.
    """
    device = model.device if device is None else device
    decoding = Decoding() if decoding is None else decoding
    decoder, next_logits, positions = _begin(model, context, max_length, num_beams, device, decoding, 1)
    allowed, ends = allowed.to(device), ends.to(device)
    ending = set(ends.nonzero()[:, 0].tolist())
    pictures = [_Beams(num_beams) for _ in range(len(context))]
    check = FiniteCheck()
    for step in range(max_length):
        check.see(next_logits)
        may_be_written = allowed if step else allowed & ~ends
        logits = next_logits[:, : len(allowed)].masked_fill(~may_be_written, float("-inf"))
        log_probabilities = logits.log_softmax(-1).unflatten(0, (len(context), num_beams))
        totals = torch.tensor([beams.totals for beams in pictures], device=device)
        candidates = (totals[..., None] + log_probabilities).flatten(1)
        # at most half of these can end, so enough beams go on
        best, indices = candidates.topk(min(2 * num_beams, candidates.shape[1]))
        scores = log_probabilities.flatten(1).gather(1, indices)
        going_on = [
            beams.extend(list(zip(*choices)), len(allowed), ending)
            for beams, *choices in zip(pictures, best.tolist(), indices.tolist(), scores.tolist())
        ]
        if step + 1 == max_length or all(beams.cannot_improve(max_length) for beams in pictures):
            break
        if all(beams.is_empty for beams in pictures):
            break
        rows, tokens = torch.tensor(going_on, device=device).unbind(1)
        first_rows = num_beams * torch.arange(len(context), device=device)[:, None]
        decoder.reorder((first_rows + rows).flatten())
        next_logits = decoder.append(tokens.reshape(-1, 1), positions[step : step + 1])
        if on_pass is not None:
            on_pass()
    check.finish()
    return [beams.results() for beams in pictures]


class _Beams:
    """The texts of one picture that beam search follows, with the sums of their log-probabilities, and the ended."""

    def __init__(self, num_beams: int):
        self.num_beams = num_beams
        self.texts: list[tuple[list[int], list[float]]] = [([], [])] * num_beams
        # all beams begin alike: only the first one counts in the first step
        self.totals = [0.0] + [float("-inf")] * (num_beams - 1)
        self.finished: list[WrittenText] = []

    def extend(
        self, choices: list[tuple[float, int, float]], vocab_size: int, ending: set[int]
    ) -> tuple[list[int], list[int]]:
        """
        Go on with the best of `(total, beam * vocab_size + token, score)`, which come best first.

        Returns:
            `tuple[list[int], list[int]]`: From which beam each goes on, and its token; zeros where none goes on.
        """
        kept: list[tuple[float, tuple[list[int], list[float]]]] = []
        rows, tokens = [], []
        for total, index, score in choices:
            if total == float("-inf"):
                break
            beam, token = divmod(index, vocab_size)
            ids, scores = self.texts[beam][0], [*self.texts[beam][1], score]
            if token in ending:
                self.finished.append(WrittenText(ids, scores, True))
            elif len(kept) < self.num_beams:
                kept.append((total, ([*ids, token], scores)))
                rows.append(beam)
                tokens.append(token)
        missing = self.num_beams - len(kept)
        self.totals = [total for total, _ in kept] + [float("-inf")] * missing
        self.texts = [text for _, text in kept] + [([], [])] * missing
        return rows + [0] * missing, tokens + [0] * missing

    @property
    def is_empty(self) -> bool:
        """Whether no text goes on."""
        return max(self.totals) == float("-inf")

    def cannot_improve(self, max_length: int) -> bool:
        """Whether no text that goes on can get a higher mean than the worst of those that would be kept."""
        if len(self.finished) < self.num_beams:
            return False
        means = sorted((text.mean_log_probability for text in self.finished), reverse=True)
        return max(self.totals) / max_length <= means[self.num_beams - 1]

    def results(self) -> list[WrittenText]:
        """The best texts that have ended, filled up with those that have not."""
        going_on = [
            WrittenText(ids, scores, False)
            for (ids, scores), total in zip(self.texts, self.totals)
            if total > float("-inf")
        ]
        parts = [sorted(texts, key=lambda text: -text.mean_log_probability) for texts in (self.finished, going_on)]
        return [text for part in parts for text in part][: self.num_beams]
