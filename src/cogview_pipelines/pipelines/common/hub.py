"""Pipelines from the Hub and to it: what goes along with the weights, and what went wrong in one sentence."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...loaders.lora import LORA_FOLDER
from .model_card import write_model_card

# Beside the components of a saved pipeline: what it is, what it was trained on, and under which terms.
COMPANIONS = ("README.md", "scope.json", "LICENSE*", "NOTICE*")


def fetch(download: Callable[..., str | os.PathLike], name: str, **kwargs) -> Path:
    """
    The folder of a pipeline of the Hub, with its companions.

    Args:
        download: `DiffusionPipeline.download` of the pipeline's class.
        name (`str`): Its id, `owner/name`.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        OSError: That says in a sentence whether there is no such model, no such revision, or no connection.
    """
    try:
        folder = Path(_download(download, name, **kwargs))
    except Exception as error:
        sentence = explain(name, kwargs.get("revision"), error)
        if sentence is None:
            raise
        raise OSError(sentence) from error
    access = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "token") if kwargs.get(key) is not None}
    try:
        snapshot_download(name, revision=folder.name, allow_patterns=[*COMPANIONS, f"{LORA_FOLDER}/*"], **access)
    except Exception as error:  # without its adapters it would be another model
        sentence = explain(name, folder.name, error) or f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(f"Adapters and card of {name!r} could not be fetched. Try again. ({sentence})") from error
    return folder


def _download(download: Callable[..., str | os.PathLike], name: str, **kwargs) -> str | os.PathLike:
    try:
        return download(name, **kwargs)
    except Exception as error:
        if kwargs.get("local_files_only") or not _is_transport_error(error):
            raise
        # not every version of diffusers knows the errors of every version of the Hub's client
        return download(name, **{**kwargs, "local_files_only": True})


def _is_transport_error(error: BaseException) -> bool:
    """Whether there is no connection: the Hub's client tells by its HTTP library, of which it has had two."""
    return isinstance(error, ConnectionError) or "TransportError" in {kind.__name__ for kind in type(error).__mro__}


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def explain(name: str, revision: str | None, error: BaseException) -> str | None:
    """What went wrong, if it is the model's name, its revision, the right to read it, or the connection."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return f"The model {name!r} on the Hub asks for an agreement first. Agree on its page, and pass `token`."
        if isinstance(cause, RevisionNotFoundError):
            return f"`revision` must be a branch, a tag or a commit of {name!r}, but is {revision!r}."
        if isinstance(cause, RepositoryNotFoundError):
            return (
                f"There is no folder {name!r}, and no model of this id on the Hub that you may read. Check the name; "
                "if the model is private, log in with `hf auth login` or pass `token`."
            )
    unreachable = (LocalEntryNotFoundError, OfflineModeIsEnabled)
    if any(isinstance(cause, unreachable) or _is_transport_error(cause) for cause in causes):
        return (
            f"The model {name!r} is not wholly in the cache, and the Hub cannot be reached or is switched off "
            "(`HF_HUB_OFFLINE`, `local_files_only`)."
        )
    return None


def copy_companions(source: str | os.PathLike | None, folder: str | os.PathLike) -> None:
    """Copy what lies beside the components of a saved pipeline to another folder; what is there already stays."""
    if source is None or not os.path.isdir(source):
        return
    for pattern in COMPANIONS:
        for path in Path(source).glob(pattern):
            target = Path(folder) / path.name
            if path.is_file() and not target.exists():
                shutil.copyfile(path, target)


def push(
    pipe: DiffusionPipeline,
    repo_id: str,
    *,
    commit_message: str | None,
    private: bool | None,
    token: str | bool | None,
    create_pr: bool,
    revision: str | None,
    subfolder: str | None,
    **saving,
) -> str:
    """Save a pipeline and upload it; returns the address of the commit."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, **saving)
        if not subfolder:
            write_model_card(pipe, folder, repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            revision=revision,
            commit_message=commit_message or f"Upload {type(pipe).__name__}",
            create_pr=create_pr,
        )
