"""What judges can ask for, and what they cannot."""

import io
import json

import pytest
from PIL import Image

from ..conftest import assert_error
from .conftest import MODELS, NUM, colour, grades


def first_task(client, token):
    start = client.get(f"/v1/judging/{token}").json()
    return start, client.get(f"/v1/judging/{token}/tasks/{start['next']}").json()


def shown(client, task):
    """Which model and caption stand at each place, by the colours of the pictures."""
    images = [Image.open(io.BytesIO(client.get(f"/{path}").content)) for path in task["pictures"]]
    known = {colour(model, caption): (model, caption) for model in range(3) for caption in range(NUM)}
    return [known[image.convert("RGB").getpixel((3, 3))] for image in images]


def test_places_become_models_in_the_answers(serve_judges, study):
    serving = serve_judges(study)
    (token,) = serving.tokens
    with serving.client() as client:
        for _ in range(NUM):
            start, task = first_task(client, token)
            places = shown(client, task)
            assert {caption for _, caption in places} == {int(task["caption"].split()[1])}
            by_place = [grades(model + 2) for model, _ in places]
            best = [model for model, _ in places].index(2)
            state = client.put(
                f"/v1/judging/{token}/tasks/{task['place']}", json={"best": best, "grades": by_place}
            ).json()
            again = client.get(f"/v1/judging/{token}/tasks/{task['place']}").json()
            assert again["answer"] == {"best": best, "grades": by_place}
    assert start["count"] == NUM and state == {"answered": NUM, "next": None}
    for answer in serving.answers.of(token).values():
        assert answer.best == 2 and [one["overall"] for one in answer.grades] == [2, 3, 4]


def test_nothing_that_is_sent_tells_who_made_a_picture(serve_judges, study, folders):
    serving = serve_judges(study)
    (token,) = serving.tokens
    with serving.client() as client:
        _, task = first_task(client, token)
        paths = [f"/judge/{token}", "/judging/judge.js", "/judging/judge.css", f"/v1/judging/{token}"]
        paths += [f"/v1/judging/{token}/tasks/{task['place']}", *(f"/{path}" for path in task["pictures"])]
        for path in paths:
            answer = client.get(path)
            assert answer.status_code == 200
            sent = answer.content + str(answer.headers).encode()
            for name in (*MODELS, str(folders[0].parent)):
                assert name.encode() not in sent
        image = Image.open(io.BytesIO(client.get(f"/{task['pictures'][0]}").content))
        assert not getattr(image, "text", None)
        order = [caption for _, caption in shown(client, task)]
    assert len(order) == 3


def test_without_the_link_of_a_judge_nothing_is_shown(serve_judges, study):
    serving = serve_judges(study)
    with serving.client() as client:
        for token in ("wrong", "", "..", serving.tokens[0][:-1]):
            for path in (f"/judge/{token}", f"/v1/judging/{token}", f"/v1/judging/{token}/tasks/0/pictures/0"):
                assert_error(client.get(path), 404)
        assert_error(client.put("/v1/judging/wrong/tasks/0", json={"best": 0}), 404)
        for path in ("/", "/judging/app.py", "/judging/..%2Fapp.py", "/openapi.json", "/docs"):
            assert_error(client.get(path), 404)
        assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "body",
    [
        b"words",
        json.dumps({"best": 0}),
        json.dumps({"best": 3, "grades": [grades(1)] * 3}),
        json.dumps({"best": -1, "grades": [grades(1)] * 3}),
        json.dumps({"best": 0, "grades": [grades(1)] * 2}),
        json.dumps({"best": 0, "grades": []}),
        json.dumps({"best": 0, "grades": [grades(11)] * 3}),
        json.dumps({"best": 0, "grades": [grades(1, others=6)] * 3}),
        json.dumps({"best": 0, "grades": [grades(1, others=0)] * 3}),
        json.dumps({"best": 0, "grades": [grades("1")] * 3}),
        json.dumps({"best": True, "grades": [grades(1)] * 3}),
        json.dumps({"best": 0, "grades": [{"overall": 1}] * 3}),
        json.dumps({"best": 0, "grades": [grades(1)] * 3, "model": "secret_alpha"}),
    ],
)
def test_answers_that_make_no_sense_are_refused_and_not_kept(serve_judges, study, body):
    serving = serve_judges(study)
    (token,) = serving.tokens
    with serving.client() as client:
        headers = {"Content-Type": "application/json"}
        assert_error(client.put(f"/v1/judging/{token}/tasks/0", content=body, headers=headers), 400)
        for place in (NUM, -1):
            sent = {"best": 0, "grades": [grades(1)] * 3}
            assert_error(client.put(f"/v1/judging/{token}/tasks/{place}", json=sent), 404)
        assert_error(client.get(f"/v1/judging/{token}/tasks/x"), 400)
        assert_error(client.get(f"/v1/judging/{token}/tasks/0/pictures/3"), 404)
    assert serving.answers.of(token) == {}


def test_foreign_pages_and_large_bodies_are_refused(serve_judges, study):
    serving = serve_judges(study)
    path = f"/v1/judging/{serving.tokens[0]}/tasks/0"
    with serving.client() as client:
        assert_error(client.put(path, json={"best": 0}, headers={"Origin": "http://elsewhere.example"}), 403)
        assert_error(client.get(path, headers={"Host": "elsewhere.example"}), 421)
        assert_error(client.put(path, content=b"x" * 100_000), 413)


def test_in_pairs_there_are_no_grades(serve_judges, pairs):
    serving = serve_judges(pairs)
    (token,) = serving.tokens
    with serving.client() as client:
        start, task = first_task(client, token)
        assert start["mode"] == "ab" and len(task["pictures"]) == 2
        path = f"/v1/judging/{token}/tasks/{task['place']}"
        assert_error(client.put(path, json={"best": 0, "grades": [grades(1)] * 2}), 400, param="grades")
        assert client.put(path, json={"best": 1}).json()["answered"] == 1


def test_a_picture_that_is_gone_is_an_error_of_its_own(serve_judges, study, folders):
    serving = serve_judges(study)
    (token,) = serving.tokens
    for file in folders[0].iterdir():
        file.unlink()
    with serving.client() as client:
        _, task = first_task(client, token)
        statuses = sorted(client.get(f"/{path}").status_code for path in task["pictures"])
    assert statuses == [200, 200, 404]
