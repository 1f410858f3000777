"""Signatures on the site are code: a processor that nbdev runs on every page, named by `procs` in settings.ini.

nbdev makes a link of every name in backticks, also in the comments of the signature that it shows above a definition.
Markdown in code is not read as markdown, so there the reader would see brackets and an address.
"""

import re
from typing import Any

from notebooks import text

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(`[^`\n]+`)\]\([^)\s]*\)")


def plain(markdown: str) -> str:
    "The same text without links in fenced code."
    return FENCE.sub(lambda block: LINK.sub(r"\1", block[0]), markdown)


def plain_signatures(cell: Any) -> None:
    "Take the links out of the code that the outputs of `cell` show."
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = plain(text(list(data["text/markdown"]))).splitlines(keepends=True)
