"""`benchmarks/run_gpu_queue.sh`, with an interpreter that only writes down what it is asked to run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cogview_pipelines.training.arguments import parse_config

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "train_vq_model": "VQTrainConfig",
    "prepare_tokens": "PrepareConfig",
    "train_coglm": "CogLMTrainConfig",
    "train_direct_sr": "DirectSRTrainConfig",
    "train_iterative_sr": "IterativeSRTrainConfig",
    "assemble_pipeline": "AssembleConfig",
}
INTERPRETER = """#!{python}
import json, os, sys, time
if "-c" not in sys.argv[1:2]:
    with open({calls!r}, "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("HANG", "nothing") in " ".join(sys.argv):
    time.sleep(1000)
sys.exit(3 if os.environ.get("FAIL", "nothing") in " ".join(sys.argv) else 0)
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or sys.platform == "win32", reason="needs bash")


class Queue:
    """A copy of the script in an empty checkout; remembers the commands of the last call."""

    def __init__(self, folder: Path):
        self.folder, self.calls_file = folder, folder / "calls.jsonl"
        (folder / "benchmarks").mkdir()
        shutil.copy(ROOT / "benchmarks" / "run_gpu_queue.sh", folder / "benchmarks")
        interpreter = folder / "interpreter"
        interpreter.write_text(INTERPRETER.format(python=sys.executable, calls=str(self.calls_file)))
        interpreter.chmod(0o755)

    def __call__(self, *arguments, **environment):
        self.calls_file.write_text("")
        known = {"PYTHON": str(self.folder / "interpreter"), "OUT": str(self.folder / "home"), "STEPS_DEVICE": "cuda"}
        return subprocess.run(
            ["bash", str(self.folder / "benchmarks" / "run_gpu_queue.sh"), *arguments],
            env={**os.environ, **known, **environment},
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path)


def listed(what: str) -> list[str]:
    script = ROOT / "benchmarks" / "run_gpu_queue.sh"
    return subprocess.run(["bash", str(script), what], capture_output=True, text=True).stdout.split()


def steps() -> list[str]:
    return listed("--list")


def prepare():
    spec = importlib.util.spec_from_file_location("prepare_gpu_queue", ROOT / "benchmarks" / "prepare_gpu_queue.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_is_described():
    described = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert len(steps()) > 10
    assert [name for name in steps() if f"`{name}`" not in described] == []


def test_every_step_stands_once_and_every_group_has_a_call_with_what_it_takes_along():
    assert len(set(steps())) == len(steps())
    assert list(prepare().GROUPS) == listed("--groups")
    described = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for group, parts in prepare().GROUPS.items():
        (call,) = [line for line in described.splitlines() if f"run_gpu_queue.sh {group}` |" in line]
        assert all((f"`gpu_inputs/{part}`" in call) is (part in parts) for part in ("base", "speed", "training")), call


@pytest.mark.slow  # it waits for half a minute, without computing
def test_in_the_first_group_a_step_that_hangs_leaves_time_for_all_that_is_most_wanted(queue):
    lines = queue("first", HANG="build_ext", QUEUE_SECONDS="80").stdout.splitlines()
    (failed,) = [line for line in lines if " failed " in line]
    assert failed.startswith("kernel_build") and "time was over" in failed
    for name in ("kernel_tests", "kernel_opcheck", "parity", "kernel_times", "generation_times", "sharded_training"):
        assert any(line.startswith(f"{name} ") and " passed " in line for line in lines), (name, lines)


def test_all_steps_run_and_none_again_once_it_passed(queue):
    first = queue()
    for name in steps():
        found = [line for line in first.stdout.splitlines() if line.startswith(f"{name} ")]
        assert found and ("passed" in found[-1] or "left out" in found[-1]), (name, first.stdout, first.stderr)
    assert len(queue.calls) >= 15
    queue()
    assert queue.calls == []
    assert queue("kernel_tests").returncode == 0 and len(queue.calls) == 1
    assert (queue.folder / "home" / "summary.txt").is_file() and (queue.folder / "home" / "results.tar.gz").is_file()
    assert len(list((queue.folder / "home").iterdir())) <= 8


def test_a_step_that_fails_does_not_stop_the_others_and_runs_again(queue):
    lines = queue(FAIL="bench_local_attention").stdout.splitlines()
    failed = [line for line in lines if " failed " in line]
    assert [line.split()[0] for line in failed] == ["kernel_times", "kernel_benchmark"]
    assert all("exit status 3" in line for line in failed)
    queue()
    assert [call[0] for call in queue.calls] == 2 * ["benchmarks/bench_local_attention.py"]


def test_a_training_that_was_cut_off_goes_on_with_the_part_that_is_missing(queue):
    queue("correctness", FAIL="cooldown")
    queue("correctness")
    parts = [call[1] for call in queue.calls if call[0] == "benchmarks/train_for.py"]
    assert parts == ["cooldown"]


def test_no_step_starts_when_the_time_is_over(queue):
    result = queue("speed", QUEUE_SECONDS="0")
    assert result.stdout.count("no time left") == 8 and queue.calls == []


def test_an_unknown_step_is_named(queue):
    result = queue("kernel_build", "kernel_biuld")
    assert result.returncode == 2 and "no step `kernel_biuld`" in result.stderr and queue.calls == []


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "training_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_scripts_know_the_options_that_they_get(queue, device, monkeypatch):
    queue(STEPS_DEVICE=device)
    monkeypatch.chdir(ROOT)
    missing = []
    for call in queue.calls:
        script, options = Path(call[0]).stem, call[1:]
        if script == "train_for":
            assert options[1] == "--minutes" and float(options[2]) > 0
            script, options = options[3], options[4:]
        if call[0] == "-m":  # pytest
            paths = [word for word in call if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths), call
        elif script in CONFIGS:
            parse_config(getattr(load(script), CONFIGS[script]), options)
        elif not (ROOT / call[0]).is_file():
            missing.append(call[0])
        elif script != "setup":
            source = (ROOT / call[0]).read_text(encoding="utf-8")
            known = [word.lstrip("-").replace("-", "_") for word in options if word.startswith("--")]
            assert [word for word in known if word not in source] == [], call
    assert missing == []
