r"""
Convert the files of the CogView release to a folder that CogView's pipelines load.

    python conversion_scripts/convert_cogview.py --output cogview \
        --base cogview-base.tar --caption cogview-caption.tar --super_resolution cogview-sr.tar \
        --image_tokenizer vqvae.pt --text_tokenizer cog-pretrain.model

Any part alone, others later into the same folder. Checkpoints in several model-parallel ranks are merged:

    python conversion_scripts/convert_cogview.py --output cogview --base cogview-base/

Hash all files of a converted folder again:

    python conversion_scripts/convert_cogview.py --verify cogview

Nothing in the files is ever run, memory stays below two gigabytes whatever their size, and an interrupted conversion
is continued by the same command. See docs/cogview.md.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence

import torch

from cogview_pipelines.conversion import ConversionError, convert_cogview_to_pipeline, verify

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--output",
        metavar="FOLDER",
        help="The pipeline folder. Made if it is not there; parts that are in it already are kept.",
    )
    checkpoint = "the tar or zip, the unpacked folder, or the .pt file"
    add("--base", metavar="PATH", help=f"Text-to-image transformer (cogview-base): {checkpoint}.")
    add("--caption", metavar="PATH", help=f"Caption transformer (cogview-caption): {checkpoint}.")
    add("--super_resolution", metavar="PATH", help=f"Super-resolution transformer (cogview-sr): {checkpoint}.")
    add("--image_tokenizer", metavar="FILE", help="The image tokenizer.")
    add("--text_tokenizer", metavar="FILE", help="The SentencePiece model, cog-pretrain.model.")
    add("--num_attention_heads", type=int, help="Of the transformers (default: width / 64, as in the release).")
    add("--dtype", choices=DTYPES, help="Convert the transformers (default: every tensor stays as it is, bit by bit).")
    add(
        "--max_shard_size",
        type=float,
        default=2.0,
        metavar="GIB",
        help="Size of the safetensors files (default: %(default)s).",
    )
    add(
        "--num_image_tokens",
        type=int,
        default=8192,
        help="Image codes in the transformers' vocabulary (default: %(default)s).",
    )
    add("--strict", action="store_true", help="Refuse files with unknown tensors or with ranks that disagree.")
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
        convert_cogview_to_pipeline(
            args.output,
            base=args.base,
            caption=args.caption,
            super_resolution=args.super_resolution,
            image_tokenizer=args.image_tokenizer,
            text_tokenizer=args.text_tokenizer,
            num_attention_heads=args.num_attention_heads,
            dtype=DTYPES.get(args.dtype),
            max_shard_size=int(args.max_shard_size * 2**30),
            num_image_tokens=args.num_image_tokens,
            strict=args.strict,
        )
    except (ConversionError, OSError) as error:  # of the system: a full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"output": args.output, "seconds": seconds, "peak_memory_gib": round(peak, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
