"""What an installed wheel holds: setuptools takes only the folders that pyproject.toml lists."""

from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "nemo_minitron").rglob("__init__.py")}
    assert sorted(listed) == sorted(found | {"nemo_minitron.recipes"})
