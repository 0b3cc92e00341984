"""Pictures that several workers have put into their shards: the first stays."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .shards import drop_pictures, read_hashes

MOST_HASHES = 1 << 22  # that are looked at together: some 150 MB


def find_duplicates(folder: str | Path, num_shards: int) -> Iterator[tuple[int, list[int]]]:
    """
    Pictures with the hash of an earlier one, in memory that does not grow with their number.

    Args:
        folder (`str` or `Path`): The folder of shards, all of which are there.
        num_shards (`int`): How many there are.

    Yields:
        `tuple[int, list[int]]`: The number of a shard, and the numbers of these pictures in it.
    """
    counts = [len(read_hashes(folder, number)) for number in range(num_shards)]
    first = np.cumsum([0, *counts])
    passes = -(-int(first[-1]) // MOST_HASHES)
    found: list[np.ndarray] = []
    for remainder in range(passes):  # all pictures with one hash are in the same pass
        hashes, places = [], []
        for number in range(num_shards):
            own = read_hashes(folder, number)
            chosen = np.flatnonzero(own % np.uint64(passes) == remainder)
            hashes.append(own[chosen])
            places.append(first[number] + chosen)
        _, firsts = np.unique(np.concatenate(hashes), return_index=True)
        found.append(np.delete(np.concatenate(places), firsts))
    duplicates = np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)
    for number in np.unique(first.searchsorted(duplicates, "right") - 1).tolist():
        own = duplicates[(duplicates >= first[number]) & (duplicates < first[number + 1])]
        yield number, (own - first[number]).tolist()


def drop_duplicates(folder: str | Path, num_shards: int) -> None:
    """
    Write those shards anew that have a picture with the hash of an earlier one, without it.

    A shard in which a kill comes is missing and has to be made again, after which this finds what it found before.

    Args:
        folder (`str` or `Path`), num_shards (`int`): As for [`find_duplicates`].
    """
    for number, dropped in find_duplicates(folder, num_shards):
        drop_pictures(folder, number, dropped, "duplicates")
