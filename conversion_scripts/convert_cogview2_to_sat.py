"""
Write a `CogView2Pipeline` folder in the format of the CogView2 release, for the original code.

    python conversion_scripts/convert_cogview2_to_sat.py --pipeline cogview2 --output sat

makes `sat/coglm/`, `sat/cogview2-dsr/`, `sat/cogview2-itersr/` (each with `latest`, `model_config.json` and the
weights), `ice_image.pt`, `ice_text.model` and `cluster_label.npy`. Converting there and back gives every tensor back
bit by bit. See docs/conversion.md.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence

import torch

from cogview_pipelines.conversion import ConversionError, convert_to_release

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--pipeline",
        required=True,
        metavar="FOLDER",
        help="A saved pipeline, or a folder with some of its components.",
    )
    add("--output", required=True, metavar="FOLDER", help="Folder for the files; none of them may exist yet.")
    add("--iteration", type=int, help="Written to `latest` (default: as it was converted, else 1).")
    add(
        "--dtype",
        choices=DTYPES,
        help="Convert the transformers; the original code runs in float16 (default: as they are).",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    start = time.monotonic()
    try:
        convert_to_release(args.pipeline, args.output, iteration=args.iteration, dtype=DTYPES.get(args.dtype))
    except (ConversionError, OSError) as error:  # of the system: a full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"output": args.output, "seconds": seconds, "peak_memory_gib": round(peak, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
