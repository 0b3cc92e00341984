"""Other states of the repository, which some benchmarks compare this one with."""

import subprocess
from pathlib import Path


def revision(checkout: Path) -> str | None:
    """The commit of a checkout, where git knows it."""
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None
