"""A server with a model of the first CogView: the same routes, and what it cannot do is said."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="needs the extra `serve`")

from cogview_pipelines import CogViewCaptionPipeline, CogViewPipeline, CogViewUpscalePipeline
from cogview_pipelines.serving.page import Page
from cogview_pipelines.serving.page_texts import text
from cogview_pipelines.serving.settings import ServerSettings
from cogview_pipelines.serving.studio_cogview import CogViewStudio

from ..pipelines.conftest import build_cogview
from ..utils_cogview import make_cogview_tokenizer
from .conftest import Running, assert_error, half_mask, picture, png

CAT = "a cat"


@pytest.fixture(scope="module")
def cogview(tmp_path_factory):
    return build_cogview(make_cogview_tokenizer(tmp_path_factory.mktemp("pieces")))


@pytest.fixture(scope="module")
def client(cogview):
    """For a server with default bounds."""
    running = Running(cogview, ServerSettings(port=0, page=False, shutdown_timeout=2))
    running.start()
    with running.client() as client:
        yield client
    running.stop()


def decoded(entry):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_pictures_are_those_of_the_pipeline(client, cogview):
    wanted = {"prompt": CAT, "n": 2, "seed": 5, "num_candidates": 3, "top_k": 9, "temperature": 0.8, "size": "32x32"}
    answer = client.post("/v1/images/generations", json=wanted)
    assert answer.status_code == 200, answer.text
    made = cogview(
        CAT,
        num_images_per_prompt=2,
        num_candidates=3,
        generator=generators(5, 6, 7),
        top_k=9,
        temperature=0.8,
    )
    data = answer.json()["data"]
    assert [entry["seed"] for entry in data] == made.seeds
    assert [entry["score"] for entry in data] == pytest.approx(made.scores)
    for entry, image in zip(data, made.images):
        assert np.array_equal(decoded(entry), np.asarray(image))
    assert client.get("/v1/models").json()["data"][0]["sizes"] == ["32x32"]


def test_requests_of_one_batch_get_their_own_pictures(cogview):
    """As the worker computes them: together, each from its own seed."""
    from cogview_pipelines.serving import schemas
    from cogview_pipelines.serving.jobs import Job

    studio = CogViewStudio(cogview, "tiny", ServerSettings(port=0))
    jobs = []
    for seed, prompt in ((1, CAT), (2, "a tree")):
        fields = {"prompt": prompt, "seed": seed, "n": 2}
        jobs.append(
            Job("generation", studio.generation(schemas.parse(schemas.GenerationRequest, fields, strict=True)))
        )
    assert jobs[0].stages[0].key == jobs[1].stages[0].key and jobs[0].size == 2
    jobs[0].stages[0].run(jobs)
    for job, seed, prompt in zip(jobs, (1, 2), (CAT, "a tree")):
        alone = cogview(prompt, num_images_per_prompt=2, generator=generators(seed, seed + 1))
        assert [made.seed for made in job.state] == [seed, seed + 1]
        for made, image in zip(job.state, alone.images):
            assert np.array_equal(np.asarray(made.image), np.asarray(image))


def test_pictures_are_enlarged_captioned_and_scored(client, cogview):
    image = picture(40, 40)
    files = {"image": png(image)}
    answer = client.post("/v1/images/upscales", files=files, data={"prompt": CAT, "seed": "3", "top_k": "5"})
    assert answer.status_code == 200, answer.text
    upscale = CogViewUpscalePipeline.from_pipe(cogview)
    expected = upscale(image, CAT, generator=generators(3), top_k=5).images[0]
    assert np.array_equal(decoded(answer.json()["data"][0]), np.asarray(expected))

    captioner = CogViewCaptionPipeline.from_pipe(cogview)
    answer = client.post("/v1/images/captions", files=files)
    (found,) = answer.json()["data"][0]["captions"]
    assert found["text"] == captioner(image, top_k=1).captions[0]
    drawn = {"strategy": "sample", "n": "2", "seed": "4"}
    answer = client.post("/v1/images/captions", files=files, data=drawn)
    texts = [entry["text"] for entry in answer.json()["data"][0]["captions"]]
    assert texts == captioner(image, num_captions_per_image=2, generator=generators(4, 5)).captions

    prompts = [CAT, "a tree on a blue"]
    answer = client.post("/v1/images/scores", files=files, data={"prompt": prompts})
    losses = {entry["prompt"]: entry["caption_loss"] for entry in answer.json()["data"]}
    assert list(losses.values()) == sorted(losses.values())
    assert [losses[text] for text in prompts] == pytest.approx((-captioner.score(image, prompts)).tolist(), abs=1e-4)


def test_what_has_no_meaning_for_it_is_refused(client):
    for field, value in (
        ("style", "cool"),
        ("guidance_scale", 2),
        ("negative_prompt", "dark"),
        ("num_lopar_steps", 2),
    ):
        answer = client.post("/v1/images/generations", json={"prompt": CAT, field: value})
        assert f"`{field}` has no meaning for this model" in assert_error(answer, 400, param=field)["message"]
    answer = client.post("/v1/images/generations", json={"prompt": CAT, "size": "64x64"})
    assert_error(answer, 400, param="size")
    answer = client.post("/v1/images/generations", json={"prompt": "a cat " * 40})
    assert "may have 21 tokens" in assert_error(answer, 400, param="prompt")["message"]
    files = {"image": png(picture(40, 40)), "mask": png(half_mask(40, 40))}
    assert_error(client.post("/v1/images/edits", files=files, data={"prompt": CAT}), 400, "unsupported")
    files.pop("mask")
    for path, data, field in (
        ("upscales", {"num_levels": "2"}, "num_levels"),
        ("captions", {"language": "zh"}, "language"),
        ("captions", {"strategy": "beam"}, "strategy"),
        ("captions", {"n": "2"}, "n"),
        ("scores", {"prompt": ["a cat " * 40]}, "prompt"),
    ):
        assert_error(client.post(f"/v1/images/{path}", files=files, data=data), 400, param=field)


def test_settings_of_cogview_are_refused_by_the_other_family(pipe):
    running = Running(pipe, ServerSettings(port=0, page=False, shutdown_timeout=2))
    running.start()
    with running.client() as client:
        for field, value in (("top_k", 5), ("top_p", 0.5)):
            answer = client.post("/v1/images/generations", json={"prompt": CAT, field: value})
            assert f"`{field}` has no meaning for this model" in assert_error(answer, 400, param=field)["message"]
    running.stop()


def test_the_page_shows_only_what_the_model_can(cogview, tmp_path):
    settings = ServerSettings(port=0)
    page = Page(CogViewStudio(cogview, "tiny", settings), None, None, settings)
    page.build()
    labels = {component.label: component.visible for component, changes in page._labels if "label" in changes}
    hidden = {label for label, visible in labels.items() if visible is False}
    names = ("steps", "guidance", "negative_prompt", "levels", "caption_language", "style")
    assert hidden == {text(name, "en") for name in names}
    assert labels[text("temperature", "en")] and text("tab_edit", "en") not in labels
    alone = CogViewPipeline(**{name: part for name, part in cogview.components.items() if "super" not in name})
    assert CogViewStudio(alone, "tiny", settings).upscaling is None
