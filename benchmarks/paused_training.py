#!/usr/bin/env python
"""
A training run that waits after every update of the weights: what `bench_training.py --against` starts, with the
package and the script of a checkout, old or new.

    python benchmarks/paused_training.py SCRIPT ARGUMENT ...

After each update it prints what the step took, a line of JSON (`null` for the first), and goes on when a line comes
in; at the end of the input it ends.
"""

import json
import os
import runpy
import sys
import time

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the script says
    begun: list[float] = []

    def pause(optimizer: torch.optim.Optimizer, *_) -> None:
        if not isinstance(optimizer, torch.optim.AdamW):  # with Muon, each step has both
            return
        now = [time.process_time(), time.perf_counter()]
        taken = [after - before for before, after in zip(begun, now)]
        answers.write(json.dumps(dict(zip(("cpu_seconds", "seconds"), taken)) or None) + "\n")
        answers.flush()
        if not sys.stdin.readline():
            os._exit(0)
        begun[:] = [time.process_time(), time.perf_counter()]

    register_optimizer_step_post_hook(pause)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
