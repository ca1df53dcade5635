"""When the teachers disagree, whom does the student follow? Counts, then some of those images (as in Figure 2)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from coadvise.report.answers import Voice, answers, choose, comparable, disputed, voices
from coadvise.report.charts import Dot, Scale, axis, dot_row, track
from coadvise.report.markup import Markup, count, join, percent, tag
from coadvise.report.read import AVERAGE, Floats, Ints, Run, sequence

SMALL = 96  # pixels: up to here a picture is embedded as it is and scaled up in blocks
LARGE = 224  # pixels: larger ones are scaled down to this
SHOWN = 5  # classes in a picture's panel
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # what Pillow decodes without starting a program


def disagreements(run: Run) -> Markup:
    """The section: how often teachers disagree, who is right then, and the pictures."""
    found = comparable(run, voices(run))
    teachers = [voice for voice in found if voice.teaches]
    tokens = [voice for voice in found if voice.shape == "dot" and voice.token != AVERAGE]
    if len(teachers) < 2 or not tokens:
        need = (
            "This needs the predictions of two teachers and of a co-advised student on the same images; not there yet."
        )
        return tag("p", need, class_="missing")
    rows = disputed(run, teachers)
    total = len(answers(run, tokens[0]))
    lead = f"The teachers give different answers on {count(len(rows))} of {count(total)} validation images"
    if not len(rows):
        return tag("p", f"{lead}.", class_="lead")
    alone = [voice for voice in found if voice.shape == "ring"]
    lead += f" ({percent(len(rows) / total)}). On those:"
    counts = tag(
        "div", _right(run, rows, [*teachers, *alone, *tokens]), _follows(run, rows, teachers, tokens[0]), class_="pair"
    )
    chosen = choose(run, teachers, tokens[0])
    shares = _shares(run, [*teachers, *tokens], np.array(chosen))
    cards = [_card(run, row, place, teachers, tokens, shares) for place, row in enumerate(chosen)]
    note = (
        f"{len(cards)} of these images, taken in turn from each case (which teacher is right, whether the student is), "
        "those with the surest teachers first. Numbers are probabilities in percent; bold: the answer; ✓: the truth."
    )
    if run.picture is None:
        note += " Thumbnails are left out: the images are not at hand."
    return join(
        [tag("p", lead, class_="lead"), counts, tag("p", note, class_="note"), tag("div", *cards, class_="cards")]
    )


def _right(run: Run, rows: Ints, found: Sequence[Voice]) -> Markup:
    labels = run.predictions[found[-1].part].labels[rows]
    shares = [(voice, float(np.mean(answers(run, voice)[rows] == labels))) for voice in found]
    return _shares_plot("Who is right?", shares)


def _follows(run: Run, rows: Ints, teachers: Sequence[Voice], student: Voice) -> Markup:
    own = answers(run, student)[rows]
    shares = [(teacher, float(np.mean(answers(run, teacher)[rows] == own))) for teacher in teachers]
    neither = float(np.mean(np.all([answers(run, teacher)[rows] != own for teacher in teachers], axis=0)))
    nobody = Voice("nobody", "nobody", student.part, student.token, "dot", "tone-student")
    return _shares_plot("Whom does the student’s class token follow?", [*shares, (nobody, neither)])


def _shares_plot(title: str, shares: Sequence[tuple[Voice, float]]) -> Markup:
    x = Scale(0.0, 1.0, 0.2)
    rows = [
        dot_row(v.name, track(x, [Dot(share, v.shape, v.tone, percent(share))], height=24), percent(share, 0))
        for v, share in shares
    ]
    numbers = dot_row("", axis(x, lambda v: f"{100 * v:.0f}"), "", kind="axis")
    return tag("figure", tag("figcaption", title), *rows, numbers, class_="dots")


def _shares(run: Run, found: Sequence[Voice], rows: Ints) -> dict[Voice, Floats]:
    by_part = {part: run.predictions[part].probabilities(rows) for part in dict.fromkeys(v.part for v in found)}
    return {voice: by_part[voice.part][voice.token] for voice in found}


def _card(
    run: Run,
    row: int,
    place: int,
    teachers: Sequence[Voice],
    tokens: Sequence[Voice],
    shares: Mapping[Voice, Floats],
) -> Markup:
    label = int(run.predictions[tokens[0].part].labels[row])
    paths = sequence(run.split("val").get("paths"))
    name = str(paths[row]) if row < len(paths) else None
    right = [teacher.name for teacher in teachers if answers(run, teacher)[row] == label]
    who = f"{' and '.join(right)} {'is' if len(right) == 1 else 'are'} right" if right else "no teacher is right"
    verdict = "the student is right" if answers(run, tokens[0])[row] == label else "the student is wrong"
    head = tag(
        "header",
        "" if run.picture is None else thumbnail(run, row, name),
        tag(
            "div", tag("h3", run.class_name(label)), tag("p", f"{who}; {verdict}"), tag("code", name or f"image {row}")
        ),
    )
    here = {voice: shares[voice][place] for voice in (*teachers, *tokens)}
    return tag("article", head, _panel(run, label, teachers, tokens, here), class_="card")


def shown_classes(label: int, shares: Sequence[Floats], most: int = SHOWN) -> list[int]:
    """The true class, every answer, and then the most probable over all voices, in the order of that mean."""
    mean = np.mean(shares, axis=0)
    order = [int(k) for k in np.argsort(-mean, kind="stable")]
    needed = {label, *(int(np.argmax(share)) for share in shares)} & set(order)
    extra = [k for k in order if k not in needed][: max(0, most - len(needed))]
    return [k for k in order if k in needed or k in extra]


def _panel(
    run: Run, label: int, teachers: Sequence[Voice], tokens: Sequence[Voice], shares: Mapping[Voice, Floats]
) -> Markup:
    top = tag(
        "tr",
        tag("td"),
        tag("th", "teachers", colspan=len(teachers), scope="colgroup"),
        tag("th", "student’s tokens", colspan=len(tokens), scope="colgroup", class_="second"),
    )
    found = [*teachers, *tokens]
    head = tag(
        "tr", tag("td"), *(tag("th", v.short, scope="col", title=v.name, class_=_edge(v, tokens)) for v in found)
    )
    body = []
    for k in shown_classes(label, list(shares.values())):
        cells = [_cell(voice, float(shares[voice][k]), k == int(np.argmax(shares[voice])), tokens) for voice in found]
        mark = tag("span", "✓ ", class_="true") if k == label else ""
        body.append(tag("tr", tag("th", mark, run.class_name(k), scope="row", title=run.class_name(k)), *cells))
    return tag(
        "div", tag("table", tag("thead", top, head), tag("tbody", *body), class_="panel"), class_="scroll", tabindex="0"
    )


def _edge(voice: Voice, tokens: Sequence[Voice]) -> str | None:
    return "second" if voice is tokens[0] else None


def _cell(voice: Voice, share: float, answer: bool, tokens: Sequence[Voice]) -> Markup:
    text = f"{100 * share:.0f}" if share >= 0.005 else "·"
    classes = " ".join(filter(None, (voice.tone, "answer" if answer else None, _edge(voice, tokens))))
    return tag("td", tag("span", text), class_=classes, style=f"--p:{100 * share:.1f}%")


def thumbnail(run: Run, row: int, name: str | None) -> Markup:
    """A picture inside the page, or a placeholder where it cannot be read or decoded."""
    try:
        assert run.picture is not None
        kind, content, small = _encoded(run.picture(row))
    except Exception:  # Pillow's decoders raise many kinds
        return tag("div", "no picture", class_="thumb placeholder", title=f"{name or 'it'} cannot be read")
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return tag("img", src=source, alt=name or "", class_="thumb pixelated" if small else "thumb")


def _encoded(encoded: bytes) -> tuple[str, bytes, bool]:
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
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
