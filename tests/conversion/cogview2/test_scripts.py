"""The two command lines."""

import json
import runpy
from pathlib import Path

import pytest

from ..conftest import NUM_IMAGE_TOKENS

SCRIPTS = Path(__file__).parents[3] / "conversion_scripts"


def script(name):
    return runpy.run_path(str(SCRIPTS / name))["main"]


def test_scripts_convert_there_verify_and_back(release, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    convert = script("convert_cogview2.py")
    argv = [word for name, path in release.items() for word in (f"--{name}", str(path))]
    assert convert([*argv, "--num_image_tokens", str(NUM_IMAGE_TOKENS), "--output", str(out)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["output"] == str(out) and report["peak_memory_gib"] > 0
    assert (out / "model_index.json").is_file()
    assert convert(["--verify", str(out)]) == 0
    (out / "transformer" / "config.json").write_text("{}")
    assert convert(["--verify", str(out)]) == 1
    assert "WRONG: config.json" in capsys.readouterr().out
    # 512 image codes are not the release's 20,000, on which the original code relies
    assert script("convert_cogview2_to_sat.py")(["--pipeline", str(out), "--output", str(back)]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_refused_file_is_an_error_without_a_traceback(tmp_path, capsys):
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    assert (
        script("convert_cogview2.py")(["--coglm", str(tmp_path / "bad.zip"), "--output", str(tmp_path / "out")]) == 1
    )
    assert "cut off" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--output", "x", "--verify", "x"]])
def test_wrong_arguments_are_refused(argv):
    with pytest.raises(SystemExit):
        script("convert_cogview2.py")(argv)
