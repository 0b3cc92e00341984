"""The page that draws in the browser: its tokenizer in Node.js, and all of it in Chromium (slow)."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import evaluate_browser
from cogview_pipelines import CogView2Pipeline, IcetkTokenizer
from cogview_pipelines.demo import Scope
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.export.tokenizer_tables import tokenizer_tables

from ..utils import skip_or_fail

ROOT = Path(__file__).parents[2]
NODE = shutil.which("node")
TEXTS = [
    *(
        "a tiger on a blue background",
        "一只老虎，蓝色背景",
        "  A  TIGER \t and\n an apple. ",
        "ＡＢＣ　１２ ﬁne Ⅷ ½",
        "",
    ),
    *(
        "a<n>b <pad> <unk> <s>",
        "<start_of_image>",
        "  ",
        "日本語 кириллица 🎈🎈 café é",
        "a tiger ",
        "只 ",
        "\u200b\ufeffx",
    ),
    *("<start_of_chinese> a<n>", "İstanbul ß ΑΣ"),
]
TYPED = ROOT / "benchmarks/typed_sentences.jsonl"
LETTERS = "abc tigerdon. ,的一只老虎红色背景é🎈Ａ﹏\u3000\t<n>▁½"


def encode_in_javascript(tokenizer, texts, folder):
    if NODE is None:
        pytest.skip("the tokenizer of the page is tested with Node.js, which is not there")
    tables = folder / "tokenizer.json"
    tables.write_text(json.dumps(tokenizer_tables(tokenizer)), encoding="utf-8")
    command = [NODE, ROOT / "tests" / "docs" / "encode.mjs", ROOT / "docs" / "browser" / "tokenizer.js", tables]
    result = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def expected(tokenizer, text):
    ids, before = tokenizer.encode(text), tokenizer.encode_before_image(text)
    known = tokenizer.known_text(text), tokenizer.knows_some(text)
    return [ids, before, tokenizer.language(text), tokenizer.unknown_parts(text), *known]


def test_the_tokenizer_of_the_page_encodes_as_that_of_the_shipped_model(tmp_path):
    tokenizer, source = IcetkTokenizer.from_pretrained(SHIPPED_MODEL / "tokenizer"), random.Random(0)
    typed = [json.loads(line)["text"] for line in TYPED.read_text("utf-8").splitlines()]
    texts = TEXTS + typed + ["".join(source.choices(LETTERS, k=source.randrange(1, 40))) for _ in range(400)]
    found = encode_in_javascript(tokenizer, texts, tmp_path)
    for text, one in zip(texts, found, strict=True):
        assert one == expected(tokenizer, text), text


def test_the_tokenizer_of_the_page_knows_added_tokens_and_known_words(tokenizer, tmp_path):
    own = type(tokenizer)(
        tokenizer.vocab_file,
        num_image_tokens=tokenizer.num_image_tokens,
        language_ranges=tokenizer.language_ranges,
        known_words=["tiger", "a", "老虎", "一只", "背景上", "背景上的", "的图"],
    )
    own.add_known_words(["犛牛"])
    own.add_tokens(["<mine>", "犛"])
    texts = [
        "a tiger and <mine>",
        "犛牛和犛羊",
        "<mine>",
        "a<mine>b",
        "a <his>, <MINE> tiger ＜猫＞ < a >",
        "一只老虎和猫",
        "Ａ TIGER, cat",
        "背景上的图",
        *TEXTS[:3],
    ]
    for text, one in zip(texts, encode_in_javascript(own, texts, tmp_path), strict=True):
        assert one == expected(own, text), text


@pytest.fixture(scope="module")
def served():
    """Address of the page, and the bytes of the files that were fetched."""
    if not evaluate_browser.is_built():
        skip_or_fail("the page is not built: `make browser`, which needs npm")
    with evaluate_browser.serving(evaluate_browser.PAGE) as served:
        yield served


@pytest.fixture(scope="module")
def page(served, browser):
    return evaluate_browser.visit(browser, served[0])


def draw(page, prompt, greedy=True):
    return evaluate_browser.draw(page, prompt, seed=5, greedy=greedy)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("greedy", [True, False])
def test_the_page_draws_what_the_pipeline_draws(page, greedy):
    prompt = "a tiger on a blue background"
    assert "Done" in draw(page, prompt, greedy)
    pipe = CogView2Pipeline.from_pretrained(SHIPPED_MODEL, dtype=torch.float32)
    cold = ("temperature", "direct_sr_temperature", "iterative_sr_temperature")
    settings = dict.fromkeys(cold, 1e-6) if greedy else {}
    tokens = pipe(prompt, generator=torch.Generator().manual_seed(5), **settings).tokens[0]
    found = json.loads(page.evaluate("document.getElementById('picture').dataset.tokens"))
    assert found["iterative_sr_transformer"] == tokens.flatten().tolist()


@pytest.mark.slow
def test_the_page_fits_a_phone_and_tells_what_is_wrong_in_both_languages(page):
    assert "too long" in draw(page, "a tiger " * 60)
    page.click("#language")
    assert "文字太长" in page.inner_text("#state")
    page.click("#language")
    assert "Write what" in draw(page, "  ")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_evaluation_says_what_was_drawn_how_fast_and_what_a_visit_loads(page, served):
    cases = evaluate_browser.choose_prompts(Scope.load(SHIPPED_MODEL), 2, seed=0)
    result = evaluate_browser.evaluate(page, cases)
    assert result["all"] == 1 and not result["missed"]
    assert 0 < result["median_seconds"] <= result["worst_seconds"] == max(result["seconds"])
    model = json.loads((evaluate_browser.PAGE / "model" / "model.json").read_text(encoding="utf-8"))
    assert sum(file["bytes"] for file in model["files"].values()) < sum(served[1]) < 40_000_000
