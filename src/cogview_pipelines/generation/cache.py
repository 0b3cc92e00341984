"""Keys and values of sequences that grow: memory that is taken once, and that can be cut back and handed on."""

import torch
from transformers import PreTrainedConfig


class KeyValueCache:
    """
    Keys and values of the dense attention of every layer.

    A model only calls `update`, layer by layer; the last layer's call makes the sequences longer. Sequences are of one
    length until `truncate` is told a length for each.

    Args:
        config (`PreTrainedConfig`): Of the model: `num_hidden_layers`, `num_attention_heads`, `hidden_size`.
        batch_size (`int`): Number of sequences.
        max_length (`int`): The longest that the sequences will get.
        dtype, device: Of the model. Attention is computed in this dtype: on a CPU, float32 is many times faster for
            16-bit models, too.

    Attributes:
        layers (`list[torch.Tensor]`): Of each layer, `(2, batch_size, num_heads, max_length, head_dim)`.
        length (`int`): Of the sequences, or of the longest.
        lengths (`torch.Tensor` of shape `(batch_size,)` or `None`): Of each sequence, where they differ. Keys beyond
            them are old: the mask that comes with later tokens must hide them.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (2, batch_size, config.num_attention_heads, max_length, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.length, self.lengths = 0, None

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def update(self, layer: int, keys_values: torch.Tensor) -> torch.Tensor:
        """
        Append to a layer.

        Args:
            layer (`int`): Its index; the last one comes last.
            keys_values (`torch.Tensor` of shape `(2, batch_size, num_heads, new, head_dim)`): Of the new tokens.

        Returns:
            `torch.Tensor`: All that the new tokens attend to, those themselves included; a view.
        """
        held, new = self.layers[layer], keys_values.shape[3]
        end = self.length + new
        if self.lengths is None:
            held[:, :, :, self.length : end] = keys_values
        else:
            rows = torch.arange(len(self.lengths), device=held.device)[:, None]
            columns = self.lengths[:, None] + torch.arange(new, device=held.device)
            held[:, rows, :, columns] = keys_values.permute(1, 3, 0, 2, 4).to(held.dtype)
        if layer == len(self.layers) - 1:
            self.advance(new)
        return held[:, :, :, :end]

    def advance(self, new: int) -> None:
        """Count tokens whose keys and values are there."""
        self.length += new
        if self.lengths is not None:
            self.lengths = self.lengths + new

    def truncate(self, length: int | torch.Tensor) -> None:
        """
        Forget the end of the sequences.

        Args:
            length (`int` or `torch.Tensor` of shape `(batch_size,)`): What stays of all of them, or of each.

        Raises:
            ValueError: If that is more than there is.
        """
        longest, lengths = (length, None) if isinstance(length, int) else (int(length.max()), length)
        if longest > self.length:
            raise ValueError(f"`length` may be {self.length} here, but is {longest}.")
        if lengths is not None and self.lengths is not None and (lengths > self.lengths).any():
            raise ValueError(f"`length` may be {self.lengths.tolist()} here, but is {lengths.tolist()}.")
        self.length = longest
        self.lengths = (
            None if lengths is None or bool((lengths == longest).all()) else lengths.to(self.layers[0].device)
        )

    def load(self, other: "KeyValueCache", repeats: int | torch.Tensor) -> None:
        """Hold what another cache holds, every sequence `repeats` times in a row, and nothing else."""
        length = self.length = other.length
        self.lengths = None if other.lengths is None else other.lengths.repeat_interleave(repeats)
        for own, theirs in zip(self.layers, other.layers):
            own[:, :, :, :length] = theirs[:, :, :, :length].repeat_interleave(repeats, 1)
            own[:, :, :, length:] = 0

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with these sequences only, in memory of their own."""
        self.layers = [layer[:, rows] for layer in self.layers]
        if self.lengths is not None:
            self.lengths = self.lengths[rows]

    def reorder(self, rows: torch.Tensor) -> None:
        """Go on with these sequences, in the same memory. `rows` has one entry per sequence."""
        for layer in self.layers:
            layer[:, :, :, : self.length] = layer[:, rows, :, : self.length]
        if self.lengths is not None:
            self.lengths = self.lengths[rows]


class SlotCache:
    """
    The memory of another cache for a step of fixed shapes, whatever it holds.

    Args:
        layers (`list[torch.Tensor]`): Of that cache.
        slots (`torch.Tensor` of shape `(batch_size, new)`): Where the new keys and values of each sequence go.
        visible (`int`): How many keys are attended to; a mask hides those not yet written.
    """

    def __init__(self, layers: list[torch.Tensor], slots: torch.Tensor, visible: int):
        self.layers, self.slots, self.visible = layers, slots, visible

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def update(self, layer: int, keys_values: torch.Tensor) -> torch.Tensor:
        """As of [`KeyValueCache`], but nothing gets longer."""
        held = self.layers[layer]
        held.scatter_(3, self.slots[None, :, None, :, None].expand_as(keys_values), keys_values.to(held.dtype))
        return held[:, :, :, : self.visible]
