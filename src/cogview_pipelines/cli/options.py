"""Options for the settings of the pipelines: help and bounds stand where the settings are declared."""

from typing import Any

import typer

from ..pipelines.cogview.settings import SamplingSettings as CogViewSamplingSettings
from ..pipelines.cogview2.settings import SamplingSettings
from ..pipelines.common.settings import MOST_COUNT

# Where both families have a setting, the help is that of CogView2.
DECLARED = {**CogViewSamplingSettings.declared(), **SamplingSettings.declared()}
ONLY_COGVIEW = CogViewSamplingSettings.declared().keys() - SamplingSettings.declared().keys()


def setting_option(name: str) -> Any:
    """The option for a setting of sampling. The pipelines check its bounds, too; a count shows them in the help."""
    setting = DECLARED[name]
    bounds: dict[str, Any] = {"min": int(setting.least), "max": int(setting.most)} if setting.is_whole else {}
    help = f"CogView only: {setting.help}" if name in ONLY_COGVIEW else setting.help
    return typer.Option(None, help=help, **({} if setting.is_per_pass else bounds))


def split_numbers(text: str | None) -> int | str | list[int | str] | None:
    """`"60"` to 60 and `"60,40,40"` to a list; what is no number is left to be reported."""
    if text is None:
        return None
    parts = [int(part) if part.strip().isdecimal() else part for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def count_option(*names: str, help: str) -> Any:
    """The option for how many are drawn."""
    return typer.Option(None, *names, min=1, max=MOST_COUNT, help=help)
