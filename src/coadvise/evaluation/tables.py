"""The results of `coadvise evaluate` as aligned text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coadvise.evaluation.shifts import FOLDER

MOST_CLASSES = 30  # that are listed one by one
Found = Mapping[str, Any]  # of `runs.evaluate.evaluate_run`


def score_lines(found: Found) -> Iterator[str]:
    """Scores, distances from the teachers, agreement, corruptions, unreadable files."""
    what = "" if found["layout"] == FOLDER else f" ({found['layout']}, of {found['classes']} classes)"
    yield f"{found['images']} images of {found['data']}{what}"
    if "parts" in found:
        yield from _scores(found["parts"])
        yield from _classes(found["by_class"])
        yield from _divergences(found["divergences"])
        yield from _agreements(found["agreements"])
    if "corruptions" in found:
        yield from _corruptions(found["corruptions"])
    for fault in found["unreadable"]:
        yield f"not scored, cannot be read: {fault}"


def _scores(parts: Found) -> Iterator[str]:
    calibrated = any("temperature" in score for answers in parts.values() for score in answers.values())
    head = f"{'':24} {'output':10} {'top-1':>7} {'top-5':>7} {'macro':>7} {'F1':>7} {'ECE':>7} {'NLL':>7}"
    yield head + (f" {'T':>6} {'ECE at T':>8}" if calibrated else "")
    for part, answers in parts.items():
        for place, (answer, score) in enumerate(answers.items()):
            shares = " ".join(
                f"{score[figure]:7.2%}" for figure in ("top1", "top5", "macro_accuracy", "macro_f1", "ece")
            )
            line = f"{part if not place else '':24} {answer:10} {shares} {score['nll']:7.3f}"
            if "temperature" in score:
                line += f" {score['temperature']:6.3f} {score['calibrated_ece']:8.2%}"
            yield line


def _classes(parts: Found) -> Iterator[str]:
    """Of the class tokens: recall and F1 a class, where there are few classes; --json has all, and precision."""
    names = list(next(iter(parts.values())))
    if len(names) > MOST_CLASSES:
        return
    yield ""
    short = [part.partition("/")[2] for part in parts]
    yield f"{'recall, F1':24} {'images':>7} " + " ".join(f"{name:>13}" for name in short)
    for name in names:
        rows = [classes[name] for classes in parts.values()]
        cells = " ".join(f"{row['recall']:6.1%} {row['f1']:6.1%}" for row in rows)
        yield f"{name[:24]:24} {rows[0]['images']:7} {cells}"


def _divergences(rows: Sequence[Found]) -> Iterator[str]:
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        table.setdefault((row["part"], row["answer"]), {})[row["teacher"]] = row["kl"]
    if table:
        yield ""
        yield f"{'KL from the teacher, nats':35} " + " ".join(f"{teacher:>7}" for teacher in teachers)
    before = ""
    for (part, answer), row in table.items():
        yield f"{part if part != before else '':24} {answer:10} " + " ".join(f"{row[t]:7.3f}" for t in teachers)
        before = part


def _agreements(pairs: Sequence[Found]) -> Iterator[str]:
    """Of the class tokens; --json has every output."""
    chosen = [pair for pair in pairs if pair["first"][1] == pair["second"][1] == "class"]
    if chosen:
        yield ""
        heads = ("same", "one right", "both wrong", "same error", "overlap")
        yield f"{'class tokens of':48} " + " ".join(f"{head:>10}" for head in heads)
    for pair in chosen:
        one_right = pair["only_first"] + pair["only_second"]
        shares = (pair["same"], one_right, pair["both_wrong"], pair["same_mistake"], pair["error_overlap"])
        yield f"{pair['first'][0]:24}{pair['second'][0]:24} " + " ".join(f"{share:10.1%}" for share in shares)


def _corruptions(found: Found) -> Iterator[str]:
    severities = ", ".join(map(str, found["severities"]))
    columns = {part.partition("/")[2]: answers for part, answers in found["parts"].items()}
    widths = {name: max(9, len(name)) for name in columns}
    yield ""
    many = f"{found['images']} images each, {found['seconds']} s"
    yield f"top-1 of the class token, mean over severities {severities}; {many}"
    yield f"{'':24} " + " ".join(f"{name:>{widths[name]}}" for name in columns)
    first = next(iter(columns.values()))
    for corruption in first["class"]["top1"]:
        cells = (f"{answers['class']['top1'][corruption]:{widths[name]}.2%}" for name, answers in columns.items())
        yield f"{corruption:24} " + " ".join(cells)
    for figure, title in (
        ("mean_corruption_error", "mean corruption error"),
        ("relative_to_alexnet", "  over AlexNet's"),
    ):
        if figure in first["class"]:
            cells = (f"{answers['class'][figure]:{widths[name]}.2%}" for name, answers in columns.items())
            yield f"{title:24} " + " ".join(cells)
    for name, answers in columns.items():
        if len(answers) > 1:
            errors = ", ".join(f"{answer} {row['mean_corruption_error']:.2%}" for answer, row in answers.items())
            yield f"mean corruption error of {name}: {errors}"
