"""What the options and `accelerate config` say together, and what is refused in a sentence."""

import pytest
from accelerate.state import AcceleratorState, GradientState

from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.processes import Processes, check_tracker, make_accelerator, resolve


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_config(**options) -> TrainConfig:
    return TrainConfig(output_dir="unused", **options)


@pytest.mark.parametrize(
    "option, environment, expected",
    [(None, "bf16", "bf16"), (None, None, "no"), ("no", "bf16", "no"), ("bf16", "no", "bf16"), ("bf16", None, "bf16")],
)
def test_mixed_precision_is_that_of_the_option_and_else_that_of_accelerate_config(
    monkeypatch, option, environment, expected
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if environment is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
    assert make_accelerator(make_config(mixed_precision=option)).mixed_precision == expected


@pytest.mark.parametrize(
    "option, environment, expected", [(None, "4", 4), (None, None, 1), (2, "4", 2), (None, "auto", 1)]
)
def test_gradient_accumulation_is_that_of_the_option_and_else_that_of_accelerate_config(
    monkeypatch, option, environment, expected
):
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    if environment is not None:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", environment)
    assert resolve(make_config(gradient_accumulation_steps=option)).gradient_accumulation_steps == expected


def test_precisions_that_the_loop_does_not_know_are_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="`mixed_precision` 'fp8' of the Accelerate config is not supported"):
        make_accelerator(make_config())


@pytest.mark.parametrize(
    "variable, engine", [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")]
)
def test_engines_that_would_save_half_a_model_are_refused_with_the_reason(monkeypatch, variable, engine):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"asks for {engine}, which owns weights.*Choose another"):
        make_accelerator(make_config())


def test_a_tracker_that_is_unknown_or_not_installed_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"`log_with` must be one of \[.*'tensorboard'.*\], but is 'tensorbord'"):
        check_tracker("tensorbord")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`log_with` 'tensorboard' needs the package tensorboard: pip install"):
        check_tracker("tensorboard")
    check_tracker(None)


def test_what_the_main_process_raises_reaches_the_caller():
    processes = Processes(make_accelerator(make_config()))
    assert processes.main_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        processes.main_first(lambda: 1 // 0)
    assert processes.sum([1.5, 2]) == [1.5, 2] and processes.gather("a") == ["a"] and not processes.any(False)


@pytest.mark.parametrize(
    "option, environment, expected",
    [
        (None, {}, ("none", True)),
        (None, {"ACCELERATE_USE_FSDP": "true"}, ("full", True)),
        (None, {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}, ("full", False)),
        (None, {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, ("full", False)),
        (None, {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "HYBRID_SHARD"}, ("hybrid", True)),
        ("none", {"ACCELERATE_USE_FSDP": "true"}, ("none", True)),
    ],
)
def test_sharding_is_that_of_the_option_and_else_that_of_accelerate_config(monkeypatch, option, environment, expected):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_SHARDING_STRATEGY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = resolve(make_config(sharding=option))
    assert (config.sharding, config.reshard_after_forward) == expected


def test_weights_on_the_cpu_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match=r"keeps weights on the CPU .*Switch it off, or pass --sharding none"):
        resolve(make_config())
