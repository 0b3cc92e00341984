"""What a model with a list of its words does not know of a text is told by the API and the page, as it is."""

import asyncio
import base64
import io

import pytest

pytest.importorskip("gradio", reason="needs the extra `serve`")

from cogview_pipelines import CogViewTokenizer, IcetkTokenizer
from cogview_pipelines.serving.metrics import Metrics
from cogview_pipelines.serving.page import DATA_URL, Page
from cogview_pipelines.serving.settings import ServerSettings
from cogview_pipelines.serving.studio import Studio

from ..pipelines.conftest import build, build_cogview
from ..utils import make_tokenizer
from ..utils_cogview import make_cogview_tokenizer
from .conftest import LOW, Running, half_mask, picture, png

KNOWN = ["a", "cat", "dog"]
REST = "The model does not know this part of `{name}`, and goes by the rest: zebra"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    make_tokenizer(folder).save_pretrained(folder / "icetk")
    make_cogview_tokenizer(folder).save_pretrained(folder / "cogview")
    return {
        "cogview2": IcetkTokenizer.from_pretrained(folder / "icetk", known_words=KNOWN),
        "cogview": CogViewTokenizer.from_pretrained(folder / "cogview", known_words=KNOWN),
    }


@pytest.fixture(scope="module")
def own(tokenizers):
    return build(tokenizers["cogview2"])


@pytest.fixture(scope="module")
def running(own):
    server = Running(own, ServerSettings(port=0, page=False, shutdown_timeout=2))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def running_cogview(tokenizers):
    server = Running(build_cogview(tokenizers["cogview"]), ServerSettings(port=0, page=False, shutdown_timeout=2))
    server.start()
    yield server
    server.stop()


def warnings(running, path, **request):
    with running.client() as client:
        answer = client.post(f"/v1/images/{path}", **request)
    assert answer.status_code == 200, answer.text
    return {warning["param"]: warning["message"] for warning in answer.json()["warnings"]}


def test_prompts_and_negative_prompts_go_by_the_rest_if_there_is_any(running):
    asked = {"prompt": "a zebra cat", "negative_prompt": "a zebra", "guidance_scale": 2, "size": f"{LOW}x{LOW}"}
    expected = {name: REST.format(name=name) for name in ("prompt", "negative_prompt")}
    assert warnings(running, "generations", json=asked) == expected
    form = {"data": {"prompt": "zebra"}, "files": {"image": png(picture(32, 32))}}
    assert warnings(running, "upscales", **form) == {"prompt": "The model knows nothing of `prompt`: zebra"}


@pytest.mark.parametrize("family", ["running", "running_cogview"])
def test_texts_that_are_scored_keep_all_words(request, family):
    server = request.getfixturevalue(family)
    form = {"data": {"prompt": ["a cat", "a zebra cat", "zebra"]}, "files": {"image": png(picture(32, 32))}}
    told = "The model does not know this part of `prompt`, so its share in the score says little: zebra"
    assert warnings(server, "scores", **form) == {"prompt": told}
    with server.client() as client:
        losses = [row["caption_loss"] for row in client.post("/v1/images/scores", **form).json()["data"]]
    assert len(set(losses)) == 3


def shown(states):
    """What a button of the page shows at the end."""

    async def last():
        return [state async for state in states][-1]

    return asyncio.run(last())


@pytest.fixture
def page(own, running):
    settings = ServerSettings()
    return Page(Studio(own, "tiny", settings), running.worker, Metrics(), settings)


def test_the_page_tells_what_it_leaves_out_of_prompts_and_negative_prompts(page):
    common = {"count": 1, "seed": "1", "style": "", "temperature": "", "language": "en"}
    asked = {"prompt": "a zebra cat", "guidance": "2", "negative": "a unicorn", **common}
    for state in (
        page.create(candidates=1, size=f"{LOW}x{LOW}", steps=0, **asked),
        page.edit(picture=url(picture()), mask=url(half_mask()), **asked),
    ):
        found = shown(state)
        assert 'data-state="done"' in found, found
        assert "does not know this part of the text, and goes by the rest: zebra, unicorn<" in found


def test_the_page_tells_each_part_once(page):
    """However many texts have it."""
    common = {"count": 1, "seed": "1", "style": "", "temperature": "", "language": "en", "guidance": "2"}
    asked = {"prompt": "a zebra cat", "negative": "a zebra", "candidates": 1, "size": f"{LOW}x{LOW}", "steps": 0}
    assert shown(page.create(**asked, **common)).count("zebra<") == 1
    found = shown(page.score(url(picture()), "a cat\na zebra\nzebra", "en"))
    assert "so its share in the loss says little: zebra<" in found and found.count("says little") == 1


def test_the_page_tells_what_it_scores_without_knowing_it(page):
    found = shown(page.score(url(picture()), "a cat\na zebra", "en"))
    assert "so its share in the loss says little: zebra<" in found and "goes by the rest" not in found
    assert "没有多少意义：zebra<" in shown(page.score(url(picture()), "a cat\na zebra", "zh"))
    assert "cv-hint" not in shown(page.score(url(picture()), "a cat\na dog", "en"))


def url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return DATA_URL + base64.b64encode(file.getvalue()).decode()
