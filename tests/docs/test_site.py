"""The documentation site builds without warnings, and its pages need no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.forks import REPOSITORY

pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="the site is built with mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return directory


def test_every_page_is_there(site: Path) -> None:
    for page in (REPOSITORY / "docs").rglob("*.md"):
        built = (site / page.relative_to(REPOSITORY / "docs")).with_suffix(".html")
        assert built.exists(), built


def test_reference_holds_the_docstrings(site: Path) -> None:
    page = (site / "reference" / "operator.html").read_text()
    assert "topk_mask" in page
    assert "TopKArgumentError" in page


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)[^>]*>", page.read_text()):
            source = re.search(r"(?:src|href)=\"?(https?://[^\s\">]+)", tag)
            assert source is None or 'rel="canonical"' in tag, (page.name, tag)
