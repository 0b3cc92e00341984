"""
Write a folder of CogView's pipelines in the format of the CogView release, for the original code.

    python conversion_scripts/convert_cogview_to_release.py --pipeline cogview --output release

makes `release/cogview-base/`, `release/cogview-caption/`, `release/cogview-sr/` (each with
`latest_checkpointed_iteration.txt` and the weights, in one rank), `vqvae.pt` and `cog-pretrain.model`, as far as the
folder has them. Converting there and back gives every tensor back bit by bit. See docs/cogview.md.
"""

import sys
from collections.abc import Sequence

from cogview_pipelines.conversion import convert_cogview_to_release
from cogview_pipelines.conversion.command_line import run_to_release


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_to_release(__doc__, argv, convert_cogview_to_release)


if __name__ == "__main__":
    sys.exit(main())
