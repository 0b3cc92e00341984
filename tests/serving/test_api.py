"""The API with a real client: what it makes, and that it is what the pipelines make."""

import base64
import io

import pytest
import torch
from PIL import Image, ImageChops

from cogview_pipelines.pipelines.cogview2.pipeline_cogview2_caption import CogView2CaptionPipeline
from cogview_pipelines.pipelines.cogview2.settings import SamplingSettings
from cogview_pipelines.serving.schemas import DrawsTokens

from .conftest import FINE, LOW, PROMPT, half_mask, picture, png


def decode(entry):
    """The picture of an entry of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def same(first, second):
    return first.size == second.size and ImageChops.difference(first.convert("RGB"), second).getbbox() is None


def test_a_generation_is_the_picture_of_its_seed(client, pipe):
    answer = client.post("/v1/images/generations", json={"prompt": PROMPT, "n": 2, "seed": 7})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["size"] == f"{FINE}x{FINE}" and body["model"] == "tiny" and body["created"] > 1.7e9
    assert [entry["seed"] for entry in body["data"]] == [7, 8]
    assert [entry["revised_prompt"] for entry in body["data"]] == [PROMPT] * 2
    for entry in body["data"]:
        generator = torch.Generator().manual_seed(entry["seed"])
        assert same(decode(entry), pipe(PROMPT, generator=generator).images[0])
    assert decode(body["data"][0]).text["seed"] == "7"
    assert decode(body["data"][0]).text["prompt"] == PROMPT


def test_without_a_seed_one_is_drawn_and_told(client):
    first, second = (
        client.post("/v1/images/generations", json={"prompt": PROMPT}).json()["data"][0]["seed"] for _ in range(2)
    )
    assert first != second
    again = client.post("/v1/images/generations", json={"prompt": PROMPT, "seed": first})
    assert again.json()["data"][0]["seed"] == first


def test_settings_size_and_style_reach_the_pipeline(client, pipe):
    fields = {
        "temperature": 0.7,
        "top_k_clusters": 2,
        "style": "cool",
        "guidance_scale": 1.5,
        "negative_prompt": "a car",
    }
    answer = client.post(
        "/v1/images/generations", json={"prompt": PROMPT, "seed": 1, "size": f"{LOW}x{LOW}", **fields}
    )
    made = pipe(PROMPT, generator=torch.Generator().manual_seed(1), height=LOW, **fields).images[0]
    assert same(decode(answer.json()["data"][0]), made)


def test_every_setting_of_the_pipelines_is_a_field():
    assert set(SamplingSettings.declared()) <= set(DrawsTokens.model_fields)


def test_candidates_are_ranked_and_their_scores_told(client):
    answer = client.post(
        "/v1/images/generations",
        json={"prompt": PROMPT, "n": 2, "num_candidates": 4, "seed": 3, "size": f"{LOW}x{LOW}"},
    )
    data = answer.json()["data"]
    assert len(data) == 2 and {entry["seed"] for entry in data} <= {3, 4, 5, 6}
    assert data[0]["score"] >= data[1]["score"]


@pytest.mark.parametrize("kind", ["mask file", "transparent mask", "transparent picture"])
def test_an_edit_changes_what_is_marked_and_nothing_else(client, kind):
    image, mask = picture(), half_mask()
    hole = image.copy()
    hole.putalpha(mask.point(lambda value: 255 - value))
    files = {
        "mask file": {"image": png(image), "mask": png(mask)},
        "transparent mask": {"image": png(image), "mask": png(hole)},
        "transparent picture": {"image": png(hole)},
    }[kind]
    answer = client.post("/v1/images/edits", data={"prompt": PROMPT, "seed": "5", "n": "2"}, files=files)
    assert answer.status_code == 200, answer.text
    assert [entry["seed"] for entry in answer.json()["data"]] == [5, 6]
    for entry in answer.json()["data"]:
        changed = (
            ImageChops.difference(decode(entry).convert("RGB"), image).convert("L").point(lambda value: value and 255)
        )
        assert changed.getbbox() is not None
        assert ImageChops.subtract(changed, mask).getbbox() is None


def test_an_upscale_is_larger(client):
    answer = client.post(
        "/v1/images/upscales", data={"seed": "2"}, files={"image": ("a.jpg", png(picture(40, 30)), "image/jpeg")}
    )
    assert answer.status_code == 200, answer.text
    assert decode(answer.json()["data"][0]).size == (120, 90)
    assert answer.json()["size"] == "120x90"


def test_captions_of_several_pictures_in_each_language(client, pipe):
    pictures = [picture(seed=1), picture(50, 70, seed=2)]
    captions = CogView2CaptionPipeline.from_pipe(pipe)
    captions.set_progress_bar_config(disable=True)
    for language in ("en", "zh"):
        answer = client.post(
            "/v1/images/captions", data={"language": language}, files=[("image", png(image)) for image in pictures]
        )
        data = answer.json()["data"]
        assert [entry["index"] for entry in data] == [0, 1]
        assert [entry["captions"][0]["text"] for entry in data] == captions(pictures, language=language).captions


def test_captions_drawn_of_several_pictures_have_seeds_of_their_own(client, pipe):
    captions = CogView2CaptionPipeline.from_pipe(pipe)
    captions.set_progress_bar_config(disable=True)
    answer = client.post(
        "/v1/images/captions",
        data={"strategy": "sample", "n": "2", "seed": "5"},
        files=[("image", png(picture(seed=1)))] * 2,
    )
    texts = [caption["text"] for entry in answer.json()["data"] for caption in entry["captions"]]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
    call = {"strategy": "sample", "num_captions_per_image": 4, "generator": generators}
    assert texts == captions(picture(seed=1), **call).captions


def test_scores_are_sorted_losses(client, pipe):
    texts = ["a tiger on a blue background.", "一只猫,红色背景。", "a car"]
    answer = client.post("/v1/images/scores", data={"prompt": texts}, files={"image": png(picture())})
    data = answer.json()["data"]
    losses = CogView2CaptionPipeline.from_pipe(pipe).score(picture(), texts).tolist()
    assert [entry["caption_loss"] for entry in data] == sorted(losses)
    assert [texts[entry["index"]] for entry in data] == [entry["prompt"] for entry in data]
    assert data[0]["caption_loss"] == pytest.approx(losses[data[0]["index"]])


def test_models_health_metrics_and_description(client):
    model = client.get("/v1/models").json()["data"][0]
    assert model["id"] == "tiny" and model["sizes"] == [f"{LOW}x{LOW}", f"{FINE}x{FINE}"] and "cool" in model["styles"]
    assert client.get("/health").json() == {"status": "ok"}
    client.post("/v1/images/generations", json={"prompt": PROMPT, "model": "tiny", "size": f"{LOW}x{LOW}"})
    numbers = client.get("/metrics").text
    assert 'cogview2_jobs_total{kind="generation",outcome="done"}' in numbers
    assert 'cogview2_requests_total{route="/v1/images/generations",status="200"}' in numbers
    assert "cogview2_places_taken 0.0" in numbers
    paths = client.get("/openapi.json").json()["paths"]
    fields = paths["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "prompt" in fields["properties"] and fields["additionalProperties"] is False


def test_answers_carry_an_id_and_are_not_stored(client):
    first = client.post("/v1/images/generations", json={})
    second = client.get("/v1/models")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.headers["cache-control"] == "no-store"
    assert first.headers["x-content-type-options"] == "nosniff"
