"""
Makes the demo data that the package ships: fetches four emoji artwork sets and the Unicode names, and renders the
drawings.

    pip install -e ".[data]"  # resvg-py; npm must be installed too
    python training_scripts/emoji/prepare_data.py  # write src/cogview_pipelines/demo/data again
    python training_scripts/emoji/prepare_data.py --full_size_folder data/sprites  # and drawings for 480 px pictures

Downloads 26 MB once (kept in `--download_folder`) and renders for about a minute on one core. Nothing of the packages
is executed. The versions are pinned: artists redraw between releases, and the scorer's references must be the drawings
that a model was trained on.
"""

import csv
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser

from cogview_pipelines.demo.rendering import FULL_SIZE, FULL_SPRITE_SIZE, SHEET_COLUMNS, resize_rgba
from cogview_pipelines.demo.scenes import BACKGROUNDS, DATA_FOLDER, SHAPE_COLOURS, SHAPES, STYLES
from cogview_pipelines.demo.scorer import hidden_backgrounds

ARTWORK = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
NAMES = "emojibase-data@17.0.0"
SHAPES_ZH = {"circle": ("圆形", "个"), "square": ("正方形", "个"), "heart": ("爱心", "颗")}  # noun and measure word
NAMES_OF_SHAPES = {
    "black square": "black large square",
    "white square": "white large square",
}  # where it is not `colour shape`
SPRITE_SIZE = 144  # pixels; the largest slot of a 240 px picture


@dataclass
class DataConfig:
    output_folder: str = field(
        default=str(DATA_FOLDER),
        metadata={"help": "Where `concepts.json` and the sheets of drawings of 144 px are written."},
    )
    full_size_folder: str | None = field(
        default=None,
        metadata={"help": "Where to write drawings of 288 px too (7 MB), for pictures of more than 240 px."},
    )
    download_folder: str = field(default="data/npm", metadata={"help": "Where the downloaded packages are kept."})
    webp_quality: int = field(
        default=95, metadata={"help": "Quality of the colours in the sheets; transparency is exact."}
    )
    full_size_quality: int = field(default=90, metadata={"help": "The same of the drawings of 288 px."})


class Package:
    """JSON files of an npm package, read from its archive."""

    def __init__(self, spec: str, folder: Path):
        name, _, version = spec.rpartition("@")
        self.archive = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not self.archive.exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    def read(self, name: str):
        with tarfile.open(self.archive) as archive:
            return json.load(archive.extractfile(f"package/{name}"))


class Artwork:
    """The SVG drawings of one artwork set by code points."""

    def __init__(self, package: Package, names: Package):
        self.package, self.names = package, names

    @cached_property
    def icons(self) -> dict:
        return self.package.read("icons.json")

    @cached_property
    def name_of(self) -> dict[str, str]:
        return {plain_hexcode(hexcode): name for hexcode, name in self.names.read("chars.json").items()}

    def svg(self, hexcode: str) -> str:
        name, aliases = self.name_of[hexcode], self.icons.get("aliases", {})
        while name not in self.icons["icons"]:
            name = aliases[name]["parent"]
        icon = {
            "left": 0,
            "top": 0,
            **{k: self.icons[k] for k in ("width", "height") if k in self.icons},
            **self.icons["icons"][name],
        }
        width, height = icon.get("width", 16), icon.get("height", 16)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' width="{width}" height="{height}" viewBox="{icon["left"]} {icon["top"]} {width} {height}">'
            f"{icon['body']}</svg>"
        )


def plain_hexcode(hexcode: str) -> str:
    """The key of an emoji in every source: lower case, without the variation selector."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def curated_rows() -> list[dict[str, str]]:
    """CLDR name, nouns and measure word of each concept; an empty noun stands for the CLDR name."""
    with open(Path(__file__).with_name("concepts.tsv"), encoding="utf-8", newline="") as file:
        rows = [{**row, "shape": ""} for row in csv.DictReader(file, delimiter="\t")]
    for colour in SHAPE_COLOURS:
        for shape in SHAPES:
            noun, (shape_zh, measure) = f"{colour} {shape}", SHAPES_ZH[shape]
            rows.append(
                {
                    "name": NAMES_OF_SHAPES.get(noun, noun),
                    "noun": noun,
                    "noun_zh": BACKGROUNDS[colour].chinese + shape_zh,
                    "measure": measure,
                    "shape": shape,
                }
            )
    return rows


def name_concepts(names: Package) -> dict[str, dict]:
    """The concept table by hexcode, still without the backgrounds on which drawings are hidden."""
    english = {entry["label"]: entry for entry in names.read("en/data.json") if "group" in entry}
    chinese = {entry["hexcode"]: entry for entry in names.read("zh/data.json")}
    concepts = {}
    for row in curated_rows():
        entry = english[row["name"]]
        concepts[plain_hexcode(entry["hexcode"])] = {
            "emoji": entry["emoji"],
            "name": row["name"],
            "noun": row["noun"] or row["name"],
            "noun_zh": row["noun_zh"] or chinese[entry["hexcode"]]["label"],
            "measure": row["measure"],
            "shape": row["shape"],
            "hidden": {},
        }
    return dict(sorted(concepts.items()))


def rasterise(svg: str, size: int = FULL_SIZE) -> Image.Image:
    """
    A square RGBA picture of the drawing, cropped to what is painted (padding would give the style away), centred.
    """
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    scale = size / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.paste(drawing, ((size - width) // 2, (size - height) // 2))
    return square


def make_sheet(drawings: list[Image.Image]) -> Image.Image:
    """Drawings side by side, row by row, in the order of the concepts."""
    rows = -(-len(drawings) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE))
    for index, drawing in enumerate(drawings):
        row, column = divmod(index, SHEET_COLUMNS)
        sheet.paste(resize_rgba(drawing, SPRITE_SIZE), (column * SPRITE_SIZE, row * SPRITE_SIZE))
    return sheet


def main(config: DataConfig) -> None:
    packages = {style: Package(spec, Path(config.download_folder)) for style, spec in ARTWORK.items()}
    concepts = name_concepts(Package(NAMES, Path(config.download_folder)))
    output = Path(config.output_folder)
    output.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        names = packages[
            "flat" if style == "fluent" else style
        ]  # the fluent set has no code points; the flat one uses the same names
        artwork, drawings = Artwork(packages[style], names), []
        for hexcode, concept in tqdm(concepts.items(), desc=style):
            drawing = rasterise(artwork.svg(hexcode))
            drawings.append(drawing)
            hidden = hidden_backgrounds(drawing)
            if hidden:
                concept["hidden"][style] = hidden
            if config.full_size_folder:
                path = Path(config.full_size_folder, style, f"{hexcode}.webp")
                path.parent.mkdir(parents=True, exist_ok=True)
                full = resize_rgba(drawing, FULL_SPRITE_SIZE)
                full.save(path, quality=config.full_size_quality, alpha_quality=100)
        path = output / f"sprites_{style}.webp"
        make_sheet(drawings).save(path, quality=config.webp_quality, alpha_quality=100, method=6)
    table = {"sources": {**ARTWORK, "names": NAMES}, "concepts": concepts}
    (output / "concepts.json").write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*HfArgumentParser(DataConfig).parse_args_into_dataclasses())
