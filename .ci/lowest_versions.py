"""Prints constraints for pip that pin everything to the lowest version that pyproject.toml allows, in any Python."""

import re
from pathlib import Path

text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
sections = text.partition("\n[project]\n")[2].partition("\n[project.scripts]\n")[0]
for name, version in dict.fromkeys(re.findall(r'"([\w.-]+)>=([\d.]+)', sections)):
    print(f"{name}=={version}")
