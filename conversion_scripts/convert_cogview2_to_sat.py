"""
Write a `CogView2Pipeline` folder in the format of the CogView2 release, for the original code.

    python conversion_scripts/convert_cogview2_to_sat.py --pipeline cogview2 --output sat

makes `sat/coglm/`, `sat/cogview2-dsr/`, `sat/cogview2-itersr/` (each with `latest`, `model_config.json` and the
weights), `ice_image.pt`, `ice_text.model` and `cluster_label.npy`. Converting there and back gives every tensor back
bit by bit. See docs/conversion.md.
"""

import sys
from collections.abc import Sequence

from cogview_pipelines.conversion import convert_to_release
from cogview_pipelines.conversion.command_line import run_to_release


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_to_release(__doc__, argv, convert_to_release)


if __name__ == "__main__":
    sys.exit(main())
