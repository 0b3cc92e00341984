"""`cogview2 judge`: people's judgement of the pictures of several models."""

import contextlib
import importlib.util
from pathlib import Path

import typer

from .console import FAILURE, bad_input, expand, fail, failures, make_writable_folder, say, say_json
from .serve import NEEDED


def judge(
    folders: list[Path] = typer.Argument(
        None, help="A folder for each model, whose pictures are named like the captions; two or more."
    ),
    captions: Path = typer.Option(None, help="What the pictures show: .jsonl, COCO's .json, or .tsv."),
    answers: Path = typer.Option(
        "judging.sqlite", help="The file of the answers. The same command with the same file goes on."
    ),
    judges: int = typer.Option(1, min=1, max=10_000, help="How many people judge; each gets a link."),
    is_pair: bool = typer.Option(False, "--ab", help="Two models: judges only say which picture is better."),
    num: int = typer.Option(None, "--num", "-n", min=1, help="So many of the captions, by chance.  [default: all]"),
    seed: int = typer.Option(0, min=0, max=2**40, help="Decides which captions."),
    size: int = typer.Option(
        None, min=1, max=4096, help="Pictures are resized to so many pixels, so that all are of one size."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 is all of them."),
    port: int = typer.Option(7861, min=0, max=65535, help="Port to listen on; 0 is a free one."),
    allow_host: list[str] = typer.Option(
        None, help="A host name that the server answers to, such as a proxy's; may be repeated."
    ),
    results: Path = typer.Option(None, help="Instead of a server: the results of a file of answers."),
    as_json: bool = typer.Option(False, "--json", help="With --results: print one line of JSON."),
) -> None:
    """
    Let people judge pictures of several models.

    A page in English and Chinese shows the pictures of all models for a caption in random order, without names. Each
    gets grades (clear, rich in detail, as the text says: 1 to 5; overall: 1 to 10), and one is the best. Answers are
    in a file as soon as they are given; --results tells means, deviations and win rates.

    \b
    Examples:
      cogview2 judge mine others truth --captions captions.jsonl --judges 3 --num 50
      cogview2 judge with_sr without_sr --captions captions.jsonl --ab
      cogview2 judge --results judging.sqlite
    """
    if results is not None:
        if folders or captions is not None:
            fail("--results is of a file of answers: leave folders and --captions out.")
        _tell(expand(results, "--results"), as_json)
        return
    if not folders or captions is None:
        fail("Name a folder for each model, and --captions; or --results to see what was found.")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fail(f'{" and ".join(missing)} must be installed: `pip install "cogview_pipelines[serve]"`.', FAILURE)
    from ..evaluation.captioned import read_captions
    from ..serving.judging.study import make_study

    with bad_input():
        rows = read_captions(expand(captions, "--captions"), seed=seed)
        study, excluded = make_study(rows, [expand(folder, "FOLDERS") for folder in folders], num, seed, is_pair, size)
    if excluded:
        say(f"{len(excluded)} captions are left out:", err=True)
        for id, reason in list(excluded.items())[:20]:
            say(f"  {id}: {reason}", err=True)
    file = expand(answers, "--answers")
    make_writable_folder(file.parent, "--answers")
    _serve(study, file, judges, host, port, tuple(allow_host or ()))


def _serve(study, file: Path, judges: int, host: str, port: int, allowed_hosts: tuple[str, ...]) -> None:
    from ..serving.judging.answers import Answers
    from ..serving.server import bind, make_server, set_up_log
    from ..serving.settings import ServerSettings

    settings = ServerSettings(host=host, port=port, allowed_hosts=allowed_hosts, max_body_bytes=2**16)
    with bad_input(), failures():
        kept = Answers(file, study)
        tokens = kept.add_judges(judges)
    try:
        listening = bind(settings)
    except OSError as error:
        fail(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Choose another --port or --host.",
            FAILURE,
        )
    from ..serving.judging.app import create_judging_app

    with listening:
        set_up_log()
        server = make_server(create_judging_app(study, kept, settings), settings)
        shown = f"[{host}]" if ":" in host else host
        say(
            f"{len(study.rows)} captions, pictures of {len(study.models)} models. Ctrl-C stops, and loses nothing.",
            err=True,
        )
        for name, token in tokens.items():
            say(f"judge {name}: http://{shown}:{listening.getsockname()[1]}/judge/{token}")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after an orderly end
            server.run(sockets=[listening])


def _tell(file: Path, as_json: bool) -> None:
    from ..serving.judging.answers import Answers
    from ..serving.judging.results import summarize

    with bad_input(), failures():
        answers = Answers(file)
        try:
            found = summarize(answers)
        finally:
            answers.close()
    if as_json:
        say_json(found)
        return
    for one in found["judges"]:
        share = "" if one["agreement"] is None else f", best is highest in {one['agreement']:.0%}"
        left_out = "" if one["counts"] or not one["answers"] else "; careless, not counted"
        say(f"judge {one['judge']:12}{one['answers']} of {found['captions']} answers{share}{left_out}")
    for one in found["models"]:
        say(f"{one['model']:18}best {_rate(one['best'])}")
        for name, value in one.items():
            if name not in ("model", "best"):
                spread = "" if value["deviation"] is None else f" ± {value['deviation']:.2f}"
                say(f"  {name:16}{value['mean']:.2f}{spread}")
    for one in found["pairs"]:
        ties = f", {one['ties']} alike" if one["ties"] else ""
        say(f"{one['models'][0]} over {one['models'][1]}: {_rate(one)}{ties}")


def _rate(found: dict) -> str:
    if found["rate"] is None:
        return "no answers"
    return f"{found['rate']:.1%} [{found['low']:.1%}, {found['high']:.1%}] of {found['of']}"
