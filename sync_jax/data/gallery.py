"""Pages of pictures with captions, as one HTML file that loads nothing and runs no script."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_SIDE = 96  # pixels of a thumbnail, at most
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }}
body {{ margin: 1em auto; max-width: 75em; padding: 0 1em }}
div {{ display: flex; flex-wrap: wrap; gap: 1em; border-top: 1px solid gray; padding: .5em 0 }}
figure {{ margin: 0; width: 12em }} img {{ min-width: 64px; image-rendering: pixelated }}
figcaption {{ overflow-wrap: anywhere; font-size: 13px; white-space: pre-line }}
</style></head><body><h1>{title}</h1>
{body}</body></html>
"""


def page(title: str, sections: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """A page of sections: a heading, a line of text, and rows of figures."""
    body = "".join(
        f"<h2>{html.escape(heading)}</h2>\n<p>{html.escape(text)}</p>\n"
        + "".join(f"<div>{row}</div>\n" for row in rows)
        for heading, text, rows in sections
    )
    return _PAGE.format(title=html.escape(title), body=body)


def figure(image: Image.Image, caption: str) -> str:
    """A thumbnail with a caption."""
    out = io.BytesIO()
    image = image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    image.save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    text = html.escape(caption)
    picture = f'<img src="data:image/jpeg;base64,{data}" alt="{text}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"
