"""Writes one HTML file: a template, scripts, styles, and data as compressed blocks.

Data are in ``<script type="text/plain" id=…>`` elements as base64 of gzip, so that nothing in them
can be markup. The browser unpacks each block when it is first used. A content security policy lets
only our own scripts run, by their hashes, and lets nothing be loaded.
"""

import base64
import gzip
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from topk_megatron.errors import AnalysisError
from topk_megatron.files import replacing
from topk_megatron.web.shared.assets import REPORT, fill, inline, policy_hash, read_asset

_COMPRESSION = 6


def block(identity: str, content: Any) -> str:
    """Returns a data element; an array is stored by its bytes, anything else as JSON."""
    if isinstance(content, np.ndarray):
        data = content.astype(content.dtype.newbyteorder("<")).tobytes()
    elif isinstance(content, str):
        data = content.encode()
    else:
        data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    packed = base64.b64encode(gzip.compress(data, _COMPRESSION, mtime=0)).decode()
    return f'<script type="text/plain" id="{identity}">{packed}</script>\n'


def write_page(path: Path, title: str, first: Iterable[str], later: Iterable[str]) -> None:
    """Writes the file in one step.

    Args:
        path: the HTML file.
        title: plain text.
        first: blocks that the first view needs.
        later: blocks of cards, written one by one, so that they need not fit into memory.
    """
    plotly = _plotly()
    style, script = inline(REPORT)
    parts = {
        "POLICY": _policy(script, plotly),
        "TITLE": html.escape(title),
        "STYLES": f"<style>{style}</style>",
        "SCRIPTS": f"<script>{script}</script>",
    }
    head, foot = read_asset(REPORT.template).split("<!--DATA-->")
    before, after = (fill(part, parts) for part in head.split("<!--FIRST-->"))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(before)
        stream.writelines(first)
        stream.write(after)
        stream.write(block("plotly", plotly))
        stream.writelines(later)
        stream.write(foot)


def _policy(*scripts: str) -> str:
    hashes = " ".join(map(policy_hash, scripts))
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
