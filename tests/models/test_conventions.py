"""What callers know from models of transformers: done as there, or refused in a sentence."""

import pytest
import torch

from cogview_pipelines.models.conventions import every_row

from ..utils import make_coglm, make_vq_model
from ..utils_cogview import make_cogview, make_cogview_vq

LENGTHS = (3, 6)


def pad(model, lengths=LENGTHS):
    """Texts of these lengths, padded on the right, and the mask that a tokenizer gives with them."""
    ids = torch.full((len(lengths), max(lengths)), model.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(60, 60 + length)
        mask[row, :length] = 1
    return ids, mask


language_models = pytest.mark.parametrize("make", [make_coglm, make_cogview])


@language_models
def test_the_mask_of_a_tokenizer_hides_padding(make):
    model = make()
    ids, mask = pad(model)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    together = model(ids, positions, mask).logits
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length], positions[:1, :length]).logits[0]
        torch.testing.assert_close(together[row, :length], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0, :3], model(ids, positions, torch.ones_like(mask)).logits[0, :3]) or (
        make is make_cogview  # causal: what follows is not seen anyway
    )


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_keys_is_one_for_every_row(causal):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for rows in (1, 3):
        full = every_row(mask, rows, causal)
        for batch in range(2):
            for row in range(rows):
                for key in range(3):
                    seen = bool(mask[batch, key]) and (not causal or key <= 3 - rows + row)
                    assert full[batch, row, key] == seen
    assert every_row(None, 3) is None


@language_models
@pytest.mark.parametrize("shape, dtype", [((2,), torch.bool), ((2, 1, 6, 6), torch.bool), ((2, 6), torch.float32)])
def test_masks_of_other_shapes_are_refused(make, shape, dtype):
    model = make()
    ids, _ = pad(model)
    with pytest.raises(ValueError, match="`attention_mask` must be"):
        model(ids, torch.arange(6).expand_as(ids), torch.ones(shape, dtype=dtype))


@language_models
@pytest.mark.parametrize(
    "asked, ignored",
    [
        ({"output_attentions": True}, {"output_attentions": False}),
        ({"use_cache": True}, {"use_cache": False}),
        ({"return_dict": False}, {"return_dict": True}),
        ({"past_key_values": 3}, {"past_key_values": None}),
        ({"no_such_thing": None}, {}),
    ],
)
def test_what_a_forward_pass_does_not_do_it_says(make, asked, ignored):
    model = make()
    ids, mask = pad(model)
    positions = torch.arange(6).expand_as(ids)
    with pytest.raises(TypeError, match=rf"`{next(iter(asked))}`"):
        model(ids, positions, mask, **asked)
    assert torch.equal(model(ids, positions, mask, **ignored).logits, model(ids, positions, mask).logits)


every_model = pytest.mark.parametrize("make", [make_coglm, make_cogview, make_vq_model, make_cogview_vq])


@every_model
def test_weights_are_float32_unless_told_otherwise(make, tmp_path):
    make().half().save_pretrained(tmp_path)
    kind = type(make())
    assert kind.from_pretrained(tmp_path).dtype == torch.float32
    assert kind.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    assert kind.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@every_model
def test_attention_is_chosen_by_the_model(make, tmp_path):
    make().save_pretrained(tmp_path)
    kind = type(make())
    kind.from_pretrained(tmp_path, attn_implementation="sdpa")
    for other in ("eager", "flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match=f"`attn_implementation` must be 'sdpa' or left out, but is '{other}'"):
            kind.from_pretrained(tmp_path, attn_implementation=other)


@every_model
def test_shards_variants_and_other_processes_are_minded(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert all(name.startswith("model.fp16-") for name in files)
    again = type(model).from_pretrained(tmp_path, variant="fp16")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), model.parameters(), strict=True))
    if hasattr(model, "should_save_on_this_rank"):  # before, transformers wrote weights in every process
        model.save_pretrained(tmp_path / "other", is_main_process=False)
        assert not list((tmp_path / "other").glob("*"))
