"""Checkpoints that are written while the training goes on."""

import logging
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch.distributed import checkpoint as dcp

from .arguments import TrainConfig
from .checkpoints import TrainingState, finish_save, prepare_save
from .processes import Processes

logger = logging.getLogger(__name__)


class BackgroundSaves:
    """
    Saves the checkpoints of a run in a thread of each process, one checkpoint at a time.

    The training waits while its state is copied to the memory of the CPU. The copy is written, checked and given its
    name in the thread, which talks to those of the other processes over a group of its own: what the training says
    meanwhile must not come between.

    Args:
        processes ([`Processes`]): Who train together; all must make this at the same time.
        config ([`TrainConfig`]): Of the run.

    Raises:
        ValueError: If torch has no gloo.
    """

    def __init__(self, processes: Processes, config: TrainConfig):
        self.processes, self.config = processes, config
        self.beside = processes.beside()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: Future[Path] | None = None
        if processes.count == 1:  # for good: threads cannot change filters for a while
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")

    def begin(self, state: TrainingState) -> None:
        """
        Copy the state of a run and begin to save it; [`BackgroundSaves.wait`] for the save before comes first.

        Raises:
            OSError: If the disk has no room.
        """
        assert self.under_way is None
        save, tensors = prepare_save(self.processes, self.config, state)
        written = dcp.async_save(
            tensors, storage_writer=dcp.FileSystemWriter(save.partial), process_group=self.beside.group
        )
        self.under_way = self.thread.submit(finish_save, save, self.beside, written.result)

    def failed(self) -> bool:
        """Whether a save came to an end that [`BackgroundSaves.wait`] will raise."""
        return self.under_way is not None and self.under_way.done() and self.under_way.exception() is not None

    def wait(self) -> Path | None:
        """
        Wait for the save that is under way, if there is one; its folder.

        Raises:
            OSError: If the disk had no room, or whatever else went wrong, on any process.
        """
        if self.under_way is None:
            return None
        under_way, self.under_way = self.under_way, None
        return under_way.result()

    def close(self) -> None:
        """Wait for what is under way when something else ended the run: its own end is logged."""
        try:
            self.wait()
        except Exception as error:
            logger.warning("The checkpoint that was under way is not saved: %s", error)
        self.thread.shutdown()
