"""Options from the command line and from a YAML file."""

from dataclasses import dataclass, field

import pytest

from cogview_pipelines.training.arguments import TrainConfig, parse_config


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
