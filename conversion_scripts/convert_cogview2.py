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

import sys
from collections.abc import Sequence

from cogview_pipelines.conversion import convert_to_pipeline
from cogview_pipelines.conversion.command_line import add_pipeline_options, make_parser, run_to_pipeline


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("released files").add_argument
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
    add(
        "--no_shared_backbone",
        dest="share_backbone",
        action="store_false",
        help="Store direct super-resolution in full even if its backbone is CogLM's.",
    )
    strict = "Refuse files with unknown tensors, instead of leaving those out."
    add_pipeline_options(parser, num_image_tokens=20000, strict=strict)
    return run_to_pipeline(parser, argv, convert_to_pipeline)


if __name__ == "__main__":
    sys.exit(main())
