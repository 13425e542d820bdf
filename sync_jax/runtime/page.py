"""Self-contained HTML pages of tables and pictures: they load nothing and run no script."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

_SIDE = 96  # pixels of a thumbnail, at most
_BEGIN, _END = "<main>\n", "</main>"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }}
body {{ margin: 1em auto; max-width: 75em; padding: 0 1em }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1em; border-top: 1px solid gray; padding: .5em 0 }}
figure {{ margin: 0; width: 12em }} figure img {{ min-width: 64px; image-rendering: pixelated }}
figcaption {{ overflow-wrap: anywhere; font-size: 13px; white-space: pre-line }}
.table {{ overflow-x: auto }} table {{ border-collapse: collapse; margin: 1em 0 }}
caption {{ font-weight: bold; text-align: left; white-space: nowrap }}
th, td {{ padding: .1em .6em; text-align: right; border-bottom: 1px solid #8884 }}
.key {{ text-align: left }} .plot {{ max-width: 100%; background: white }}
</style></head><body><h1>{title}</h1>
<main>
{body}</main>
</body></html>
"""


def page(title: str, *parts: str) -> str:
    """A page of parts, each of the functions below."""
    return _PAGE.format(title=html.escape(title), body="\n".join(parts) + "\n")


def inside(page: str) -> str:
    """The parts of a page."""
    return page.partition(_BEGIN)[2].rpartition(_END)[0]


def heading(text: str) -> str:
    """A heading below the title."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], keys: int) -> str:
    """A table, the first `keys` columns of which say what a row is of."""

    def line(cells: Sequence[object], kind: str) -> str:
        tags = (
            f"<{kind}{' class=key' * (i < keys)}>{html.escape(str(cell))}</{kind}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(tags)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return (
        f"<div class=table><table><caption>{html.escape(title)}</caption>\n<thead>"
        f"{line(headings, 'th')}</thead>\n<tbody>{body}</tbody></table></div>"
    )


def plot(path: Path, description: str) -> str:
    """A PNG."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img class=plot src="data:image/png;base64,{data}" alt="{html.escape(description)}">'


def figures(row: Sequence[tuple[Image.Image, str]]) -> str:
    """A row of thumbnails with captions."""
    return f"<div class=figures>{''.join(_figure(*each) for each in row)}</div>"


def _figure(image: Image.Image, caption: str) -> str:
    out = io.BytesIO()
    image = image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    image.save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    text = html.escape(caption)
    picture = f'<img src="data:image/jpeg;base64,{data}" alt="{text}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"
