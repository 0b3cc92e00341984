"""`cogview2 models`: what can be loaded without a network."""

import json
from collections.abc import Iterator
from pathlib import Path

import typer

from ..environment import SHIPPED_MODELS
from .console import say, say_json

PACKAGE = __name__.split(".")[0]


def models(as_json: bool = typer.Option(False, "--json", help="Print one line of JSON a model.")) -> None:
    """
    List the models that are at hand.

    Those are the ones that come with the package, and pipelines of the Hub that are in the cache. The first column is
    what --model takes.
    """
    rows = [*shipped_models(), *cached_models()]
    if as_json:
        for row in rows:
            say_json(row)
        return
    if not rows:
        say(
            "There are none: this installation holds no model, and the cache has no pipeline of this package.",
            err=True,
        )
    width = max((len(row["model"]) for row in rows), default=0)
    for row in rows:
        revisions = f"  ({', '.join(row['revisions'])})" if row["revisions"] else ""
        say(f"{row['model']:{width}}  {row['class']:24}  {row['bytes'] / 1e6:9.1f} MB{revisions}")


def shipped_models() -> Iterator[dict]:
    """The models that come with the package."""
    for model, folder in SHIPPED_MODELS.items():
        name = _class_of(folder / "model_index.json")
        if name is not None:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            yield {"model": model, "class": name, "bytes": size, "revisions": []}


def cached_models() -> Iterator[dict]:
    """Pipelines of this package in the cache of the Hub, by their ids."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):  # ValueError: a file in place of the folder
        return
    for repository in sorted(repositories, key=lambda one: one.repo_id):
        names, revisions = set(), []
        for revision in sorted(repository.revisions, key=lambda one: one.commit_hash):
            name = _class_of(Path(revision.snapshot_path) / "model_index.json")
            if repository.repo_type == "model" and name is not None:
                names.add(name)
                revisions += sorted(revision.refs) or [revision.commit_hash[:12]]
        if names:
            row = {"model": repository.repo_id, "class": ", ".join(sorted(names))}
            yield {**row, "bytes": repository.size_on_disk, "revisions": revisions}


def complete_model(incomplete: str) -> list[str]:
    """For shells: names for `--model` that begin so. Folders are completed by the shell itself."""
    names = [row["model"] for row in (*shipped_models(), *cached_models())]
    return [name for name in names if name.startswith(incomplete)]


def _class_of(index: Path) -> str | None:
    """The class of a saved pipeline, if it is one of this package."""
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        parts = [value[0] for value in saved.values() if isinstance(value, list) and value]
        name = saved["_class_name"]
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and PACKAGE in parts else None
