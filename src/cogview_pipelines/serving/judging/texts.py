"""What the page for judges says, in both of its languages."""

TEXTS = {
    "title": ("Judging pictures", "图片评价"),
    "hint": (
        "Look at all pictures of this text, then give each its grades, and say which one is the best.",
        "请先看完这段文字的所有图片，再逐一评分，并选出最好的一张。",
    ),
    "hint_ab": ("Which picture is better for this text?", "哪张图片更符合这段文字、质量更好？"),
    "picture": ("Picture", "图片"),
    "clarity": ("Clear", "清晰度"),
    "texture": ("Rich in detail", "细节纹理"),
    "relevance": ("Shows what the text says", "与文字相符"),
    "overall": ("Overall", "总体评分"),
    "best": ("The best one", "最好的一张"),
    "best_ab": ("The better one", "更好的一张"),
    "from_to": ("1 is worst, {most} is best", "1 最差，{most} 最好"),
    "send": ("Save and go on", "保存并继续"),
    "back": ("Back", "上一条"),
    "missing": ("Something is not answered yet:", "还有未回答的问题："),
    "failed": (
        "This was not saved. Your answers are still here: try again.",
        "保存失败。您的回答仍在本页，请重试。",
    ),
    "no_picture": (
        "A picture cannot be shown. Tell whoever sent you the link.",
        "有图片无法显示，请告知发送链接的人。",
    ),
    "done": ("That was all. Thank you! You may close this page.", "已全部完成，谢谢！可以关闭本页。"),
    "progress": ("{done} of {count} answered", "已完成 {done} / {count}"),
}
