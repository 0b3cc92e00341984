import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview_pipelines.demo import SpriteSet, load_concepts

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "emoji" / "prepare_data.py"
specification = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
prepare_data = importlib.util.module_from_spec(specification)
specification.loader.exec_module(prepare_data)


def make_package(folder, spec, files):
    """An npm archive as `npm pack` would leave it, so that nothing is fetched."""
    name, _, version = spec.rpartition("@")
    with tarfile.open(folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", "w:gz") as archive:
        for path, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return prepare_data.Package(spec, folder)


def test_the_curated_list_gives_the_shipped_names(tmp_path):
    shipped = load_concepts()
    english = [
        {"label": c.name, "hexcode": c.hexcode.upper(), "emoji": c.emoji, "group": 1}
        for c in reversed(shipped.values())
    ]
    chinese = [{"label": c.noun_zh, "hexcode": c.hexcode.upper()} for c in shipped.values()]
    names = make_package(tmp_path, "names@1.0.0", {"en/data.json": english, "zh/data.json": chinese})
    table = prepare_data.name_concepts(names)
    assert list(table) == list(shipped)
    for hexcode, row in table.items():
        assert {**row, "hidden": None} == {
            **{key: getattr(shipped[hexcode], key) for key in row},
            "hidden": None,
        }


def test_a_hexcode_is_the_same_key_with_and_without_variation_selector():
    assert prepare_data.plain_hexcode("2615-FE0F") == prepare_data.plain_hexcode("2615") == "2615"


def test_svg_follows_aliases_and_an_icon_overrides_the_box_of_its_file(tmp_path):
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"cat": {"body": "<g/>", "height": 33, "left": 1}},
        "aliases": {"kitten": {"parent": "pet"}, "pet": {"parent": "cat"}},
    }
    package = make_package(tmp_path, "@set/one@1.0.0", {"icons.json": icons, "chars.json": {"1F431-FE0F": "kitten"}})
    svg = prepare_data.Artwork(package, package).svg("1f431")
    assert 'width="32" height="33" viewBox="1 0 32 33"><g/></svg>' in svg


def test_rasterised_drawing_is_cropped_centred_and_keeps_its_aspect():
    pytest.importorskip("resvg_py", reason="an optional dependency that only making the data needs")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32" viewBox="0 0 32 32">'
        '<rect x="2" y="3" width="20" height="10" fill="#f00"/></svg>'
    )
    alpha = np.asarray(prepare_data.rasterise(svg, 128))[..., 3]
    painted = alpha > 128
    assert painted.any(0).all()
    rows = np.flatnonzero(painted.any(1))
    assert rows[0] == 32 and rows[-1] == 95


def test_a_sheet_made_of_the_shipped_drawings_is_the_shipped_sheet():
    sprites = SpriteSet()
    drawings = [sprites.get(hexcode, "flat") for hexcode in load_concepts()]
    with Image.open(prepare_data.DATA_FOLDER / "sprites_flat.webp") as image:
        shipped = np.asarray(image.convert("RGBA"))
    made = np.asarray(prepare_data.make_sheet(drawings))
    painted = shipped[..., 3] > 0  # the codec is free to choose the colour of what cannot be seen
    assert np.array_equal(made[..., 3], shipped[..., 3])
    assert np.array_equal(made[painted], shipped[painted])
