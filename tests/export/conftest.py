"""A tiny pipeline, and its export."""

import pytest

pytest.importorskip("onnx", reason="needs the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")

from cogview_pipelines.export.onnx_folder import export_onnx  # noqa: E402
from cogview_pipelines.export.onnx_pictures import OnnxPictures  # noqa: E402

from ..pipelines.conftest import build  # noqa: E402


def one_thread():
    """Options of sessions that leave the other cores alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


@pytest.fixture(scope="session")
def pipe(tokenizer):
    """All three stages, of which direct super-resolution borrows its backbone; one style is guided."""
    pipe = build(tokenizer, shares_backbone=True)
    pipe.register_to_config(styles={**pipe.config.styles, "guided": {"guidance_scale": 2.0, "temperature": 0.9}})
    return pipe


@pytest.fixture(scope="session")
def folder(pipe, tmp_path_factory):
    """An export of `pipe` whose weights are those of `pipe`."""
    folder = tmp_path_factory.mktemp("export") / "model"
    export_onnx(pipe, folder, "float32")
    return folder


@pytest.fixture(scope="session")
def pictures(folder):
    return OnnxPictures(folder, one_thread())
