"""How a model is spread over the processes: a copy on each, or shared out."""

import contextlib
import copy
import logging
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..ops.processor import multiplies
from .arguments import TrainConfig
from .processes import Processes

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


class DistributedModel:
    """
    A model on the devices of the processes.

    Args:
        model (`nn.Module`): The model; its weights are on the main process, and need not be on the others.
        config ([`TrainConfig`]): Its `compile`, `sharding`, `shard_size` and `reshard_after_forward` count.
        accelerator (`Accelerator`): Of this process.
        processes ([`Processes`]): Who train together.

    Attributes:
        model (`nn.Module`): The model itself, whose names of parameters are its own; its tensors may be sharded.
        forward (`nn.Module`): What computes, to be called instead of `model` in a training step.
        gradient_factor (`float`): What a loss is multiplied by, so that gradients are sums over all processes.

    Raises:
        ValueError: If a model without layers is to be sharded, or `shard_size` does not divide the processes.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, accelerator: Accelerator, processes: Processes):
        self.device, self.processes = processes.device, processes
        self.precision = computing_dtype(accelerator.mixed_precision, processes.device)
        if self.precision is None and accelerator.mixed_precision in PRECISIONS and processes.is_main:
            logger.warning(
                "`mixed_precision` %s: this processor has no such arithmetic. It computes in float32, which is "
                "several times as fast here.",
                accelerator.mixed_precision,
            )
        self.gradient_factor, self.skeleton = 1.0, None
        sharded = config.sharding != "none" and processes.count > 1
        if sharded and not layers_of(model):
            raise ValueError(
                f"`sharding` {config.sharding!r} shares out the layers of a transformer, but {type(model).__name__} "
                "does not say what its layers are. Train it with --sharding none."
            )
        mesh = make_mesh(config, processes) if sharded else None
        weights = dict(_tensors(model))
        if processes.count > 1 and (sharded or not processes.is_main):
            model.to("meta")
        if sharded:
            self.skeleton = copy.deepcopy(model)
        if config.compile:
            compile_layers(model)
        if sharded:
            shard_layers(model, mesh, self.precision, config.reshard_after_forward)
        if any(value.is_meta for _, value in _tensors(model)):
            model.to_empty(device=self.device)
        self.model = self.forward = model.to(self.device)
        if processes.count > 1:
            fill(model, weights, processes)
        if processes.count > 1 and not sharded:
            devices = None if self.device.type == "cpu" else [self.device]
            self.forward = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
            self.gradient_factor = float(processes.count)  # it averages

    @contextlib.contextmanager
    def synchronizing(self, last: bool) -> Iterator[None]:
        """
        A forward and backward pass, of which the last of a step gives the processes their common gradient.

        Shares of a sharded gradient are exchanged in each pass: whole ones would not fit.
        """
        copies = self.forward is not self.model
        with self.forward.no_sync() if copies and not last else contextlib.nullcontext():
            yield

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, with neither gradients nor a trace in the global random state."""
        was_training = self.model.training
        with torch.random.fork_rng(), torch.no_grad():
            self.model.eval()
            self._forget_gathered()
            yield
            self._forget_gathered()
            self.model.train(was_training)

    def _forget_gathered(self) -> None:
        """Weights that are gathered now are not those of the next step, and not the average."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole_model(self) -> nn.Module:
        """
        The model as one, to be saved, in the memory of the main process; the others get its shapes alone.

        A model that is not sharded is itself, on every process.
        """
        if self.skeleton is None:
            return self.model
        whole = {}
        for name, value in self.model.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.processes.is_main:
                whole[name] = value.cpu()
        if self.processes.is_main:
            self.skeleton.load_state_dict(whole, assign=True)
        return self.skeleton


def computing_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """
    What a forward pass under `mixed_precision` computes in; `None` for float32, the dtype of the weights.

    That is what a processor without 16-bit arithmetic is given in any case: PyTorch's products of 16-bit numbers take
    many times as long there.
    """
    dtype = PRECISIONS.get(mixed_precision)
    return None if dtype is None or (device.type == "cpu" and not multiplies(dtype)) else dtype


def shard_layers(model: nn.Module, mesh: DeviceMesh, precision: torch.dtype | None, reshard: bool = True) -> None:
    """
    Share out the weights of a model over the processes of a mesh (FSDP2).

    Each layer is gathered when it computes; what surrounds the layers is gathered once a step: the embedding of the
    tokens, which is also their scores, is the largest matrix. States keep the dtype that autocast gives them;
    gradients are added up in float32, and are sums over the processes.

    Args:
        model (`nn.Module`): Changed in place.
        mesh (`DeviceMesh`): Of one dimension, or of two: copies, and shares of each.
        precision (`torch.dtype`, *optional*): What gathered weights are rounded to; by default they stay as they are.
        reshard (`bool`): Give up the gathered weights of a layer after its forward pass.
    """
    policy = MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo averages wrongly in some versions


def make_mesh(config: TrainConfig, processes: Processes) -> DeviceMesh:
    """The processes in one row, or, with `sharding` `"hybrid"`, a row for each group that shares one copy."""
    if config.sharding == "full":
        return init_device_mesh(processes.device.type, (processes.count,), mesh_dim_names=("shard",))
    size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
    if size < 1 or processes.count % size:
        raise ValueError(f"`shard_size` must divide the {processes.count} processes, but is {size}.")
    shape = (processes.count // size, size)
    return init_device_mesh(processes.device.type, shape, mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def fill(model: nn.Module, weights: dict[str, torch.Tensor], processes: Processes) -> None:
    """
    Give every process its share of the weights that the main process has, one tensor after the other.

    Args:
        model (`nn.Module`): On its device, sharded or not.
        weights (`dict[str, torch.Tensor]`): Parameters and buffers by name; used on the main process.
    """
    for name, own in _tensors(model):
        value = torch.empty(own.shape, dtype=own.dtype, device=processes.device)
        if processes.is_main:
            value.copy_(weights[name])
        distributed.broadcast(value, 0)
        if isinstance(own, DTensor):
            own.to_local().copy_(
                distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).to_local()
            )
        else:
            own.copy_(value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, value.detach()) for name, value in model.named_parameters())
    yield from model.named_buffers()


def compile_layers(model: nn.Module) -> None:
    """
    Run the layers of a model through `torch.compile`, each by itself: names of weights stay as they are.

    A model that does not say what its layers are (`_no_split_modules`) is compiled as a whole.
    """
    for module in layers_of(model) or [model]:
        module.compile()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer: the modules that its class says not to split."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]
