"""Settings and fixtures of all tests."""

import pytest
import torch

from .utils import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tiny bilingual tokenizer, trained once for all tests."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state."""
    torch.manual_seed(0)
