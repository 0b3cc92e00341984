import pytest
import torch

from cogview_pipelines.evaluation.likelihood import caption_losses
from cogview_pipelines.models.cogview2 import sequences

from ..utils import captions, make_coglm, make_image_tokens, token_config


@pytest.fixture(scope="module")
def transformer(tokenizer):
    return make_coglm(**token_config(tokenizer))


def test_the_loss_is_the_mean_over_the_text_tokens_of_each_pair(tokenizer, transformer):
    texts = captions()[:5]
    tokens = make_image_tokens(5)
    losses = caption_losses(transformer, tokenizer, tokens, texts)
    assert losses.shape == (5,)
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text)
        start = tokenizer.start_of_chinese_id if index % 2 else tokenizer.start_of_english_id
        sequence = sequences.caption(tokens[index : index + 1], [start], transformer.config.layout, [ids])
        with torch.no_grad():
            logits = transformer(
                sequence.input_ids, sequence.position_ids, sequence.attention_mask, full_vocabulary=True
            ).logits[0]
        length = transformer.config.layout.image_length
        expected = -logits.log_softmax(-1)[torch.arange(length, length + len(ids)), torch.tensor(ids)].mean()
        torch.testing.assert_close(losses[index], expected)


def test_the_loss_of_a_pair_does_not_depend_on_its_batch(tokenizer, transformer):
    texts = captions()[:7]
    tokens = make_image_tokens(7)
    together = caption_losses(transformer, tokenizer, tokens, texts)
    for batch_size in (1, 3):
        parts = caption_losses(transformer, tokenizer, tokens.view(7, 4, 4), texts, max_batch_size=batch_size)
        torch.testing.assert_close(parts, together)
    alone = [caption_losses(transformer, tokenizer, tokens[i : i + 1], texts[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(torch.cat(alone), together)


def test_picture_text_and_language_all_matter(tokenizer, transformer):
    texts, tokens = captions()[:2], make_image_tokens(2)
    losses = caption_losses(transformer, tokenizer, tokens, texts)
    assert not torch.isclose(losses, caption_losses(transformer, tokenizer, tokens.flip(0), texts)).any()
    assert not torch.isclose(losses, caption_losses(transformer, tokenizer, tokens, texts[::-1])).any()
    chinese = caption_losses(transformer, tokenizer, tokens, texts, languages=["zh", "zh"])
    assert torch.isclose(losses, chinese).tolist() == [False, True]


@pytest.mark.parametrize(
    "texts, shape, message",
    [
        (["a cat"], (2, 16), "one per picture"),
        (["a cat", ""], (2, 16), r"`texts\[1\]` must have 1 to 30 tokens, but has 0"),
        (["a cat", "a cat " * 30], (2, 16), r"`texts\[1\]` must have 1 to 30 tokens"),
        (["a cat"], (1, 5, 5), "4 x 4"),
    ],
)
def test_what_cannot_be_scored_is_refused(tokenizer, transformer, texts, shape, message):
    with pytest.raises(ValueError, match=message):
        caption_losses(transformer, tokenizer, torch.zeros(shape, dtype=torch.long), texts)
