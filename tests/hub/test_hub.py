"""Pushed to the Hub and loaded from it, by processes that have never seen the folders. The Hub is a stand-in."""

import subprocess
import sys

import pytest

from .programs import CALLS, MODELS
from .running import TOKEN

RUN = """
import json, sys
from tests.hub import programs
print(json.dumps(getattr(programs, sys.argv[1])(*sys.argv[2:])))
"""
EXAMPLES = {
    "Inpaint": ("image-to-image", ["inpainted.png"]),
    "Upscale": ("image-to-image", ["larger.png"]),
    "Caption": ("image-to-text", []),
}
EVERYTHING = (*CALLS, *MODELS, "IcetkTokenizer", "CogViewTokenizer", "LoPARScheduler")


@pytest.fixture(scope="module")
def pushed(hub):
    """What the things that were pushed do."""
    return hub.json(RUN, "push_all", token=TOKEN)


@pytest.fixture(scope="module")
def cache(hub):
    """That of the process that loads everything."""
    return hub.new_cache()


@pytest.fixture(scope="module")
def loaded(hub, pushed, cache):
    """What they do in another process, which loads them by id; one of its downloads breaks off twice."""
    hub.control(cut={"path": "transformer/model.safetensors", "after": 10_000, "times": 2}, requests=True)
    found = hub.json(RUN, "load_all", cache=cache)
    found["requests"] = hub.control(requests=True)
    return found


@pytest.fixture(scope="module")
def special(hub, pushed):
    return hub.json(RUN, "load_special")


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_is_loaded_by_its_id_does_what_was_pushed(pushed, loaded, name):
    assert loaded[name] == pushed[name]


def test_a_download_that_breaks_off_goes_on(loaded):
    request = "GET /someone/CogView2Pipeline/resolve/"
    asked = [line for line in loaded["requests"] if line.startswith(request)]
    assert sum(line.endswith("transformer/model.safetensors") for line in asked) > 3  # for three files


@pytest.mark.parametrize("name", ["card", "other", "seven"])
def test_a_revision_is_the_one_that_was_pushed(pushed, special, name):
    assert special[name] == pushed[name]
    assert pushed["card"] != pushed["other"]
    assert pushed["CogLMModel"] != pushed["seven"]


def test_of_a_variant_only_its_own_files_are_fetched(special):
    assert special["variant"]
    assert set(special["variant files"]) == {"model.fp16.safetensors"}
    assert len(special["variant files"]) == 4


def test_card_scope_and_licence_go_along(special):
    assert special["companions"]["scope.json"] == '{"things": []}'
    assert special["companions"]["LICENSE"] == "Do as you like."
    card = special["companions"]["README.md"]
    assert "\nlicense: mit\n" in card.partition("\n---\n")[0]
    assert "Draws noise." in card
    assert card.count("# Tiny") == card.count('CogView2Pipeline.from_pretrained("someone/card")') == 1


def test_sharded_files_are_put_together(pushed, special):
    assert special["sharded"] == pushed["CogView2Pipeline"]
    assert {"transformer", "iterative_sr_transformer"} <= set(special["shards"])


def test_a_private_model_opens_to_its_token_only(pushed, special):
    assert special["private"]["token"] == pushed["CogView2Pipeline"]
    for who in ("none", "another"):
        assert (
            "OSError: There is no folder 'someone/private', and no model of this id on the Hub"
            in special["private"][who]
        )
        assert "pass `token`" in special["private"][who]


def test_what_cannot_be_loaded_is_named_in_a_sentence(special):
    assert special["unknown"].startswith("OSError: There is no folder 'someone/nothing', and no model of this id")
    assert special["unknown revision"].startswith("OSError: `revision` must be a branch, a tag or a commit")
    assert "someone/nothing" in special["unknown model"]
    assert special["wrong class"].startswith("ValueError")
    assert "model_index.json" in special["no pipeline"]


def test_the_classes_that_find_others_find_these(hub, pushed):
    found = hub.json(RUN, "load_by_auto_classes")
    expected = {
        "DiffusionPipeline": "CogView2Pipeline",
        "caption": "CogViewCaptionPipeline",
        "AutoPipelineForText2Image": "CogView2Pipeline",
        "AutoPipelineForInpainting": "CogView2InpaintPipeline",
        "AutoPipelineForImage2Image": "CogView2UpscalePipeline",
        "CogView": "CogViewPipeline",
        "AutoModel of diffusers": "CogLMModel",
        "tokenizer": "IcetkTokenizer",
        **{name: name for name in (*MODELS, "IcetkTokenizer", "CogViewTokenizer")},
        **{f"config of {name}": name.replace("Model", "Config") for name in MODELS},
    }
    assert found == expected


@pytest.fixture(scope="module")
def cards(hub, pushed):
    """What the examples of the model cards leave in an empty folder, and print."""
    return hub.json(RUN, "run_cards")


@pytest.mark.parametrize("name", CALLS)
def test_the_example_of_a_model_card_runs_as_it_stands(cards, name):
    ran = cards[name]
    kind = next((kind for kind in EXAMPLES if kind in name), None)
    task, files = EXAMPLES.get(kind, ("text-to-image", ["chinese.png", "english.png"]))
    assert (ran["blocks"], ran["files"]) == (1, files)
    assert bool(ran["said"].strip()) == (not files)
    assert ran["data"]["pipeline_tag"] == task
    assert {"cogview_pipelines", name} <= set(ran["data"]["tags"])


def test_after_a_download_that_failed_the_same_command_goes_on(hub, pushed):
    cache = hub.new_cache()
    hub.control(cut={"path": "vqvae/model.safetensors", "after": 0, "times": 100})
    failed = hub.run(RUN, "load_one", "CogViewPipeline", cache=cache)
    assert failed.returncode != 0
    hub.control(mend=True, requests=True)
    assert hub.json(RUN, "load_one", "CogViewPipeline", cache=cache) == pushed["CogViewPipeline"]
    fetched = [line for line in hub.control(requests=True) if line.startswith("GET") and ".safetensors" in line]
    assert len(fetched) == 1  # the rest was there
    assert "vqvae" in fetched[0]


def test_what_is_in_the_cache_needs_no_hub(hub, pushed, loaded, cache):
    hub.control(requests=True)
    offline = hub.json(RUN, "load_offline", cache=cache, HF_HUB_OFFLINE="1")
    assert hub.control(requests=True) == []
    unreachable = hub.json(RUN, "load_offline", cache=cache, HF_ENDPOINT="http://127.0.0.1:9")  # nobody answers
    for found in (offline, unreachable):
        assert found["cached"] == pushed["CogView2Pipeline"]
        expected = "OSError: The model 'someone/sharded' is not wholly in the cache, and the Hub cannot be reached"
        assert found["other"].startswith(expected)


def cogview2(hub, cache, *arguments, **variables):
    command = [sys.executable, "-c", "from cogview_pipelines.cli import app; app()", *map(str, arguments)]
    environment = hub.environment(cache, **variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_the_command_line_draws_with_a_model_of_the_hub(hub, pushed, loaded, cache, tmp_path):
    arguments = ("generate", "a cat", "--seed", 3, "--quiet", "--output", tmp_path / "cat.png", "--model")
    result = cogview2(hub, cache, *arguments, "someone/CogView2Pipeline")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "cat.png").stat().st_size > 100
    result = cogview2(hub, cache, *arguments, "someone/nothing")
    assert result.returncode == 2
    assert "no model of this id on the Hub" in result.stderr
    assert "Traceback" not in result.stderr


# Adapters ------------------------------------------------------------------------------------------------------------

ADAPTER = """
import json, sys, tempfile
from pathlib import Path
import torch
from cogview_pipelines import CogView2CaptionPipeline, CogView2InpaintPipeline, CogView2Pipeline, IcetkTokenizer
from cogview_pipelines.loaders.lora_files import find_trained, read_lora, write_lora
from cogview_pipelines.loaders.textual_inversion import write_learned_token
from huggingface_hub import HfApi
from tests.hub.programs import call
from tests.loaders.conftest import random_adapter
from tests.pipelines.conftest import build
from tests.utils import make_tokenizer

def push():
    folder = Path(tempfile.mkdtemp())
    make_tokenizer(folder).save_pretrained(folder)
    pipe = build(IcetkTokenizer.from_pretrained(folder, known_words=["a", "tiger"]), shares_backbone=True)
    pipe.push_to_hub("someone/base")
    models = {name: getattr(pipe, name) for name in ("transformer", "direct_sr_transformer")}
    weights, configs, _ = read_lora(random_adapter(models, folder / "a"), [*models])
    write_lora(folder / "a", weights, configs, known_words=["red"])
    pipe.load_lora_weights(folder / "a", "style")
    pipe.push_adapter_to_hub("someone/style", base_model="someone/base", prompt="a tree")
    for kind in (CogView2InpaintPipeline, CogView2CaptionPipeline):
        other = f"someone/style-{kind.__name__}"
        kind.from_pipe(pipe).push_adapter_to_hub(other, base_model="someone/base", prompt="a tree")
    word = write_learned_token(folder / "word", "<mine>", torch.zeros(32))
    for name in ("someone/word", "someone/style-CogView2InpaintPipeline"):
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=word.parent)
    whole = call(pipe)
    pipe.set_adapters("style", 0.5)
    pipe.push_to_hub("someone/with-style")
    return [whole, call(pipe)]

def load():
    pipe = CogView2Pipeline.from_pretrained("someone/base")
    unknown = [pipe.tokenizer.unknown_parts("a red tiger")]
    pipe.load_lora_weights("someone/style")
    unknown.append(pipe.tokenizer.unknown_parts("a red tiger"))
    card, names = run_card("someone/style")
    others = [run_card(f"someone/style-CogView2{kind}Pipeline")[1]["pipe"] for kind in ("Inpaint", "Caption")]
    adapted = [[type(other).__name__, *other.get_list_adapters()] for other in others]
    saved = CogView2Pipeline.from_pretrained("someone/with-style")
    unknown.append(saved.tokenizer.unknown_parts("a red tiger"))
    results = {"same": [call(pipe), call(saved)], "card": card.data.to_dict(), "size": names["image"].size}
    sources = ("someone/style", "someone/word", "someone/style-CogView2InpaintPipeline")
    trained = [[path.name for path in find_trained(source)] for source in sources]
    return {**results, "unknown": unknown, "others": adapted, "trained": trained}

def run_card(id):
    from huggingface_hub import ModelCard
    card, names = ModelCard.load(id), {}
    exec(card.text.split("```python\\n")[1].split("```")[0], names)
    return card, names

print(json.dumps({"push": push, "load": load}[sys.argv[1]]()))
"""


def test_an_adapter_is_pushed_with_a_card_and_loaded_by_its_id(hub):
    pushed = hub.json(ADAPTER, "push", token=TOKEN)
    loaded = hub.json(ADAPTER, "load")
    assert loaded["same"] == pushed and pushed[0] != pushed[1]
    assert loaded["card"]["base_model"] == "someone/base"
    assert {"lora", "cogview_pipelines", "CogView2Pipeline"} <= set(loaded["card"]["tags"])
    assert loaded["size"] == [96, 96]  # the example runs as it stands
    assert loaded["others"] == [  # so do those of pipelines that need more than a prompt
        ["CogView2InpaintPipeline", "transformer", "direct_sr_transformer"],
        ["CogView2CaptionPipeline", "transformer"],
    ]
    adapter, word = ["pytorch_lora_weights.safetensors"], ["learned_embeds.safetensors"]
    assert loaded["trained"] == [adapter, word, word + adapter]
    assert loaded["unknown"] == [["red"], [], []]
