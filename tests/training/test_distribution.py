"""What training computes in; sharded models: test_sharding.py."""

import logging

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from cogview_pipelines.training import distribution
from cogview_pipelines.training.arguments import TrainConfig
from cogview_pipelines.training.distribution import DistributedModel, computing_dtype
from cogview_pipelines.training.processes import Processes, make_accelerator


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("has", [False, True])
def test_a_processor_without_16_bit_arithmetic_computes_in_float32_whatever_is_asked_for(monkeypatch, has):
    monkeypatch.setattr(distribution, "multiplies", lambda dtype: has)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert computing_dtype("no", cpu) is computing_dtype("no", cuda) is None
    assert computing_dtype("bf16", cuda) == torch.bfloat16 and computing_dtype("fp16", cuda) == torch.float16
    assert computing_dtype("bf16", cpu) == (torch.bfloat16 if has else None)
    assert computing_dtype("fp16", cpu) == (torch.float16 if has else None)


@pytest.mark.parametrize("has", [False, True])
def test_it_is_said_and_the_forward_pass_keeps_to_it(monkeypatch, caplog, has):
    monkeypatch.setattr(distribution, "multiplies", lambda dtype: has)
    config = TrainConfig(output_dir="unused", mixed_precision="bf16", sharding="none", gradient_accumulation_steps=1)
    accelerator = make_accelerator(config)
    with caplog.at_level(logging.WARNING):
        distributed = DistributedModel(torch.nn.Linear(3, 2), config, accelerator, Processes(accelerator))
    assert ("It computes in float32" in caplog.text) is not has
    with distributed.autocast():
        assert distributed.forward(torch.ones(1, 3)).dtype == (torch.bfloat16 if has else torch.float32)
