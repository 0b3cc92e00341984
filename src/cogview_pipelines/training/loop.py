"""
The loop that the training scripts share.

It is written once because exact resuming, accumulation and clean stops are easy to get subtly wrong in copies. What
differs between the scripts (samples, loss, sample pictures, what happens between steps) they pass in as functions.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from .arguments import TrainConfig
from .checkpoints import Clock, resume, save_checkpoint
from .data.prefetch import prefetch
from .logs import MetricsLog, save_samples
from .setup import make_accelerator, make_averaged_model, make_optimizer, make_scheduler

logger = logging.getLogger(__name__)

Draw = tuple[int, int, int]
Pictures = torch.Tensor | list[Image.Image]


def train(
    config: TrainConfig,
    model: nn.Module,
    make_batch: Callable[[Draw], object],
    compute_loss: Callable[[nn.Module, object], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    make_samples: Callable[[nn.Module], Pictures | dict[str, Pictures]] | None = None,
    adamw_names: tuple[str, ...] = (),
    begin_step: Callable[[int], None] | None = None,
    finish: Callable[[nn.Module], None] | None = None,
) -> nn.Module | None:
    """
    Train all parameters of a model that require a gradient.

    Args:
        config ([`TrainConfig`]): The knobs.
        model (`nn.Module`): The model, with `save_pretrained`.
        make_batch (`Callable`): Makes the batch of `(step, micro step, process)`, an object with `.to(device)`. It
            must depend on nothing else, so that a resumed run sees the batches that it would have seen.
        compute_loss (`Callable`): Loss and further scalars of the model (as Accelerate prepared it) and a batch.
        make_samples (`Callable`, *optional*): Pictures made by the model in evaluation mode, or several sets by name.
        adamw_names (`tuple[str, ...]`): Parts of names of linear layers that Muon leaves to AdamW.
        begin_step (`Callable`, *optional*): Called with the number of updates so far before each forward pass.
        finish (`Callable`, *optional*): Called with the trained model, in evaluation mode, before it is saved.

    Returns:
        `nn.Module` or `None`: The trained model (the moving average, if there is one), also saved in
        `<output_dir>/final`; `None` if `max_minutes` ended the run, which then goes on with `resume_from_checkpoint`.
    """
    accelerator = make_accelerator(config)
    averaged = make_averaged_model(model.to(accelerator.device), config)
    optimizer = make_optimizer(model, config, adamw_names)
    scheduler = make_scheduler(optimizer, config)
    trained = torch.compile(model) if config.compile else model
    trained, optimizer = accelerator.prepare(trained, optimizer)
    accelerator.register_for_checkpointing(scheduler, *([] if averaged is None else [averaged]))
    start_step = resume(accelerator, config)
    log, clock = MetricsLog(accelerator, config, start_step), Clock(accelerator, config)

    draws = (
        (step, micro_step, accelerator.process_index)
        for step in range(start_step, config.max_steps)
        for micro_step in range(config.gradient_accumulation_steps)
    )
    trained.train()
    for (step, _, _), batch in prefetch(make_batch, draws, config.data_workers, config.data_processes):
        batch = batch.to(accelerator.device)
        if begin_step is not None:
            begin_step(step)
        with accelerator.accumulate(trained):
            with accelerator.autocast():
                loss, metrics = compute_loss(trained, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        log.add(config.batch_size, loss=loss, **metrics)
        if not accelerator.sync_gradients:
            continue

        scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)
        num_steps = step + 1
        log.end_step(num_steps, scheduler.get_last_lr()[0])
        if make_samples is not None and config.sample_every_steps and num_steps % config.sample_every_steps == 0:
            if accelerator.is_main_process:
                save_samples(_sample(make_samples, model if averaged is None else averaged.module), config, num_steps)
            accelerator.wait_for_everyone()
        if clock.checkpoint_due(num_steps):
            save_checkpoint(accelerator, config, num_steps)
        if num_steps < config.max_steps and clock.time_is_over():
            save_checkpoint(accelerator, config, num_steps)
            logger.warning(
                "Stopped after %d steps by `max_minutes`; resume with --resume_from_checkpoint latest.", num_steps
            )
            log.close()
            return None

    log.close()
    final = (model if averaged is None else averaged.module).eval()
    if finish is not None:
        finish(final)
    if accelerator.is_main_process:
        final.save_pretrained(Path(config.output_dir) / "final")
    return final


def _sample(make_samples, model: nn.Module):
    """Pictures, without a trace in the model's mode or the global random state."""
    was_training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        model.eval()
        samples = make_samples(model)
        model.train(was_training)
    return samples
