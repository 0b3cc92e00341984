"""The kernel that runs a whole step on a CPU: the logits of the model, whatever the sizes, threads and processor."""

import copy

import pytest
import torch

from cogview_pipelines.generation import decoders
from cogview_pipelines.generation.decoders import Decoder, FusedDecoder, encode_context
from cogview_pipelines.models.cogview2.sequences import text_to_image
from cogview_pipelines.ops import decode_step, native

from ..utils import NUM_IMAGE_TOKENS, VOCAB_SIZE, make_coglm, make_texts

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels are not built")
CPU = torch.device("cpu")
NUM_STEPS = 5


@torch.no_grad()
def run_steps(decoder_class, model, num_sequences, text_attention_bias=1.4, full_vocabulary=False, prepare=None):
    """Logits of a few steps after texts of different lengths, `(steps, sequences, tokens)`, and the decoder."""
    texts = make_texts([1 + index % 9 for index in range(num_sequences)])
    context = text_to_image(texts, model.config.layout)
    cache, bias, _ = encode_context(model, context, text_attention_bias, full_vocabulary, CPU)
    decoder = decoder_class(model, num_sequences, cache.length + NUM_STEPS, full_vocabulary, CPU)
    decoder.begin(cache, bias, torch.ones(num_sequences, dtype=torch.long))
    if prepare is not None:
        prepare(decoder)
    tokens = torch.randint(NUM_IMAGE_TOKENS, (num_sequences, NUM_STEPS), generator=torch.Generator().manual_seed(1))
    positions = model.config.layout.image_positions
    steps = [decoder.append(tokens[:, i : i + 1], positions[i : i + 1]) for i in range(NUM_STEPS)]
    return torch.stack(steps), decoder


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 5, 8, 9, 19])
def test_logits_are_those_of_the_model_for_any_number_of_sequences(num_sequences):
    model = make_coglm()
    expected, _ = run_steps(Decoder, model, num_sequences)
    result, _ = run_steps(FusedDecoder, model, num_sequences)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 20},  # heads of 5 numbers, less than a vector
        {"hidden_size": 68, "intermediate_size": 37},  # rests after whole vectors
        {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3},
        {"layer_norm_eps": 0.3},
        {"pb_relaxation_alpha": 32.0},
    ],
    ids=str,
)
def test_logits_are_those_of_the_model_for_any_shape(config):
    model = make_coglm(**config)
    for full_vocabulary in (False, True):
        expected, _ = run_steps(Decoder, model, 3, full_vocabulary=full_vocabulary)
        result, _ = run_steps(FusedDecoder, model, 3, full_vocabulary=full_vocabulary)
        assert result.shape[-1] == (VOCAB_SIZE if full_vocabulary else NUM_IMAGE_TOKENS)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_reads_every_dtype(dtype, isa):
    names = native.build_info()["cpu_instruction_sets"]
    if isa >= len(names) or isa > names.index(native.build_info()["cpu_instruction_set"]):
        pytest.skip("not compiled in, or not of this processor")
    model = make_coglm(hidden_size=68).to(dtype)
    exact, context_of = copy.deepcopy(model).float(), {}

    def choose(decoder):
        decoder.step.step.isa = 1 + isa
        context_of["cache"] = [layer.clone() for layer in decoder.cache.layers]

    result, _ = run_steps(FusedDecoder, model, 3, prepare=choose)

    def same_context(decoder):  # the context is encoded in the model's dtype, the steps are not
        for layer, held in zip(decoder.cache.layers, context_of["cache"]):
            layer.copy_(held)

    expected, _ = run_steps(Decoder, exact, 3, prepare=same_context)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("num_new", [1, 2, 3, 4, 5, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_read_together_get_to_the_bit_what_each_gets_alone(num_new, dtype):
    """So that several positions at once are drawn as one by one, also where two tokens are nearly tied."""
    model = make_coglm(hidden_size=68).to(dtype)
    lengths, most = torch.tensor([0, 5, 2]), 13
    tokens = torch.randint(VOCAB_SIZE, (3, 5 + most), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(5 + most)

    def begun():
        context = text_to_image(make_texts([4, 1, 9]), model.config.layout)
        cache, bias, _ = encode_context(model, context, 1.4, False, CPU)
        decoder = FusedDecoder(model, 3, cache.length + 5 + most, False, CPU)
        decoder.begin(cache, bias, torch.ones(3, dtype=torch.long))
        return decoder

    alone = begun()
    expected = torch.stack([alone.append(tokens[:, i : i + 1], positions[i : i + 1]) for i in range(5 + most)], 1)
    together = begun()
    start = together.cache.length
    together.append(tokens[:, :5], positions[:5])
    together.truncate(start + lengths)
    own = lengths[:, None] + torch.arange(num_new)
    logits = together.append_all(tokens.gather(1, own), positions[own])
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(logits[row], expected[row, length : length + num_new])
    together.truncate(start + lengths)
    last = together.append(tokens.gather(1, own), positions[own])
    assert torch.equal(last, logits[:, -1])
    for layer, one_by_one in zip(together.cache.layers, alone.cache.layers):
        for row, length in enumerate((start + lengths + num_new).tolist()):
            assert torch.equal(layer[:, row, :, :length], one_by_one[:, row, :, :length])


@pytest.mark.parametrize("pool", ["torch", "own"])
def test_the_result_does_not_depend_on_the_number_of_threads(pool, monkeypatch):
    if pool == "own":
        monkeypatch.setattr(decode_step, "openmp_parallel", lambda: None)
    model, results = make_coglm(hidden_size=64), []
    for threads in (1, 2, 5):

        def choose(decoder, threads=threads):
            decoder.step.step.threads = threads

        results.append(run_steps(FusedDecoder, model, 3, prepare=choose)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_more_weights_take_more_threads_but_no_more_than_torch(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    used = [run_steps(FusedDecoder, make_coglm(hidden_size=size), 1)[1].step.step.threads for size in (16, 128, 256)]
    assert used[0] == 1 and used[0] < used[1] <= used[2] == 3


def test_keys_and_values_are_those_of_the_model_and_known_tokens_are_read_together():
    model = make_coglm()
    tokens, positions = torch.randint(NUM_IMAGE_TOKENS, (2, 6)), model.config.layout.image_positions[:6]

    def read(decoder_class):
        _, decoder = run_steps(decoder_class, model, 2)
        longer = decoder_class(model, 2, decoder.cache.length + 6, False, CPU)
        longer.begin(decoder.cache, decoder.bias[:, :, : decoder.cache.length], torch.ones(2, dtype=torch.long))
        with torch.no_grad():
            return longer.append(tokens[:, :4], positions[:4]), longer.append(tokens[:, 4:5], positions[4:5])

    for result, expected in zip(read(FusedDecoder), read(Decoder)):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("token", "position"), [(VOCAB_SIZE, 40), (-1, 40), (0, 1000), (0, -1)])
def test_tokens_and_positions_outside_of_their_tables_are_errors(token, position):
    _, decoder = run_steps(FusedDecoder, make_coglm(), 2)
    decoder.cache.length -= 1
    with pytest.raises(IndexError, match=r"position|token id"):
        decoder.append(torch.tensor([[0], [token]]), torch.tensor([position]))


def test_a_full_cache_is_an_error():
    _, decoder = run_steps(FusedDecoder, make_coglm(), 2)
    with pytest.raises(RuntimeError, match="not supported"):
        decoder.append(torch.zeros(2, 1, dtype=torch.long), torch.tensor([40]))


def test_input_of_another_size_or_type_is_an_error():
    _, decoder = run_steps(FusedDecoder, make_coglm(), 2)
    decoder.cache.length -= 1
    for wrong in (torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"must be 2 rows of torch\.int64"):
            decoder.append(wrong, torch.tensor([40]))


def test_weights_that_are_exchanged_between_steps_are_read_to_the_end():
    expected, _ = run_steps(FusedDecoder, make_coglm(), 2)
    result, _ = run_steps(FusedDecoder, make_coglm(), 2, prepare=lambda decoder: decoder.model.half())
    assert torch.equal(result, expected)


def test_the_default_dtype_changes_nothing():
    expected, _ = run_steps(FusedDecoder, make_coglm(), 2)
    before = torch.get_default_dtype()
    try:
        result, _ = run_steps(
            FusedDecoder, make_coglm(), 2, prepare=lambda decoder: torch.set_default_dtype(torch.float64)
        )
    finally:
        torch.set_default_dtype(before)
    assert result.dtype == torch.float32 and torch.equal(result, expected)


# when the model runs as it is


def with_a_hook(model):
    model.layers[1].mlp.register_forward_hook(lambda module, arguments, output: output)


def with_its_own_forward(model):  # as offloading sets it
    model.layers[0].attention.forward = model.layers[0].attention.forward


def with_an_adapter(model):
    class Adapter(torch.nn.Linear):
        pass

    model.layers[0].mlp.dense_h_to_4h.__class__ = Adapter


def in_training(model):
    model.train()


def with_one_dropout_on(model):  # dropout as a measure of doubt
    model.layers[1].dropout.train()


def with_dropout_of_attention_on(model):
    model.layers[0].attention.train()
    model.layers[0].attention.dropout = 0.5


def in_mixed_precision(model):
    model.layers[0].mlp.to(torch.bfloat16)


def without_its_last_layer(model):
    model.layers = model.layers[:-1]


def with_layers_in_another_order(model):
    model.layers = torch.nn.ModuleList(reversed(model.layers))


def with_less_of_a_layer(model):
    mlp, left = model.layers[1].mlp, 9
    mlp.dense_h_to_4h = torch.nn.Linear(model.config.hidden_size, left)
    mlp.dense_4h_to_h = torch.nn.Linear(left, model.config.hidden_size)


def without_a_bias(model):
    model.layers[0].attention.dense.bias = None


def with_another_epsilon(model):
    model.layers[0].mlp_layernorm.eps = 0.1


def with_fewer_tokens(model):
    model.word_embeddings.weight = torch.nn.Parameter(model.word_embeddings.weight[: NUM_IMAGE_TOKENS - 1].detach())


CHANGES = [
    with_a_hook,
    with_its_own_forward,
    with_an_adapter,
    in_training,
    with_one_dropout_on,
    with_dropout_of_attention_on,
    in_mixed_precision,
    without_its_last_layer,
    with_layers_in_another_order,
    with_less_of_a_layer,
    without_a_bias,
    with_another_epsilon,
    with_fewer_tokens,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_is_more_than_its_weights_runs_as_it_is(change):
    model = make_coglm(hidden_dropout=0.1)
    decoding = decoders.Decoding()
    assert isinstance(decoding.decoder(model, 1, 9, False, CPU), FusedDecoder)
    change(model)
    assert type(decoding.decoder(model, 1, 9, False, CPU)) is Decoder
    assert decoders.fused_decoding_refusals(model, 1, 9, CPU)


def test_the_kernel_can_be_refused_and_refuses_what_it_cannot_run():
    model = make_coglm()
    assert type(decoders.Decoding(fused=False).decoder(model, 1, 9, False, CPU)) is Decoder
    assert "65 sequences" in decode_step.decode_step_refusals(torch.float32, "cpu", 65)[0]
    assert "100000 tokens long" in decode_step.decode_step_refusals(torch.float32, "cpu", 1, 100000)[0]
    assert "torch.float64" in decode_step.decode_step_refusals(torch.float64, "cpu")[0]
    assert "cuda:1" in decode_step.decode_step_refusals(torch.float32, "cuda:1")[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert decoders.fused_decoding_refusals(model, 1, 9, CPU) == ["autocast is on"]
    with torch.nn.modules.module.register_module_forward_hook(lambda module, arguments, output: None):
        assert decoders.fused_decoding_refusals(model, 1, 9, CPU) == ["all modules have hooks"]
    with pytest.raises(ValueError, match=r"cannot run this model: the dtype is torch\.float64"):
        FusedDecoder(make_coglm().double(), 1, 9, False, CPU)
