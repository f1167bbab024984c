"""The files that the two pages are built from.

`REPORT` and `EXPLORER` list them, in the order in which a browser must see them. Both pages share
the files in shared/assets/ and add their own. The report contains them (`inline`), because it is a
single file; the explorer links to them (`linked`) and serves them by name (`served`).
"""

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

_SHARED_STYLES = ("shared/base.css", "shared/card.css")
_SHARED_SCRIPTS = ("shared/dom.js", "shared/text.js", "shared/charts.js", "shared/card.js")
_PLACE = re.compile(r"<!--([A-Z]+)-->")


@dataclass(frozen=True)
class Page:
    """The files of one page, each named as FOLDER/NAME for web/FOLDER/assets/NAME.

    Attributes:
        template: HTML in which comments such as ``<!--STYLES-->`` mark what `fill` replaces.
        styles: style sheets; later ones override earlier ones.
        scripts: scripts; while it loads, each may use only what the earlier ones define.
    """

    template: str
    styles: tuple[str, ...]
    scripts: tuple[str, ...]


REPORT = Page(
    "report/report.html",
    (*_SHARED_STYLES, "report/report.css"),
    (
        *_SHARED_SCRIPTS,
        *(f"report/{name}.js" for name in ("data", "search", "list", "claims", "plots", "main")),
    ),
)
EXPLORER = Page(
    "explorer/explorer.html",
    (*_SHARED_STYLES, "explorer/explorer.css"),
    (*_SHARED_SCRIPTS, *(f"explorer/{name}.js" for name in ("server", "steering", "main"))),
)


def read_asset(path: str) -> str:
    """Returns the text of FOLDER/NAME."""
    folder, name = path.split("/")
    return files("topk_megatron.web").joinpath(folder, "assets", name).read_text(encoding="utf-8")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Replaces each ``<!--NAME-->`` by its part. The parts themselves are not searched."""
    return _PLACE.sub(lambda found: parts[found[1]], template)


def inline(page: Page) -> tuple[str, str]:
    """Returns the page's style sheets as one, and its scripts as one that defines no globals."""
    style, script = ("\n".join(map(read_asset, paths)) for paths in (page.styles, page.scripts))
    return style, f"(() => {{\n'use strict';\n{script}\n}})();"


def linked(page: Page, address: str) -> str:
    """Returns the page's HTML with links to its files, which are served below `address`."""
    names = [f"{address}/{html.escape(_name(path))}" for path in (*page.styles, *page.scripts)]
    links = {
        "STYLES": [f'<link rel="stylesheet" href="{n}">' for n in names if n.endswith(".css")],
        "SCRIPTS": [f'<script defer src="{n}"></script>' for n in names if n.endswith(".js")],
    }
    return fill(read_asset(page.template), {key: "\n".join(tags) for key, tags in links.items()})


def served(page: Page) -> dict[str, str]:
    """Returns the page's style sheets and scripts by file name."""
    paths = (*page.styles, *page.scripts)
    found = {_name(path): read_asset(path) for path in paths}
    assert len(found) == len(paths), "two files of a page have the same name"
    return found


def policy_hash(script: str) -> str:
    """Returns the source expression by which a content security policy allows this script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1]
