"""What PNG files of a server say of their pictures: enough that the command line makes each of them again."""

import asyncio
import base64
import hashlib
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("gradio", reason="needs the extra `serve`")

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.cli import app
from cogview_pipelines.cli.loading import describe_model
from cogview_pipelines.ops.int8_linear import is_built
from cogview_pipelines.pictures.png import read_metadata
from cogview_pipelines.serving.app import create_app
from cogview_pipelines.serving.metrics import Metrics
from cogview_pipelines.serving.page import DATA_URL, Page
from cogview_pipelines.serving.settings import ServerSettings
from cogview_pipelines.serving.studio import Studio
from cogview_pipelines.serving.worker import Worker

from ..pipelines.conftest import build_cogview
from ..utils_cogview import make_cogview_tokenizer
from .conftest import LOW, PROMPT, Serving, half_mask, picture, png

GENERATIONS = "/v1/images/generations"


class Described(Serving):
    """A server of a model in a folder, as `cogview2 serve` starts it."""

    def __init__(self, pipe, folder, int8=False):
        settings = ServerSettings(port=0, page=False, shutdown_timeout=2)
        super().__init__(create_app(pipe, settings, "mine", describe_model(str(folder), int8=int8)), settings)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """Where the model stands."""
    folder = tmp_path_factory.mktemp("secret") / "tiny-model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def described(pipe, folder):
    """A client for a server of that model."""
    yield from client_of(pipe, folder)


def client_of(pipe, folder, **options):
    running = Described(pipe, folder, **options)
    running.start()
    with running.client() as client:
        yield client
    running.stop()


@pytest.fixture
def saved(tmp_path):
    """The files of an answer's pictures."""

    def save(answer):
        assert answer.status_code == 200, answer.text
        paths = []
        for entry in answer.json()["data"]:
            paths.append(tmp_path / f"served-{entry['seed']}.png")
            paths[-1].write_bytes(base64.b64decode(entry["b64_json"]))
        return paths

    return save


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def assert_same(first, second):
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))


def assert_remade(path, folder, *options):
    """That the command line makes the picture again, and says the same of it."""
    again = path.with_name("again.png")
    call("generate", "--remake", path, "--model", folder, "--output", again, *options)
    assert_same(path, again)
    first, second = read_metadata(path), read_metadata(again)
    first.pop("post_selection", None)
    assert first == second


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "prompt": "一只老虎,蓝色背景。",
            "style": "cool",
            "size": f"{LOW}x{LOW}",
            "temperature": 0.7,
            "top_k_clusters": 2,
        },
        {"guidance_scale": 1.5, "negative_prompt": "a car", "num_lopar_steps": 2, "style": "natural"},
    ],
    ids=["nothing", "style and size", "guidance"],
)
def test_a_picture_is_made_again_by_the_command_line(described, saved, folder, fields):
    paths = saved(described.post(GENERATIONS, json={"prompt": PROMPT, "n": 2, "seed": 7, **fields}))
    for path, seed in zip(paths, (7, 8), strict=True):
        told = read_metadata(path)
        assert (told["prompt"], told["seed"]) == (fields.get("prompt", PROMPT), seed)
        assert (
            told["settings"].items()
            >= {name: value for name, value in fields.items() if name not in ("prompt", "size", "style")}.items()
        )
        assert_remade(path, folder)


def test_a_picture_says_what_one_of_the_command_line_says(described, saved, folder, tmp_path):
    [path] = saved(described.post(GENERATIONS, json={"prompt": PROMPT, "seed": 3}))
    call("generate", PROMPT, "--seed", 3, "--model", folder, "--output", tmp_path / "own.png")
    assert read_metadata(path) == read_metadata(tmp_path / "own.png")
    assert path.read_bytes() == (tmp_path / "own.png").read_bytes()
    assert read_metadata(path)["model"] == "tiny-model"
    assert b"secret" not in path.read_bytes()  # where a model stands is nobody's business


def test_a_chosen_candidate_says_of_which(described, saved, folder, tmp_path):
    fields = {"prompt": PROMPT, "n": 2, "num_candidates": 4, "seed": 3, "size": f"{LOW}x{LOW}"}
    answer = described.post(GENERATIONS, json=fields)
    paths = saved(answer)
    for path, entry in zip(paths, answer.json()["data"], strict=True):
        selection = {"num_candidates": 4, "seed": 3, "score": entry["score"]}
        assert read_metadata(path)["post_selection"] == selection
        assert_remade(path, folder)
    del fields["seed"]
    (path, _) = saved(described.post(GENERATIONS, json=fields))
    told = read_metadata(path)
    assert told["post_selection"]["seed"] <= told["seed"] < told["post_selection"]["seed"] + 4


@pytest.mark.skipif(not is_built(), reason="the kernels are not built")
def test_a_picture_that_was_made_in_int8_says_so(folder, saved):
    pipe = CogView2Pipeline.from_pretrained(folder)
    pipe.set_super_resolution(int8=True)
    for client in client_of(pipe, folder, int8=True):
        [path] = saved(client.post(GENERATIONS, json={"prompt": PROMPT, "seed": 7}))
    assert read_metadata(path)["int8"] is True
    assert_remade(path, folder, "--int8")


def test_a_picture_of_cogview_is_made_again(saved, tmp_path):
    pipe = build_cogview(make_cogview_tokenizer(tmp_path))
    folder = tmp_path / "cogview"
    pipe.save_pretrained(folder)
    fields = {"prompt": "a cat", "n": 2, "seed": 5, "top_k": 9, "temperature": 0.8}
    for client in client_of(pipe, folder):
        plain = saved(client.post(GENERATIONS, json=fields))
        chosen = saved(client.post(GENERATIONS, json={**fields, "num_candidates": 3}))
        [enlarged] = saved(
            client.post("/v1/images/upscales", data={"seed": "3"}, files={"image": png(picture(40, 40))})
        )
    for path in plain:
        assert_remade(path, folder)
    assert read_metadata(chosen[0])["post_selection"]["seed"] == 5
    told = read_metadata(enlarged)
    assert (told["command"], told["settings"], told["model"]) == ("upscale", {}, "cogview")


def test_changed_pictures_say_what_those_of_the_command_line_say(described, saved, folder, tmp_path):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(png(picture()))
    mask.write_bytes(png(half_mask()))
    files = {"image": image.read_bytes(), "mask": mask.read_bytes()}
    own, options = tmp_path / "own.png", ("--seed", 5, "--model", folder, "--output", tmp_path / "own.png")

    fields = {"prompt": PROMPT, "seed": "5", "temperature": "0.8"}
    [path] = saved(described.post("/v1/images/edits", data=fields, files=files))
    call("inpaint", PROMPT, "--image", image, "--mask", mask, "--temperature", 0.8, *options)
    assert_same(path, own)
    assert read_metadata(path) == without_names(read_metadata(own))

    del files["mask"]
    fields = {"prompt": PROMPT, "seed": "5", "num_levels": "2"}
    [path] = saved(described.post("/v1/images/upscales", data=fields, files=files))
    call("upscale", image, "--prompt", PROMPT, "--levels", 2, *options)
    assert_same(path, own)
    assert read_metadata(path) == without_names(read_metadata(own))


def without_names(metadata):
    """What an upload can say of its files."""
    inputs = {name: {"sha256": told["sha256"]} for name, told in metadata["inputs"].items()}
    return {**metadata, "inputs": inputs}


def test_pictures_of_the_page_say_it_too(pipe, folder, tmp_path):
    settings, metrics = ServerSettings(port=0), Metrics()
    worker = Worker(settings.queue_limit, settings.job_timeout, metrics)
    page = Page(Studio(pipe, "mine", settings, describe_model(str(folder))), worker, metrics, settings)
    image, mask = (f"{DATA_URL}{base64.b64encode(png(one)).decode()}" for one in (picture(), half_mask()))

    async def shown(states):
        async for state in states:
            html = state
        [content] = set(re.findall(f'{DATA_URL}([^"]+)"', html))  # shown, and to be kept
        path = tmp_path / "shown.png"
        path.write_bytes(base64.b64decode(content))
        return read_metadata(path)

    worker.start()
    try:
        told = asyncio.run(shown(page.create(PROMPT, 1, 1, "3", f"{LOW}x{LOW}", "cool", "", "", "", "", "en")))
        assert told["settings"]["style"] == "cool" and told["model"] == "tiny-model"
        assert_remade(tmp_path / "shown.png", folder)
        told = asyncio.run(shown(page.edit(image, mask, PROMPT, 1, "3", "cool", "", "", "", "zh")))
        assert (told["command"], told["settings"]) == ("inpaint", {"style": "cool"})
        assert told["inputs"]["mask"] == {"sha256": hashlib.sha256(png(half_mask())).hexdigest()}
        told = asyncio.run(shown(page.upscale(image, "", 1, "3", "en")))
        assert (told["command"], told["settings"], told["seed"]) == ("upscale", {"num_levels": 1}, 3)
        assert told["inputs"] == {"image": {"sha256": hashlib.sha256(png(picture())).hexdigest()}}
    finally:
        worker.stop()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_files_hold_pixels_alone(described, kind):
    """As on the command line, which writes PNG files only."""
    answer = described.post(
        GENERATIONS, json={"prompt": PROMPT, "seed": 1, "size": f"{LOW}x{LOW}", "output_format": kind}
    )
    content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert PROMPT.encode() not in content and b"tiny-model" not in content
