"""The command line: parse, call, print. A user's error is one line and exit code 2."""

import inspect
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from coadvise import __version__
from coadvise.errors import Interrupted, LostProcessError, StorageError, UserError
from coadvise.machine import stop_signals
from coadvise.runs.options import (
    DATA_HELP,
    OUTPUT,
    FitOptions,
    Help,
    Options,
    PlanOptions,
    RunOptions,
    StudyOptions,
    described,
)
from coadvise.terminal import Terminal, shown

if TYPE_CHECKING:
    from coadvise.runs.estimate import Forecast

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Complete commands with the Tab key: run 'coadvise --install-completion' once.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
AllowUnreadable = Annotated[
    bool, typer.Option("--allow-unreadable", help="Skip images that cannot be read, and still exit with 0.")
]
Part = Annotated[
    str | None, typer.Option(help="Another network of the run, such as students/alone-0 or teachers/conv.")
]
Answer = Annotated[str, typer.Option(help="Output head: class, the name of another token, or average.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only list what would be trained, and for how long.", rich_help_panel=OUTPUT),
]


def show(text: str) -> None:
    print(shown(text))


def _ignore(text: str) -> None:
    """For a line that has no place in JSON."""


class GroupedCommand(TyperCommand):
    """Lists arguments and options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                heading = getattr(parameter, "rich_help_panel", None) or "Options"
                groups.setdefault(heading, []).append(record)
        for heading in sorted(groups, key=lambda name: name == "Options"):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])


def command_of(options: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function of an options object; its parameters are the options' fields, then its own."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(function).parameters.values()][1:]

        def command(**given: Any) -> None:
            rest = {parameter.name: given.pop(parameter.name) for parameter in own}
            function(options.of(**{name: value for name, value in given.items() if value is not None}), **rest)

        parameters = [_parameter(field.name, field.default, kind, about) for field, kind, about in described(options)]
        signature = inspect.Signature([*parameters, *own])
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        command.__signature__ = signature  # type: ignore[attr-defined]
        app.command(cls=GroupedCommand)(command)
        return function

    return decorate


def _parameter(name: str, default: Any, kind: Any, about: Help) -> inspect.Parameter:
    """An option of a run as typer wants it."""
    if kind == tuple[str, ...]:
        kind, default = list[str] | None, None
    required = default is MISSING
    if required or about.positional:
        spelled = typer.Argument(help=about.text, rich_help_panel=about.group, show_default=False)
    else:
        flag = about.flag or f"--{name.replace('_', '-')}"
        spelled = typer.Option(flag, help=about.text, rich_help_panel=about.group, show_default=kind is not bool)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(
        name, keyword, annotation=Annotated[kind, spelled], default=inspect.Parameter.empty if required else default
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"coadvise {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train small, accurate vision models by co-advice of teachers with different inductive bias."""


def _print_estimate(
    estimate: Callable[[Callable[[str], None], Callable[[str, float], None]], "Forecast"],
    options: RunOptions, preset: str, as_json: bool,
) -> None:  # fmt: skip
    """Prints what would be trained, each network as soon as its time is known."""
    networks = []

    def tell(network: str, seconds: float) -> None:
        networks.append({"network": network, "seconds": seconds})
        if not as_json:
            print(f"{f'{seconds / 60:.1f} min' if seconds else 'done':>10}  {shown(network)}", flush=True)

    found = estimate(_ignore if as_json else show, tell)
    if as_json:
        print(json.dumps({"networks": networks, "seconds": found.seconds, "jobs": found.jobs}))
        return
    print(f"    in all: {found.text()}")
    if options.reuse is not None:
        print("            networks that --reuse may copy are included: what can be copied is only known in the run")
    if warning := found.warning(preset):
        show(warning)


@command_of(FitOptions)
def fit(options: FitOptions, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Train teachers and a co-advised student on a folder of labelled images."""
    from coadvise.runs.plan import plan_fit

    plan = plan_fit(options)  # refuses bad input before PyTorch is imported
    from coadvise.runs.fit import estimate_fit, run_fit
    from coadvise.training.metrics import last_of, read_records

    if dry_run:
        if plan.by_default and not as_json:
            show(f"preset {plan.preset}")
        _print_estimate(partial(estimate_fit, plan), options, plan.preset, as_json)
        return
    with closing(Terminal(Console(stderr=as_json))) as terminal:
        folder = run_fit(plan, terminal)
    if as_json and _is_first_process():
        print(json.dumps({"run": str(folder), **(last_of(read_records(folder), "verdict") or {})}))


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@app.command()
def check(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="How the data are read, as for fit: data.KEY=value and seed=N.", show_default=False),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A run whose teachers judge the labels; its data options are used too.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="A network that judges the labels: a timm model with published weights, a file of weights named "
            "after its model, such as resnet18.safetensors, or a folder such as runs/x/teachers/conv."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write. Default: NAME-check.html.")] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Also write a table for fit, ending in .csv, without what is wrong. See --leave-out."),
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(
            help="What --write leaves out: unreadable, duplicates (further copies of a file; the scored copy stays), "
            "two-labels (identical files under two labels), near (resized or recompressed copies), suspects (training "
            "images whose labels are probably wrong). Default: asked on a terminal, else the first three."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what is likely to go wrong with some data: copies, wrong labels, broken files. Trains nothing.

    Writes a page, and with --write a table without what is wrong. The exit code is 0, whatever is found.
    """
    from coadvise.data.sources import short_name
    from coadvise.inspection.check import check_outputs, inspect, source_to_check, write_cleaned, write_page
    from coadvise.inspection.findings import KINDS, USUALLY

    page = out or Path(f"{short_name(data)}-check.html")
    kinds = None if leave_out is None else tuple(filter(None, leave_out.split(",")))
    source = source_to_check(data, run, overrides or ())
    check_outputs(source, page, write, kinds)
    with closing(Terminal(Console(stderr=as_json))) as terminal:
        found = inspect(source, run, features, terminal)
    write_page(found, page)
    result = {**found.plain(), "page": str(page)}
    for line in () if as_json else (*found.lines(), f"page: {page}"):
        show(line)
    if write is not None:
        if kinds is None and not as_json and sys.stdin.isatty():
            counts = {kind: len(places) for kind, places in found.left_out(tuple(KINDS)).items()}
            kinds = tuple(
                kind for kind, what in KINDS.items()
                if counts[kind] and typer.confirm(f"leave out {counts[kind]} {what}?", default=kind in USUALLY)
            )  # fmt: skip
        left_out = write_cleaned(found, write, USUALLY if kinds is None else kinds)
        result["written"] = {"table": str(write), "left_out": left_out}
        if not as_json:
            what = ", ".join(f"{count} {KINDS[kind]}" for kind, count in left_out.items() if count) or "nothing"
            show(f"table: {write}, left out: {what}")
    if as_json:
        print(json.dumps(result))


@command_of(PlanOptions)
def plan(options: PlanOptions, as_json: AsJson = False) -> None:
    """Foresee time, memory, loader cores and bytes of a training that is not begun, and what holds it up."""
    from coadvise.costs.ask import question
    from coadvise.costs.table import lines, plain

    if options.calibrate:
        from coadvise.costs.calibrate import calibrate
        from coadvise.costs.machine import save

        path = save(calibrate(partial(print, file=sys.stderr)), options.calibration)
        print(f"calibration: {path}", file=sys.stderr)
        if options.preset is None:
            return
    from coadvise.costs.foresee import foresee

    found = foresee(question(options))
    for line in [json.dumps(plain(found))] if as_json else lines(found):
        show(line)


@app.command()
def shard(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[str, typer.Option(help="Where to write: a folder, or an address such as s3://BUCKET/PATH.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="How the data are read, as for fit: data.KEY=value and seed=N.", show_default=False),
    ] = None,
    presize: Annotated[
        int, typer.Option(min=0, help="Resize to this shorter side, in pixels. 0 keeps the files as they are.")
    ] = 0,
    megabytes: Annotated[float, typer.Option(min=0.001, help="About the size of a shard.")] = 64,
    part: Annotated[
        str | None, typer.Option(help="K/N: this process writes every N-th shard, from the K-th on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write data as tar shards with an index, for 'fit shards:URL': data that no disk holds.

    What is whole there stays. Any number of processes may write together: on one machine as they are, on several with
    --part. The last one writes the index.
    """
    from dataclasses import asdict

    from coadvise.runs.shard import shard as run_shard

    with closing(Terminal(Console(stderr=as_json))) as terminal:
        done = run_shard(data, out, overrides or (), presize, megabytes, part, terminal)
    if as_json:
        print(json.dumps(asdict(done)))


@app.command()
def cache(
    run: Annotated[Path, typer.Argument(help="A run directory with trained teachers. It is only read.")],
    out: Annotated[Path | None, typer.Option(help="Folder for 'coadvise fit --cache'. Default: RUN/cache.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of student seeds, counted from the run's seed.")] = 1,
    epochs: Annotated[int | None, typer.Option(help="Epochs of views. Default: the student's.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that share the work. Further commands may join in.")] = 1,
    top_k: Annotated[
        int | None, typer.Option(help="Largest logits kept of an image if there are many classes. Default: 32.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store the logits of a run's teachers on its students' views, for later runs."""
    from coadvise.runs.build_cache import build_cache

    with closing(Terminal(Console(stderr=as_json))) as terminal:
        folder = build_cache(run, out, seeds, epochs, jobs, top_k, terminal)
    if as_json and _is_first_process():
        print(json.dumps({"cache": str(folder)}))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    data: Annotated[
        str | None,
        typer.Option(help="Score on this folder, table or dataset. Default: the images that the run was scored on."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="folder, imagenet-a, imagenet-r or imagenet-c. Default: recognised by folder names."),
    ] = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Also score on the images under ImageNet-C's 15 corruptions.")
    ] = False,
    severities: Annotated[str, typer.Option(help="Severities of the corruptions, 1 to 5.")] = "1,2,3,4,5",
    images: Annotated[int | None, typer.Option(help="Score on this many images, evenly chosen. Default: all.")] = None,
    allow_unreadable: AllowUnreadable = False,
    as_json: AsJson = False,
) -> None:
    """Score every trained network of a run: accuracy, calibration, distance to the teachers, shared mistakes.

    Images that cannot be read are named, and the exit code is then 2, unless --allow-unreadable is given.
    """
    from coadvise.evaluation.tables import score_lines
    from coadvise.runs.evaluate import evaluate_run

    try:
        chosen = tuple(int(word) for word in severities.split(","))
    except ValueError:
        raise UserError(f"--severities {severities} is no list of numbers; give for instance 1,3,5") from None
    with closing(Terminal(Console(stderr=True))) as terminal:
        scores = evaluate_run(run, data, layout, corruptions, chosen, images, terminal)
    for line in [json.dumps(scores)] if as_json else score_lines(scores):
        show(line)
    if (lost := scores["unreadable"]) and not allow_unreadable:
        raise UserError(
            f"{len(lost)} image(s) cannot be read and are not in these scores, the first is {lost[0]}; repair them, or "
            "accept that with --allow-unreadable"
        )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run directories; the first is compared with.")],
    out: Annotated[Path | None, typer.Option(help="Also write a page, ending in .html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare finished runs: accuracies, paired differences, and what advice is worth in all of them together."""
    from coadvise.runs.compare import compare as run_compare
    from coadvise.runs.compare import comparison_lines

    found = run_compare(runs, out)
    if as_json:
        print(json.dumps(found))
        return
    for line in comparison_lines(found):
        show(line)
    if out is not None:
        show(f"page: {out}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    part: Part = None,
    answer: Answer = "class",
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Also write a table of what every token and every teacher says.")
    ] = None,
    attention: Annotated[
        Path | None,
        typer.Option(help="Also draw where each token looks: a PNG file, a row an image, dark where it does not look."),
    ] = None,
    allow_unreadable: AllowUnreadable = False,
    as_json: AsJson = False,
) -> None:
    """Classify images. One that cannot be read is an error, unless --allow-unreadable is given."""
    from coadvise.data.images import readable
    from coadvise.data.sources.folder import image_files
    from coadvise.deploy.publish import load

    student, images, unreadable = load(run, part), image_files(images), list[str]()
    if allow_unreadable:
        images, unreadable = readable(images)
    if attention is not None:
        student.draw_attention(images, attention)
    if csv is not None:
        from coadvise.deploy.opinions import write_opinions

        write_opinions(student, run, images, csv)
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
    for what, path in (("table", csv), ("attention", attention)):
        if path is not None:
            show(f"{what}: {path}")


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    part: Annotated[str | None, typer.Option(help="Another student of the run, such as students/alone-0.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 opens the page to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 7860,
) -> None:
    """Serve a page: drop a photograph, see what every token and teacher says, where tokens look, what is similar."""
    from coadvise.deploy.demo import serve

    with closing(Terminal(Console())) as terminal:
        serve(run, part, host, port, terminal)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for PyTorch.")],
    part: Part = None,
    answer: Answer = "class",
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="The file takes a decoded picture of any size, uint8 [H, W, 3].")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise with training images; accuracy and speed are measured.")
    ] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write an int8 file that loses more than a point of accuracy.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export a trained student as one file that runs without coadvise: pixels in, probabilities out."""
    from coadvise.deploy.export import export as run_export
    from coadvise.deploy.export import export_lines

    say = partial(print, file=sys.stderr) if as_json else show
    about = run_export(run, out, part, answer, preprocess, int8, allow_loss, say)
    for line in [json.dumps({"out": str(out), **about})] if as_json else export_lines(out, about):
        show(line)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    name: Annotated[str, typer.Argument(help="ORG/NAME on the hub.")],
    part: Part = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is not public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write the folder, RUN/hub.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a trained network on the Hugging Face hub: weights for timm, a model card, the report.

    The report shows pictures of the data. What is there already is not pushed again.
    """
    from coadvise.deploy.publish import push as run_push

    done = run_push(run, name, part, private, dry_run, _ignore if as_json else show)
    if as_json:
        print(json.dumps(done))
    elif not dry_run:
        show(f"pushed: {done['url']}" if done["pushed"] else f"there already: {done['url']}")


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the networks of coadvise. Any timm model can be a teacher, too."""
    from coadvise.models import describe_models

    described = describe_models()
    if as_json:
        print(json.dumps(described))
        return
    print(f"{'model':32} {'role':8} {'parameters':>11}  image size")
    for row in described:
        print(f"{row['model']:32} {row['role']:8} {row['parameters'] / 1e6:9.2f} M  {row['image_size']}")
    print("Any timm model can be a teacher, too: teachers.NAME.model=resnet18")
    print("timm's vision transformers can be students: student.model=vit_small_patch16_224 student.start=true")


@app.command()
def studies(
    name: Annotated[str | None, typer.Argument(help="Print this study's rows, the paper's figures and claims.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the studies, the paper's tables as commands, or print one. Nothing is trained."""
    from coadvise.studies import STUDIES, study_named

    if name is not None:
        study = study_named(name)
        for line in [json.dumps({"name": name, **study.described()})] if as_json else study.lines():
            show(line)
        return
    if as_json:
        print(json.dumps({name: study.title for name, study in STUDIES.items()}))
        return
    for name, study in STUDIES.items():
        print(f"{name:14} {study.title}")


@command_of(StudyOptions)
def study(options: StudyOptions, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Run a study: train and compare the networks of one of the paper's tables on your data."""
    from coadvise.studies.plan import study_config

    study_config(options)  # refuses bad input before PyTorch is imported
    from coadvise.studies.runner import estimate_study, run_study_of

    if dry_run:
        _print_estimate(partial(estimate_study, options), options, options.preset or "", as_json)
        return
    with closing(Terminal(Console(stderr=as_json))) as terminal:
        result = run_study_of(options, terminal)
    if as_json:
        print(json.dumps(result))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A model of timm with published weights, or hf-hub:ORG/NAME.")],
) -> None:
    """Download a network's weights into the local cache, for a start without a connection."""
    from coadvise.models.pretrained import fetch as run_fetch

    run_fetch(name)
    print(f"{name}: in the local cache; give it as teachers.NAME.start")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published checkpoint: .pt, .pth or .safetensors.")],
    out: Annotated[Path, typer.Option(help="The file to write, ending in .safetensors.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="What the shapes of its weights do not show, such as num_heads=3 or token_names=[conv]."),
    ] = None,
    distillation_token: Annotated[
        str | None,
        typer.Option(help="The token that gets the weights of a DeiT's distillation token. Default: the first."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a published RedNet, Co-advise student or DeiT for timm.create_model."""
    from coadvise.config.reading import parse_arguments
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
    name: Annotated[str | None, typer.Argument(help="Print this preset in full.")] = None, as_json: AsJson = False
) -> None:
    """List the presets, or print one."""
    from coadvise.config.reading import load_config, preset_names, preset_text

    if name is not None:
        config = load_config(name)
        for line in (config.model_dump_json(indent=1) if as_json else preset_text(name)).split("\n"):
            show(line)
        return
    headers = {n: preset_text(n).partition("\n")[0].removeprefix("# ") for n in preset_names()}
    if as_json:
        print(json.dumps(headers))
        return
    width = max(map(len, headers))
    for preset, header in headers.items():
        print(f"{preset:{width}} {header}")


def main() -> None:
    """The program. Exit code 2: usage or configuration error. After the others the same command continues.

    75: stopped by a signal; 74: the run directory cannot be written any more; 69: another process died or hangs.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that the terminal's encoding lacks are shown escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except (UserError, StorageError, LostProcessError) as error:
        print(shown(f"coadvise: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        for name in stop_signals():  # everything is saved; a further signal changes nothing
            signal.signal(name, signal.SIG_IGN)
        print(shown(f"coadvise: {stop}; run the same command again to continue"), file=sys.stderr)
        sys.exit(stop.exit_code)
    finally:
        _flush()


def _flush() -> None:
    """Writes what is buffered; a reader that is gone is exit code 1, without Python's message about it at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
