"""The command is killed in the middle: every answer that a judge was told of is there."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

from cogview_pipelines.serving.judging.answers import Answers

from ..conftest import httpx

COMMAND = [sys.executable, "-c", "from cogview_pipelines.cli import app; app()", "judge"]


@contextlib.contextmanager
def started(*arguments):
    """The command, once it has told its links."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def links(process, count):
    return [re.search(r"http://\S+", process.stdout.readline())[0] for _ in range(count)]


def wait_until_it_answers(url):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url, timeout=30)
        time.sleep(0.05)
    raise AssertionError("it does not answer")


def test_no_answer_is_lost_when_the_server_is_killed(tmp_path, rows, folders):
    captions, file = tmp_path / "captions.jsonl", tmp_path / "answers.sqlite"
    captions.write_text("".join(json.dumps({"id": row.id, "caption": row.caption}) + "\n" for row in rows))
    arguments = (*folders, "--captions", captions, "--answers", file, "--judges", 4)
    possible = {}  # by judge and place: what may be kept. An answer on its way may have come or not; one told of, has
    for round in range(3):
        with started(*arguments) as process:
            urls = links(process, 4)
            wait_until_it_answers(urls[0])
            enough = threading.Event()

            def judge(url, round=round, enough=enough):
                token, base = url.rsplit("/", 1)[1], url.partition("/judge/")[0]
                own = possible.setdefault(token, {place: {None} for place in range(4)})
                with httpx.Client(timeout=30) as client, contextlib.suppress(httpx.TransportError):
                    for number in range(10_000):
                        place, clarity, overall = number % 4, 1 + number % 5, 1 + round
                        own[place].add((clarity, overall))
                        answer = client.put(
                            f"{base}/v1/judging/{token}/tasks/{place}",
                            json={
                                "best": 0,
                                "grades": [{"clarity": clarity, "texture": 1, "relevance": 1, "overall": overall}] * 3,
                            },
                        )
                        assert answer.status_code == 200
                        own[place] = {(clarity, overall)}
                        if number == 10:
                            enough.set()

            threads = [threading.Thread(target=judge, args=(url,)) for url in urls]
            for thread in threads:
                thread.start()
            assert enough.wait(120)
            os.kill(process.pid, signal.SIGKILL)  # while others are writing
            for thread in threads:
                thread.join(60)
        answers = Answers(file)
        assert set(answers.judges().values()) == {url.rsplit("/", 1)[1] for url in urls}
        assert any(None not in own[place] for own in possible.values() for place in own)
        for token, own in possible.items():
            kept = answers.of(token)
            for place, may_be in own.items():
                answer = kept.get(caption_at(answers, token, place))
                assert answer is None or len(answer.grades) == 3
                grades = answer and answer.grades[0]
                assert (grades and (grades["clarity"], grades["overall"])) in may_be
        answers.close()


def caption_at(answers, token, place):
    """The caption at a place of a judge's order."""
    order = list(range(len(answers.study["captions"])))
    random.Random(token).shuffle(order)
    return order[place]
