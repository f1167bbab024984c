"""One HTML file: a template, scripts, styles, and data as compressed blocks.

Data lie in ``<script type="text/plain" id=…>`` elements as base64 of gzip, so that nothing in them
can be markup, and are unpacked by the browser when first used. A content security policy lets only
our own scripts run, by their hashes, and nothing be loaded.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from topk_megatron.errors import AnalysisError
from topk_megatron.files import replacing

_SHARED = ("dom.js", "card.js", "plots.js", "base.css", "card.css")
SCRIPTS = ("dom.js", "card.js", "search.js", "list.js", "plots.js", "main.js")
STYLES = ("base.css", "card.css", "report.css")
_COMPRESSION = 6


def asset(name: str) -> str:
    """A file of this page's assets/, or of those that both pages share."""
    package = "topk_megatron.web.shared" if name in _SHARED else __package__
    return files(package).joinpath("assets", name).read_text(encoding="utf-8")


def block(identity: str, content: Any) -> str:
    """A data element; an array is stored by its bytes, anything else as JSON."""
    if isinstance(content, np.ndarray):
        data = content.astype(content.dtype.newbyteorder("<")).tobytes()
    elif isinstance(content, str):
        data = content.encode()
    else:
        data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    packed = base64.b64encode(gzip.compress(data, _COMPRESSION, mtime=0)).decode()
    return f'<script type="text/plain" id="{identity}">{packed}</script>\n'


def write_page(path: Path, title: str, first: Iterable[str], later: Iterable[str]) -> None:
    """Write the file in one step.

    Args:
        path: the HTML file.
        title: plain text.
        first: blocks that the first view needs.
        later: blocks of cards; written as they come, so that they need not fit into memory.
    """
    plotly = _plotly()
    script = "(() => {\n'use strict';\n" + "\n".join(map(asset, SCRIPTS)) + "\n})();"
    parts = {
        "POLICY": _policy(script, plotly),
        "TITLE": html.escape(title),
        "STYLE": "\n".join(map(asset, STYLES)),
        "SCRIPT": f"<script>{script}</script>",
    }
    head, foot = asset("report.html").split("<!--DATA-->")
    before, after = head.split("<!--FIRST-->")
    for name, text in parts.items():
        before, after = (part.replace(f"<!--{name}-->", text) for part in (before, after))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(before)
        stream.writelines(first)
        stream.write(after)
        stream.write(block("plotly", plotly))
        stream.writelines(later)
        stream.write(foot)


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise AnalysisError(
            "the report's plots need plotly; install the extra: pip install topk-megatron[analysis]"
        ) from error
    return get_plotlyjs()
