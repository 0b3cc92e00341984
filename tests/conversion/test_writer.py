"""Writing tensors file by file: what an interrupted run leaves, and how much room it needs."""

import shutil

import pytest
import torch

from cogview_pipelines.conversion import writer
from cogview_pipelines.conversion.reader import ConversionError, LoadedTensor
from cogview_pipelines.conversion.writer import write_component

SIZE = 2**20
MARGIN = 2**26


def test_what_an_interrupted_run_wrote_needs_no_room_again(tmp_path, monkeypatch):
    tensors = {name: LoadedTensor(torch.full((SIZE,), index, dtype=torch.uint8)) for index, name in enumerate("abc")}
    folder, written = tmp_path / "model", []

    def stop_at_the_third(count):
        written.append(count)
        if len(written) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_component(folder, tensors, {}, "source", max_shard_size=SIZE, advance=stop_at_the_third)
    there = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 2 * SIZE <= there < 3 * SIZE

    def go_on(free):
        monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 * MARGIN, 0, free))
        return write_component(folder, tensors, {}, "source", max_shard_size=SIZE)

    needed = 3 * SIZE + MARGIN - there
    with pytest.raises(ConversionError, match="not free on its disk"):
        go_on(needed - 1)
    assert go_on(needed)["reused"] == 2
