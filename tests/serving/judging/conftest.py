"""Pictures of three models, of one colour each, whose files tell who made them."""

import contextlib

import pytest
from PIL import Image

from cogview_pipelines.evaluation.captioned import Captioned
from cogview_pipelines.pictures.png import save_png
from cogview_pipelines.serving.judging.answers import Answers
from cogview_pipelines.serving.judging.app import create_judging_app
from cogview_pipelines.serving.judging.study import make_study
from cogview_pipelines.serving.settings import ServerSettings

from ..conftest import Serving

MODELS = ("secret_alpha", "secret_beta", "secret_gamma")
NUM = 4


def colour(model, caption):
    """Of the picture of a model for a caption."""
    return (60 * model + 30, 40 * caption + 20, 200)


def grades(overall, others=3):
    """Of one picture."""
    return {"clarity": others, "texture": others, "relevance": others, "overall": overall}


@pytest.fixture
def rows():
    return [Captioned(f"id{number}", f"caption {number}") for number in range(NUM)]


@pytest.fixture
def folders(tmp_path, rows):
    made = [tmp_path / name for name in MODELS]
    for model, folder in enumerate(made):
        folder.mkdir()
        for number, row in enumerate(rows):
            image = Image.new("RGB", (32 + 8 * model, 32), colour(model, number))
            save_png(image, folder / f"{row.id}.png", {"model": MODELS[model]})
    return made


@pytest.fixture
def study(rows, folders):
    return make_study(rows, folders)[0]


@pytest.fixture
def pairs(rows, folders):
    return make_study(rows, folders[:2], is_pair=True)[0]


@pytest.fixture
def serve_judges(tmp_path):
    """Start servers; each comes with the tokens of its judges."""
    with contextlib.ExitStack() as stack:

        def start(study, judges=1, name="answers.sqlite"):
            settings = ServerSettings(port=0, shutdown_timeout=2, max_body_bytes=2**16)
            answers = Answers(tmp_path / name, study)
            tokens = list(answers.add_judges(judges).values())
            serving = Serving(create_judging_app(study, answers, settings), settings)
            serving.start()
            stack.callback(serving.stop)
            serving.tokens, serving.answers = tokens, answers
            return serving

        yield start
