"""What common clients send, in their words: the official ones of the image endpoints, and front ends."""

import base64
import io

import pytest
from PIL import Image

from .conftest import FINE, LOW, PROMPT, assert_error, half_mask, picture, png

GENERATIONS = "/v1/images/generations"
SMALL = {"prompt": PROMPT, "size": f"{LOW}x{LOW}", "seed": 7}


def first(answer):
    """The first picture of an answer."""
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


@pytest.mark.parametrize(
    "field",
    [
        {"n": None},
        {"response_format": None},
        {"seed": 7, "style": None},
        {"model": None, "user": None, "num_candidates": None},
        {"quality": "auto"},
        {"quality": "standard", "style": "vivid"},
        {"quality": "hd", "style": "natural"},
        {"quality": "high", "background": "auto", "moderation": "low"},
        {"background": "opaque", "output_format": "png", "output_compression": 100},
        {"output_compression": None, "output_format": None, "background": None, "moderation": None, "quality": None},
        {"stream": False, "partial_images": 0},
        {"stream": None, "partial_images": None},
        {"user": "somebody"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_else_gives_the_same_picture(client, field):
    plain = first(client.post(GENERATIONS, json=SMALL))
    assert first(client.post(GENERATIONS, json={**SMALL, **field})).tobytes() == plain.tobytes()


def test_a_size_of_null_is_the_largest(client):
    assert first(client.post(GENERATIONS, json={"prompt": PROMPT, "size": None})).size == (FINE, FINE)


@pytest.mark.parametrize("path", ["generations", "edits", "upscales"])
def test_a_seed_of_minus_one_is_drawn_and_told(client, path):
    files = {"image": png(picture()), "mask": png(half_mask())}
    if path == "upscales":
        del files["mask"]
    seeds = set()
    for _ in range(2):
        if path == "generations":
            answer = client.post(GENERATIONS, json={**SMALL, "seed": -1})
        else:
            answer = client.post(f"/v1/images/{path}", data={"prompt": PROMPT, "seed": "-1"}, files=files)
        seeds.add(answer.json()["data"][0]["seed"])
    assert len(seeds) == 2 and min(seeds) >= 0


def test_captions_take_a_seed_of_minus_one(client):
    data = {"strategy": "sample", "seed": "-1"}
    assert client.post("/v1/images/captions", data=data, files={"image": png(picture())}).status_code == 200


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]"])
def test_a_list_of_one_picture_is_a_picture(client, name):
    files = [(name, png(picture())), ("mask", png(half_mask()))]
    data = {"prompt": PROMPT, "seed": "5"}
    plain = first(client.post("/v1/images/edits", data=data, files=dict([("image", files[0][1]), files[1]])))
    assert first(client.post("/v1/images/edits", data=data, files=files)).tobytes() == plain.tobytes()


def test_a_list_of_two_pictures_to_paint_is_refused(client):
    files = [("image[]", png(picture())), ("image[]", png(picture())), ("mask", png(half_mask()))]
    assert_error(client.post("/v1/images/edits", data={"prompt": PROMPT}, files=files), 400, param="image")


def test_lists_in_other_forms(client):
    files = [("image[]", png(picture(seed=1))), ("image[]", png(picture(seed=2)))]
    assert len(client.post("/v1/images/captions", files=files).json()["data"]) == 2
    answer = client.post("/v1/images/scores", data={"prompt[]": ["a tiger", "a car"]}, files=files[:1])
    assert len(answer.json()["data"]) == 2
    assert_error(client.post("/v1/images/captions", data={"n[]": "1"}, files=files), 400, "unknown_parameter")


def test_a_field_of_a_form_that_is_empty_or_null_is_left_out(client):
    """Clients write what is not there as an empty text, or as the word."""
    files = {"image": png(picture()), "mask": png(half_mask())}
    data = {"prompt": PROMPT, "seed": "5"}
    plain = first(client.post("/v1/images/edits", data=data, files=files))
    more = {"n": "", "size": "null", "response_format": "", "quality": "auto", "input_fidelity": "high", "user": ""}
    more |= {"stream": "false", "background": "auto", "output_format": "png"}
    assert first(client.post("/v1/images/edits", data={**data, **more}, files=files)).tobytes() == plain.tobytes()
    assert_error(client.post("/v1/images/edits", data={"prompt": ""}, files=files), 400, param="prompt")


def test_a_file_that_nobody_chose_is_none(client):
    image = picture()
    hole = image.copy()
    hole.putalpha(half_mask().point(lambda value: 255 - value))
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % part
        for part in (
            (b"prompt", b"", PROMPT.encode()),
            (b"mask", b'; filename=""\r\nContent-Type: application/octet-stream', b""),
            (b"image", b'; filename="a.png"', png(hole)),
        )
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert first(client.post("/v1/images/edits", content=body + b"--x--\r\n", headers=headers)).size == image.size


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_files_of_other_kinds(client, kind):
    fields = {**SMALL, "output_format": kind, "output_compression": 90}
    answer = client.post(GENERATIONS, json=fields)
    assert answer.json()["output_format"] == kind
    small, plain = first(answer), first(client.post(GENERATIONS, json=SMALL))
    assert small.format == kind.upper() and small.size == plain.size
    assert not small.info.get("exif")


def test_a_model_is_found_by_its_name(client):
    assert client.get("/v1/models/tiny").json() == client.get("/v1/models").json()["data"][0]
    assert_error(client.get("/v1/models/other"), 404, "model_not_found", "model")


def test_what_the_model_cannot_read_is_told(client, pipe):
    assert client.post(GENERATIONS, json=SMALL).json()["warnings"] == []
    answer = client.post(GENERATIONS, json={**SMALL, "prompt": "тигр on a blue 🐯 background."})
    [warning] = answer.json()["warnings"]
    assert (warning["code"], warning["param"]) == ("unreadable_text", "prompt")
    assert "тигр" in warning["message"] and "🐯" in warning["message"] and "blue" not in warning["message"]
    fields = {**SMALL, "negative_prompt": "ꙮ", "guidance_scale": 2}
    [warning] = client.post(GENERATIONS, json=fields).json()["warnings"]
    assert warning["param"] == "negative_prompt" and "ꙮ" in warning["message"]
    files = {"image": png(picture(32, 32))}
    for path, prompt in (("upscales", "ꙮ"), ("scores", ["a tiger", "ꙮ"])):
        answer = client.post(f"/v1/images/{path}", data={"prompt": prompt}, files=files)
        assert [warning["param"] for warning in answer.json()["warnings"]] == ["prompt"]
    long = client.post(GENERATIONS, json={**SMALL, "prompt": "ꙮ" * 900 + " tiger"})
    assert len(long.json()["warnings"][0]["message"]) < 200


def test_without_metadata_the_file_tells_nothing(serve):
    running = serve(metadata=False)
    with running.client() as client:
        told = first(client.post(GENERATIONS, json=SMALL)).text
    assert told == {}
