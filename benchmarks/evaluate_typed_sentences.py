#!/usr/bin/env python
"""
Pictures of sentences written as people type, one JSON line for each language, layout and scope. Whoever wrote them
knew the list of things, but not the grammar that the model was trained with. What went wrong with the first of them
(`typed_sentences.jsonl`) was read before the grammar was made wider; nobody has looked at those of
`typed_sentences_new.jsonl`, which were written afterwards. A picture is right; or wrong, but the model had named words
that it does not know; or wrong without a word.

    python benchmarks/evaluate_typed_sentences.py
    python benchmarks/evaluate_typed_sentences.py --sentences benchmarks/typed_sentences_new.jsonl
    python benchmarks/evaluate_typed_sentences.py --model MODEL --save wrong --output results.jsonl
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import typer

from cogview_pipelines import CogView2Pipeline
from cogview_pipelines.demo import LANGUAGES, Request, Scene, Scope, is_usable
from cogview_pipelines.demo.evaluation import Case, generate_pictures, share, shares
from cogview_pipelines.demo.scenes import BACKGROUNDS, LAYOUTS
from cogview_pipelines.environment import SHIPPED_MODEL, stamp
from cogview_pipelines.json_lines import dump_line, parse_object, read_lines

SENTENCES = Path(__file__).with_name("typed_sentences.jsonl")


def read_cases(path: Path, scope: Scope, seed: int) -> list[tuple[str, Case]]:
    """Language and case of each line, with any scene that would be right."""
    found = []
    for index, (_, text) in enumerate(read_lines(path)):
        line = parse_object(text)
        request = Request(tuple(line["objects"]), tuple(line["relations"]), line["style"], line["background"])
        styles = [request.style] if request.style else scope.styles
        backgrounds = [request.background] if request.background else BACKGROUNDS
        relation = next(iter(request.relations), None)
        scenes = [Scene(style, ground, request.objects, relation) for style in styles for ground in backgrounds]
        scene = next(filter(is_usable, scenes), scenes[0])
        found.append((line["language"], Case(scene, line["text"], seed + index, request)))
    return found


def fits(pipe: CogView2Pipeline, sentence: str) -> bool:
    """Whether the model takes a sentence of this length."""
    try:
        pipe.check_inputs(sentence)
    except ValueError:
        return False
    return True


def measure(pipe: CogView2Pipeline, cases: Sequence[Case], batch_size: int, save: Path | None) -> dict:
    """Shares of what is right, of what is wrong with and without a word, and of what is refused, over all cases."""
    taken = [case for case in cases if fits(pipe, case.caption)]
    images = generate_pictures(pipe, taken, batch_size) if taken else []
    scores = [case.score(image) for case, image in zip(taken, images, strict=True)]
    named = [bool(pipe.tokenizer.unknown_parts(case.caption)) for case in taken]
    for case, image, score in zip(taken, images, scores, strict=True):
        if save is not None and not score["all"]:
            image.save(save / f"{case.seed}.png")
    refused = [False] * (len(cases) - len(taken))
    outcomes = [(score["all"], is_named) for score, is_named in zip(scores, named, strict=True)]
    return {
        **shares(scores),
        "right": share([is_right for is_right, _ in outcomes] + refused),
        "wrong_with_warning": share([not is_right and is_named for is_right, is_named in outcomes] + refused),
        "wrong_without_warning": share([not is_right and not is_named for is_right, is_named in outcomes] + refused),
        "right_with_warning": share([is_right and is_named for is_right, is_named in outcomes] + refused),
        "refused": share([False for _ in outcomes] + [True for _ in refused]),
        "wrong": [case.caption for case, (is_right, _) in zip(taken, outcomes) if not is_right],
    }


def cells(cases: Sequence[tuple[str, Case]], scope: Scope) -> Iterator[tuple[dict, list[Case]]]:
    """The cases by language, layout, and whether the model's scope has what they ask for."""
    for is_known in (True, False):
        for layout in LAYOUTS:
            for language in LANGUAGES:
                own = [
                    case
                    for spoken, case in cases
                    if spoken == language
                    and case.scene.layout == layout
                    and set(case.scene.objects).issubset(scope.concepts) is is_known
                ]
                if own:
                    yield {"language": language, "layout": layout, "in_scope": is_known, "n": len(own)}, own


def main(
    model: str = typer.Option(str(SHIPPED_MODEL), help="Folder of a saved pipeline with its scope.json."),
    sentences: Path = typer.Option(SENTENCES, exists=True, help="JSONL file: what was typed, and what it asks for."),
    output: Path = typer.Option(None, help="JSONL file; lines are added."),
    save: Path = typer.Option(None, help="Folder for the pictures that are wrong."),
    seed: int = typer.Option(0, min=0, help="Of the pictures."),
    batch_size: int = typer.Option(20, min=1, help="Pictures that are computed at a time."),
) -> None:
    pipe = CogView2Pipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scope = Scope.load(model)
    name = "shipped" if Path(model) == SHIPPED_MODEL else model
    context = {"sentences": sentences.name, "seed": seed, "model": name, **stamp(str(pipe.device))}
    for folder in filter(None, (save, output and output.parent)):
        folder.mkdir(parents=True, exist_ok=True)
    for cell, cases in cells(read_cases(sentences, scope, seed), scope):
        result = measure(pipe, cases, batch_size, save)
        line = dump_line({"measure": "typed_sentences", **cell, **result, **context})
        print(line, end="", flush=True)
        if output is not None:
            with output.open("a", encoding="utf-8") as file:
                file.write(line)


if __name__ == "__main__":
    typer.run(main)
