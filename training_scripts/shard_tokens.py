#!/usr/bin/env python
r"""
Turn a token folder (tokens.safetensors and captions.jsonl) into token shards, which training scripts read at any place
instead of holding them in memory.

    python training_scripts/shard_tokens.py --data data/mine --shard_size 10000 --output_dir data/mine_shards
Stop it at any time; the same command goes on. The shards draw the same pictures as the folder did.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from cogview_pipelines.json_lines import read_lines
from cogview_pipelines.training.arguments import parse_config, run_script
from cogview_pipelines.training.data.captions import Captions, parse_captions, tell_blank
from cogview_pipelines.training.data.shards import TOKEN_ARRAYS, is_written, write_index, write_shard
from cogview_pipelines.training.data.tokens import CAPTIONS_FILE, TOKENS_FILE
from cogview_pipelines.training.run_folder import locked, remove_leftovers


@dataclass
class ShardConfig:
    data: str = field(metadata={"help": "The token folder."})
    output_dir: str = field(metadata={"help": "The folder of shards to write."})
    shard_size: int = field(default=10_000, metadata={"help": "Pictures in a shard."})
    num_codes: int | None = field(
        default=None, metadata={"help": "Codes of the image tokenizer, to be compared when the shards are used."}
    )
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )


def read_rows(path: Path) -> Iterator[Captions]:
    """The lines of a file of captions, checked."""
    return (parse_captions(line, f"Line {number} of {path}") for number, line in read_lines(path))


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(ShardConfig, arguments, description=__doc__)
    if config.shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1, but is {config.shard_size}.")
    source = Path(config.data)
    for name in (TOKENS_FILE, CAPTIONS_FILE):
        if not (source / name).is_file():
            raise ValueError(f"`data` must be a folder with {TOKENS_FILE} and {CAPTIONS_FILE}, not {source}.")
    with locked(config.output_dir):
        remove_leftovers(config.output_dir)
        write_shards(config, source)


def write_shards(config: ShardConfig, source: Path) -> None:
    """All shards that are not there yet, and their index."""
    try:
        tokens = safe_open(source / TOKENS_FILE, "np")
    except SafetensorError as error:
        raise ValueError(f"`data` has a damaged {TOKENS_FILE} ({error}).") from error
    slices = {name: tokens.get_slice(name) for name in TOKEN_ARRAYS if name in tokens.keys()}  # noqa: SIM118
    if "low" not in slices:
        raise ValueError(f"`data` has no tensor `low` in {source}.")
    counts = {name: part.get_shape()[0] for name, part in slices.items()}
    rows = read_rows(source / CAPTIONS_FILE)
    stat = (source / TOKENS_FILE).stat()
    num_shards, count, num_blank = -(-counts["low"] // config.shard_size), 0, 0
    largest = max(largest_code(part, config.shard_size) for part in slices.values())
    how = {"num_codes": config.num_codes, "dtype": np.uint16 if largest < 1 << 16 else np.int32}
    for number in tqdm(range(num_shards), unit="shard"):
        first, end = number * config.shard_size, min((number + 1) * config.shard_size, counts["low"])
        own = list(itertools.islice(rows, end - first))
        count += len(own)
        num_blank += sum(each.num_blank for each in own)
        made_of = {
            "data": str(source.resolve()),
            "bytes": stat.st_size,
            "changed": stat.st_mtime_ns,
            "first": first,
            "end": end,
        }
        if len(own) < end - first or counts.get("fine", end) < end:
            break
        if not is_written(config.output_dir, number, made_of):
            tensors = {name: np.asarray(part[first:end]) for name, part in slices.items()}
            texts = [{**each.texts, "weight": each.weight} for each in own]
            write_shard(config.output_dir, number, tensors, texts, made_of=made_of, **how)
    count += sum(1 for _ in rows)
    if {count} != set(counts.values()):
        said = " and ".join(f"{value} pictures in `{name}`" for name, value in counts.items())
        raise ValueError(f"`data` has {said}, but {count} lines of captions.")
    report = write_index(config.output_dir, num_shards)
    print(f"{report['num_pictures']} pictures are in {num_shards} shards in {config.output_dir}.")
    if num_blank:
        print(tell_blank(num_blank))


def largest_code(tokens, rows: int) -> int:
    """The largest of all tokens, looked for in parts."""
    count = tokens.get_shape()[0]
    parts = (tokens[first : min(first + rows, count)] for first in range(0, count, rows))
    return max((int(np.asarray(part).max()) for part in parts), default=0)


if __name__ == "__main__":
    run_script(main)
