"""
Would the tests notice an error? Makes deliberate small errors, one at a time, and expects each to be caught.

    python tests/mutations/run_mutations.py                # all of them; one line for each, then a JSON line
    python tests/mutations/run_mutations.py --only window  # those whose description or file has the word
    python tests/mutations/run_mutations.py --sample 12    # some of every folder; others after the code has changed

The errors are listed by folder of the package in the files next to this one, each with the test that must notice it.
An error that survives is a missing test.

Every error is made in a temporary copy of the package; the checkout stays as it is. Each trial is a fork of a process
that has imported torch already (so this does not run on Windows) and ends at the first test that fails. The copy has
no compiled kernels: their errors are not lines of Python, and tests of their own compare them with the reference.
"""

import argparse
import ast
import compileall
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files have the names of many packages

from tests import mutations  # noqa: E402
from tests.child_processes import give_progress_bars_a_lock  # noqa: E402
from tests.mutations.mutation import Mutation  # noqa: E402

PACKAGE = ROOT / "src" / "cogview_pipelines"
PRELOADED = (
    "accelerate",
    "diffusers.loaders",
    "numpy",
    "PIL.Image",
    "pytest",
    "safetensors.torch",
    "sentencepiece",
    "torch.distributed.checkpoint",
    "torch.utils.data",
    "tqdm",
    "transformers.modeling_utils",
    "typer.testing",
)
PRELOADED_FOR_SERVING = ("fastapi", "gradio", "httpx", "prometheus_client", "uvicorn")


def all_mutations() -> list[Mutation]:
    """Those of all lists in this folder."""
    names = sorted(module.name for module in pkgutil.iter_modules(mutations.__path__))
    lists = [importlib.import_module(f"tests.mutations.{name}") for name in names if not name.startswith("test_")]
    return [mutation for module in lists for mutation in getattr(module, "MUTATIONS", ())]


def problems(listed: Iterable[Mutation]) -> list[str]:
    """
    What is wrong with the lists themselves: every mutation must have exactly one place, make Python and name a test. A
    source line that was rewritten needs its mutation rewritten.
    """
    found, seen = [], set()
    for mutation in listed:
        path, (test, _, function) = PACKAGE / mutation.file, mutation.test.partition("::")
        source = path.read_text("utf-8") if path.is_file() else ""
        if mutation.what in seen:
            found.append(f"{mutation.what}: stands in the lists twice")
        seen.add(mutation.what)
        if source.count(mutation.old) != 1:
            found.append(f"{mutation.what}: {mutation.old!r} stands {source.count(mutation.old)} times in {path}")
            continue
        try:
            ast.parse(source.replace(mutation.old, mutation.new))
        except SyntaxError as error:
            found.append(f"{mutation.what}: makes no Python ({error})")
        test = ROOT / "tests" / test
        if not test.is_file() or f"def {function}" not in test.read_text("utf-8"):
            found.append(f"{mutation.what}: there is no test {mutation.test}")
    return found


def sample(listed: Sequence[Mutation], count: int) -> list[Mutation]:
    """
    `count` mutations, evenly from all folders of the package: the same ones for the same code, others after a change.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    key = digest.hexdigest()
    folders: dict[str, list[Mutation]] = {}
    for mutation in sorted(listed, key=lambda one: hashlib.sha256((key + one.what).encode()).digest()):
        folders.setdefault(mutation.file.partition("/")[0], []).append(mutation)
    rounds = max(map(len, folders.values()))
    by_turns = [own[index] for index in range(rounds) for own in folders.values() if index < len(own)]
    return by_turns[:count]


def preload(listed: Iterable[Mutation]) -> None:
    """Import what is slow and not under test, once: every trial is a fork of this process."""
    serves = any(mutation.test.startswith("serving/") for mutation in listed)
    for name in (*PRELOADED, *(PRELOADED_FOR_SERVING if serves else ())):
        importlib.import_module(name)
    from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin  # noqa: F401 - resolves lazy modules
    from transformers import PreTrainedModel, PreTrainedTokenizer  # noqa: F401


class Failures:
    """A pytest plugin that remembers which tests noticed."""

    def __init__(self):
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid)


def run_tests(source: Path, tests: Sequence[str], stop_at_first: bool) -> tuple[int, list[str]]:
    """pytest's exit status on the package in `source`, and the tests that failed."""
    import pytest

    sys.path.insert(0, str(source))
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(source), PYTHONDONTWRITEBYTECODE="1")  # for programs that tests start
    assert not any(name.split(".")[0] == PACKAGE.name for name in sys.modules), "the package is loaded already"
    failures = Failures()
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *(["-x"] if stop_at_first else [])]
    status = pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)], plugins=[failures])
    package = sys.modules.get(PACKAGE.name)
    assert package is None or Path(package.__file__).is_relative_to(source), "another copy of the package was tested"
    return int(status), failures.names


class Trial:
    """A process that runs tests on a copy of the package, with an error in it or none."""

    def __init__(self, package: Path, mutation: Mutation | None, tests: Sequence[str]):
        self.mutation, self._folder = mutation, tempfile.TemporaryDirectory(prefix="mutation-")
        source = Path(self._folder.name)
        shutil.copytree(package, source / PACKAGE.name, copy_function=os.link)
        if mutation is not None:
            path = source / PACKAGE.name / mutation.file
            text = path.read_text("utf-8").replace(mutation.old, mutation.new)
            path.unlink()  # the other name of the file stays as it is
            path.write_text(text, "utf-8")
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            try:
                give_progress_bars_a_lock()
                log = os.open(source / "log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                result = run_tests(source, tests, stop_at_first=mutation is not None)
                (source / "result.json").write_text(json.dumps(result))
            finally:
                os._exit(0)

    def result(self) -> tuple[int, list[str]]:
        """Once the process has ended: as of [`run_tests`]. Ends the program if the tests could not be run at all."""
        source = Path(self._folder.name)
        try:
            status, failed = json.loads((source / "result.json").read_text())
        except OSError:
            status, failed = -1, []
        if status not in (0, 1):  # passed, or failed
            what = "without any error" if self.mutation is None else self.mutation.what
            sys.exit(f"A trial gave no result ({what}):\n{(source / 'log').read_text()[-3000:]}")
        self._folder.cleanup()
        return status, failed


def run_trials(package: Path, listed: Sequence[Mutation], jobs: int) -> Iterable[tuple[Mutation, str]]:
    """Every mutation with the name of the test that noticed, or with `""`."""
    waiting, running = list(listed), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutation = waiting.pop(0)
            trial = Trial(package, mutation, [mutation.test])
            running[trial.process] = trial
        process, _ = os.wait()
        trial = running.pop(process)
        status, failed = trial.result()
        yield trial.mutation, failed[0].split("::")[-1] if status else ""


def run_without_errors(package: Path, listed: Sequence[Mutation]) -> None:
    """Ends the program unless all named tests pass on the package as it is."""
    trial = Trial(package, None, sorted({mutation.test for mutation in listed}))
    os.waitpid(trial.process, 0)
    _, failed = trial.result()
    if failed:
        sys.exit("These tests fail without any error:\n  " + "\n  ".join(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Only errors whose description or file has this word.")
    parser.add_argument("--sample", type=int, help="Only so many, from all folders.")
    parser.add_argument("--jobs", type=int, default=1, help="Trials at a time (default: 1).")
    parser.add_argument(
        "--trust", action="store_true", help="Do not run the tests without any error first: they have passed already."
    )
    parser.add_argument("--list", action="store_true", help="Name the errors and stop.")
    args = parser.parse_args()
    listed = all_mutations()
    if wrong := problems(listed):
        sys.exit("The lists of mutations are not in order:\n  " + "\n  ".join(wrong))
    chosen = [mutation for mutation in listed if args.only in mutation.what or args.only in mutation.file]
    if args.sample is not None:
        chosen = sample(chosen, args.sample)
    if args.list:
        print("\n".join(f"{mutation.file}: {mutation.what}" for mutation in chosen))
        return 0
    start = time.monotonic()
    preload(chosen)
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        package = Path(folder) / PACKAGE.name  # as it is now, whoever edits it meanwhile
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        compileall.compile_dir(package, quiet=2)  # once, for all trials
        if not args.trust:
            run_without_errors(package, chosen)
        for mutation, caught_by in run_trials(package, chosen, args.jobs):
            survivors += not caught_by
            print(
                f"caught    {mutation.what}  ({caught_by})" if caught_by else f"SURVIVED  {mutation.what}", flush=True
            )
    seconds = round(time.monotonic() - start)
    print(json.dumps({"mutations": len(chosen), "caught": len(chosen) - survivors, "seconds": seconds}))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
