"""`cogview2 doctor`: what is installed here and what will be used."""

import json
import platform
from typing import Any

import typer

from ..environment import SHIPPED_MODELS, devices, optional_versions, versions
from .console import say


def doctor(as_json: bool = typer.Option(False, "--json", help="Print one line of JSON.")) -> None:
    """Tell what is installed and will be used."""
    import torch

    from ..ops.decode_step import decode_step_refusals
    from ..ops.native import build_info

    report: dict[str, Any] = {
        "versions": versions(),
        "optional": optional_versions(),
        "platform": platform.platform(),
        "devices": devices(),
        "kernels": build_info() | {"decode_step": "; ".join(decode_step_refusals(torch.float32, "cpu")) or "used"},
        "shipped_models": {
            name: {"folder": str(folder), "found": (folder / "model_index.json").is_file()}
            for name, folder in SHIPPED_MODELS.items()
        },
    }
    if as_json:
        say(json.dumps(report, default=str))
        return
    for name, version in report["versions"].items():
        say(f"{name:20} {version or 'not installed'}")
    for name, version in report["optional"].items():
        if version is not None:
            say(f"{name:20} {version}")
    say(f"{'platform':20} {report['platform']}")
    for device in report["devices"]:
        say(f"{device['device']:20} " + ", ".join(f"{key} {device[key]}" for key in device if key != "device"))
    say("kernels")
    for name, value in report["kernels"].items():
        if isinstance(value, dict):
            value = "; ".join(f"{key}: {entry}" for key, entry in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        say(f"{name:20} {value or 'none'}")
    say("shipped models")
    for name, shipped in report["shipped_models"].items():
        say(f"{name:20} {shipped['folder']}" + ("" if shipped["found"] else " (not there)"))
