"""
Write a folder of CogView's pipelines in the format of the CogView release, for the original code.

    python conversion_scripts/convert_cogview_to_release.py --pipeline cogview --output release

makes `release/cogview-base/`, `release/cogview-caption/`, `release/cogview-sr/` (each with
`latest_checkpointed_iteration.txt` and the weights, in one rank), `vqvae.pt` and `cog-pretrain.model`, as far as the
folder has them. Converting there and back gives every tensor back bit by bit. See docs/cogview.md.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence

import torch

from cogview_pipelines.conversion import ConversionError, convert_cogview_to_release

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
    add("--output", required=True, metavar="FOLDER", help="Gets the files; nothing of them may be there yet.")
    add("--iteration", type=int, help="Of the checkpoints (default: as it was converted, else 1).")
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
        convert_cogview_to_release(args.pipeline, args.output, iteration=args.iteration, dtype=DTYPES.get(args.dtype))
    except (ConversionError, OSError) as error:  # of the system: a full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"output": args.output, "seconds": seconds, "peak_memory_gib": round(peak, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
