"""The page of a pipeline on the Hub: how to use it, what it is made of, and whatever its maker wrote."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

# The Hub's name of the task, and an example that runs with every model, by what a pipeline is for.
EXAMPLES = {
    "text to image": (
        "text-to-image",
        """images = pipe(["a tiger", "一只老虎"], generator=torch.Generator().manual_seed(7)).images
images[0].save("english.png")
images[1].save("chinese.png")""",
    ),
    "inpainting": (
        "image-to-image",
        """image = Image.new("RGB", (240, 240), "orange")  # or Image.open(...)
mask = Image.new("L", image.size, 0)
mask.paste(255, (80, 80, 160, 160))  # white is painted anew
pipe("a tiger", image, mask, generator=torch.Generator().manual_seed(7)).images[0].save("inpainted.png")""",
    ),
    "upscaling": (
        "image-to-image",
        """height, width = pipe.sizes[0]
image = Image.new("RGB", (width, height), "orange")  # or Image.open(...)
pipe(image, "a tiger", generator=torch.Generator().manual_seed(7)).images[0].save("larger.png")""",
    ),
    "captioning": (
        "image-to-text",
        """image = Image.new("RGB", (240, 240), "orange")  # or Image.open(...)
print(pipe(image).captions[0])""",
    ),
}
# What is written anew whenever a pipeline is pushed stands between these lines of the card.
BEGIN, END = "<!-- written by push_to_hub: begin -->", "<!-- written by push_to_hub: end -->"


def write_model_card(pipe: DiffusionPipeline, folder: str | os.PathLike, repo_id: str) -> None:
    """
    Write `README.md` of a saved pipeline, for the Hub.

    A `README.md` that is there is kept, with what it says of licence, languages and tags; the part about use and
    components goes in after its title, or in the place where an earlier push put it.

    Args:
        pipe ([`PipelineBase`]): The pipeline.
        folder (path): Where it is saved.
        repo_id (`str`): Its id on the Hub.
    """
    path = Path(folder) / "README.md"
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    own = f"{BEGIN}\n{_use(pipe, repo_id)}\n{_components(pipe)}\n{END}\n"
    card = ModelCard(content, ignore_metadata_errors=True)
    text = card.text.lstrip("\n")
    if BEGIN in text and END in text:
        text = text[: text.index(BEGIN)] + own + text[text.index(END) + len(END) :].lstrip("\n")
    else:
        title = re.match(r"# .*\n", text)
        head = title[0] if title else f"# {repo_id.split('/')[-1]}\n"
        rest = text[title.end() :] if title else text
        text = f"{head}\n{own}\n{rest.lstrip(chr(10))}"
    data = _data(pipe, card.data)
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n", encoding="utf-8")


def _data(pipe: DiffusionPipeline, given: ModelCardData) -> ModelCardData:
    """What the Hub sorts models by; what the card says itself stays."""
    fields: dict[str, Any] = given.to_dict()
    fields.setdefault("library_name", "diffusers")
    fields.setdefault("pipeline_tag", EXAMPLES[pipe._made_for][0])
    fields.setdefault("language", ["en", "zh"])
    tags = list(fields.get("tags") or [])
    fields["tags"] = tags + [tag for tag in ("cogview_pipelines", type(pipe).__name__) if tag not in tags]
    return ModelCardData(**fields)


def _use(pipe: DiffusionPipeline, repo_id: str) -> str:
    name = type(pipe).__name__
    example = EXAMPLES[pipe._made_for][1]
    imports = "import torch\n" * ("torch." in example) + f"from cogview_pipelines import {name}\n"
    imports += "from PIL import Image\n" * ("Image." in example)
    return f"""
## Use

With [cogview_pipelines](https://pypi.org/project/cogview_pipelines/) (`pip install cogview_pipelines`):

```python
{imports}
pipe = {name}.from_pretrained("{repo_id}")
{example}
```
"""


def _components(pipe: DiffusionPipeline) -> str:
    rows = []
    for name, part in pipe.components.items():
        if part is None:
            continue
        size = ""
        if isinstance(part, torch.nn.Module):
            count = sum(parameter.numel() for parameter in {id(p): p for p in part.parameters()}.values())
            size = f"{count / 1e6:,.1f} M parameters, {str(part.dtype).removeprefix('torch.')}"
        rows.append(f"| `{name}` | `{type(part).__name__}` | {size} |")
    return "\n".join(["## Components", "", "| name | class | size |", "|---|---|---|", *rows, ""])
