"""The command line: parse, call, print. Errors of the user's are one line and exit code 2."""

import io
import json
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.terminal import Terminal, shown

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for a program to read.")]
AllowUnreadable = Annotated[
    bool, typer.Option("--allow-unreadable", help="Leave out images that cannot be read, and still exit with 0.")
]
Reuse = Annotated[
    Path | None,
    typer.Option(help="A run on the same images; networks of it that would be trained just so again are taken."),
]
Part = Annotated[
    str | None, typer.Option(help="Another network of the run, such as students/alone-0 or teachers/conv.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained, and for how long.")]


def show(text: str) -> None:
    print(shown(text))


def _foreseen(networks: Iterable[tuple[str, float]], reuse: Path | None, as_json: bool) -> None:
    """Prints what would be trained, each network as soon as its time is known."""
    total, found = 0.0, []
    for network, seconds in networks:
        total += seconds
        found.append({"network": network, "seconds": seconds})
        if not as_json:
            print(f"{f'{seconds / 60:.1f} min' if seconds else 'done':>10}  {shown(network)}", flush=True)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{total / 60:6.1f} min  in all, one network after the other")
    if reuse is not None:
        print("            what --reuse would take is counted too: that is found out once teachers are there")


@app.command()
def fit(
    data: Annotated[str, typer.Argument(help="Folder with train/ and val/, folder of class folders, or 'digits'.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the preset, such as student.recipe.epochs=10.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A name of 'coadvise presets' or a YAML file; default: by image size.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Run directory; default runs/DATA-PRESET-seedN. An existing run goes on.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="First seed; default the preset's.")] = None,
    seeds: Annotated[int, typer.Option(help="Students to train, at consecutive seeds; they share the teachers.")] = 1,
    jobs: Annotated[int, typer.Option(help="Networks to train at the same time, each in a process.")] = 1,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also train the student without teachers, and compare.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(help="Folder of teachers' logits for the students' views; made or completed, then used."),
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Go on with a run of another configuration; its finished networks stay."),
    ] = False,
    reuse: Reuse = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train teachers and a co-advised student on a folder of labelled images."""
    from coadvise.runs.fit import fit as run_fit
    from coadvise.runs.fit import foresee_fit
    from coadvise.runs.parallel import check_jobs
    from coadvise.training.metrics import last_of, read_records

    if dry_run:
        check_jobs(jobs)
        _foreseen(foresee_fit(data, preset, out, seed, baseline, seeds, overrides or [], cache), reuse, as_json)
        return
    with closing(Terminal(Console(stderr=as_json))) as terminal:
        folder = run_fit(
            data, preset, out, seed, baseline, seeds, jobs, overrides or [],
            listener=terminal, cache=cache, allow_changes=allow_changes, reuse=reuse,
        )  # fmt: skip
    if as_json and os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(json.dumps({"run": str(folder), **(last_of(read_records(folder), "verdict") or {})}))


@app.command()
def cache(
    run: Annotated[Path, typer.Argument(help="A run directory whose teachers are trained; it is only read.")],
    out: Annotated[Path | None, typer.Option(help="The cache, for 'coadvise fit --cache'; default RUN/cache.")] = None,
    seeds: Annotated[int, typer.Option(help="Students' seeds, from the run's on.")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Epochs of views; default the student's.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the work, here; others may join in.")] = 1,
    top_k: Annotated[int | None, typer.Option(help="Logits kept of an answer with many classes; default 32.")] = None,
    as_json: AsJson = False,
) -> None:
    """Store what a run's teachers say of its students' views, so that later runs need not ask them."""
    from coadvise.runs.build_cache import build_cache

    with closing(Terminal(Console(stderr=as_json))) as terminal:
        folder = build_cache(run, out, seeds, epochs, jobs, top_k, terminal)
    if as_json and os.environ.get("RANK", "0") == "0":
        print(json.dumps({"cache": str(folder)}))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    data: Annotated[
        str | None, typer.Option(help="Score on this folder instead of the run's own validation images.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="folder, imagenet-a, imagenet-r or imagenet-c; default: by its folders' names.")
    ] = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Also score on the images under ImageNet-C's 15 corruptions.")
    ] = False,
    severities: Annotated[str, typer.Option(help="At these severities.")] = "1,2,3,4,5",
    images: Annotated[int | None, typer.Option(help="Score on so many images, evenly chosen; default all.")] = None,
    allow_unreadable: AllowUnreadable = False,
    as_json: AsJson = False,
) -> None:
    """Score every trained network of a run: accuracy, calibration, distance to the teachers, shared mistakes.

    Images that cannot be read are named, and the exit code is 2 unless that is allowed.
    """
    from coadvise.evaluation.tables import score_lines
    from coadvise.runs.evaluate import evaluate_run

    try:
        chosen = tuple(int(word) for word in severities.split(","))
    except ValueError:
        raise UserError(f"--severities {severities} is no list of numbers; give some of them, such as 1,3,5") from None
    with closing(Terminal(Console(stderr=True))) as terminal:
        scores = evaluate_run(run, data, layout, corruptions, chosen, images, terminal)
    for line in [json.dumps(scores)] if as_json else score_lines(scores):
        show(line)
    if (lost := scores["unreadable"]) and not allow_unreadable:
        raise UserError(
            f"{len(lost)} image(s) cannot be read and are not in these scores, the first is {lost[0]}; mend them, or "
            "accept that with --allow-unreadable"
        )


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    part: Part = None,
    answer: Annotated[str, typer.Option(help="class, another token's name, or average.")] = "class",
    allow_unreadable: AllowUnreadable = False,
    as_json: AsJson = False,
) -> None:
    """Say what is on images. One that cannot be read is an error, unless allowed."""
    from coadvise.data.images import readable
    from coadvise.data.sources.folder import image_files
    from coadvise.deploy.predict import load

    student, images, unreadable = load(run, part), image_files(images), list[str]()
    if allow_unreadable:
        images, unreadable = readable(images)
    predictions = student.predict(images, answer) if images else []
    if as_json:
        rows: list[dict[str, Any]] = [
            {"image": str(i), "label": p.label, "probabilities": p.probabilities}
            for i, p in zip(images, predictions, strict=True)
        ]
        print(json.dumps([*rows, *({"unreadable": fault} for fault in unreadable)]))
        return
    for image, prediction in zip(images, predictions, strict=True):
        likely = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:3]
        show(f"{image}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in likely))
    for fault in unreadable:
        show(f"cannot be read: {fault}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for PyTorch alone.")],
    part: Part = None,
    answer: Annotated[str, typer.Option(help="class, another token's name, or average.")] = "class",
    as_json: AsJson = False,
) -> None:
    """Write a trained student as one file that answers without coadvise: pixels in, probabilities out."""
    from coadvise.deploy.export import export as run_export

    about = run_export(run, out, part, answer)
    if as_json:
        print(json.dumps({"out": str(out), **about}))
        return
    size, classes = about["image_size"], len(about["classes"])
    show(f"{out}: {about['part']}, {about['model']}, {about['bytes'] / 1e6:.2f} MB, answers by {about['answer']}")
    print(f"in: images, float32 [batch, 3, {size}, {size}], RGB in 0..1: shorter side to {size} (bicubic), its middle")
    print(f'out: probabilities [batch, {classes}]; the classes\' names are in its metadata, as JSON under "coadvise"')
    if about["difference"] is None:
        print("not run: that needs the package onnxruntime")
    else:
        print(f"checked: probabilities as the network's, to {about['difference']:.1g}")


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the networks that come with coadvise; any timm model can be a teacher too."""
    from coadvise.models import describe_models

    described = describe_models()
    if as_json:
        print(json.dumps(described))
        return
    print(f"{'model':32} {'role':8} {'parameters':>11}  image size")
    for row in described:
        print(f"{row['model']:32} {row['role']:8} {row['parameters'] / 1e6:9.2f} M  {row['image_size']}")
    print("Any model of timm can be a teacher as well: teachers.NAME.model=resnet18")


@app.command()
def studies(as_json: AsJson = False) -> None:
    """List the studies: the paper's tables as commands."""
    from coadvise.studies import STUDIES

    if as_json:
        print(json.dumps({name: study.title for name, study in STUDIES.items()}))
        return
    for name, study in STUDIES.items():
        print(f"{name:14} {study.title}")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A name of 'coadvise studies'.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the preset, a.b=c.")] = None,
    data: Annotated[str, typer.Option(help="As for fit.")] = "digits",
    preset: Annotated[str | None, typer.Option(help="As for fit.")] = None,
    seeds: Annotated[int, typer.Option(help="Students a row, at consecutive seeds.")] = 1,
    out: Annotated[str | None, typer.Option(help="Folder; default studies/DATA. Studies in it share networks.")] = None,
    jobs: Annotated[int, typer.Option(help="Networks to train at the same time, each in a process.")] = 1,
    cache: Annotated[
        bool, typer.Option("--cache", help="Store the teachers' logits: students of the same views share them.")
    ] = False,
    shift: Annotated[
        list[str] | None,
        typer.Option(help="Also score on this folder (ImageNet-A, -R, -C or like DATA); may be given several times."),
    ] = None,
    reuse: Reuse = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a study: train and compare the networks of one of the paper's tables on your data."""
    from coadvise.runs.parallel import check_jobs
    from coadvise.studies.runner import foresee_study, run_study

    changes = overrides or []
    if dry_run:
        check_jobs(jobs)
        _foreseen(foresee_study(name, data, preset, seeds, out, changes, cache), reuse, as_json)
        return
    with closing(Terminal(Console(stderr=as_json))) as terminal:
        result = run_study(
            name, data, preset, seeds, out, jobs, changes,
            listener=terminal, cache=cache, shifts=shift or [], reuse=reuse,
        )  # fmt: skip
    if as_json:
        print(json.dumps(result))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published checkpoint: .pt, .pth or .safetensors.")],
    out: Annotated[Path, typer.Option(help="The file to write, ending in .safetensors.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What shapes do not show, such as num_heads=3 or token_names=[conv].")
    ] = None,
    distillation_token: Annotated[
        str | None, typer.Option(help="The token that takes a distilled DeiT's; default the first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a published RedNet, Co-advise student or DeiT for timm.create_model."""
    from coadvise.config import parse_arguments
    from coadvise.models.published import convert as run_convert

    found = run_convert(checkpoint, out, distillation_token, **parse_arguments(arguments or []))
    if as_json:
        about = {"layout": found.layout, "model": found.model, "arguments": found.arguments, "notes": found.notes}
        print(json.dumps({"out": str(out), **about}))
        return
    print(f"{checkpoint}: {found.layout}, {sum(value.numel() for value in found.weights.values()) / 1e6:.2f} M numbers")
    for note in found.notes:
        print(note)
    settings = "".join(f", {key}={value!r}" for key, value in found.arguments.items())
    print(f"timm.create_model('{found.model}', checkpoint_path='{out}'{settings})")


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one in full.")] = None, as_json: AsJson = False
) -> None:
    """List the presets, or print one."""
    from coadvise.config import load_config, preset_names, preset_text

    if name is not None:
        config = load_config(name)
        for line in (config.model_dump_json(indent=1) if as_json else preset_text(name)).split("\n"):
            show(line)
        return
    headers = {n: preset_text(n).partition("\n")[0].removeprefix("# ") for n in preset_names()}
    if as_json:
        print(json.dumps(headers))
        return
    for preset, header in headers.items():
        print(f"{preset:14} {header}")


def main() -> None:
    """The program. Exit code 2: the user's to mend; the others go on with the same command.

    75: stopped by a signal; 74: the run directory can no longer be written; 69: another process died or hangs.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is shown escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except (UserError, StorageError, LostProcessError) as error:
        print(shown(f"coadvise: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # all is saved; leave with the code that says so
            signal.signal(name, signal.SIG_IGN)
        print(shown(f"coadvise: {stop}; run the same command again to go on"), file=sys.stderr)
        sys.exit(stop.exit_code)
