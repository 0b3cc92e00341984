"""
Several processes that train together over gloo, as a launcher would start them.

They are forked from a server that has imported what they need, so that a run of tiny models takes seconds.
"""

import contextlib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import tracking
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from cogview_pipelines import CogLMCanvasModel, CogLMModel, IcetkTokenizer, IcetkVQModel  # noqa: F401
from cogview_pipelines.models.image_tokenizers import auto  # noqa: F401
from cogview_pipelines.training import checkpoints, distribution, loop, processes
from cogview_pipelines.training.optimizers import LossScale, Optimizers
from cogview_pipelines.training.processes import Processes

SCRIPTS = Path(__file__).parents[2] / "training_scripts"


def launch(count: int, work: Callable, *arguments, local_count: int | None = None, timeout: float = 600) -> list:
    """
    Run `work(*arguments)` on some processes that form a group, and return what each returned.

    Raises:
        RuntimeError: If one failed or took too long; with the traceback of each.
    """
    root = str(Path(__file__).parents[2])
    if root not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # the server finds what it preloads by this
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    environment = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(local_count or count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    pipes, workers = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank % (local_count or count))}
        worker = context.Process(target=_run, args=(environment | ranks, sender, work, arguments), daemon=True)
        worker.start()
        sender.close()
        pipes.append(receiver)
        workers.append(worker)
    results, failures = [], []
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(timeout):
                raise EOFError("it took too long")
            succeeded, result = pipe.recv()
        except EOFError as error:
            succeeded, result = False, f"process {rank} ended without a result ({error})"
        (results if succeeded else failures).append(result)
    for worker in workers:
        worker.join(10)
        if worker.is_alive():
            worker.kill()
    if failures:
        raise RuntimeError("\n".join(failures))
    return results


def free_port() -> int:
    """
    A port for a process that is about to start. It is below those that systems hand out by themselves, or a test that
    runs meanwhile could be given it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("127.0.0.1", port))
            return port


def _run(environment, sender, work, arguments) -> None:
    if environment["WORLD_SIZE"] != "1":
        os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            result = work(*arguments)
        sender.send((True, result))
    except BaseException:
        sender.send((False, f"process {environment['RANK']}:\n{traceback.format_exc()}\n{said.getvalue()[-2000:]}"))
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, arguments: list[str]) -> bool:
    """Run a training script; whether it came to its end."""
    return load_script(name).main(arguments) is not None


def run_uncompiled(name: str, arguments: list[str]) -> bool:
    """Run a training script that would compile something, without that: the numbers are nearly the same."""
    torch.compiler.set_stance("force_eager")
    return run_script(name, arguments)


def with_16_bits(work: Callable, *arguments):
    """
    Do some work as on a processor that has arithmetic for 16-bit numbers, without which training computes in float32.

    Losses are scaled by as much as a tiny model's gradients can take in the first step.
    """
    distribution.multiplies = lambda dtype: True
    loop.LossScale = functools.partial(LossScale, scale=2.0**8)
    return work(*arguments)


def traced(work: Callable, *arguments) -> tuple[int, object]:
    """Do some work through `torch.compile` without its slow last part; how many graphs it made, and the result."""
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    result = work(*arguments)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], result


def first_gradients(name: str, arguments: list[str], mean_of_means: bool = False) -> dict[str, torch.Tensor]:
    """
    The gradient of every parameter in the first step, whole, as the optimizer gets it; not clipped unless asked for.

    Args:
        mean_of_means (`bool`): Divide on each process by its own labels, which is wrong: the control of the test.
    """
    found = {}

    class Enough(Exception):
        pass

    def keep(optimizers: Optimizers) -> None:
        for key, parameter in optimizers.parameters.items():
            gradient = parameter.grad
            found[key] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone().numpy()
        raise Enough

    before = Optimizers.step, Processes.sum
    Optimizers.step = keep
    if mean_of_means:
        Processes.sum = lambda self, values: [value * self.count for value in values]
    try:
        load_script(name).main(["--max_grad_norm", "0", *arguments, "--max_steps", "1"])
    except Enough:
        pass
    finally:
        Optimizers.step, Processes.sum = before
    return found


def types_of_weights(name: str, arguments: list[str]) -> tuple[set[str], set[str]]:
    """Run a training script; types of the weights of linear layers while they compute, and of all that stays."""
    computing, kept, before = set(), set(), Optimizers.step

    def note(module, inputs):
        if isinstance(module, nn.Linear) and torch.is_grad_enabled():
            computing.add(str(module.weight.dtype))

    def step(optimizers: Optimizers) -> None:
        before(optimizers)
        held = [*optimizers.parameters.values(), *optimizers.gradients(), *optimizers.tensors().values()]
        kept.update(str(value.dtype) for value in held)

    Optimizers.step = step
    with register_module_forward_pre_hook(note):
        load_script(name).main(arguments)
    return computing, kept


def spoiled(name: str, arguments: list[str], step: int, how: str) -> bool:
    """
    Run a training script, of which the last process has a loss that is not finite in a step, from 0; whether it came
    to its end.

    Args:
        how (`str`): `"nan"`, gradients and all; or `"inf"`, of the loss alone.
    """
    script = load_script(name)
    compute_loss, calls = script.compute_loss, []

    def compute(*rest):
        loss, metrics = compute_loss(*rest)
        calls.append(None)
        is_last = not distributed.is_initialized() or distributed.get_rank() == distributed.get_world_size() - 1
        if is_last and len(calls) == step + 1:
            loss = loss * float("nan") if how == "nan" else loss + float("inf")
        return loss, metrics

    script.compute_loss = compute
    return script.main(arguments) is not None


class Recorder(tracking.GeneralTracker):
    """A tracker that writes what it is told into a file, `seen.jsonl` in its folder."""

    name = "tensorboard"
    requires_logging_directory = True
    tracker = None

    def __init__(self, run_name, logging_dir, **unused):
        super().__init__()
        self.path = Path(logging_dir) / "seen.jsonl"

    def _write(self, **line) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @tracking.on_main_process  # as those of Accelerate are
    def store_init_configuration(self, values):
        self._write(options=values)

    @tracking.on_main_process
    def log(self, values, step=None, **unused):
        self._write(step=step, values=values)

    @tracking.on_main_process
    def finish(self):
        self._write(finished=True)


def recorded(name: str, arguments: list[str]) -> bool:
    """Run a training script whose tensorboard is a [`Recorder`]; whether it came to its end."""
    tracking.LOGGER_TYPE_TO_CLASS["tensorboard"] = Recorder
    tracking._available_trackers.append(tracking.LoggerType.TENSORBOARD)
    processes.check_tracker = lambda name: None  # the package need not be there
    return run_script(name, [*arguments, "--log_with", "tensorboard"])


def killed_in_second_save(name: str, arguments: list[str], note: Path) -> None:
    """
    Run a training script, of which the last process is killed while it writes its second checkpoint; it leaves the
    time in a file.
    """
    saves, write = [], checkpoints.dcp.FileSystemWriter.write_data

    def die(writer, *rest):
        saves.append(None)
        if len(saves) == 2 and distributed.get_rank() == distributed.get_world_size() - 1:
            note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return write(writer, *rest)

    checkpoints.dcp.FileSystemWriter.write_data = die
    load_script(name).main(arguments)


def told_to_stop(name: str, arguments: list[str], step: int) -> bool:
    """Run a training script, of which the last process gets SIGTERM in a step; whether it came to its end."""
    script = load_script(name)
    make_batch = script.make_batch

    def make(*rest):
        if rest[-1].step == step and distributed.get_rank() == distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(*rest)

    script.make_batch = make
    return script.main(arguments) is not None


def shares(name: str, arguments: list[str]) -> tuple[bool, dict[str, tuple[int, int]]]:
    """Whether this process was given weights before they were spread, and elements of each parameter: its own, all."""
    seen, before = {}, distribution.fill

    def look(model, weights, processes):
        seen["had weights"] = not any(value.is_meta for value in weights.values())
        before(model, weights, processes)
        seen["shares"] = {
            key: ((value.to_local() if isinstance(value, DTensor) else value).numel(), value.numel())
            for key, value in model.named_parameters()
        }

    distribution.fill = look
    load_script(name).main(arguments)
    return seen["had weights"], seen["shares"]
