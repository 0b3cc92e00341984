"""The page in a real browser, which talks to nobody but the server."""

import base64
import contextlib
import io
import re

import pytest
from PIL import Image

from cogview_pipelines.serving.page_texts import TEXTS, text
from cogview_pipelines.serving.settings import ServerSettings

from .conftest import FINE, PROMPT, Hold, Running, assert_error, half_mask, picture, png, wait_for

SECONDS = 60_000  # milliseconds that a loaded machine may take for a step


@pytest.fixture(scope="module")
def server(pipe):
    running = Running(pipe, ServerSettings(port=0, shutdown_timeout=2))
    running.start()
    yield running
    running.stop()


class Visit:
    """A visit of the page: what it asked for, and what went wrong in it."""

    def __init__(self, browser, url, locale="en-US", **context):
        self.context = browser.new_context(locale=locale, viewport={"width": 1200, "height": 900}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.requests, self.problems = [], []
        self.page.on("request", lambda request: self.requests.append((request.method, request.url)))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console", lambda message: self.problems.append(message.text) if message.type == "error" else None
        )
        self.page.goto(url, timeout=SECONDS)
        self.page.wait_for_selector("#cv-create-start")
        self.page.wait_for_function("window.cogview2 !== undefined")

    def open(self, name):
        self.page.locator(f"#cv-tab-{name}-button").first.click()

    def choose(self, name, image):
        """Put a picture into the field of a tab."""
        field = self.page.locator(f'[data-picture="{name}"] [data-tool="file"]')
        field.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(image)})
        self.page.wait_for_function(f"window.cogview2.picture('{name}') !== ''")

    def result(self, state, tab):
        """The result of a tab once it is in a state."""
        found = self.page.locator(f'#cv-tab-{tab} .cv-result[data-state="{state}"]')
        found.wait_for(state="visible")
        return found


@pytest.fixture
def visit(browser, server):
    visit = Visit(browser, server.url)
    yield visit
    visit.context.close()


def test_a_picture_of_a_prompt_appears_with_its_seed_and_in_the_gallery(visit, pipe):
    page = visit.page
    page.get_by_label(text("prompt", "en")).fill(PROMPT)
    page.locator("#cv-tab-create").get_by_label(text("seed", "en")).fill("7")
    hold = Hold(pipe)
    hold.close()
    try:
        page.locator("#cv-create-start").click()
        assert hold.reached.wait(60)
    finally:
        hold.remove()
    result = visit.result("done", "create")
    assert "seed 7" in result.inner_text()
    image = result.locator("img")
    assert image.evaluate("image => [image.complete, image.naturalWidth]") == [True, FINE]
    assert image.get_attribute("alt") == PROMPT
    assert page.locator("[data-gallery] figure[data-seed='7']").count() == 1
    assert visit.problems == []


def test_previews_come_row_by_row_before_the_picture(visit, pipe):
    page = visit.page
    page.get_by_label(text("prompt", "en")).fill(PROMPT)
    hold = Hold(pipe)
    steps = hold.steps
    try:
        hold.close()
        page.locator("#cv-create-start").click()
        assert hold.reached.wait(60)
        while page.locator('#cv-tab-create .cv-result[data-state="preview"] img').count() == 0:
            hold.reached.clear()  # one token at a time
            hold.open()
            assert hold.reached.wait(60)
            hold.close()
            page.wait_for_timeout(200)
        assert (
            text("transformer", "en", step=1).split("1")[0] in page.locator("#cv-tab-create .cv-result").inner_text()
        )
        assert hold.steps - steps <= 16 + 1
    finally:
        hold.remove()
    visit.result("done", "create")


def test_candidates_are_shown_with_their_scores(visit):
    page = visit.page
    page.get_by_label(text("prompt", "en")).fill("一只老虎,蓝色背景。")
    for label, value in (("candidates", "3"), ("n", "2")):
        page.locator("#cv-tab-create").get_by_label(f"number input for {text(label, 'en')}").fill(value)
        page.keyboard.press("Tab")
    page.locator("#cv-create-start").click()
    facts = visit.result("done", "create").locator(".cv-facts").all_inner_texts()
    assert len(facts) == 2 and all("score" in fact for fact in facts)


def test_a_mask_is_brushed_and_only_what_it_marks_changes(visit, server):
    page = visit.page
    visit.open("edit")
    visit.choose("edit", picture(96, 96))
    canvas = page.locator('[data-picture="edit"] canvas')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=4)
    page.mouse.up()
    brushed = page.evaluate("window.cogview2.mask('edit')")
    mask = decode(brushed)
    assert mask.size == (96, 96)
    assert mask.getpixel((48, 43))[0] == 255 and mask.getpixel((5, 5))[0] == 0
    page.get_by_label(text("edit_prompt", "en")).fill(PROMPT)
    page.locator("#cv-edit-start").click()
    painted = decode(visit.result("done", "edit").locator("img").get_attribute("src")).convert("RGB")
    assert painted.getpixel((5, 5)) == picture(96, 96).getpixel((5, 5))
    assert painted.crop((30, 30, 66, 60)).tobytes() != picture(96, 96).crop((30, 30, 66, 60)).tobytes()
    # and a mask from a file, inverted, then cleared
    page.locator('[data-tool="mask"]').set_input_files(
        {"name": "m.png", "mimeType": "image/png", "buffer": png(half_mask(96, 96))}
    )
    page.wait_for_function("before => window.cogview2.mask('edit') !== before", arg=brushed)
    page.locator('[data-tool="invert"]').click()
    inverted = decode(page.evaluate("window.cogview2.mask('edit')"))
    assert inverted.getpixel((20, 20))[0] == 0 and inverted.getpixel((60, 60))[0] == 255
    page.locator('[data-tool="clear"]').click()
    page.locator("#cv-edit-start").click()
    assert "`mask`" in visit.result("failed", "edit").inner_text()


def test_a_result_goes_to_another_tab_and_is_enlarged_described_and_ranked(visit):
    page = visit.page
    visit.open("upscale")
    visit.choose("upscale", picture(32, 32))
    page.locator("#cv-upscale-start").click()
    result = visit.result("done", "upscale")
    assert result.locator("img").evaluate("image => image.naturalWidth") == 96
    result.locator('[data-send="caption"]').click()
    page.wait_for_function("window.cogview2.picture('caption') !== ''")
    page.locator("#cv-caption-start").click()
    assert visit.result("done", "caption").locator("tbody tr").count() == 1
    visit.open("score")
    visit.choose("score", picture(32, 32))
    page.get_by_label(text("texts", "en")).fill("a tiger\n\n一只猫\n<b>a car</b>")
    page.locator("#cv-score-start").click()
    rows = visit.result("done", "score").locator("tbody tr")
    assert rows.count() == 3
    losses = [float(row.split("\t")[1]) for row in rows.all_inner_texts()]
    assert losses == sorted(losses)
    assert "<b>a car</b>" in " ".join(rows.all_inner_texts())  # as text
    assert visit.problems == []


def test_the_language_switch_changes_every_word(visit):
    page = visit.page
    page.locator("#cv-language").get_by_text("中文").click()
    page.get_by_label(text("prompt", "zh")).wait_for()
    page.wait_for_function(f"document.body.innerText.includes('{text('gallery', 'zh')}')")
    for name in ("create", "edit", "upscale", "caption", "score"):
        visit.open(name)
        page.wait_for_function("document.querySelector('[role=tab][aria-selected=true]') !== null")
        shown = page.locator("body").inner_text()
        english = [words[0] for words in TEXTS.values() if "{" not in words[0] and words[0] in shown]
        assert english == []
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.locator("#cv-language").get_by_text("English").click()
    page.get_by_role("heading", name=text("title", "en")).wait_for()


def test_a_chinese_browser_sees_chinese_first(browser, server):
    visit = Visit(browser, server.url, locale="zh-CN")
    visit.page.get_by_label(text("prompt", "zh")).wait_for()
    visit.context.close()


def test_files_are_chosen_by_buttons_in_the_language_of_the_page_and_not_of_the_browser(visit):
    page = visit.page
    page.locator("#cv-language").get_by_text("中文").click()
    visit.open("edit")
    for words in ("choose_file", "mask_file"):
        field = page.locator("#cv-tab-edit").get_by_label(text(words, "zh"))
        assert field.evaluate("field => getComputedStyle(field).opacity") == "0"  # with the browser's own words
        with page.expect_file_chooser():
            field.click()


def test_what_is_wrong_is_said_on_the_page(visit):
    page = visit.page
    page.locator("#cv-create-start").click()
    assert "`prompt`" in visit.result("failed", "create").inner_text()
    page.get_by_label(text("prompt", "en")).fill("a тигр on a blue background.")
    page.locator("#cv-create-start").click()
    hint = visit.result("done", "create").locator(".cv-hint[role=status]")
    assert hint.inner_text() == text("unknown_rest", "en", parts="тигр")
    visit.open("caption")
    page.locator('[data-picture="caption"] [data-tool="file"]').set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    page.get_by_text(text("unreadable", "en")).wait_for()
    page.locator("#cv-caption-start").click()
    assert "`image`" in visit.result("failed", "caption").inner_text()


def test_what_is_wrong_is_said_in_chinese_on_the_chinese_page(visit):
    page = visit.page
    page.locator("#cv-language").get_by_text("中文").click()
    page.get_by_label(text("prompt", "zh")).wait_for()
    page.locator("#cv-create-start").click()
    said = visit.result("failed", "create").inner_text()
    assert "不能为空" in said and not re.search("[a-z]{3}", said)
    page.get_by_label(text("prompt", "zh")).fill("тигр 老虎")
    page.locator("#cv-create-start").click()
    assert text("unknown_rest", "zh", parts="тигр") in visit.result("done", "create").inner_text()


def test_stop_and_leaving_end_the_work(browser, server, pipe):
    for leave in (False, True):
        visit = Visit(browser, server.url)
        visit.page.get_by_label(text("prompt", "en")).fill(PROMPT)
        hold = Hold(pipe)
        hold.close()
        try:
            visit.page.locator("#cv-create-start").click()
            assert hold.reached.wait(60)
            if leave:
                visit.context.close()
            else:
                visit.page.locator("#cv-create-stop").click()
            wait_for(lambda: server.worker.places_taken == 0, 60)
        finally:
            hold.remove()
            visit.context.close()
        wait_for(lambda: not server.worker.is_busy)


def test_the_page_asks_nobody_else_for_anything(visit, server):
    for name in ("edit", "score", "create"):
        visit.open(name)
    visit.page.wait_for_timeout(1000)
    foreign = [url for _, url in visit.requests if not url.startswith((server.url, "data:", "blob:"))]
    assert foreign == []
    assert visit.problems == []


def test_every_field_and_button_of_the_page_has_a_name(visit):
    for name in ("create", "edit", "upscale", "caption", "score"):
        visit.open(name)
        visit.page.wait_for_timeout(300)
        nameless = visit.page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, select, button')]
                .filter((element) => element.checkVisibility())
                .filter((element) => !(element.labels?.length && [...element.labels].some((l) => l.innerText.trim()))
                    && !element.getAttribute('aria-label') && !element.innerText?.trim() && !element.title)
                .map((element) => element.outerHTML.slice(0, 200))"""
        )
        assert nameless == []
    assert visit.page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")


def test_with_a_token_the_browser_asks_for_it(browser, pipe):
    running = Running(pipe, ServerSettings(port=0, token="secret", shutdown_timeout=2))
    running.start()
    try:
        visit = Visit(browser, running.url, http_credentials={"username": "me", "password": "secret"})
        visit.page.get_by_label(text("prompt", "en")).fill(PROMPT)
        visit.page.locator("#cv-create-start").click()
        visit.result("done", "create")
        visit.context.close()
    finally:
        running.stop()


def test_gradio_serves_and_fetches_nothing_that_the_page_does_not_need(server, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with server.client() as client:
        refused = client.get("/v1/images/generations")  # the page at `/` must not take what the API has no method for
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert refused.json()["error"]["code"] == "method_not_allowed"
        assert client.delete("/v1/models").headers["allow"] == "GET"
        config = client.get("/config")
        assert config.status_code == 200 and str(tmp_path.home()) not in config.text
        for method, path in (
            ("GET", f"/gradio_api/file={secret}"),
            ("GET", "/gradio_api/file=http://127.0.0.1:1/x"),
            ("GET", "/gradio_api/proxy=http://127.0.0.1:1/x"),
            ("GET", "/static/%2e%2e/%2e%2e/__init__.py"),
            ("GET", "/gradio_api/openapi.json"),
            ("GET", "/monitoring"),
            ("POST", "/gradio_api/upload"),
            ("POST", "/gradio_api/component_server"),
            ("POST", "/gradio_api/run/create"),
            ("POST", "/gradio_api/call/create"),
            ("POST", "/login"),
        ):
            answer = client.request(method, path)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found", (method, path)
        files = [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}]
        answer = client.post("/gradio_api/queue/join", json={"data": files, "fn_index": 0, "session_hash": "x"})
        assert answer.status_code == 400 and "secret" not in answer.text


def decode(url):
    """The picture of a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


JOIN = "/gradio_api/queue/join"
SHAPES = [
    (JOIN, {"data": [], "fn_index": -1, "session_hash": "abc"}, "fn_index"),
    (JOIN, {"data": [], "fn_index": 999, "session_hash": "abc"}, "fn_index"),
    (JOIN, {"data": [], "fn_index": True, "session_hash": "abc"}, "fn_index"),
    (JOIN, {"data": [], "fn_index": "0", "session_hash": "abc"}, "fn_index"),
    (JOIN, {"data": [], "session_hash": "abc"}, None),
    (JOIN, {"data": ["en"], "fn_index": 0, "session_hash": ""}, "session_hash"),
    (JOIN, {"data": ["en"], "fn_index": 0, "session_hash": None}, "session_hash"),
    (JOIN, {"data": ["en"], "fn_index": 0, "session_hash": "a/../b"}, "session_hash"),
    (JOIN, {"data": ["en"], "fn_index": 0, "session_hash": "x" * 65}, "session_hash"),
    (JOIN, {"data": ["en"], "fn_index": 0, "session_hash": "abc", "trigger_id": [1]}, "trigger_id"),
    (JOIN, {"data": ["en"] * 99, "fn_index": 0, "session_hash": "abc"}, "data"),
    (JOIN, {"data": "en", "fn_index": 0, "session_hash": "abc"}, None),
    (JOIN, [1, 2], None),
    (JOIN, "text", None),
    ("/gradio_api/cancel", {}, None),
    ("/gradio_api/cancel", {"session_hash": "abc", "fn_index": "x", "event_id": 7}, None),
    ("/gradio_api/reset", {"event_id": {}}, None),
]


@pytest.mark.parametrize(("path", "body", "param"), SHAPES, ids=str)
def test_what_the_page_does_not_send_is_refused_as_documented(server, path, body, param, caplog):
    with server.client() as client:
        answer = client.post(path, json=body)
    assert 400 <= answer.status_code < 500
    assert_error(answer, answer.status_code, param=param)
    assert "Traceback" not in caplog.text


def test_other_errors_of_gradio_have_the_documented_shape(server, caplog):
    with server.client() as client:
        for path in ("/gradio_api/queue/data", "/assets/nothing.js", "/static/nothing.css", "/svelte/nothing.js"):
            answer = client.get(path)
            assert 400 <= answer.status_code < 500, path
            assert_error(answer, answer.status_code)
        answer = client.post("/gradio_api/cancel", content=b"{", headers={"Content-Type": "application/json"})
        assert_error(answer, answer.status_code)
    assert "Traceback" not in caplog.text


def test_pages_left_open_leave_connections_for_others(pipe):
    running = Running(pipe, ServerSettings(port=0, max_connections=8, shutdown_timeout=1))
    running.start()
    try:
        with contextlib.ExitStack() as stack:
            answers = []
            for number in range(6):
                client = stack.enter_context(running.client())
                answers.append(stack.enter_context(client.stream("GET", f"/gradio_api/heartbeat/visit{number}")))
            assert [answer.status_code for answer in answers] == [200] * 4 + [503] * 2
            with running.client() as client:
                assert client.get("/health").status_code == 200
    finally:
        running.stop()
