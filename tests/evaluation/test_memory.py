"""Memory does not grow with the number of pictures."""

import subprocess
import sys

import pytest

CODE = """
import sys, resource
from pathlib import Path
import torch
from PIL import Image
from cogview_pipelines.evaluation.captioned import Captioned
from cogview_pipelines.evaluation.distances import torchmetrics
from cogview_pipelines.evaluation.picture_runs import PictureRun
from cogview_pipelines.evaluation.preparation import Preparation

def picture(seed):
    noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (16, 16), noise.numpy().tobytes())

class Random:
    def read(self, row):
        return picture(int(row.id))

def network(pixels):
    values = pixels.float() / 255
    return values.flatten(1)[:, :128], values.mean((2, 3))

folder, num = Path(sys.argv[1]), int(sys.argv[2])
rows = [Captioned(str(number), "a caption") for number in range(num)]
run = PictureRun(folder, rows, {}, made=Random(), references=Random(), network=network,
                 preparation=Preparation(16, (0, 2)), scores={"one": lambda images, rows: [1.0] * len(images)},
                 batch_size=64)
torchmetrics()  # loaded for the results, and no small library
run.begin()
done, early = 0, None
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB
def on_pictures(count):
    global done, early
    done += count
    if early is None and done >= num // 10:
        early = peak()
run.run(on_pictures=on_pictures)
after = peak()
assert run.results()["pictures"] == num
print(early, after, peak())
"""


@pytest.mark.parametrize("num", [1280, pytest.param(30_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_memory_stays_what_it_was_after_a_tenth_of_the_pictures(tmp_path, num):
    command = [sys.executable, "-c", CODE, str(tmp_path / "run"), str(num)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    early, run, results = map(int, result.stdout.split())
    # 30,000 pictures of both sides with their features in two radii would be 150 MiB
    assert run - early < 15
    assert results - run < 40
