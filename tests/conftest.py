"""
Settings and fixtures of all tests.

`pytest -n` reads this in a process that runs no test, too: torch, and what takes it, is imported where it is needed.
"""

import importlib.util
import os
from pathlib import Path

import pytest

from cogview_pipelines.environment import num_cores

from .hub.running import run_hub

MOST_WORKERS = 8  # each holds torch and tiny models, a gigabyte and more

# The workers of `pytest -n` share the cores, and programs that they start do, instead of taking all of them each. It
# counts for this process, too, since torch is not imported yet.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, (num_cores() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`pytest -n auto`: a worker for every core that this process may use; xdist counts all of the machine."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else min(num_cores() or 1, MOST_WORKERS)


def pytest_addoption(parser):
    parser.addoption(
        "--parity-fixtures",
        metavar="DIR",
        help="Numbers of the original code for tests/parity/cogview2 (default: tests/parity/cogview2/fixtures). "
        "`pytest tests/parity/cogview2 --fixtures DIR` does the same.",
    )
    parser.addoption(
        "--cogview_fixtures",
        metavar="DIR",
        help="Numbers of the original CogView for tests/parity/cogview (default: tests/parity/cogview/fixtures).",
    )
    parser.addoption(
        "--device",
        default="cpu",
        help="Where tests/parity runs the models, such as cuda (default: cpu). Float32 is never rounded to TF32.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`--fixtures DIR` of the parity tests: pytest's own flag of this name lists fixtures, and DIR is a path to it."""
    if config.option.showfixtures:
        folders = [arg for arg in config.args if (Path(arg) / "MANIFEST.json").is_file()]
        if folders:
            config.option.showfixtures = False
            config.option.parity_fixtures = str(Path(folders[0]).resolve())
            config.args[:] = [arg for arg in config.args if arg != folders[0]]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tiny bilingual tokenizer, trained once for all tests."""
    from .utils import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A stand-in for the Hub on loopback, and a way to run processes that know no other: `tests/hub/running.py`."""
    with run_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; a test of another module has another."""
    from benchmarks import evaluate_browser

    from .utils import skip_or_fail

    if importlib.util.find_spec("playwright") is None:
        skip_or_fail("the tests of pages need playwright: it is in the extra `test`")
    if evaluate_browser.CHROMIUM is None:
        skip_or_fail("the tests of pages need Chromium, such as the Debian package `chromium`")
    with evaluate_browser.chromium() as browser:
        yield browser


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clip():
    """A random CLIP of one layer, with a tokenizer of letters."""
    from .utils import make_clip

    return make_clip()
