"""Everything that can go wrong on the page is said in the language of its reader."""

import re

import pytest
from PIL import Image

from cogview_pipelines.pictures.files import open_picture
from cogview_pipelines.serving import schemas
from cogview_pipelines.serving.errors import ApiError, internal_error
from cogview_pipelines.serving.forms import bad_request
from cogview_pipelines.serving.page_errors import NAMES, explain
from cogview_pipelines.serving.page_texts import TEXTS
from cogview_pipelines.serving.settings import ServerSettings
from cogview_pipelines.serving.studio import Studio
from cogview_pipelines.serving.worker import Worker

from .conftest import PROMPT, half_mask, picture, png

GENERATIONS = [
    ({}, "不能为空"),
    ({"prompt": " "}, "不能为空"),
    ({"prompt": "\u200b"}, "不能为空"),
    ({"prompt": "a\0b"}, "无法使用的字符"),
    ({"prompt": "x" * 1001}, "最多 1000 个字符，但现在有 1001 个"),
    ({"prompt": "tiger " * 100}, "词元"),
    ({"prompt": PROMPT, "n": 9}, "最多为 8，但现在是 9"),
    ({"prompt": PROMPT, "n": "0"}, "至少为 1"),
    ({"prompt": PROMPT, "n": "two"}, "应为整数"),
    ({"prompt": PROMPT, "seed": "-2"}, "至少为 -1"),
    ({"prompt": PROMPT, "seed": "a"}, "应为整数"),
    ({"prompt": PROMPT, "temperature": "0"}, "至少为 0.000001。"),
    ({"prompt": PROMPT, "temperature": "1e9"}, "最多为 1000000"),
    ({"prompt": PROMPT, "temperature": "hot"}, "应为数字"),
    ({"prompt": PROMPT, "guidance_scale": "nan"}, "「引导强度」"),
    ({"prompt": PROMPT, "negative_prompt": "a car"}, "引导强度大于 1"),
    ({"prompt": PROMPT, "num_candidates": 17}, "最多为 16，但现在是 17"),
    ({"prompt": PROMPT, "n": 4, "num_candidates": 2}, "至少为 4，但现在是 2"),
    ({"prompt": PROMPT, "style": "oil"}, "「风格」"),
    ({"prompt": PROMPT, "size": "1x1"}, "「尺寸」"),
    ({"prompt": PROMPT, "num_lopar_steps": "1000"}, "「细化次数」"),
]


@pytest.fixture(scope="module")
def studio(pipe):
    return Studio(pipe, "tiny", ServerSettings())


def assert_chinese(error, part=""):
    """A message with Chinese words and no English ones, that has this part."""
    message = explain(error, "zh")
    assert part in message and re.search("[\u4e00-\u9fff]", message), (error.message, message)
    assert not re.search(r"[A-Za-z]{3,}", re.sub("PNG|JPEG|WebP|GIF|BMP", "", message)), message
    assert explain(error, "en") == error.message


@pytest.mark.parametrize(("fields", "part"), GENERATIONS, ids=str)
def test_a_bad_field(studio, fields, part):
    with pytest.raises(ApiError) as error:
        studio.check_generation(schemas.parse(schemas.GenerationRequest, fields, strict=False))
    assert_chinese(error.value, part)


@pytest.mark.parametrize(
    ("mask", "part"),
    [
        (half_mask(60, 64), "64 x 64"),
        (Image.new("L", (64, 64)), "没有标出"),
        (Image.new("L", (64, 64), 255), "整张图片"),
    ],
    ids=["size", "nothing", "all"],
)
def test_a_bad_mask(studio, mask, part):
    with pytest.raises(ApiError) as error:
        studio.check_edit(schemas.EditRequest(prompt=PROMPT), picture(), mask)
    assert_chinese(error.value, part)


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"text", "无法读取"), (png(picture())[:-60], "已损坏"), (png(Image.new("1", (3000, 3000))), "3000 x 3000")],
    ids=["no picture", "cut off", "large"],
)
def test_a_bad_file(content, part):
    with pytest.raises(ValueError) as error:
        open_picture(content, 4_200_000)
    assert_chinese(bad_request(f"`image` {error.value}", "image", "invalid_image"), part)


def test_a_large_picture_to_enlarge(studio):
    with pytest.raises(ApiError) as error:
        studio.check_upscale(schemas.UpscaleRequest(), picture(2000, 2000))
    assert_chinese(error.value, "放大后最多 4,000,000 像素")


def test_a_full_queue_and_a_failure(studio):
    worker = Worker(0, 600, studio_metrics())
    with pytest.raises(ApiError) as error, worker.place():
        pass
    assert_chinese(error.value, "队列已满")
    assert_chinese(internal_error(), "服务器出错")
    assert_chinese(ApiError(503, "There is not enough memory for this.", "out_of_memory"), "内存不足")
    assert_chinese(ApiError(418, "Something new, of which nobody has thought.", "new"), "无法使用")


def studio_metrics():
    from cogview_pipelines.serving.metrics import Metrics

    return Metrics()


def test_every_field_of_the_page_has_a_name_there():
    assert set(NAMES.values()) <= set(TEXTS)
