"""
Make the pictures of docs/serving.md: start the server with the shipped model, and look at it with Chromium.

    python docs/images/make_page_screenshots.py

Needs the extra `test`, Chromium, and a font with Chinese characters. Takes a minute or two on a CPU.
"""

import argparse
import shutil
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.environment import SHIPPED_MODEL
from cogview_pipelines.serving.app import create_app
from cogview_pipelines.serving.server import bind, make_server
from cogview_pipelines.serving.settings import ServerSettings

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
MINUTES = 30 * 60_000  # milliseconds
COLOURS = 128  # of the saved pictures: a page has few


def create(page: Page) -> None:
    """Two pictures of four candidates."""
    page.locator("#cv-create-prompt textarea").fill("a painted style drawing of a tiger on a blue background")
    tab = page.locator("#cv-tab-create")
    for label, value in (("Pictures", "2"), ("Candidates: draft so many, keep the best", "4")):
        tab.get_by_label(f"number input for {label}").fill(value)
        page.keyboard.press("Tab")
    tab.get_by_label("Seed (empty: by chance)").fill("7")
    page.locator("#cv-create-start").click()
    tab.locator('.cv-result[data-state="done"]').wait_for(timeout=MINUTES)


def edit(page: Page) -> None:
    """A mask over the object of the first picture, and what comes of it, in Chinese."""
    page.locator('#cv-tab-create [data-send="edit"]').first.click()
    page.wait_for_function("window.cogview2.picture('edit') !== ''")
    page.locator("#cv-language").get_by_text("中文").click()
    page.locator("#cv-edit-prompt textarea").fill("一只青蛙，蓝色背景，彩绘风格")
    canvas = page.locator('[data-picture="edit"] canvas')
    box = canvas.bounding_box()
    page.locator('[data-picture="edit"] [data-tool="size"]').fill("80")
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    for row in (0.3, 0.4, 0.5, 0.6, 0.7):
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * row, steps=3)
        page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * row, steps=8)
    page.mouse.up()
    page.locator("#cv-edit-start").click()
    page.locator('#cv-tab-edit .cv-result[data-state="done"]').wait_for(timeout=MINUTES)


def save(page: Page, path: Path) -> None:
    """A screenshot with few colours, and so a small file."""
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def main() -> None:
    """Start, look, stop."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the pictures")
    parser.add_argument("--model", default=SHIPPED_MODEL)
    arguments = parser.parse_args()
    settings = ServerSettings(port=0)
    server = make_server(create_app(CogView2Pipeline.from_pretrained(arguments.model), settings, "shipped"), settings)
    with bind(settings) as listening, sync_playwright() as playwright:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.1)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(locale="en-US", viewport={"width": 1200, "height": 900})
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=MINUTES)
        page.wait_for_selector("#cv-create-start", timeout=MINUTES)
        create(page)
        save(page, arguments.output / "page_create.png")
        edit(page)
        save(page, arguments.output / "page_edit.png")
        browser.close()
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
