"""CogView's captions: where they end, and what their scores are."""

import torch

from cogview_pipelines.models.cogview import sequences

from ...utils_cogview import make_image_tokens, make_texts


def test_a_caption_ends_before_the_first_piece_that_ends_a_sentence(captioner, monkeypatch):
    tokens = make_image_tokens(1).view(1, 4, 4)

    def write(**options):
        generator = torch.Generator().manual_seed(3)
        return captioner(tokens=tokens, max_length=8, generator=generator, **options).token_ids[0]

    whole = write(end="length")
    place = next(index for index in range(2, 8) if whole[index] not in whole[:index])
    monkeypatch.setattr(type(captioner.tokenizer), "sentence_end_ids", [whole[place]])
    assert write() == whole[:place]
    assert write(end="length") == whole


@torch.no_grad()
def test_scores_are_log_probabilities_among_all_that_is_no_image_code(captioner):
    model, layout = captioner.caption_transformer, captioner.layout
    tokens, (text,) = make_image_tokens(1), make_texts([5])
    sequence = sequences.caption(tokens, layout, [text])
    logits = model(sequence.input_ids, sequence.position_ids, full_vocabulary=True).logits[0]
    expected = 0.0
    for index, token in enumerate(text):
        row = logits[len(sequence.input_ids[0]) - len(text) - 1 + index].clone()
        row[: layout.num_image_tokens] = float("-inf")
        expected += row.softmax(-1)[token].log().item()
    found = captioner._caption_scores("caption_transformer", tokens, [text], 1, "sum")
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-4, atol=1e-4)
