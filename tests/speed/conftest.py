"""The tiny pipelines of the tests of the pipelines."""

from ..pipelines.conftest import pipe

__all__ = ["pipe"]
