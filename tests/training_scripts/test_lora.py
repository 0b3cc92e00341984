"""Adapters in the training scripts: what is trained, what is saved, and that a pipeline makes the same of it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cogview_pipelines import CogLMCanvasModel, CogLMModel, IcetkTokenizer
from cogview_pipelines.loaders.lora_files import WEIGHT_NAME, read_lora
from cogview_pipelines.models.adapters import add_adapter, load_adapter
from cogview_pipelines.training.adapters import LEFT_OUT
from cogview_pipelines.training.data.tokens import TokenData

from ..utils import FINE_GRID, make_coglm, token_config
from .conftest import WINDOWS, as_arguments, load_script, metrics

STAGES = {
    "train_coglm": "transformer",
    "train_direct_sr": "direct_sr_transformer",
    "train_iterative_sr": "iterative_sr_transformer",
}


@pytest.fixture(scope="module")
def stages(coglm_folder, tokenizer, tmp_path_factory):
    """Folders of the three trained stages; direct super-resolution borrows the weights of CogLM."""
    root = tmp_path_factory.mktemp("stages")
    transformer = CogLMModel.from_pretrained(coglm_folder)
    options = {"num_text_slots": 30, **WINDOWS}
    direct = CogLMCanvasModel.from_transformer(transformer, "direct", FINE_GRID, shares_backbone=True, **options)
    direct.save_pretrained(root / "direct")
    make_coglm("iterative", **token_config(tokenizer)).save_pretrained(root / "iterative")
    return {
        "train_coglm": {"init_from": coglm_folder},
        "train_direct_sr": {"transformer": coglm_folder, "init_from": root / "direct"},
        "train_iterative_sr": {"transformer": root / "iterative"},
    }


@pytest.fixture
def run(stages, token_folder, tokenizer_folder, tmp_path):
    def start(script, folder="run", **options):
        common = {
            "data": token_folder,
            "tokenizer": tokenizer_folder,
            "output_dir": tmp_path / folder,
            "batch_size": 4,
        }
        common |= {"max_steps": 4, "warmup_steps": 0, "log_every_steps": 1, "lora_rank": 4, "learning_rate": 0.02}
        result = load_script(script).main(as_arguments({**common, **stages[script], **options}))
        return result, tmp_path / folder

    return start


@pytest.mark.parametrize("script", STAGES)
def test_only_the_adapter_is_trained_and_saved(script, run, stages):
    model, folder = run(script)
    assert [path.name for path in (folder / "final").iterdir()] == [WEIGHT_NAME]
    weights, configs, words = read_lora(folder / "final", [*STAGES.values()])
    assert words == []  # the tokenizer has no list of those that the model knows
    part = STAGES[script]
    assert list(weights) == [part] and configs[part]["r"] == 4
    assert len(weights[part]) % 2 == 0 and len(weights[part]) >= 16
    moved = [name for name, value in weights[part].items() if "lora_B" in name and value.any()]
    assert len(moved) >= 7  # the last layer's output has no part in reading a context
    losses = [line["loss"] for line in metrics(folder)]
    assert losses[-1] < losses[0]
    if script == "train_coglm":  # the frozen weights are those of the file
        before = CogLMModel.from_pretrained(stages[script]["init_from"], dtype=torch.float32).state_dict()
        after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        assert all(torch.equal(after[name], value) for name, value in before.items())
        fresh = CogLMModel.from_pretrained(stages[script]["init_from"], dtype=torch.float32)
        load_adapter(fresh, "style", weights[part], configs[part])
        ids = torch.randint(48, (2, 16))
        positions = torch.arange(16).expand(2, 16)
        assert torch.equal(fresh(ids, positions).logits, model(ids, positions).logits)


def test_a_resumed_run_has_the_losses_of_the_whole_one_and_its_checkpoints_hold_the_adapter_alone(run, stop_after):
    _, whole = run("train_coglm", "whole", ema_decay=0.5)
    stop_after(2)
    assert run("train_coglm", "parts", ema_decay=0.5)[0] is None
    size = sum(path.stat().st_size for path in (whole.parent / "parts" / "checkpoint-2").glob("*.distcp"))
    assert size < 200_000  # weights alone would be more
    _, parts = run("train_coglm", "parts", ema_decay=0.5, resume_from_checkpoint="latest")
    assert metrics(parts) == metrics(whole)
    first, second = (load_file(folder / "final" / WEIGHT_NAME) for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_and_alpha_can_be_chosen(run):
    _, folder = run("train_coglm", lora_target_modules=["query_key_value"], lora_alpha=8, lora_dropout=0.1)
    weights, configs, _ = read_lora(folder / "final", ["transformer"])
    assert {name.rsplit(".", 3)[-3].rpartition(".")[2] for name in weights["transformer"]} == {"query_key_value"}
    assert configs["transformer"]["lora_alpha"] == 8 and configs["transformer"]["lora_dropout"] == 0.1


def test_an_adapter_of_coglm_brings_the_words_that_it_has_learned(run, tokenizer_folder, token_folder, tmp_path):
    tokenizer = IcetkTokenizer.from_pretrained(tokenizer_folder, known_words=["a", "blue"])
    learned = tokenizer.unknown_words(TokenData.load(token_folder, tokenizer).texts())
    assert "red" in learned and "a" not in learned and "blue" not in learned
    tokenizer.save_pretrained(tmp_path / "words")
    _, folder = run("train_coglm", tokenizer=tmp_path / "words", max_steps=1)
    assert read_lora(folder / "final", ["transformer"]).known_words == learned
    _, folder = run("train_iterative_sr", "fine", tokenizer=tmp_path / "words", max_steps=1)
    assert read_lora(folder / "final", ["iterative_sr_transformer"]).known_words == []


def test_mistakes_are_named(run, coglm_folder, tmp_path):
    with pytest.raises(ValueError, match="`target_modules` must name linear layers, such as"):
        run("train_coglm", lora_target_modules=["q_proj"])
    with pytest.raises(ValueError, match="`rank` must be at least 1, but is 0"):
        run("train_coglm", lora_rank=0)
    with pytest.raises(ValueError, match="`lora_rank` adapts a trained model"):
        run("train_iterative_sr", transformer=coglm_folder)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("script", STAGES)
def test_adapters_that_were_saved_with_the_model_are_named_where_training_goes_on_without(
    script, run, tokenizer, tmp_path, caplog
):
    from ..pipelines.conftest import build

    pipe = build(tokenizer)
    add_adapter(getattr(pipe, STAGES[script]), "style", 2)
    pipe.save_pretrained(tmp_path / "MODEL")
    own = tmp_path / "MODEL" / STAGES[script]
    option = "transformer" if script == "train_iterative_sr" else "init_from"
    run(script, max_steps=1, **{option: own})
    said = [text for text in caplog.messages if LEFT_OUT in text]
    assert said == [f"The adapters ['style'] of `{option}` {LEFT_OUT}"]


def test_adapters_of_other_components_are_not_named(run, tokenizer, tmp_path, caplog):
    from ..pipelines.conftest import build

    pipe = build(tokenizer)
    add_adapter(pipe.iterative_sr_transformer, "style", 2)
    pipe.save_pretrained(tmp_path / "MODEL")
    run("train_coglm", max_steps=1, init_from=tmp_path / "MODEL/transformer")
    assert LEFT_OUT not in caplog.text


def test_the_adapter_works_in_a_pipeline(run, stages, tokenizer, tmp_path):
    from ..pipelines.conftest import build

    _, folder = run("train_iterative_sr")
    pipe = build(tokenizer)
    pipe.load_lora_weights(folder / "final")
    assert pipe.get_list_adapters() == {"iterative_sr_transformer": ["default_0"]}
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
