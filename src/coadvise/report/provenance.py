"""Which data was used, and how can the run be reproduced?"""

from __future__ import annotations

from coadvise.report.markup import Markup, count, header_row, join, paragraph, row, table, tag
from coadvise.report.read import Run, mapping, number, sequence

MOST_ROWS = 40
MOST_NAMES = 200


def data_section(run: Run) -> Markup:
    """Splits, classes, image counts, and the files that could not be read."""
    if not run.data:
        return paragraph("missing", "data.json is missing or empty, so nothing is known about the data.")
    splits = {name: mapping(split) for name, split in mapping(run.data.get("splits")).items()}
    images = ", ".join(f"{count(number(split.get('images')))} in {name}" for name, split in splits.items())
    size = run.data.get("image_size")
    height, width = (number(side) for side in (size if isinstance(size, list) and len(size) == 2 else (size, size)))
    resolution = f"{count(height)} × {count(width)} pixels" + (" (height × width)" if height != width else "")
    if fit := run.data.get("fit"):
        resolution += f", fitted by {fit}"
    facts = f"{len(run.classes)} classes; images: {images or 'none'}; resolution: {resolution}."
    parts = [paragraph("lead", facts)]
    if run.data.get("note"):
        parts.append(paragraph("note", str(run.data["note"])))
    rows = _class_rows(run)
    counted = table(header_row(("class", *splits)), rows)
    if len(rows) > MOST_ROWS:
        counted = tag("details", tag("summary", f"Images of each of the {len(rows)} classes"), counted)
    parts += [counted, *(_unreadable(name, sequence(split.get("unreadable"))) for name, split in splits.items())]
    return join([*parts, tag("p", "Read from ", tag("code", str(run.data.get("root"))), class_="note")])


def _class_rows(run: Run) -> list[Markup]:
    columns = [sequence(mapping(split).get("per_class")) for split in mapping(run.data.get("splits")).values()]
    counts = [[number(value) for value in column] for column in columns]
    most = [max((value for value in column if value), default=1.0) for column in counts]
    rows = []
    for k in range(max([len(run.classes), *map(len, counts)])):
        values = [column[k] if k < len(column) else None for column in counts]
        cells = [
            tag("td", tag("span", count(value)), class_="amount", style=f"--p:{100 * (value or 0) / high:.1f}%")
            for value, high in zip(values, most, strict=True)
        ]
        rows.append(row(run.class_name(k), cells))
    return rows


def _unreadable(split: str, names: list[object]) -> Markup:
    if not names:
        return paragraph("note", f"All files of {split} could be read.")
    listed = [tag("li", tag("code", str(name))) for name in names[:MOST_NAMES]]
    if len(names) > MOST_NAMES:
        listed.append(tag("li", f"and {count(len(names) - MOST_NAMES)} more"))
    files = "1 file" if len(names) == 1 else f"{count(len(names))} files"
    summary = tag("summary", f"{files} of {split} left out: could not be read")
    return tag("details", summary, tag("ul", *listed, class_="files"), open="" if len(names) <= 5 else None)


def again_section(run: Run) -> Markup:
    """Command, device, versions, seeds, and the complete configuration."""
    record = run.last("run")
    versions = mapping(record.get("versions"))
    facts = [
        ("coadvise", record.get("version")),
        ("started", run.begun),
        ("device", record.get("device")),
        ("seeds", ", ".join(str(seed) for seed in sequence(record.get("seeds")))),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    pairs = [join([tag("dt", name), tag("dd", str(value))]) for name, value in facts if value]
    command = tag("pre", str(record["command"]), tabindex="0") if record.get("command") else ""
    about = tag("dl", *pairs) if pairs else paragraph("missing", "The run has not recorded its start.")
    config = paragraph("missing", "config.yaml is missing.")
    if run.config is not None:
        config = tag("details", tag("summary", "The complete configuration"), tag("pre", run.config, tabindex="0"))
    return join([command, about, config])
