"""`cogview2 bench`: how fast pictures are made on this machine, and how fast they could be."""

import json

import typer

from .adapters import LORA_OPTION, read_adapters
from .console import failures, say
from .loading import DEVICE_OPTION, DTYPE_OPTION, INT8_OPTION, MODEL_OPTION, DType, load_pipeline


def bench(
    batch_size: list[int] = typer.Option([1, 4], "--batch-size", "-b", min=1, help="Pictures at a time; repeatable."),
    seconds: float = typer.Option(20.0, min=0.1, help="Time for each batch size, after a call that warms up."),
    compile: bool = typer.Option(False, "--compile", help="Run the steps of the tokens through torch.compile."),
    cuda_graph: bool = typer.Option(False, "--cuda-graph", help="Replay the steps of the tokens as a CUDA graph."),
    model: str = MODEL_OPTION,
    lora: list[str] = LORA_OPTION,
    int8: bool = INT8_OPTION,
    device: str = DEVICE_OPTION,
    dtype: DType = DTYPE_OPTION,
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON for each batch size."),
) -> None:
    """Measure the speed of all stages on this machine."""
    from ..speed.generation_speed import bench_pipeline, table
    from ..speed.timing import resident_bytes

    before = resident_bytes()  # by now everything is imported
    pipe = load_pipeline(model, device, dtype, adapters=read_adapters(lora), int8=int8)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_decoding(compile=compile, cuda_graph=cuda_graph)
    for size in batch_size:
        with failures():
            line = bench_pipeline(pipe, size, seconds, before=before) | {
                "compile": compile,
                "cuda_graph": cuda_graph,
                "int8": int8,
            }
        say(json.dumps(line) if as_json else table(line) + "\n")
