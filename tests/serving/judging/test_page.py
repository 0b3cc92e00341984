"""The page in a real browser."""

import pytest

from cogview_pipelines.serving.judging.texts import TEXTS

from .conftest import MODELS, NUM

SECONDS = 60_000


@pytest.fixture
def visit(browser):
    """Open links, each in a browser of its own; what went wrong in any page is found at the end."""
    contexts, problems, hosts = [], [], set()

    def open_page(url, locale="en-US"):
        context = browser.new_context(locale=locale, viewport={"width": 1200, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else ""))
        page.goto(url, timeout=SECONDS)
        page.locator("#pictures img").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == [] and len(hosts - {""}) == 1


def choose(page, name, value):
    page.locator(f'input[name="{name}"][value="{value}"]').check()


def fill(page, overall, best):
    for place, grade in enumerate(overall):
        for name in ("clarity", "texture", "relevance"):
            choose(page, f"{name}-{place}", 4)
        choose(page, f"overall-{place}", grade)
    choose(page, "best", best)


def send(page):
    """Save, and wait until the page has gone on."""
    before = page.locator("#progress").inner_text()
    page.locator("#send").click()
    page.wait_for_function("before => document.getElementById('progress').textContent !== before", arg=before)


def test_all_captions_are_graded_one_after_the_other(serve_judges, study, visit):
    serving = serve_judges(study)
    (token,) = serving.tokens
    page = visit(f"{serving.url}/judge/{token}")
    captions = set()
    for _ in range(NUM):
        captions.add(page.locator("#caption").inner_text())
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        assert page.locator("#pictures img").count() == 3
        content = page.content()
        assert not [name for name in MODELS if name in content]
        fill(page, (2, 9, 5), 1)
        send(page)
    assert captions == {row.caption for row in study.rows}
    page.locator("#done").wait_for()
    assert page.locator("#done").inner_text() == TEXTS["done"][0]
    answers = serving.answers.of(token)
    for caption, answer in answers.items():
        order = study.order_of_models(token, caption)
        assert answer.best == order[1]
        assert [answer.grades[model]["overall"] for model in order] == [2, 9, 5]


def test_what_is_missing_is_told_and_nothing_is_sent(serve_judges, study, visit):
    serving = serve_judges(study)
    page = visit(f"{serving.url}/judge/{serving.tokens[0]}")
    choose(page, "clarity-0", 3)
    page.locator("#send").click()
    assert TEXTS["texture"][0] in page.locator("#problem").inner_text()
    assert page.locator("fieldset.missing").count() == 3 * 4 - 1 + 3
    assert serving.answers.of(serving.tokens[0]) == {}


def test_one_may_go_back_and_change_an_answer(serve_judges, study, visit):
    serving = serve_judges(study)
    (token,) = serving.tokens
    page = visit(f"{serving.url}/judge/{token}")
    assert page.locator("#back").is_disabled()
    fill(page, (2, 9, 5), 1)
    send(page)
    caption = study.order_of_captions(token)[0]
    page.locator("#back").click()
    page.wait_for_function("document.querySelector('input[name=\"best\"]:checked')?.value === '1'")
    assert page.locator('input[name="overall-1"]:checked').get_attribute("value") == "9"
    choose(page, "best", 2)
    page.locator("#send").click()
    page.wait_for_function("document.querySelector('input:checked') === null")
    assert serving.answers.of(token)[caption].best == study.order_of_models(token, caption)[2]
    assert page.locator("#progress").inner_text().startswith("1 ")


def test_the_page_speaks_both_languages_and_remembers(serve_judges, study, visit):
    serving = serve_judges(study)
    page = visit(f"{serving.url}/judge/{serving.tokens[0]}", locale="zh-CN")
    assert page.locator("#send").inner_text() == TEXTS["send"][1]
    assert page.evaluate("document.documentElement.lang") == "zh"
    choose(page, "best", 1)
    page.locator('[data-language="en"]').click()
    assert page.locator("#send").inner_text() == TEXTS["send"][0]
    assert page.locator('input[name="best"]:checked').get_attribute("value") == "1"  # nothing is lost
    page.reload()
    page.locator("#pictures img").first.wait_for()
    assert page.locator("#send").inner_text() == TEXTS["send"][0]


def test_judges_work_at_the_same_time_and_each_goes_on_where_they_stopped(serve_judges, pairs, visit):
    serving = serve_judges(pairs, judges=2)
    pages = [visit(f"{serving.url}/judge/{token}") for token in serving.tokens]
    for _ in range(2):
        for place, page in enumerate(pages):
            assert page.locator("#pictures input").count() == 2  # in A/B mode there is one question
            choose(page, "best", place)
            send(page)
    for place, token in enumerate(serving.tokens):
        own = serving.answers.of(token)
        order = pairs.order_of_captions(token)
        assert set(own) == set(order[:2])
        assert all(answer.best == pairs.order_of_models(token, caption)[place] for caption, answer in own.items())
    page = visit(f"{serving.url}/judge/{serving.tokens[0]}")
    assert page.locator("#caption").inner_text() == pairs.rows[pairs.order_of_captions(serving.tokens[0])[2]].caption


def test_what_cannot_be_saved_stays_in_the_page(serve_judges, study, visit):
    serving = serve_judges(study)
    page = visit(f"{serving.url}/judge/{serving.tokens[0]}")
    fill(page, (2, 9, 5), 1)
    page.context.set_offline(True)
    page.locator("#send").click()
    page.wait_for_function("document.getElementById('problem').textContent !== ''")
    assert page.locator("#problem").inner_text() == TEXTS["failed"][0]
    page.context.set_offline(False)
    assert page.locator('input[name="overall-1"]:checked').get_attribute("value") == "9"
    send(page)
    assert len(serving.answers.of(serving.tokens[0])) == 1
