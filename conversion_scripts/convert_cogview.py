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

import sys
from collections.abc import Sequence

from cogview_pipelines.conversion import convert_cogview_to_pipeline
from cogview_pipelines.conversion.command_line import add_pipeline_options, make_parser, run_to_pipeline


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("released files").add_argument
    checkpoint = "the tar or zip, the unpacked folder, or the .pt file"
    add("--base", metavar="PATH", help=f"Text-to-image transformer (cogview-base): {checkpoint}.")
    add("--caption", metavar="PATH", help=f"Caption transformer (cogview-caption): {checkpoint}.")
    add("--super_resolution", metavar="PATH", help=f"Super-resolution transformer (cogview-sr): {checkpoint}.")
    add("--image_tokenizer", metavar="FILE", help="The image tokenizer.")
    add("--text_tokenizer", metavar="FILE", help="The SentencePiece model, cog-pretrain.model.")
    add("--num_attention_heads", type=int, help="Of the transformers (default: width / 64, as in the release).")
    strict = "Refuse files with unknown tensors or with ranks that disagree."
    add_pipeline_options(parser, num_image_tokens=8192, strict=strict)
    return run_to_pipeline(parser, argv, convert_cogview_to_pipeline)


if __name__ == "__main__":
    sys.exit(main())
