"""`benchmarks/train_for.py`: as many steps as a time is good for, the last of them with a falling learning rate."""

import importlib.util
import json

import pytest

from cogview_pipelines.training.checkpoints import list_checkpoints

from .conftest import COGLM, SCRIPTS, as_arguments, metrics


@pytest.fixture
def train_for(token_folder, tokenizer_folder, tmp_path):
    spec = importlib.util.spec_from_file_location("train_for", SCRIPTS.parent / "benchmarks" / "train_for.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(part: str, minutes: float) -> None:
        options = {
            "output_dir": tmp_path / "run",
            "data": token_folder,
            "tokenizer": tokenizer_folder,
            "model": COGLM,
            "batch_size": 2,
            "warmup_steps": 0,
            "log_every_steps": 1,
            "sample_every_steps": 0,
            "data_workers": 0,
        }
        module.main([part, "--minutes", str(minutes), "train_coglm", *as_arguments(options)])

    return call


def test_the_rate_falls_to_zero_over_the_steps_that_the_minutes_are_good_for(train_for, stop_after, tmp_path, capsys):
    with pytest.raises(SystemExit, match="`steady` leaves it"):
        train_for("cooldown", 1.5)
    stop_after(2)
    train_for("steady", 1)  # two steps a minute, as it seems
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert len(rates) == 2 and rates[0] == rates[1] > 0
    stop_after(1)  # interrupted
    train_for("cooldown", 1.5)
    assert not (tmp_path / "run/final").exists()
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"
    train_for("cooldown", 100)  # goes on as planned, whatever the minutes are now
    pace = json.loads((tmp_path / "run/pace.json").read_text())
    assert pace == {"steps_per_minute": 2.0, "decay_steps": 3, "max_steps": 5}
    falling = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert len(falling) == 5 and falling[0] == rates[0] == falling[3] > falling[4] > 0
    assert (tmp_path / "run/final/config.json").is_file()
    train_for("cooldown", 1)
    assert "is there already" in capsys.readouterr().out
