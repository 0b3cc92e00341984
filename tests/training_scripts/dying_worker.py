"""
A training script in a process that torchrun started; in its first life the last process is killed in a step.

    torchrun ... -m tests.training_scripts.dying_worker train_coglm STEP ARGUMENTS...

A step of -1 kills nobody.
"""

import os
import signal
import sys

from .launching import load_script


def main(name: str, step: int, arguments: list[str]) -> None:
    script = load_script(name)
    make_batch = script.make_batch
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def make(*rest):
        if is_last and rest[-1].step == step and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return make_batch(*rest)

    script.make_batch = make
    if script.main(arguments) is None:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
