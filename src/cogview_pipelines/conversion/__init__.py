"""
Between the files of the releases and folders that `from_pretrained` loads; `conversion_scripts/` is the command line
of it.

- [`reader`], [`released_models`]: tensors out of released files, one at a time, without running anything that stands
  in them; folders, zips and tars.
- [`writer`], [`job`]: streamed safetensors shards that can be continued after an interruption; what was made of what.
- [`shapes`]: whether the tensors of a file are those of a model.
- `cogview2/`, `cogview/`: names and configurations on both sides, and the two directions.
"""

from .cogview.to_pipeline import convert_to_pipeline as convert_cogview_to_pipeline
from .cogview.to_release import convert_to_release as convert_cogview_to_release
from .cogview2.to_pipeline import convert_to_pipeline
from .cogview2.to_release import convert_to_release
from .job import verify
from .reader import ConversionError

__all__ = [
    "ConversionError",
    "convert_cogview_to_pipeline",
    "convert_cogview_to_release",
    "convert_to_pipeline",
    "convert_to_release",
    "verify",
]
