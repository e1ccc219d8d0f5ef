"""One HTML file that holds its data, style and JavaScript: nothing is fetched when it is opened.

The JavaScript modules, the style sheet and the HTML of the page lie in explorer/. Names of tiles
and classes never run as code: facts are JSON without a `<`, and the page's Content-Security-Policy
allows the one script whose hash it names, and no request at all.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from pathlib import Path

from running.errors import InputError
from running.files import atomic_write

import numpy as np

from maps.land_cover import PALETTE

FOLDER = Path(__file__).resolve().parent
# in the order of the page; a module comes after those whose constants it reads at the start
WORKER_MODULES = ("learn.js", "worker.js")
PAGE_MODULES = ("colors.js", "data.js", "geo.js", "labels.js", "next.js", "pool.js")
PAGE_MODULES += ("files.js", "plot.js", "geotiff.js", "layers.js", "map.js", "panel.js")
PAGE_MODULES += ("session.js", "app.js", "main.js")


class Blobs:
    """Arrays of the page, compressed, in base64; `digest` is a hash of them all."""

    def __init__(self):
        self.parts, self.digest = [], hashlib.sha256()

    def add(self, array):
        """Add an array. Returns its entry in the facts of the page."""
        content = zlib.compress(np.ascontiguousarray(array).data, 6)
        self.digest.update(content)
        self.parts.append(base64.b64encode(content).decode())
        return {"blob": len(self.parts) - 1, "type": array.dtype.name}


def to_json(content):
    """JSON that can stand in a script element: ASCII, and no <, > or &.

    Raises InputError for a number that JSON cannot hold.
    """
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise InputError(f"tile.json: found a value that is no JSON ({error})") from None
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def join_modules(names):
    """The JavaScript modules one after another, without their imports and exports."""
    text = "\n".join((FOLDER / name).read_text() for name in names)
    text = re.sub(r"^import [^;]*;\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^export ", "", text, flags=re.MULTILINE)


def hash_source(text):
    """The source of an inline script or style as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_page(path, facts, blobs):
    """Write the page (HTML). Only its own script can run in it."""
    style = (FOLDER / "style.css").read_text()
    script, worker = "\n" + join_modules(PAGE_MODULES), join_modules(WORKER_MODULES)
    script = script.replace("{{PALETTE}}", " ".join(PALETTE))
    parts = {
        "TITLE": html.escape(facts["title"]),
        "SCRIPT_HASH": hash_source(script),
        "STYLE": style,
        "STYLE_HASH": hash_source(style),
        "FACTS": to_json(facts),
        "WORKER": worker,
        "SCRIPT": script,
    }
    template = (FOLDER / "page.html").read_text().split("{{BLOBS}}")
    head, tail = (re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], half) for half in template)
    with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(head)
        for number, blob in enumerate(blobs.parts):
            file.write(f'<script type="text/plain" id="blob-{number}">{blob}</script>\n')
        file.write(tail)
