"""The documentation as a site: every link holds, and every page is in the navigation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_strictly(tmp_path):
    """A hook makes README.md the first page, and mends the links that leave docs/."""
    pytest.importorskip("material", reason="mkdocs-material is not installed here (pip install '.[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    plain = os.environ | {"NO_COLOR": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'not included in the "nav"' not in done.stderr
    pages = {page.stem for page in (tmp_path / "site").glob("*.html")}
    assert pages >= {"index", "docker", "contributing", *(page.stem for page in (ROOT / "docs").glob("*.md"))}
    home = (tmp_path / "site" / "index.html").read_text()
    assert 'href="first-run.html"' in home
    assert "benchmarks/results/demo_perplexity.svg" in home
    assert (tmp_path / "site" / "benchmarks" / "results" / "demo_perplexity.svg").is_file()
