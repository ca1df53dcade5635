"""Which teacher does the student follow when they disagree? Counts, then examples (as in Figure 2 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from coadvise.report.charts import Dot, Scale, axis_row, dot_row, track
from coadvise.report.document import thumbnail
from coadvise.report.markup import Markup, count, join, paragraph, percent, table, tag
from coadvise.report.predictors import Predictor, choose_examples, comparable, disputed, predicted, predictors
from coadvise.report.read import AVERAGE, Floats, Ints, Run, mapping, number, sequence

SHOWN = 5  # classes in an image's table


def disagreements(run: Run) -> Markup:
    """The section: how often the teachers disagree, who is right then, and examples."""
    found = comparable(run, predictors(run))
    teachers = [predictor for predictor in found if predictor.is_teacher]
    tokens = [predictor for predictor in found if predictor.shape == "dot" and predictor.token != AVERAGE]
    if len(teachers) < 2 or not tokens:
        need = "This needs predictions of two teachers and a co-advised student for the same images; not there yet."
        return paragraph("missing", need)
    rows = disputed(run, teachers)
    total = len(predicted(run, tokens[0]))
    lead = f"The teachers disagree on {count(len(rows))} of {count(total)} {run.scored} images"
    if not len(rows):
        return paragraph("lead", f"{lead}.")
    alone = [predictor for predictor in found if predictor.shape == "ring"]
    lead += f" ({percent(len(rows) / total)}). On those:"
    right = _right(run, rows, [*teachers, *alone, *tokens])
    counts = tag("div", right, _follows(run, rows, teachers, tokens[0]), class_="pair")
    chosen = choose_examples(run, teachers, tokens[0])
    shown = (*teachers, *tokens)
    by_part = {part: run.predictions[part].probabilities(np.array(chosen)) for part in {p.part for p in shown}}
    cards = []
    for place, row in enumerate(chosen):
        shares = {p: by_part[p.part][p.token][place] for p in shown}
        cards.append(_card(run, row, teachers, tokens, shares))
    note = (
        f"{len(cards)} of these images, from each case in turn (which teacher is right, is the student right), most "
        "confident teachers first. Numbers: probabilities in percent; bold: the prediction; ✓: the true class."
        + " Thumbnails are left out, since the images could not be opened." * (run.picture is None)
        + " Small pictures are dark where a token does not look in the last block." * (run.attention is not None)
        + _overlap(run)
    )
    return join([paragraph("lead", lead), counts, paragraph("note", note), tag("div", *cards, class_="cards")])


def _overlap(run: Run) -> str:
    """How much of what two teachers' tokens look at is the same."""
    pairs = [mapping(pair) for pair in sequence(run.last("verdict").get("overlaps"))]
    said = [
        f"the {one} and the {other} token share {percent(number(pair.get('last')), 0)} of what they look at"
        for pair in pairs
        if "class" not in (found := sequence(pair.get("tokens"))) and len(found) == 2
        for one, other in [found]
    ]
    return f" Over {count(number(pairs[0].get('images')))} images {', '.join(said)}." if said else ""


def _right(run: Run, rows: Ints, found: Sequence[Predictor]) -> Markup:
    labels = run.predictions[found[-1].part].labels[rows]
    shares = [(predictor, float(np.mean(predicted(run, predictor)[rows] == labels))) for predictor in found]
    return _shares_plot("Who is right?", shares)


def _follows(run: Run, rows: Ints, teachers: Sequence[Predictor], student: Predictor) -> Markup:
    own = predicted(run, student)[rows]
    shares = [(teacher, float(np.mean(predicted(run, teacher)[rows] == own))) for teacher in teachers]
    neither = float(np.mean(np.all([predicted(run, teacher)[rows] != own for teacher in teachers], axis=0)))
    other = Predictor("neither", "neither", student.part, student.token, "dot", "tone-student")
    return _shares_plot("Which teacher does the class token follow?", [*shares, (other, neither)])


def _shares_plot(title: str, shares: Sequence[tuple[Predictor, float]]) -> Markup:
    x = Scale(0.0, 1.0, 0.2)
    rows = [
        dot_row(v.name, track(x, [Dot(share, v.shape, v.tone, percent(share))], height=24), percent(share, 0))
        for v, share in shares
    ]
    return tag("figure", tag("figcaption", title), *rows, axis_row(x, lambda v: f"{100 * v:.0f}"), class_="dots")


def _card(
    run: Run, row: int, teachers: Sequence[Predictor], tokens: Sequence[Predictor], shares: Mapping[Predictor, Floats]
) -> Markup:
    label = int(run.predictions[tokens[0].part].labels[row])
    paths = sequence(run.scored_split.get("paths"))
    name = str(paths[row]) if row < len(paths) else None
    right = [teacher.name for teacher in teachers if predicted(run, teacher)[row] == label]
    who = f"{' and '.join(right)} {'is' if len(right) == 1 else 'are'} right" if right else "no teacher is right"
    verdict = "the student is right" if predicted(run, tokens[0])[row] == label else "the student is wrong"
    about = [tag("h3", run.class_name(label)), tag("p", f"{who}; {verdict}"), tag("code", name or f"image {row}")]
    picture = thumbnail(partial(run.picture, row), name or "") if run.picture else ""
    head = tag("header", picture, tag("div", *about))
    return tag(
        "article", head, _attention(run, row), _probabilities(run, label, teachers, tokens, shares), class_="card"
    )


def _attention(run: Run, row: int) -> Markup:
    """The picture by token, dark where it does not look."""
    if run.attention is None:
        return Markup()
    try:
        found = run.attention(row)
    except Exception:  # as for thumbnails: whatever a decoder raises
        return Markup()
    tiles = (
        tag(
            "figure",
            thumbnail(partial(found.__getitem__, token), f"where the {token} token looks"),
            tag("figcaption", token),
        )
        for token in found
    )
    return tag("div", *tiles, class_="attention")


def shown_classes(label: int, shares: Sequence[Floats], most: int = SHOWN) -> list[int]:
    """The true class, every predicted class, then the most probable ones; sorted by mean probability."""
    mean = np.mean(shares, axis=0)
    order = [int(k) for k in np.argsort(-mean, kind="stable")]
    needed = {label, *(int(np.argmax(share)) for share in shares)} & set(order)
    extra = [k for k in order if k not in needed][: max(0, most - len(needed))]
    return [k for k in order if k in needed or k in extra]


def _probabilities(
    run: Run, label: int, teachers: Sequence[Predictor], tokens: Sequence[Predictor], shares: Mapping[Predictor, Floats]
) -> Markup:
    top = tag(
        "tr",
        tag("td"),
        tag("th", "teachers", colspan=len(teachers), scope="colgroup"),
        tag("th", "student’s tokens", colspan=len(tokens), scope="colgroup", class_="second"),
    )
    found = [*teachers, *tokens]
    names = (tag("th", p.short, scope="col", title=p.name, class_=_edge(p, tokens)) for p in found)
    head = tag("tr", tag("td"), *names)
    body = []
    for k in shown_classes(label, list(shares.values())):
        cells = [_cell(p, float(shares[p][k]), k == int(np.argmax(shares[p])), tokens) for p in found]
        mark = tag("span", "✓ ", class_="true") if k == label else ""
        body.append(tag("tr", tag("th", mark, run.class_name(k), scope="row", title=run.class_name(k)), *cells))
    return table(join([top, head]), body, "panel")


def _edge(predictor: Predictor, tokens: Sequence[Predictor]) -> str | None:
    return "second" if predictor is tokens[0] else None


def _cell(predictor: Predictor, share: float, is_prediction: bool, tokens: Sequence[Predictor]) -> Markup:
    text = f"{100 * share:.0f}" if share >= 0.005 else "·"
    classes = " ".join(filter(None, (predictor.tone, "answer" if is_prediction else None, _edge(predictor, tokens))))
    return tag("td", tag("span", text), class_=classes, style=f"--p:{100 * share:.1f}%")
