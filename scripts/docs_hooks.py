"""A hook that prepares the documentation's pages for the site."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show links to files outside docs/ as paths, because the site lacks those files."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match: "re.Match[str]") -> str:
        text, target = match[1], match[2]
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        return f"`{path}`" if text.strip("`") in (path, target) else f"{text} (`{path}`)"

    return _LINK.sub(replace, markdown)
