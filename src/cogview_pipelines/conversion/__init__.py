"""
Between the files of the CogView2 release and folders that `from_pretrained` loads; `conversion_scripts/` is the
command line of it.

- [`reader`]: tensors out of released files, one at a time, without running anything that stands in them.
- [`layout`]: names, shapes and configurations on both sides.
- [`writer`]: streamed safetensors shards that can be continued after an interruption.
- [`to_pipeline`], [`to_release`]: the two directions.
"""

from .cogview2.to_pipeline import convert_to_pipeline, verify
from .cogview2.to_release import convert_to_release
from .reader import ConversionError

__all__ = ["ConversionError", "convert_to_pipeline", "convert_to_release", "verify"]
