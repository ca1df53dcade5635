"""What TensorBoard, W&B offline and MLflow on SQLite stored of a run that was stopped and resumed, read back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import Stopper, never

from coadvise import Interrupted, fit
from coadvise.config.reading import read_config
from coadvise.training import trackers

Points = dict[tuple[str, int], float]  # by key and step; of a step that was repeated the last


@pytest.fixture(scope="module")
def run(tiny_images: Path, tiny_preset: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with all three, stopped in its second network and resumed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        options: dict[str, Any] = {
            "overrides": ["engine.trackers=[tensorboard, wandb, mlflow]"], "baseline": True,
            "out": tmp_path_factory.mktemp("tracked") / "run",
        }  # fmt: skip
        stopper = Stopper(lambda part, step: (part, step) == ("teachers/inv", 3))
        with pytest.raises(Interrupted):
            fit(tiny_images, tiny_preset, listener=stopper, **options)
        listener = Stopper(never)
        yield fit(tiny_images, tiny_preset, listener=listener, **options)
        assert not [line for line in listener.said if "goes on without it" in line]


@pytest.fixture(scope="module")
def wanted(run: Path) -> Points:
    """Every number of the record that has a step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        (f"{line['part']}/{key}", line["step"]): value
        for line in lines
        if "step" in line
        for key, value in trackers._figures(line)
    }
    assert {key.rpartition("/")[2] for key, _ in found} >= {"total", "class", "conv", "inv", "learning_rate"}
    return found


def _sentence(run: Path) -> str:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["sentence"]


def test_tensorboard(run: Path, wanted: Points) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert found.keys() >= wanted.keys()
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)  # float32
    (text,) = (make_ndarray(event.tensor_proto).item().decode() for event in events.Tensors("verdict/text_summary"))
    assert text == _sentence(run)
    assert len(events.Tensors("config/text_summary")) == 1, "it is told once"


def test_mlflow(run: Path, wanted: Points) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("coadvise")
    (tracked,) = client.search_runs([experiment.experiment_id])
    identity = tracked.info.run_id
    assert json.loads((run / "trackers.json").read_text())["mlflow"] == identity
    found = {
        (key, metric.step): metric.value
        for key in tracked.data.metrics
        for metric in client.get_metric_history(identity, key)
    }
    assert {key: found[key] for key in wanted} == wanted
    assert tracked.data.tags["verdict"] == _sentence(run)
    config = dict(trackers._leaves(read_config(run / "config.yaml").model_dump(mode="json")))
    assert tracked.data.params == {key: str(value) for key, value in config.items()}
    assert {file.path for file in client.list_artifacts(identity)} == {"report.html", "metrics.jsonl"}
    assert (run / "mlartifacts" / identity / "artifacts" / "report.html").read_bytes() == (
        run / "report.html"
    ).read_bytes()
    assert (tracked.info.status, tracked.info.run_name) == ("FINISHED", "run")


def _log(content: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log after seven bytes of its own, in blocks of 32 KiB."""
    assert content[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # no header fits
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb(run: Path, wanted: Points) -> None:
    from wandb.proto import wandb_internal_pb2

    found: Points = {}
    summary, identities, configured, artifacts = dict[str, Any](), set[str](), dict[str, Any](), list[str]()
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in _log(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                identities.add(record.run.run_id)
                configured |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                for key, value in row.items():
                    step = row.get(f"{'/'.join(key.split('/')[:2])}/step")
                    if step is not None:
                        found[key, step] = value
            elif record.HasField("summary"):
                for item in record.summary.update:
                    summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            elif record.HasField("artifact"):
                artifacts.append(record.artifact.name)
    assert {key: found[key] for key in wanted} == wanted
    assert identities == {json.loads((run / "trackers.json").read_text())["wandb"]}
    assert summary["verdict"] == _sentence(run)
    assert artifacts == [f"run-{identity}" for identity in identities]
    assert configured["seed"] == 0
    assert configured["data"] == read_config(run / "config.yaml").data.model_dump(mode="json")


def test_a_server_that_is_not_there_is_named_once(
    tiny_images: Path, tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    listener = Stopper(never)
    overrides = ["engine.trackers=[mlflow]", "student.recipe.epochs=1"]
    run = fit(tiny_images, tiny_preset, tmp_path / "run", listener, overrides=overrides)
    assert len([line for line in listener.said if line.startswith("mlflow: ") and "goes on without it" in line]) == 1
    assert (run / "report.html").exists()
