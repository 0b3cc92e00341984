#!/usr/bin/env python
"""
The page that draws in the browser, as a visitor has it: prompts of the demo data, half of them Chinese, are drawn in
headless Chromium and read back by the demo scorer. Prints one JSON line: the shares, the seconds of each picture, and
the bytes of the first visit.

    make docs browser
    python benchmarks/evaluate_browser.py --num 20 --output benchmarks/results/browser_cpu.jsonl

It takes Chromium, playwright and the page in `build/docs/draw`. Nothing but this machine is talked to.
"""

import base64
import contextlib
import functools
import http.server
import io
import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
from PIL import Image

from cogview_pipelines.demo import LANGUAGES, Scope
from cogview_pipelines.demo.evaluation import Case, choose_cases, shares
from cogview_pipelines.environment import SHIPPED_MODEL, num_cores, processor_name, stamp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "build" / "docs" / "draw"
SPLITS = ("train", "test_background", "test_pair", "test_order")  # what the model was made to do
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Files(http.server.SimpleHTTPRequestHandler):
    """The files of a folder; adds to the `sizes` of the server the bytes of each that it sends."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def copyfile(self, source, outputfile):
        self.server.sizes.append(source.seek(0, io.SEEK_END))
        source.seek(0)
        super().copyfile(source, outputfile)

    def end_headers(self):
        if self.server.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(folder: Path, isolated: bool = False) -> Iterator[tuple[str, list[int]]]:
    """
    A server of a folder on the loopback interface: its address, and the bytes of each file that it sent so far.
    `isolated`: with the headers that allow a page more than one thread.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=folder))
    server.sizes, server.isolated = [], isolated
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.sizes
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def chromium():
    """A Chromium without a window, new and empty."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        raise FileNotFoundError("There is no Chromium on the PATH: install it, as with `apt install chromium`.")
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def is_built(page: Path = PAGE) -> bool:
    """Whether the page and its model are there."""
    return (page / "model" / "model.json").is_file() and any(page.glob("*.wasm.gz"))


def visit(browser, address: str, language: str = "en"):
    """The page on the screen of a phone, once its model is loaded."""
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(f"{address}/?lang={language}")
    wait(page, seconds=300)
    return page


def wait(page, seconds: float) -> None:
    """Until the button can be pressed. The page is asked ten times a second, which takes nothing from its drawing."""
    page.wait_for_function("!document.getElementById('draw').disabled", timeout=1000 * seconds, polling=100)


def draw(page, prompt: str, seed: int = 0, greedy: bool = False) -> str:
    """Press the button; what the page says in the end."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.set_checked("#greedy", greedy)
    page.click("#draw")
    wait(page, seconds=600)
    return page.inner_text("#state")


def picture_of(page) -> Image.Image:
    """The picture on the page."""
    address = page.evaluate("document.getElementById('picture').toDataURL('image/png')")
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")


def choose_prompts(scope: Scope, num: int, seed: int, splits: Sequence[str] = SPLITS) -> list[tuple[str, Case]]:
    """So many cases, each with its split: in turn of each split and language."""
    cells = [(split, language) for split in splits for language in LANGUAGES]
    counts = [len(range(place, num, len(cells))) for place in range(len(cells))]
    chosen = [  # seeds far apart, or both languages would tell of the same scenes
        [(split, case) for case in choose_cases(scope, split, language, count, seed + 1000 * place)] if count else []
        for place, ((split, language), count) in enumerate(zip(cells, counts))
    ]
    return [cell[turn] for turn in range(max(counts)) for cell in chosen if turn < len(cell)]


def evaluate(page, cases: Sequence[tuple[str, Case]], greedy: bool = False) -> dict:
    """
    Draw the cases one by one, and score the pictures.

    Raises:
        RuntimeError: If the page does not draw one. It says what the page said.
    """
    scores, seconds, missed = [], [], []
    for split, case in cases:
        started = time.perf_counter()
        said = draw(page, case.caption, case.seed, greedy)
        seconds.append(round(time.perf_counter() - started, 2))
        if "Done" not in said:
            raise RuntimeError(f"The page did not draw {case.caption!r}: {said}")
        scores.append(case.score(picture_of(page)))
        if not scores[-1]["all"]:
            missed.append({"split": split, "prompt": case.caption, "seed": case.seed, **scores[-1]})
    return {
        **shares(scores),
        "missed": missed,
        "seconds": seconds,
        "median_seconds": round(statistics.median(seconds), 2),
        "worst_seconds": max(seconds),
    }


def main(
    num: int = typer.Option(20, min=1, help="Prompts, in turn of each split and language."),
    seed: int = typer.Option(0, min=0, help="Of scenes, captions and pictures."),
    splits: str = typer.Option(",".join(SPLITS), help="Of the demo data, joined by commas."),
    greedy: bool = typer.Option(False, help="The likeliest tokens only."),
    isolated: bool = typer.Option(False, help="With the headers that allow the page more than one thread."),
    page: Path = typer.Option(PAGE, help="Folder of the page."),
    output: Path = typer.Option(None, help="JSONL file; the line is added."),
) -> None:
    if not is_built(page):
        raise typer.BadParameter(f"{page} does not hold the page: run `make docs browser`, which needs npm.")
    cases = choose_prompts(Scope.load(SHIPPED_MODEL), num, seed, splits.split(","))
    lock = json.loads((ROOT / "docs" / "browser" / "package-lock.json").read_text(encoding="utf-8"))
    with serving(page, isolated) as (address, sizes), chromium() as browser:
        started = time.perf_counter()
        visited = visit(browser, address)
        load_seconds = round(time.perf_counter() - started, 2)
        result = {
            "n": len(cases),
            "seed": seed,
            "splits": splits.split(","),
            "greedy": greedy,
            "isolated": visited.evaluate("self.crossOriginIsolated"),
            "first_load_bytes": sum(sizes),
            "load_seconds": load_seconds,
            **evaluate(visited, cases, greedy),
        }
        context = stamp("cpu")
        context["hardware"] = f"{processor_name()}, {num_cores()} cores"
        context["versions"] |= {
            "chromium": browser.version,
            "onnxruntime-web": lock["packages"]["node_modules/onnxruntime-web"]["version"],
        }
    line = json.dumps({**result, **context}, ensure_ascii=False)
    print(line)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    typer.run(main)
