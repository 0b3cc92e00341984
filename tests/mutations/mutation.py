"""What a deliberate error is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """
    One error.

    Args:
        what (`str`): In words, with the subject first.
        file (`str`): Path in the package.
        old, new (`str`): `old` stands in the file exactly once.
        test (`str`): What must notice, in `tests/`: a file, or `file::test`.
    """

    what: str
    file: str
    old: str
    new: str
    test: str
