"""The page of a check: what is likely to go wrong, then the pictures and figures behind it."""

from collections.abc import Iterable, Sequence
from functools import partial

from coadvise.inspection.duplicates import Group
from coadvise.inspection.findings import Findings, count_by
from coadvise.report.document import document, thumbnail
from coadvise.report.markup import Markup, count, header_row, join, paragraph, percent, row, table, tag

MOST_CARDS = 60  # with pictures, of suspects and of each kind of group
MOST_COPIES = 4  # of a group with pictures
MOST_CLASSES = 60


def render(found: Findings) -> str:
    """The whole page as one string."""
    source = found.pictures.source
    name = source.where.rstrip("/").rpartition("/")[2] or source.where
    facts = f" · {count(len(found.pictures))} readable images · {len(found.classes)} classes · {source.note}"
    top = (
        tag("p", tag("b", name), facts, class_="origin"),
        tag("h1", "What is likely to go wrong, and what to do"),
        tag("ol", *(tag("li", sentence) for sentence in found.sentences()), class_="lead"),
    )
    sections = (
        ("labels", "Labels", "Which labels are probably wrong?", _labels(found)),
        ("copies", "Copies", "Which images are there more than once?", _copies(found)),
        ("classes", "Classes", "How large is each class?", _classes(found)),
        ("files", "Files", "What kind of files are they?", _files(found)),
    )
    return document(f"{name} · coadvise check", top, sections, f"Made from all files of {source.where}.")


def _labels(found: Findings) -> Markup:
    suspects = found.doubts.suspects
    agreement = (
        f" The predictions agree with {percent(found.doubts.agreement)} of all labels." if found.doubts.ranking else ""
    )
    parts = []
    if found.two_labels:
        parts.append(tag("h3", f"Identical files under two labels ({len(found.two_labels)})"))
        parts.append(_groups(found, found.two_labels))
    if doubtful := [group for group in found.near if found.labels_differ(group)]:
        parts.append(tag("h3", f"Resized or recompressed copies under two labels ({len(doubtful)})"))
        parts.append(_groups(found, doubtful))
    parts.append(tag("h3", f"Labels that the predictions contradict ({count(len(suspects))})"))
    parts.append(paragraph("note", f"{found.remark}{agreement}"))
    if suspects:
        parts.append(tag("div", *(_suspect(found, number) for number in suspects[:MOST_CARDS]), class_="cards"))
        parts.append(_shown(len(suspects), MOST_CARDS))
    return join(parts)


def _suspect(found: Findings, number: int) -> Markup:
    about = (
        tag("h3", f"{found.label(number)}: rather {found.suggested(number)}?"),
        tag("p", f"{found.reason(number)[0].upper()}{found.reason(number)[1:]}."),
        tag("code", f"{found.places[number].split}: {found.places[number].name}"),
    )
    return tag("article", tag("header", _picture(found, number), tag("div", *about)), class_="card")


def _copies(found: Findings) -> Markup:
    parts = []
    for title, groups in (("Identical files", found.exact), ("Resized or recompressed copies", found.near)):
        across = [group for group in groups if found.across_splits(group)]
        inside = [group for group in groups if not found.across_splits(group)]
        for where, some in (("in several splits", across), ("inside one split", inside)):
            if some:
                parts += [tag("h3", f"{title} {where} ({count(len(some))})"), _groups(found, some)]
    if not parts:
        return paragraph("lead", "No two files are the same, and no two images look the same.")
    note = "Identical files have the same checksum; other copies a close perceptual hash and the same look when small."
    return join([paragraph("note", note), *parts])


def _groups(found: Findings, groups: Sequence[Group]) -> Markup:
    cards = tag("div", *(_group(found, group) for group in groups[:MOST_CARDS]), class_="cards")
    return join([cards, _shown(len(groups), MOST_CARDS)])


def _group(found: Findings, group: Group) -> Markup:
    members = []
    for number in group[:MOST_COPIES]:
        place, header = found.places[number], found.pictures.headers[number]
        about = (
            tag("h3", found.label(number)),
            tag("p", f"{place.split}, {header.shape[0]} × {header.shape[1]}, {header.format}"),
            tag("code", place.name),
        )
        members.append(tag("header", _picture(found, number), tag("div", *about)))
    rest = [paragraph("note", f"and {len(group) - MOST_COPIES} more")] if len(group) > MOST_COPIES else []
    return tag("article", *members, *rest, class_="card")


def _picture(found: Findings, number: int) -> Markup:
    return thumbnail(partial(found.pictures.read, number), found.places[number].name)


def _shown(total: int, most: int) -> Markup:
    return paragraph("note", f"The first {most} of {count(total)}; --json lists all.") if total > most else Markup()


def _classes(found: Findings) -> Markup:
    splits = {name: found.per_class(name) for name in found.pictures.source.splits}
    largest = max(splits["train"])
    order = sorted(range(len(found.classes)), key=lambda label: -splits["train"][label])
    shown = order if len(order) <= MOST_CLASSES else [*order[: MOST_CLASSES // 2], *order[-MOST_CLASSES // 2 :]]
    body = []
    for label in shown:
        amount = splits["train"][label]
        cells = [tag("td", count(amount), class_="amount", style=f"--p:{100 * amount / max(1, largest):.1f}%")]
        cells += [tag("td", count(counts[label])) for name, counts in splits.items() if name != "train"]
        body.append(row(found.classes[label], cells))
    smallest = min(splits["train"])
    lead = f"The largest class has {count(largest)} training images, the smallest {count(smallest)}."
    note = f"The {MOST_CLASSES // 2} largest and smallest of {len(order)} classes." if len(shown) < len(order) else ""
    return join([paragraph("lead", lead), table(header_row(["class", *splits]), body), paragraph("note", note)])


def _files(found: Findings) -> Markup:
    headers = found.pictures.headers
    sides = sorted((min(header.shape), max(header.shape)) for header in headers)
    shapes = count_by(headers, "shape")
    sizes = (
        f"{len(shapes)} sizes; shorter side {sides[0][0]} to {sides[-1][0]} pixels, median {sides[len(sides) // 2][0]}"
        if len(shapes) > 1
        else f"{headers[0].shape[0]} × {headers[0].shape[1]} pixels"
    )
    facts = {
        "size": sizes,
        "format": _counted(count_by(headers, "format").items()),
        "mode": _counted(count_by(headers, "mode").items()),
        "depth": _counted((f"{bits} bit", images) for bits, images in count_by(headers, "bits").items()),
    }
    parts = [
        tag("dl", *(tag(kind, text) for name, fact in facts.items() for kind, text in (("dt", name), ("dd", fact))))
    ]
    for line in found.pictures.source.remarks:
        parts.append(paragraph("note", line))
    if lost := found.pictures.unreadable:
        items = (tag("li", reason) for _, reason in lost)
        parts += [tag("h3", f"Cannot be read ({count(len(lost))})"), tag("ul", *items, class_="files")]
    return join(parts)


def _counted(values: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name}: {count(images)}" for name, images in values)
