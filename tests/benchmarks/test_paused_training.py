"""`benchmarks/paused_training.py`: a run that waits after every update, and says what each took."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paused_training.py"
TRAINING = """
import sys, torch
weight = torch.nn.Parameter(torch.ones(3, 3))
parts = [torch.optim.AdamW([weight]), torch.optim.SGD([weight], lr=0.1)]
for step in range(int(sys.argv[1])):
    print("step", step)
    weight.square().sum().backward()
    for part in parts:
        part.step()
print("the end")
"""


def test_it_waits_after_each_update_and_says_what_that_took(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "train.py"), "1000000"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert json.loads(process.stdout.readline()) is None
    for _ in range(3):
        process.stdin.write("\n")
        process.stdin.flush()
        taken = json.loads(process.stdout.readline())
        assert taken.keys() == {"cpu_seconds", "seconds"} and 0 < taken["seconds"] < 60
    left, said = process.communicate(timeout=60)  # closes its input
    assert process.returncode == 0 and not left
    assert said.count("step") == 4 and "the end" not in said
