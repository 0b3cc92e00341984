#!/usr/bin/env python
"""
One evaluation of the shipped model, twice: at once, and killed (`kill -9`) on the way. Prints one JSON line: the
figures of both, how far they differ, and how many pictures were made more than once.

    python benchmarks/evaluate_killed.py --num 500 --kills 2 --folder outputs/killed

All measures that need no download can be taken: FID and the Inception score by EfficientNet-Lite0 (whose weights are
in a package), the caption loss, what the demo scorer sees (`--detector`), and precision and recall (`--precision`, by
torch-fidelity). What is there already is not made again, so that this may itself be stopped.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from cogview_pipelines.environment import stamp

COMMAND = [sys.executable, "-c", "from cogview_pipelines.cli import app; app()", "evaluate"]
DETECTOR = "cogview_pipelines.demo.detector:demo_detector"
NETWORK = "cogview_pipelines.evaluation.networks:efficientnet_lite0"


def evaluate(listed: Path, output: Path, more: list[str], stop_at: int | None = None) -> dict | None:
    """The results of the command; `None` if it was killed, once so many pictures were there."""
    command = [*COMMAND, "--captions", listed / "captions.jsonl", "--references", listed, "--network", NETWORK]
    process = subprocess.Popen(
        [*map(str, command), "--json", "--output", str(output), *more], stdout=subprocess.PIPE, text=True
    )
    if stop_at is not None:
        while process.poll() is None and num_pictures(output) < stop_at:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    printed = process.communicate()[0]
    if process.returncode == -signal.SIGKILL:
        return None
    if process.returncode != 0:
        raise RuntimeError(f"cogview2 evaluate ended with status {process.returncode}.")
    return json.loads(printed)


def num_pictures(folder: Path) -> int:
    return sum(1 for _ in folder.glob("pictures/*/*.png"))


def written(folder: Path) -> dict[str, int]:
    """When each picture was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("pictures/*/*.png")}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for captions, pictures and results")
    parser.add_argument("--num", type=int, default=500, help="captions of the demo data")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--height", type=int, default=80, help="of the pictures, in pixels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--radii", default="0,1,2,4,8", help="of the blur, a FID for each")
    parser.add_argument("--detector", action="store_true", help="check the objects that the captions ask for, too")
    parser.add_argument("--precision", action="store_true", help="precision and recall, too")
    options = parser.parse_args(arguments)
    listed = options.folder / "captions"
    export = ["--num", options.num, "--height", options.height, "--export", listed]
    subprocess.run([*COMMAND, *map(str, export)], check=True, stdout=subprocess.DEVNULL)
    more = ["--height", options.height, "--batch-size", options.batch_size, "--radii", options.radii]
    more = [*map(str, more), *(["--detector", DETECTOR] if options.detector else [])]
    more += ["--precision"] if options.precision else []
    killed, whole = options.folder / "killed", options.folder / "whole"
    notes = options.folder / "kills.json"
    state = json.loads(notes.read_text()) if notes.is_file() else {"kills": 0, "made_again": 0, "written": {}}

    def look() -> None:
        """Count what was written anew since the last look, and note it, so that a later call of this goes on."""
        there = written(killed)
        state["made_again"] += sum(there.get(name) != moment for name, moment in state["written"].items())
        state["written"] = there
        notes.write_text(json.dumps(state))

    for number in range(1, options.kills + 1):
        stop_at = options.num * number // (options.kills + 1)
        if num_pictures(killed) >= stop_at:
            continue
        state["kills"] += evaluate(listed, killed, more, stop_at) is None
        look()
    results = {"killed": evaluate(listed, killed, more)}
    look()
    results["whole"] = evaluate(listed, whole, more)
    figures = {name: result["figures"] for name, result in results.items()}
    differences = [
        abs(value - figures["killed"][name][kind]) / max(abs(value), 1e-12)
        for name, figure in figures["whole"].items()
        for kind, value in figure.items()
        if value is not None
    ]
    pictures = {
        name: [path.read_bytes() for path in sorted((options.folder / name).glob("pictures/*/*.png"))]
        for name in results
    }
    line = {
        "measure": "killed evaluation",
        "n": results["whole"]["pictures"],
        "height": options.height,
        "kills": state["kills"],
        "pictures_made_twice": state["made_again"],
        "pictures_alike": sum(a == b for a, b in zip(pictures["killed"], pictures["whole"], strict=True)),
        "largest_relative_difference": max(differences),
        "figures": figures["whole"],
        "figures_killed": figures["killed"],
        "notes": results["whole"]["notes"],
        "settings": results["whole"]["settings"],
        **stamp("cpu"),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
