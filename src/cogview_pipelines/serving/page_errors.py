"""What the server says to people who read the page in Chinese: its messages are English, as the API's are."""

import re

from .errors import ApiError
from .page_texts import TEXTS

# Fields as the page calls them
NAMES = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "n": "n",
    "num_candidates": "candidates",
    "seed": "seed",
    "size": "size",
    "style": "style",
    "temperature": "temperature",
    "guidance_scale": "guidance",
    "num_lopar_steps": "steps",
    "num_levels": "levels",
    "image": "picture",
    "mask": "mask",
    "language": "caption_language",
    "strategy": "strategy",
}
NUMBER = r"(-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)"
# What the pipelines, the forms and pydantic say, from the most special on
MESSAGES = [
    (r"The queue is full: (\d+) requests .* Try again in (\d+) s", "队列已满（{0} 个请求），请在 {1} 秒后重试。"),
    (rf"The work was not done {NUMBER} s after", "任务在 {0} 秒内未完成，请减少数量。"),
    (r"has no super-resolution", "此模型不支持放大。"),
    (r"is no picture that can be read", "无法读取该文件，请使用 PNG、JPEG、WebP、GIF 或 BMP 图片。"),
    (rf"has more than {NUMBER} pixels", "图片超过 {0} 像素，请缩小。"),
    (rf"may have {NUMBER} pixels, but has (\d+) x (\d+)", "图片最多 {0} 像素，但现在是 {1} x {2}，请缩小。"),
    (rf"may have {NUMBER} pixels, with what .* would have {NUMBER}", "放大后最多 {0} 像素，但会有 {1}，请缩小图片。"),
    (r"is an animation of (\d+) frames", "这是 {0} 帧的动画，请使用单张图片。"),
    (r"is damaged", "文件已损坏，无法解码。"),
    (r"must be given: choose a picture", "请先选择图片。"),
    (r"must be given", "不能为空。"),
    (rf"may have {NUMBER} characters, but has (\d+)", "最多 {0} 个字符，但现在有 {1} 个，请缩短。"),
    (rf"may have {NUMBER} tokens.* has (\d+)", "太长：模型最多读 {0} 个词元，但现在有 {1} 个，请缩短。"),
    (r"no effect without `guidance_scale`", "只有引导强度大于 1 时才有效。"),
    (r"has no visible character|must not be empty", "不能为空，请说明图片内容。"),
    (r"marks nothing to paint", "没有标出要修改的部分，请先涂抹。"),
    (r"marks the whole picture", "蒙版覆盖了整张图片，请留下一部分。"),
    (r"every token is masked", "蒙版几乎覆盖了整张图片，请缩小。"),
    (
        r"as large as its picture.* \((\d+) x (\d+) pixels\), but is (\d+) x (\d+)",
        "应与图片一样大（{1} x {0}），但现在是 {3} x {2}。",
    ),
    (rf"may be {NUMBER} on this server, but is {NUMBER}", "最多为 {0}，但现在是 {1}。"),
    (rf"must be at least .*\({NUMBER}\).* but is {NUMBER}", "至少为 {0}，但现在是 {1}。"),
    (rf"greater than or equal to {NUMBER}|at least {NUMBER}", "至少为 {0}。"),
    (rf"less than or equal to {NUMBER}|at most {NUMBER}", "最多为 {0}。"),
    (r"valid integer|whole number", "应为整数。"),
    (r"valid number", "应为数字。"),
    (r"without the character NUL", "含有无法使用的字符。"),
]
CODES = {
    "stopping": "服务器正在停止，请稍后重试。",
    "queue_full": "队列已满，请稍后重试。",
    "timeout": "任务超时，请减少数量。",
    "out_of_memory": "内存不足，请减少图片数量或尺寸。",
    "failed": "服务器出错。管理员可以在日志中查看详情。",
    "unsupported": "此模型不支持该操作。",
    "prompt_too_long": "太长，请缩短。",
    "missing_parameter": "不能为空。",
    "invalid_image": "无法读取该图片。",
}
_MESSAGES = [(re.compile(pattern, re.DOTALL), words) for pattern, words in MESSAGES]


def explain(error: ApiError, language: str) -> str:
    """
    What an error says, in the language of the page.

    Args:
        error ([`ApiError`]): Of the API.
        language (`str`): `"en"` or `"zh"`.
    """
    if language == "en":
        return error.message
    words = CODES.get(error.code, "这个值无法使用，请修改。")
    for pattern, translation in _MESSAGES:
        if found := pattern.search(error.message):
            words = translation.format(*(group for group in found.groups() if group is not None))
            break
    if error.param not in NAMES:
        return words
    return f"「{TEXTS[NAMES[error.param]][1].partition('（')[0].partition('：')[0]}」{words}"
