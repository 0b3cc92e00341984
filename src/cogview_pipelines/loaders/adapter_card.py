"""The page of an adapter on the Hub: what it is for, and how it is used."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def write_adapter_card(
    folder: str | os.PathLike,
    repo_id: str,
    base_model: str | None,
    pipeline_class: str,
    configs: Mapping[str, Mapping[str, Any]],
    prompt: str | None = None,
) -> None:
    """
    Write `README.md` beside an adapter.

    Args:
        folder: Where the adapter is.
        repo_id (`str`): Its id on the Hub.
        base_model (`str`, *optional*): Id of the pipeline that it adapts.
        pipeline_class (`str`): Class of that pipeline.
        configs (`dict[str, dict]`): By component, fields of its `peft.LoraConfig`.
        prompt (`str`, *optional*): What the example draws, for a pipeline that draws from a prompt alone; without,
            the card says only how the adapter is loaded.
    """
    data = ModelCardData(
        base_model=base_model, library_name="diffusers", tags=["lora", "cogview_pipelines", pipeline_class]
    )
    rows = [
        f"| `{part}` | {config['r']} | {config['lora_alpha']:g} | {len(config.get('target_modules', ()))} |"
        for part, config in configs.items()
    ]
    imports, example = f"from cogview_pipelines import {pipeline_class}", ""
    if prompt is not None:
        imports = f"import torch\n{imports}"
        example = f"\nimage = pipe({prompt!r}, generator=torch.Generator().manual_seed(7)).images[0]"
    title = repo_id.split("/")[-1]
    text = f"""# {title}

An adapter (LoRA){f" for [{base_model}](https://huggingface.co/{base_model})" if base_model else ""}.

## Use

With [cogview_pipelines](https://pypi.org/project/cogview_pipelines/) (`pip install "cogview_pipelines[lora]"`):

```python
{imports}

pipe = {pipeline_class}.from_pretrained({(base_model or "MODEL")!r})
pipe.load_lora_weights({repo_id!r}){example}
```

## What it adapts

| component | rank | alpha | layers |
|---|---|---|---|
{chr(10).join(rows)}
"""
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    Path(folder, "README.md").write_text(str(card), encoding="utf-8")
