"""The frame of a page that loads nothing: head, style, sections; and embedded pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from importlib import resources

from PIL import Image

from coadvise.report.markup import Markup, tag

SMALL = 96  # pixels: images up to this size are embedded unchanged and enlarged without smoothing
LARGE = 224  # pixels: larger images are reduced to this
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # what Pillow decodes without starting a program
# The page loads nothing, whatever the names in it contain.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

Section = tuple[str, str, str, Markup]  # anchor, name in the navigation, heading, content


def document(title: str, top: Sequence[Markup], sections: Sequence[Section], footer: str) -> str:
    """The whole page as one string; `top` is what stands above the navigation."""
    style = Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    links = (tag("a", short, href=f"#{anchor}") for anchor, short, _, _ in sections)
    body = tag(
        "body",
        tag("header", *top, tag("nav", *links), class_="top"),
        tag("main", *(tag("section", tag("h2", name), made, id=anchor) for anchor, _, name, made in sections)),
        tag("footer", footer),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def thumbnail(picture: Callable[[], bytes], name: str) -> Markup:
    """An embedded image, or a placeholder if it cannot be read or decoded. `picture` returns the encoded image."""
    try:
        kind, content, small = _encoded(picture())
    except Exception:  # Pillow's decoders raise many types
        return tag("div", "no image", class_="thumb placeholder", title=f"{name or 'it'} cannot be read")
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return tag("img", src=source, alt=name, class_="thumb pixelated" if small else "thumb")


def _encoded(encoded: bytes) -> tuple[str, bytes, bool]:
    known = [*FORMATS, *(["HEIF"] if "HEIF" in Image.OPEN else [])]  # Pillow was taught it where pictures are read
    with Image.open(io.BytesIO(encoded), formats=known) as picture:
        if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError("a decompression bomb")
        picture.draft("RGB", (LARGE, LARGE))
        image = picture.convert("RGB")
    small = max(image.size) <= SMALL
    image.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=85)
    return "png" if small else "jpeg", buffer.getvalue(), small
