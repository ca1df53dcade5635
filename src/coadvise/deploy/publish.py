"""A trained network on the Hugging Face hub: a folder that timm loads, with a card made from the run's record."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from torch import nn

from coadvise.advice import CLASS
from coadvise.config.reading import read_config
from coadvise.config.schema import HUB, plain_size, sides
from coadvise.data.scanned import PREPROCESSING
from coadvise.deploy.card import card
from coadvise.deploy.predict import TrainedStudent, load_from_run
from coadvise.errors import UserError
from coadvise.evaluation.scores import finished_predictions
from coadvise.models.module import ModuleTeacher
from coadvise.models.network import Network, checked_about, create_network
from coadvise.models.token_vit import TokenViT
from coadvise.runs.run import CONFIG, DATA
from coadvise.storage import replacing_folder, write_text, write_weights
from coadvise.training.metrics import last_of, read_records

CARD, SETTINGS, WEIGHTS, REPORT = "README.md", "config.json", "model.safetensors", "report.html"
_CROPS = {"crop": "center", "pad": "border", "stretch": "squash"}  # timm's names of our ways to fit a picture


def push(
    run: str | Path,
    name: str,
    part: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Publishes a network of a finished run on the hub, in one commit.

    The folder is written to RUN/hub first: the weights, a config.json that timm reads, a model card, and the report,
    which shows pictures of the data.

    Args:
        run: Run directory.
        name: ORG/NAME on the hub.
        part: The network, such as "teachers/conv"; by default the first co-advised student.
        private: A new repository is not public.
        dry_run: Only write the folder.
        say: Receives what the folder holds.

    Returns:
        "folder", "url" (None for a dry run), and "pushed", whether anything was. What is there already is not pushed
        again.

    Raises:
        UserError: A run that is not finished, a network that timm cannot build, a name that is taken or not allowed, no
            token, no connection. Nothing is half pushed: a commit is all or nothing.
    """
    run = Path(run)
    if not re.fullmatch(r"\w[\w-]*/\w[\w.-]*", name, re.ASCII):
        raise UserError(f"'{name}' cannot be the name of a repository; give ORG/NAME, of letters, digits, -, _ and .")
    student = load_from_run(run, part)
    folder = _write_folder(run, student, name)
    pictures = " and the report, which shows pictures of the data" if (folder / REPORT).exists() else ""
    say(f"{folder}: {WEIGHTS}, {SETTINGS}, {CARD}{pictures}")
    if dry_run:
        return {"folder": str(folder), "url": None, "pushed": False}
    try:
        url, pushed = _upload(folder, name, private)
    except UserError:
        raise
    except Exception as error:  # the client's own kinds, and those of two libraries below it
        raise UserError(
            f"'{name}' could not be pushed: {_said(error)}; check the connection and your token ('hf auth login', or "
            "HF_TOKEN), and run the same command again: nothing was half pushed"
        ) from None
    return {"folder": str(folder), "url": url, "pushed": pushed}


def load(run: str | Path, part: str | None = None) -> TrainedStudent:
    """Loads a network of a finished run, or from the hub.

    Args:
        run: Run directory, or hf-hub:ORG/NAME of a network that `coadvise push` published.
        part: The network of the run, such as "students/alone-0"; by default the first co-advised student.

    Raises:
        UserError: No such run, the network is not finished, or the hub has none or cannot be reached.
    """
    return _from_hub(str(run)) if str(run).startswith(HUB) else load_from_run(run, part)


def _from_hub(name: str) -> TrainedStudent:
    where = name.removeprefix(HUB)
    try:
        settings = json.loads(Path(hf_hub_download(where, SETTINGS)).read_text())
    except Exception as error:
        raise UserError(f"'{name}' could not be loaded: {_said(error)}; check its name and your connection") from None
    own = settings.get("coadvise")
    if not isinstance(own, Mapping):
        raise UserError(
            f"'{name}' was not pushed by coadvise; it can be a teacher's start (teachers.NAME.start={name}), and timm "
            "loads it"
        )
    arguments, cfg = settings.get("model_args") or {}, settings.get("pretrained_cfg") or {}
    described = {
        **{key: own[key] for key in (*PREPROCESSING, "temperatures", "image_size") if key in own},
        "model": settings.get("architecture"),
        "model_kwargs": {key: value for key, value in arguments.items() if key != "img_size"},
        "classes": settings.get("label_names"),
        **{key: cfg.get(key) for key in ("mean", "std")},
    }
    network = create_network(checked_about(described, f"{name}: {SETTINGS}"), source=HUB + where)
    return TrainedStudent(network, str(own.get("part")), tuple(own.get("tokens") or (CLASS,)))


def _write_folder(run: Path, student: TrainedStudent, name: str) -> Path:
    """RUN/hub, whole or as it was."""
    network = student.network
    model, arguments = _timms(network)
    whole = model is network.model  # else its class token alone
    tokens = student.tokens if whole else (CLASS,)
    temperatures = {key: value for key, value in network.temperatures.items() if whole or key == CLASS}
    records, config = read_records(run), read_config(run / CONFIG)
    data = json.loads((run / DATA).read_text())
    result = last_of(records, "result", student.part)
    if result is None:
        raise UserError(f"'{run}' is not finished; run the same 'coadvise fit' again")
    logits, labels = finished_predictions(run, student.part)
    folder = run / "hub"
    with replacing_folder(folder) as made:
        write_weights(made / WEIGHTS, model.state_dict(), {"format": "pt"})
        settings = _settings(network, model, arguments)
        settings["coadvise"] = {
            "part": student.part, "tokens": list(tokens), "image_size": plain_size(student.image_size),
            **{key: network.about[key] for key in PREPROCESSING if key in network.about},
            **({"temperatures": temperatures} if temperatures else {}),
        }  # fmt: skip
        write_text(made / SETTINGS, json.dumps(settings, indent=2) + "\n")
        text = card(
            name, student.part, network, config, data, result, last_of(records, "verdict"), logits[CLASS], labels,
            needs_coadvise=not _is_timms_own(model),
        )  # fmt: skip
        write_text(made / CARD, text)
        if (run / REPORT).exists():
            shutil.copy(run / REPORT, made / REPORT)
    return folder


def _timms(network: Network) -> tuple[nn.Module, dict[str, Any]]:
    """The network as timm builds it, and its arguments. Named tokens of timm's transformers become registers."""
    model, arguments = network.model, dict(network.about["model_kwargs"])
    if isinstance(model, ModuleTeacher):
        raise UserError("a module that was given from Python cannot be pushed: timm does not know its code")
    if not isinstance(model, TokenViT):
        return model, arguments
    arguments.pop("token_names")
    arguments.pop("aligned", None)
    vit = model.as_timm()
    return vit, arguments | ({"reg_tokens": vit.num_reg_tokens} if vit.num_reg_tokens else {})


def _is_timms_own(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] == "timm"


def _settings(network: Network, model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of timm's format."""
    about, known = network.about, model.pretrained_cfg
    height, width = sides(about["image_size"])
    return {
        "architecture": about["model"].partition(".")[0],
        "num_classes": len(network.classes),
        "num_features": model.num_features,
        "label_names": list(network.classes),
        "model_args": {**arguments, **({"img_size": [height, width]} if network.fixed_image_size else {})},
        "pretrained_cfg": {
            "custom_load": False,
            "num_classes": len(network.classes),
            "input_size": [3, height, width],
            "fixed_input_size": bool(known.get("fixed_input_size")),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": _CROPS[about.get("fit", "crop")],
            "mean": about["mean"],
            "std": about["std"],
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


def _upload(folder: Path, name: str, private: bool) -> tuple[str, bool]:
    """The repository's address, and whether anything was pushed."""
    api = HfApi()
    try:
        there = api.model_info(name, files_metadata=True)
    except RepositoryNotFoundError:
        there = None
    if there is not None:
        held = {file.rfilename: file for file in there.siblings or ()}
        if held.keys() - {".gitattributes"}:
            _check_ours(name, held)
            if all(_is_same(folder / file, held.get(file)) for file in sorted(path.name for path in folder.iterdir())):
                return f"{api.endpoint}/{name}", False
    url = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="A network trained by coadvise")
    return str(url), True


def _check_ours(name: str, held: Mapping[str, Any]) -> None:
    """Raises UserError for a repository that holds something else."""
    if SETTINGS in held:
        settings = json.loads(Path(hf_hub_download(name, SETTINGS)).read_text())
        if isinstance(settings, dict) and "coadvise" in settings:
            return
    raise UserError(f"'{name}' is taken: it holds {', '.join(sorted(held)[:5])}; choose another name")


def _is_same(path: Path, held: Any) -> bool:
    """Whether the hub holds a file's content, by the digest that it keeps: of git, or SHA-256 of large files."""
    if held is None:
        return False
    content = path.read_bytes()
    if held.lfs is not None:
        return bool(held.lfs.sha256 == hashlib.sha256(content).hexdigest())
    return bool(held.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _said(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return "the hub wants a token (401)"
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
