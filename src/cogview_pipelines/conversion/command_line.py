"""What the command lines of all converters have in common: options, messages, the line of JSON at the end."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence

import torch

from ..reports import guard_streams
from .errors import ConversionError
from .job import verify

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _gibibytes(text: str) -> int:
    size = float(text)
    if not 1e-6 < size < 1e6:
        raise argparse.ArgumentTypeError("must be a number of GiB above 0")
    return int(size * 2**30)


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose description is printed as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_pipeline_options(parser: argparse.ArgumentParser, num_image_tokens: int, strict: str) -> None:
    """
    The options of converters from a release to a pipeline, named like the arguments of the functions behind them.

    Args:
        parser (`argparse.ArgumentParser`): Gets them.
        num_image_tokens (`int`): As in the release.
        strict (`str`): What `--strict` does.
    """
    add = parser.add_argument
    add(
        "--output",
        metavar="FOLDER",
        help="The pipeline folder; it is made if missing, and parts that it holds already are kept.",
    )
    add("--dtype", choices=DTYPES, help="Convert the transformers (default: every tensor stays as it is, bit by bit).")
    add(
        "--max_shard_size",
        type=_gibibytes,
        default="2",
        metavar="GIB",
        help="Size of the safetensors files (default: %(default)s).",
    )
    add(
        "--num_image_tokens",
        type=int,
        default=num_image_tokens,
        help="Image codes in the transformers' vocabulary (default: %(default)s).",
    )
    add("--strict", action="store_true", help=strict)
    add("--verify", metavar="FOLDER", help="Convert nothing; say whether a converted pipeline is whole, by hashes.")


def run_to_pipeline(parser: argparse.ArgumentParser, argv: Sequence[str] | None, convert: Callable) -> int:
    """
    Read the command line and convert, or verify what was converted.

    Args:
        parser (`argparse.ArgumentParser`): With [`add_pipeline_options`] and options for the released files.
        argv (sequence of `str`, *optional*): By default those of the process.
        convert: Function of the output folder, with all other options as keyword arguments.

    Returns:
        `int`: The exit status.
    """
    options = vars(parser.parse_args(argv))
    output, checked = options.pop("output"), options.pop("verify")
    if (checked is None) == (output is None):
        parser.error("give --output, or --verify alone")
    options["dtype"] = DTYPES.get(options["dtype"])
    if checked is not None:
        return _run(lambda: bool(verify(checked)))
    return _run(lambda: convert(output, **options), output)


def run_to_release(description: str, argv: Sequence[str] | None, convert: Callable) -> int:
    """
    Read the command line of a converter from a pipeline to a release, and convert; returns the exit status.

    `convert` is a function of the pipeline's folder and the output folder, and of `iteration` and `dtype`.
    """
    parser = make_parser(description)
    add = parser.add_argument
    add(
        "--pipeline",
        required=True,
        metavar="FOLDER",
        help="A saved pipeline, or a folder with some of its components.",
    )
    add("--output", required=True, metavar="FOLDER", help="Folder for the files; none of them may exist yet.")
    add("--iteration", type=int, help="Of the checkpoints (default: as it was converted, else 1).")
    add(
        "--dtype",
        choices=DTYPES,
        help="Convert the transformers; the original code runs in float16 (default: as they are).",
    )
    args = parser.parse_args(argv)
    dtype = DTYPES.get(args.dtype)
    return _run(lambda: convert(args.pipeline, args.output, iteration=args.iteration, dtype=dtype), args.output)


def _run(work: Callable[[], object], output: str | None = None) -> int:
    """The exit status of some work; if it writes an output, what it took is told in a line of JSON."""
    guard_streams()
    start = time.monotonic()
    try:
        result = work()
    except (ConversionError, OSError) as error:  # of the system: a full disk, no permission
        print(f"error: {error}", file=sys.stderr)
        return 1
    if output is None:
        return int(bool(result))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = round(time.monotonic() - start, 1)
    print(json.dumps({"output": output, "seconds": seconds, "peak_memory_gib": round(peak, 2)}))
    return 0
