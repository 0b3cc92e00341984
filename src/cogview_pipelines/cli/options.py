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


def count_option(*names: str, help: str) -> Any:
    """The option for how many are drawn."""
    return typer.Option(None, *names, min=1, max=MOST_COUNT, help=help)
