"""
Seeded random input.

The normal suite runs a bounded number of cases. `COGVIEW_FUZZ=20` runs twenty times as many, and other seeds than the
first ones; a failure names the seed of its case.
"""

import os
import random
import resource
from collections.abc import Iterator

FACTOR = float(os.environ.get("COGVIEW_FUZZ", "1"))


def cases(count: int) -> Iterator[tuple[int, random.Random]]:
    """Seeds with their random numbers: so many, or more if the environment says so."""
    for seed in range(max(1, round(count * FACTOR))):
        yield seed, random.Random(seed)


def mutated(content: bytes, source: random.Random, last: int | None = None) -> bytes:
    """Bytes with a few changes before `last`: other values, extremes, parts that are gone, doubled or cut off."""
    content = bytearray(content)
    for _ in range(source.randint(1, 4)):
        end = min(len(content), last or len(content))
        at = source.randrange(end) if end else 0
        kind = source.randrange(7)
        if kind == 0:
            content[at : at + 1] = bytes([source.randrange(256)])
        elif kind == 1 and at < len(content):
            content[at] ^= 1 << source.randrange(8)
        elif kind == 2:
            value = source.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\1\0\0\0"])
            content[at : at + 4] = value
        elif kind == 3:
            del content[at : at + source.randint(1, 40)]
        elif kind == 4:
            content[at:at] = content[at : at + source.randint(1, 40)]
        elif kind == 5:
            content[at:at] = source.randbytes(source.randint(1, 20))
        elif source.random() < 0.2:
            del content[at:]
    return bytes(content)


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
