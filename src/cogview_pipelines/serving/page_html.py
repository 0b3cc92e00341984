"""The parts of the page that are not Gradio's: pictures are data in the page, never files of the server."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from .page_texts import TEXTS, text
from .studio import Made, Preview

PREVIEW_SIDE = 240  # pixels
TARGETS = ("edit", "upscale", "caption", "score")  # tabs that take a picture


def both(key: str, tag: str = "span") -> str:
    """A text that page.js changes with the language."""
    english, chinese = (html.escape(words) for words in TEXTS[key])
    return f'<{tag} data-en="{english}" data-zh="{chinese}">{english}</{tag}>'


def picture_field(name: str, has_mask: bool = False) -> str:
    """A field for a picture, with a brush if there is a mask to paint; page.js brings it to life."""
    mask = ""
    if has_mask:
        mask = (
            f'<p class="cv-hint">{both("paint_here")}</p>'
            f'<div class="cv-tools"><label>{both("brush_size")} '
            '<input type="range" data-tool="size" min="2" max="80" value="24"></label>'
            f'<label><input type="checkbox" data-tool="eraser"> {both("eraser")}</label>'
            f'<button type="button" data-tool="clear">{both("clear")}</button>'
            f'<button type="button" data-tool="invert">{both("invert")}</button>'
            f'<label class="cv-file">{both("mask_file")} '
            '<input type="file" accept="image/*" data-tool="mask"></label></div>'
        )
    return (
        f'<div class="cv-picture" data-picture="{name}" data-mask="{int(has_mask)}">'
        f'<label class="cv-file">{both("choose_file")} <input type="file" accept="image/*" data-tool="file"></label>'
        '<p class="cv-hint" role="status" data-tool="note"></p>'
        '<div class="cv-stage" hidden><img alt=""><canvas></canvas></div>'
        f"{mask}</div>"
    )


def gallery() -> str:
    """Where page.js puts the pictures that were made."""
    return (
        '<section class="cv-gallery" aria-labelledby="cv-gallery-title">'
        f'<h2 id="cv-gallery-title">{both("gallery")}</h2>'
        f'<p class="cv-hint">{both("gallery_hint")}</p><div class="cv-figures" data-gallery></div></section>'
    )


def progress(preview: Preview | None, columns: int, language: str) -> str:
    """How far the work is."""
    if preview is None:
        return _state("busy", f"<p>{text('working', language)}</p>")
    step = preview.step
    if preview.stage == "transformer":
        step = -(-preview.step // columns)
    words = text(preview.stage, language, step=step)
    figures = "".join(
        f'<figure><img src="{_data_url(_enlarged(image), "WEBP")}" alt="{html.escape(words)}"></figure>'
        for image in preview.images
    )
    return _state("preview", f'<p>{words}</p><div class="cv-figures">{figures}</div>')


def waiting(language: str) -> str:
    """The work has not begun."""
    return _state("waiting", f"<p>{text('waiting', language)}</p>")


def failure(message: str, language: str) -> str:
    """What went wrong."""
    return _state("failed", f'<p role="alert">{text("error", language)} {html.escape(message)}</p>')


def pictures(
    made: list[Made], contents: list[bytes], notes: Sequence[str], language: str, targets: Sequence[str] = TARGETS
) -> str:
    """
    Pictures with their seeds and scores, where they can be sent (`targets`, names of tabs), and what is to be said of
    them all.
    """
    figures = []
    for one, content in zip(made, contents):
        facts = [text("seed_of", language, seed=one.seed)]
        if one.score is not None:
            facts.append(text("score_of", language, score=f"{one.score:.3f}"))
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        prompt = html.escape(one.prompt)
        buttons = "".join(
            f'<button type="button" data-send="{name}">{both(f"to_{name}")}</button>' for name in targets
        )
        figures.append(
            f'<figure data-seed="{one.seed}"><img src="{url}" alt="{prompt}" width="{one.image.width}" '
            f'height="{one.image.height}"><figcaption><span>{prompt}</span><span class="cv-facts">'
            f'{html.escape(" · ".join(facts))}</span><span class="cv-tools"><a download="{one.seed}.png" href="{url}">'
            f"{both('download')}</a>{buttons}</span></figcaption></figure>"
        )
    return _state("done", f'{_hints(notes)}<div class="cv-figures">{"".join(figures)}</div>')


def table(headings: list[str], rows: list[tuple[str, float]], language: str, notes: Sequence[str] = ()) -> str:
    """Texts with their numbers, and what is to be said of them all."""
    head = "".join(f'<th scope="col">{text(key, language)}</th>' for key in headings)
    body = "".join(f"<tr><td>{html.escape(words)}</td><td>{number:.3f}</td></tr>" for words, number in rows)
    return _state("done", f"{_hints(notes)}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _hints(notes: Sequence[str]) -> str:
    return "".join(f'<p class="cv-hint" role="status">{html.escape(note)}</p>' for note in notes)


def _state(name: str, content: str) -> str:
    return f'<div class="cv-result" data-state="{name}" aria-live="polite">{content}</div>'


def _enlarged(image: Image.Image) -> Image.Image:
    """A draft at the size of the result, so that the page does not jump."""
    factor = max(PREVIEW_SIDE // max(image.size), 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BILINEAR)


def _data_url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
