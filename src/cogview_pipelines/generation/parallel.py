"""
The tokens of the sequential loop in fewer passes, exactly.

All random numbers of a picture are drawn before its first token, so that its tokens are a function of the logits, and
the sequential result is the one fixed point of "predict every position from the present guess, and draw again with the
same numbers". A pass predicts a window of positions at once. The first of them follows from settled tokens only and is
settled now; so is each one after it as long as those before it came out as they had been guessed. What has not been
settled is the guess of the next pass.

Predictable pictures settle many positions a pass. At worst one is settled, as in the sequential loop; where a pass
takes longer in proportion to its tokens, [`Budget`] then narrows the window. Unlike speculative sampling, which keeps
the distribution, this keeps the picture.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .decoders import Decoder


@dataclass
class Window:
    """
    How positions are predicted at once.

    Args:
        size (`int`): Positions a pass, at most.
        row_length (`int`): A position that was never predicted is guessed to equal the one `row_length` before it.
            With the columns of a grid, that is the cell above; if that was never predicted either, the one above that.
        fixed_cost (`float`, *optional*): What a pass takes beside its tokens, in tokens of one sequence. Where few
            positions settle, the window is then narrowed by a [`Budget`]. Default: it stays as wide.
    """

    size: int
    row_length: int = 1
    fixed_cost: float | None = None


class Budget:
    """
    Keeps passes over a window from taking longer than writing one by one, where hardly a guess holds.

    Time is counted in tokens, as `fixed_cost` and those that a pass reads. Each settled token earns an eighth more
    than what it takes one by one, and there is a loan of two passes over the whole window to begin with: all of it
    takes at most that much longer than one by one. It depends on what settles and on no clock, so that a seed makes
    the same passes every time.

    Args:
        window ([`Window`]): The widest, with its `fixed_cost`.
        sequences (`int`): That are read at once, to begin with.
    """

    MARGIN = 1.125

    def __init__(self, window: Window, sequences: int):
        assert window.fixed_cost is not None
        self.window, self.fixed_cost = window, window.fixed_cost
        self.left = 2.0 * self._cost(window.size, sequences)

    def _cost(self, width: int, sequences: int) -> float:
        return self.fixed_cost + width * sequences

    def width(self, sequences: int) -> int:
        """The widest window that is paid for if no more than one token of each sequence settles; at least 1."""
        affordable = self.left + self.MARGIN * self._cost(1, sequences) - self.fixed_cost
        return max(1, min(self.window.size, int(affordable / sequences)))

    def note(self, width: int, sequences: int, settled: float) -> None:
        """A pass has read windows of so many positions; `settled` is the mean over the sequences."""
        self.left += settled * self.MARGIN * self._cost(1, sequences) - self._cost(width, sequences)


class ParallelLoop:
    """
    Sequences that are settled token by token, each at its own pace; those that are whole leave the batch.

    Args:
        decoder (`Decoder`): It has read the contexts.
        entries (`torch.Tensor` of shape `(batch_size, num_entries)`): Known tokens, and anything where one is wanted.
        positions (`torch.Tensor` of shape `(num_entries,)`): Their position ids.
        is_wanted (`torch.Tensor` of shape `(num_entries,)`): boolean, of all sequences.
        draw: Function of logits `(rows, new, tokens)`, rows of the batch `(rows,)` and entries `(rows, new)` that
            returns the tokens of these entries, `(rows, new)`, from the same noise whenever it is asked.
        window (`Window`): How many at once.
        copies (`int`): Sequences of the decoder for each of the batch: 2 with guidance.
        on_settled (*optional*): Called after each `draw` with the rows `(rows,)`, the entries and which of them are
            settled now, both `(rows, new)`. It returns which rows are whole already, `(rows,)`.
    """

    def __init__(
        self,
        decoder: Decoder,
        entries: torch.Tensor,
        positions: torch.Tensor,
        is_wanted: torch.Tensor,
        draw: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        window: Window,
        copies: int = 1,
        on_settled: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.decoder, self.entries, self.positions, self.draw = decoder, entries, positions, draw
        self.is_wanted, self.window, self.copies, self.on_settled = is_wanted, window, copies, on_settled
        self.context_length = decoder.cache.length
        self.last = int(is_wanted.nonzero()[-1])
        self.rows = torch.arange(len(entries), device=entries.device)  # of the batch, that are still written
        # per row of the batch: entries whose keys are in the cache, and entries that were predicted at least once
        self.num_read = torch.zeros_like(self.rows)
        self.num_predicted = torch.zeros_like(self.rows)
        self.budget = None if window.fixed_cost is None else Budget(window, copies * len(entries))

    def begin(self, logits: torch.Tensor) -> None:
        """Settle the first entry from the logits after the contexts, `(copies * batch_size, tokens)`."""
        is_whole = None
        if self.is_wanted[0]:
            first = torch.zeros_like(self.rows)[:, None]
            self.entries[:, :1] = self.draw(logits[:, None], self.rows, first)
            is_whole = self._tell(first, torch.ones_like(first, dtype=torch.bool))
        self.num_predicted += 1
        self._leave(is_whole)

    def begin_after(self, num_settled: int) -> None:
        """Hold the first entries, at least one, as settled, and read all of them but the last."""
        if num_settled > 1:
            read = slice(num_settled - 1)
            self.decoder.append(self._of_all_copies(self.entries[:, read]), self.positions[read])
        self.num_read += num_settled - 1
        self.num_predicted += num_settled
        self._leave()

    @property
    def num_settled(self) -> int:
        """How many entries are settled in every sequence."""
        return int(self.num_read.min()) + 1

    @property
    def is_done(self) -> bool:
        return len(self.rows) == 0

    def run_pass(self) -> None:
        """Predict a window of every sequence."""
        rows, read = self.rows, self.num_read[self.rows]
        sequences = self.copies * len(rows)
        widest = self.window.size if self.budget is None else self.budget.width(sequences)
        width = min(widest, self.last - int(read.min()))
        columns = read[:, None] + torch.arange(width, device=rows.device)
        inside = columns < self.last
        columns = columns.clamp(max=self.last - 1)  # of short sequences what is left over is read, and not looked at
        self._guess(int(columns.max()))
        held = self.entries[rows]
        self.decoder.truncate(self._of_all_copies(self.context_length + read))
        logits = self.decoder.append_all(
            self._of_all_copies(held.gather(1, columns)), self._of_all_copies(self.positions[columns])
        )
        targets = columns + 1
        guessed = held.gather(1, targets)
        drawn = torch.where(self.is_wanted[targets], self.draw(logits, rows, targets), guessed)
        # the first is drawn from settled tokens; one after another as long as the guess before it was right
        right = (drawn == guessed) & inside
        settled = (right.long().cumprod(1).sum(1) + 1).minimum(inside.sum(1))
        held.scatter_(1, torch.where(inside, targets, targets[:, :1]), torch.where(inside, drawn, drawn[:, :1]))
        self.entries[rows] = held
        self.num_read[rows] = read + settled
        if self.budget is not None:
            self.budget.note(width, sequences, float(settled.sum()) / len(rows))
        self.num_predicted[rows] = self.num_predicted[rows].maximum(targets.amax(1) + 1)
        self._leave(self._tell(targets, torch.arange(width, device=rows.device) < settled[:, None]))

    def _tell(self, targets: torch.Tensor, is_settled: torch.Tensor) -> torch.Tensor | None:
        return None if self.on_settled is None else self.on_settled(self.rows, targets, is_settled)

    def _of_all_copies(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.copies == 1 else torch.cat([values] * self.copies)

    def _guess(self, last: int) -> None:
        """Fill what was never predicted, up to an entry, from what was, or is known, before it."""
        length, frontier = self.window.row_length, self.num_predicted[self.rows, None]
        columns = torch.arange(last + 1, device=self.rows.device)
        rows_up = torch.div(columns - frontier, length, rounding_mode="floor") + 1
        source = torch.where(columns < frontier, columns, columns - rows_up * length)
        source = torch.where(source < 0, frontier - 1, source)
        held = self.entries[self.rows]
        guess = torch.where(self.is_wanted[: last + 1], held.gather(1, source), held[:, : last + 1])
        self.entries[self.rows, : last + 1] = guess

    def _leave(self, is_whole: torch.Tensor | None = None) -> None:
        """Drop the sequences that are whole, or said to be, from the batch and from the decoder."""
        stays = self.num_read[self.rows] < self.last
        if is_whole is not None:
            stays &= ~is_whole
        if not bool(stays.all()):
            self.decoder.keep_rows(self._of_all_copies(stays).nonzero()[:, 0])
            self.rows = self.rows[stays]
