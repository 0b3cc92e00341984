"""Options from the command line and from a YAML file."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from cogview_pipelines.training.arguments import (
    INTERRUPTED,
    TrainConfig,
    files_option,
    json_option,
    parse_config,
    read_words,
    run_script,
)


@dataclass
class Config(TrainConfig):
    data: str = field(kw_only=True, metadata={"help": "A folder."})
    model: str = field(default="{}", metadata={"help": "JSON."})
    ratios: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "Numbers."})


@pytest.fixture
def parse(tmp_path):
    def call(text, *arguments):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return parse_config(Config, ["--config", str(tmp_path / "config.yaml"), "--output_dir", "out", *arguments])

    return call


def test_the_file_sets_defaults_and_the_command_line_wins(parse):
    config = parse("data: here\nlearning_rate: 2e-3\nratios: [1, 0.25]\nmax_steps: 7\ncompile: true\n")
    assert (config.data, config.learning_rate, config.ratios, config.max_steps) == ("here", 2e-3, [1.0, 0.25], 7)
    assert config.compile is True and config.seed == 0
    config = parse("data: here\nmax_steps: 7\nratios: [1]\n", "--max_steps", "9", "--data", "there", "--ratios", "2")
    assert (config.max_steps, config.data, config.ratios) == (9, "there", [2.0])


def test_a_mapping_becomes_json_with_chinese(parse):
    assert parse("data: d\nmodel: {name: 猫, size: [1, 2]}\n").model == '{"name": "\\u732b", "size": [1, 2]}'


def test_a_bare_no_is_the_word_and_other_values_must_be_choices(parse):
    assert parse("data: d\nmixed_precision: no\n").mixed_precision == "no"
    with pytest.raises(ValueError, match=r"`optimizer` must be one of \['adamw', 'muon'\] in .*, but is 'mun'"):
        parse("data: d\noptimizer: mun\n")


def test_a_file_that_cannot_be_used_is_named(parse, tmp_path):
    with pytest.raises(ValueError, match="has options that Config lacks: max_step, ratio"):
        parse("max_step: 7\nratio: 1\n")
    with pytest.raises(ValueError, match="must hold `option: value` lines, but holds a list"):
        parse("- 1\n")
    with pytest.raises(ValueError, match="`--config` must be a YAML file, but there is none at /nowhere"):
        parse_config(Config, ["--config", "/nowhere", "--output_dir", "out"])


def test_required_options_may_come_from_either_side(parse, capsys):
    with pytest.raises(SystemExit):
        parse("seed: 1\n")
    assert "required: --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rat", "1"], "no such option: --learning_rat (did you mean --learning_rate?); --help lists all"),
        (["--zzz=1", "--yyy"], "no such option: --zzz=1, --yyy; --help lists all of them"),
        (["here"], "nothing takes these: here"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
    ],
)
def test_what_the_command_line_does_not_know_is_said_in_a_sentence(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, ["--output_dir", "out", "--data", "d", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value", [("max_steps", "0"), ("batch_size", "-1"), ("learning_rate", "nan"), ("log_every_steps", "0")]
)
def test_numbers_that_cannot_work_are_named_before_anything_is_loaded(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        parse_config(Config, ["--output_dir", "out", "--data", "d", f"--{name}", value])


def test_a_decay_of_one_would_never_move():
    with pytest.raises(ValueError, match=r"`ema_decay` must be at least 0 and below 1, but is 1\.0"):
        parse_config(Config, ["--output_dir", "out", "--data", "d", "--ema_decay", "1"])


def test_a_file_that_is_no_yaml_is_named(parse):
    with pytest.raises(ValueError, match=r"`--config` .*config\.yaml is no YAML file"):
        parse("a: [1\n")


@pytest.mark.parametrize("result, resumable, status", [("model", True, 0), (None, True, 75), (None, False, 0)])
def test_the_exit_status_says_whether_to_resume(result, resumable, status):
    assert INTERRUPTED == 75
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: result, resumable)
    assert (caught.value.code or 0) == status


@pytest.mark.parametrize("error, status", [(ValueError("no `a`"), 2), (FloatingPointError("b"), 1), (OSError("c"), 1)])
def test_a_program_says_what_went_wrong_in_a_sentence(capsys, error, status):
    def fail():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(fail)
    said = capsys.readouterr().err
    assert caught.value.code == status and said.endswith(f": error: {error}\n") and "Traceback" not in said


def test_a_program_that_ctrl_c_ends_says_so_without_a_traceback(capsys):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_script(stop)
    assert caught.value.code == 130 and capsys.readouterr().err.endswith(": stopped.\n")


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_script(lambda: {}["a"])


@pytest.mark.parametrize("text", ["{", "[1]", "3", "[" * 100_000, "NaN", ""])
def test_options_that_hold_json_name_themselves_where_they_do_not(text):
    with pytest.raises(ValueError, match=r"`model` must be (a JSON object|JSON), but is"):
        json_option(Config(output_dir="out", data="here", model=text), "model")
    assert json_option(Config(output_dir="out", data="here", model='{"虎": 1}'), "model") == {"虎": 1}


@pytest.mark.parametrize("name", ["", "../a", "a/b", "/a"])
def test_files_are_copied_under_names_of_their_own(tmp_path, name):
    (tmp_path / "card.md").write_text("# A model")
    files = {"README.md": str(tmp_path / "card.md")}
    assert files_option(_holding(files), "model") == files
    with pytest.raises(ValueError, match="must hold names of files"):
        files_option(_holding({name: str(tmp_path / "card.md")}), "model")
    for source in (3, None, "nowhere", "x" * 300):
        with pytest.raises(ValueError, match="which is no file"):
            files_option(_holding({"a": source}), "model")


def _holding(files):
    return Config(output_dir="out", data="here", model=json.dumps(files))


def test_words_come_from_any_kind_of_utf_8_and_other_text_is_named(tmp_path):
    (tmp_path / "words.txt").write_text("a 老虎\r\n\ncat\n", "utf-8-sig")
    assert read_words(tmp_path / "words.txt") == ["a", "老虎", "cat"]
    (tmp_path / "words.txt").write_text("a cat", "utf-16")
    with pytest.raises(ValueError, match="Save the file as UTF-8"):
        read_words(tmp_path / "words.txt")


def test_a_run_is_not_begun_where_its_weights_could_not_be_written():
    with pytest.raises(ValueError, match="`output_dir` must be a name in UTF-8"):
        Config(output_dir=os.fsdecode(b"\xff"), data="here").check()
    with pytest.raises(ValueError, match="`learning_rate` must be at least 0"):
        Config(output_dir="out", data="here", learning_rate=float("inf")).check()


def test_reports_of_scripts_stop_nothing(tmp_path):
    """On consoles without the letters, and after whoever read them has left."""
    program = (
        "import sys, time\n"
        "from cogview_pipelines.training.arguments import run_script\n"
        "def main():\n"
        "    print('ñ', flush=True); time.sleep(1)\n"
        "    for _ in range(10_000):\n        print('虎' * 10)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "    return 1\n"
        "run_script(main)\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"\\xf1\n"
        process.stdout.close()
        assert process.wait(60) == 0 and (tmp_path / "done").exists()
