r"""
Convert the files of the CogView2 release to a folder that `CogView2Pipeline.from_pretrained` loads.

    python conversion_scripts/convert_cogview2.py --output cogview2 \
        --coglm coglm.zip --direct_sr cogview2-dsr.zip --iterative_sr cogview2-itersr.zip \
        --image_tokenizer ice_image.pt --cluster_labels cluster_label.npy --text_tokenizer ice_text.model

Any part alone, others later into the same folder:

    python conversion_scripts/convert_cogview2.py --output cogview2 --coglm coglm.zip

Whether a converted pipeline is whole:

    python conversion_scripts/convert_cogview2.py --verify cogview2

Nothing in the files is ever run, memory stays below two gigabytes whatever their size, and an interrupted conversion
is continued by the same command. See docs/conversion.md.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence

import torch

from cogview_pipelines.conversion import ConversionError, convert_to_pipeline, verify

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _gibibytes(text: str) -> float:
    size = float(text)
    if not 1e-6 < size < 1e6:
        raise argparse.ArgumentTypeError("must be a number of GiB above 0")
    return size


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--output",
        metavar="FOLDER",
        help="The pipeline folder; it is made if missing, and parts that it holds already are kept.",
    )
    checkpoint = "the released zip, the unpacked folder, or the .pt file"
    add("--coglm", metavar="PATH", help=f"Text-to-image transformer (coglm): {checkpoint}.")
    add("--direct_sr", metavar="PATH", help=f"Direct super-resolution (cogview2-dsr): {checkpoint}.")
    add("--iterative_sr", metavar="PATH", help=f"Iterative super-resolution (cogview2-itersr): {checkpoint}.")
    add("--image_tokenizer", metavar="FILE", help="ice_image.pt.")
    add("--text_tokenizer", metavar="FILE", help="ice_text.model.")
    add(
        "--cluster_labels",
        metavar="FILE",
        help='cluster_label.npy, or "compute" for clusters that are not the released ones.',
    )
    add("--dtype", choices=DTYPES, help="Convert the transformers (default: every tensor stays as it is, bit by bit).")
    add(
        "--max_shard_size",
        type=_gibibytes,
        default=2.0,
        metavar="GIB",
        help="Size of the safetensors files (default: %(default)s).",
    )
    add(
        "--no_shared_backbone",
        action="store_true",
        help="Store direct super-resolution in full even if its backbone is CogLM's.",
    )
    add(
        "--num_image_tokens",
        type=int,
        default=20000,
        help="Image codes in the transformers' vocabulary (default: %(default)s).",
    )
    add("--strict", action="store_true", help="Refuse files with unknown tensors, instead of leaving those out.")
    add("--verify", metavar="FOLDER", help="Convert nothing; say whether a converted pipeline is whole, by hashes.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.verify is None) == (args.output is None):
        parser.error("give --output, or --verify alone")
    start = time.monotonic()
    try:
        if args.verify is not None:
            return 1 if verify(args.verify) else 0
        convert_to_pipeline(
            args.output,
            coglm=args.coglm,
            direct_sr=args.direct_sr,
            iterative_sr=args.iterative_sr,
            image_tokenizer=args.image_tokenizer,
            text_tokenizer=args.text_tokenizer,
            cluster_labels=args.cluster_labels,
            dtype=DTYPES.get(args.dtype),
            max_shard_size=int(args.max_shard_size * 2**30),
            share_backbone=not args.no_shared_backbone,
            num_image_tokens=args.num_image_tokens,
            strict=args.strict,
        )
    except (ConversionError, OSError) as error:  # of the system: a full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {"output": args.output, "seconds": round(time.monotonic() - start, 1), "peak_memory_gib": round(peak, 2)}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
