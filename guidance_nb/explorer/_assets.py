"""The files beside this module, and how a page for a browser is made of them."""

import json
from collections.abc import Mapping
from importlib.resources import files


def asset(name: str) -> bytes:
    "A file beside this module."
    return (files(__package__) / name).read_bytes()


def program(*names: str) -> str:
    "Modules in JavaScript, one after another; the last one of a page puts it into its place."
    return "\n".join(asset(f"{name}.js").decode() for name in names)


def embed(kind: str, fallback: str, page: Mapping[str, object], script: str) -> str:
    "HTML without outside parts, to be put into any page; a browser without JavaScript shows the fallback."
    data = json.dumps(page, ensure_ascii=False).replace("</", "<\\/")  # so that no text of ours ends the script
    host = f'<div class="guidance-{kind}"><p>{fallback}</p></div>'
    return f"{host}\n<script>\n(() => {{\nconst PAGE = {data};\n{script}}})();\n</script>"
