"""What the page says, in both of its languages."""

LANGUAGES = {"English": "en", "中文": "zh"}

TEXTS = {
    "title": ("CogView2: pictures from text", "CogView2：文字生成图片"),
    "interface_language": ("Language of this page", "页面语言"),
    "tab_create": ("Create", "生成"),
    "tab_edit": ("Edit", "修改"),
    "tab_upscale": ("Enlarge", "放大"),
    "tab_caption": ("Describe", "描述"),
    "tab_score": ("Rank texts", "文字排序"),
    "prompt": ("What the picture shows, in English or Chinese", "图片内容（中文或英文）"),
    "edit_prompt": ("What the finished picture shows", "修改后的图片内容"),
    "upscale_prompt": ("What the picture shows (may be empty)", "图片内容（可不填）"),
    "negative_prompt": ("What to lead away from (with guidance above 1)", "不想要的内容（引导强度大于 1 时）"),
    "n": ("Pictures", "图片数量"),
    "candidates": ("Candidates: draft so many, keep the best", "候选数量：先画草图，再选最好的"),
    "seed": ("Seed (empty: by chance)", "随机种子（不填则随机）"),
    "size": ("Size", "尺寸"),
    "style": ("Style", "风格"),
    "settings": ("Settings", "设置"),
    "temperature": ("Temperature of the draft (lower is more regular)", "草图温度（越低越规整）"),
    "guidance": ("Guidance (1 is none)", "引导强度（1 表示不引导）"),
    "steps": ("Passes of refinement", "细化次数"),
    "levels": ("How many times", "放大次数"),
    "caption_language": ("Language of the captions", "描述语言"),
    "strategy": ("How to choose", "选择方式"),
    "greedy": ("most likely words", "最可能的词"),
    "sample": ("drawn, three of them", "抽取三个"),
    "best_of": ("best of several", "多个中选最好"),
    "texts": ("Texts, one a line", "文字，每行一条"),
    "make": ("Create", "生成"),
    "paint": ("Paint", "修改"),
    "enlarge": ("Enlarge", "放大"),
    "describe": ("Describe", "描述"),
    "rank": ("Rank", "排序"),
    "stop": ("Stop", "停止"),
    "default": ("default", "默认"),
    # what is made by the page itself, not by Gradio
    "picture": ("Picture", "图片"),
    "choose_file": ("Choose a picture", "选择图片"),
    "mask": ("Mask", "蒙版"),
    "paint_here": ("Paint over what is to change", "涂抹要修改的部分"),
    "brush_size": ("Brush size", "画笔大小"),
    "eraser": ("Eraser", "橡皮"),
    "clear": ("Clear", "清除"),
    "invert": ("Invert", "反选"),
    "mask_file": ("Or choose a mask file, white where to paint", "或选择蒙版文件（白色为要修改的部分）"),
    "unreadable": ("This file cannot be shown as a picture.", "无法将此文件显示为图片。"),
    "too_large": ("The picture was reduced, because it is too large.", "图片过大，已缩小。"),
    "gallery": ("Pictures of this visit", "本次生成的图片"),
    "gallery_hint": ("They are kept in this tab of the browser only.", "仅保存在当前浏览器标签页中。"),
    # answers
    "waiting": ("Waiting in the queue", "排队中"),
    "transformer": ("Drawing the draft: row {step}", "正在画草图：第 {step} 行"),
    "direct_sr_transformer": ("Enlarging", "正在放大"),
    "iterative_sr_transformer": ("Refining: pass {step}", "正在细化：第 {step} 次"),
    "super_resolution_transformer": ("Larger picture: token {step}", "放大：第 {step} 个符号"),
    "working": ("Working", "处理中"),
    "stopped": ("Stopped.", "已停止。"),
    "error": ("This did not work:", "出错了："),
    "unknown_rest": (
        "The model does not know this part of the text, and goes by the rest: {parts}",
        "模型不认识这部分文字，已按其余文字生成：{parts}",
    ),
    "unknown_nothing": ("The model knows nothing of the text: {parts}", "模型完全不认识这些文字：{parts}"),
    "unknown_score": (
        "The model does not know this part of the text, so its share in the loss says little: {parts}",
        "模型不认识这部分文字，它在描述损失中的部分没有多少意义：{parts}",
    ),
    "seed_of": ("seed {seed}", "种子 {seed}"),
    "score_of": ("score {score}", "得分 {score}"),
    "download": ("Save", "保存"),
    "to_edit": ("Edit", "修改"),
    "to_upscale": ("Enlarge", "放大"),
    "to_caption": ("Describe", "描述"),
    "to_score": ("Rank texts", "文字排序"),
    "text": ("Text", "文字"),
    "loss": ("Caption loss (lower fits better)", "描述损失（越低越符合）"),
    "caption": ("Caption", "描述"),
    "caption_score": ("Score (higher is better)", "得分（越高越好）"),
}


def text(key: str, language: str, **values: object) -> str:
    """A text of the page in `"en"` or `"zh"`."""
    return TEXTS[key][0 if language == "en" else 1].format(**values)


def preferred_language(accepted: str) -> str:
    """The language of the header `Accept-Language`, by its first entry."""
    return "zh" if accepted.strip().lower().startswith("zh") else "en"
