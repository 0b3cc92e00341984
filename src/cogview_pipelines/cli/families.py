"""Which pipelines a saved model has."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Of each family the classes that its folders name, and the pipeline for each kind of work.
FAMILIES: dict[str, dict[str, str]] = {
    "cogview2": {
        "generate": "CogView2Pipeline",
        "inpaint": "CogView2InpaintPipeline",
        "upscale": "CogView2UpscalePipeline",
        "caption": "CogView2CaptionPipeline",
    },
    "cogview": {
        "generate": "CogViewPipeline",
        "upscale": "CogViewUpscalePipeline",
        "caption": "CogViewCaptionPipeline",
    },
}
# CogView's models stand alone or together in a folder, which names the pipeline that saved it.
SAVED_AS = {"CogView2Pipeline": "cogview2", **dict.fromkeys(FAMILIES["cogview"].values(), "cogview")}


def pipeline_class(saved_as: str, work: str) -> type["DiffusionPipeline"]:
    """
    The pipeline that does some work with a saved model.

    Args:
        saved_as (`str`): The class that the folder names, one of `SAVED_AS`.
        work (`str`): `"generate"`, `"inpaint"`, `"upscale"` or `"caption"`.

    Raises:
        ValueError: If models of this family cannot do it.
    """
    import cogview_pipelines

    names = FAMILIES[SAVED_AS[saved_as]]
    if work not in names:
        raise ValueError(f"a {saved_as} cannot {work}; it can {', '.join(names)}.")
    return getattr(cogview_pipelines, names[work])


def pipeline_for(pipe: "DiffusionPipeline", work: str) -> "DiffusionPipeline":
    """
    A loaded model as the pipeline that does some work.

    Raises:
        ValueError: If the model cannot do it.
    """
    kind = pipeline_class(type(pipe).__name__, work)
    return pipe if isinstance(pipe, kind) else kind.from_pipe(pipe)


def is_cogview(pipe: "DiffusionPipeline") -> bool:
    """Whether it is a pipeline of the first CogView."""
    return type(pipe).__name__ in FAMILIES["cogview"].values()
