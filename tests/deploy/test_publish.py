"""A network goes to the hub whole or not at all, and timm and coadvise load it from there.

A server of this machine stands in for the hub: it answers the calls that the hub's own client makes.
"""

import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from tiny import CLASSES
from torch import nn

import coadvise
from coadvise import UserError, fit
from coadvise.cli import main
from coadvise.models.network import load_network
from coadvise.models.token_vit import create_token_vit
from coadvise.storage import MANIFEST

# the folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["students/advised-0", "students/alone-0", "teachers/conv"])
def test_timm_builds_the_same_network_from_the_folder(part: str, finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    found = coadvise.push(run, "me/colours", part, dry_run=True)
    assert (found["url"], found["pushed"]) == (None, False)
    folder = Path(found["folder"])
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md", "report.html"}
    network = coadvise.load(run, part)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), network.model(images))
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)


@pytest.mark.parametrize("model", ["test_vit", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_named_tokens_of_timm_s_transformers_become_registers(model: str) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    student = create_token_vit(model, ["conv", "inv"], **size).eval()
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    alone = student.as_timm()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(alone(images), student(images))
    again = timm.create_model(model, reg_tokens=alone.num_reg_tokens, **size).eval()
    again.load_state_dict(alone.state_dict())
    torch.testing.assert_close(again(images), student(images))


def test_the_card_says_what_the_record_says_and_no_path(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    text = Path(coadvise.push(run, "me/colours", dry_run=True)["folder"], "README.md").read_text()
    verdict = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert verdict["sentence"] in text
    for row in verdict["rows"]:
        assert f"| {row['name']} | {100 * row['top1']:.1f} % |" in text
    for name in CLASSES:
        assert re.search(rf"^\| {name} \| 4 \| [\d.]+ % \| [\d.]+ % \|$", text, re.M)
    assert "24 images, 8 to 8 a class" in text
    assert "conv: resnet_small, on the token(s) conv, λ 1, τ 1" in text
    header = yaml.safe_load(text.split("---")[1])
    assert (header["library_name"], header["pipeline_tag"]) == ("timm", "image-classification")
    assert "coadvise.load('hf-hub:me/colours')" in text
    assert str(Path(json.loads((run / "data.json").read_text())["root"]).parent) not in text
    assert re.search(r"```bibtex\n@inproceedings\{ren2022coadvise", text)
    teacher = Path(coadvise.push(run, "me/colours", "teachers/conv", dry_run=True)["folder"], "README.md").read_text()
    assert "Advice" not in teacher, "the verdict is the student's"


# the hub -------------------------------------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for to push and to load models."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def handle_any(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, repositories = self.path.partition("?")[0], self.server.repositories
        if self.server.cut and re.search(self.server.cut, path):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if (
            self.command in ("POST", "PUT")
            and self.headers.get("Authorization") != "Bearer hf_secret"
            and "/put/" not in path
        ):
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            about = json.loads(content)
            name = f"{about['organization']}/{about['name']}"
            there = name in repositories
            repositories.setdefault(name, {})
            self.server.private[name] = about.get("private", about.get("visibility") == "private")
            return self.json({"url": f"{self.server.url}/{name}"}, 409 if there else 200)
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(\w+/\w+)/preupload/main", path):
            files = json.loads(content)["files"]
            modes = {True: "lfs", False: "regular"}
            return self.json({"files": [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]})  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            return self.json({"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/put/{o['oid']}"}}} for o in wanted
            ]})  # fmt: skip
        if found := re.fullmatch(r"/put/(\w+)", path):
            assert hashlib.sha256(content).hexdigest() == found[1]
            self.server.large[found[1]] = content
            return self.answer(200)
        if found := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", path):
            repository = repositories[found[1]]
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository[value["path"]] = self.server.large[value["oid"]]
            self.server.commits.append(found[1])
            return self.json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{'a' * 40}", "commitOid": "a" * 40})
        if (found := re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/main)?", path)) and found[1] in repositories:
            siblings = [_described(file, data) for file, data in repositories[found[1]].items()]
            return self.json({"id": found[1], "sha": "a" * 40, "siblings": siblings})
        if (found := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path)) and found[1] in repositories:
            if (data := repositories[found[1]].get(found[2])) is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "a" * 40}
            return self.answer(200, data, about)
        return self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815  (as the library asks for them)

    def json(self, value: Any, code: int = 200) -> None:
        self.answer(code, json.dumps(value).encode())

    def answer(self, code: int, content: bytes = b"", about: dict[str, str] | None = None) -> None:
        self.send_response(code)
        more = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for key, value in {**more, **(about or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def log_message(self, *about: Any) -> None:
        pass


def _described(file: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    about: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": blob}
    if file.endswith(".safetensors"):
        about["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return about


class _Server(ThreadingHTTPServer):
    """What the hub holds, and where it cuts the connection."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.cut = ""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    server = _Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path / "home"
    for key, value in {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret"}.items():
        monkeypatch.setenv(key, value)  # of programs that the test starts; this one has read them already
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(home / "hub"))
    # Chunks in a store of its own; without it large files go by Git LFS.
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    server.shutdown()


def copied(finished: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, run], check=True)
    return run


LOADED = """
import sys, json, torch
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_DISABLE_XET = True
import coadvise
student = coadvise.load("hf-hub:me/colours")
print(json.dumps([student.part, *student.tokens, student.predict(sys.argv[1])[0].probabilities]))
import coadvise.models, timm
model = timm.create_model("hf-hub:me/colours", pretrained=True).eval()
torch.manual_seed(0)
print(json.dumps(model(torch.rand(1, 3, 16, 16))[0].tolist()))
"""


def test_a_student_is_pushed_once_and_loaded_from_there(
    hub: _Server, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(finished, tmp_path)
    monkeypatch.setattr(sys, "argv", ["coadvise", "push", str(run), "me/colours"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed: {hub.url}/me/colours"
    folder = run / "hub"
    assert hub.repositories["me/colours"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    again = coadvise.push(run, "me/colours")
    assert again == {"folder": str(folder), "url": f"{hub.url}/me/colours", "pushed": False}
    assert hub.commits == ["me/colours"], "nothing is pushed twice"
    picture = next((Path(json.loads((run / "data.json").read_text())["root"]) / "val" / "red").iterdir())
    shown = subprocess.run(
        [sys.executable, "-c", LOADED, str(picture)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert shown.returncode == 0, shown.stderr
    (part, *tokens, answer), logits = map(json.loads, shown.stdout.splitlines())
    student = coadvise.load(run)
    assert (part, tuple(tokens)) == (student.part, student.tokens)
    assert answer == pytest.approx(student.predict(picture)[0].probabilities, abs=1e-6)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.tensor(logits), student.model(torch.rand(1, 3, 16, 16))[0].detach())
    assert coadvise.push(run, "me/colours", "students/alone-0")["pushed"]
    assert len(hub.commits) == 2, "another network of ours takes its place"


@pytest.mark.parametrize("cut", [r"/commit/", r"^/api/models/"])
def test_a_cut_connection_pushes_nothing_and_the_same_command_does(
    cut: str, hub: _Server, finished: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    hub.cut = cut
    with pytest.raises(UserError, match="run the same command again: nothing was half pushed"):
        coadvise.push(run, "me/colours")
    assert hub.repositories.get("me/colours", {}) == {}
    hub.cut = ""
    assert coadvise.push(run, "me/colours")["pushed"]
    assert hub.commits == ["me/colours"]


def test_what_cannot_be_pushed_is_one_sentence(
    hub: _Server, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(finished, tmp_path)
    hub.repositories["me/theirs"] = {"README.md": b"theirs", "weights.bin": b"x"}
    for name, said in (
        ("me/theirs", r"'me/theirs' is taken: it holds README.md, weights.bin; choose another name"),
        ("colours", r"'colours' cannot be the name of a repository; give ORG/NAME"),
        ("a/b/c", r"'a/b/c' cannot be the name of a repository"),
    ):
        with pytest.raises(UserError, match=said):
            coadvise.push(run, name)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"the hub wants a token \(401\); check the connection and your token"):
        coadvise.push(run, "me/colours")
    assert not hub.commits
    assert set(hub.repositories) == {"me/theirs"}
    (run / "students" / "advised-0" / MANIFEST).unlink()
    with pytest.raises(UserError, match="run the same 'coadvise fit' command again"):
        coadvise.push(run, "me/colours")


def test_how_pictures_become_pixels_and_temperatures_go_with_it(
    hub: _Server, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(finished, tmp_path)
    network = load_network(run / "students" / "advised-0")
    network.about |= {"fit": "pad", "value_range": [0.0, 4095.0], "temperatures": {"class": 2.0, "average": 3.0}}
    network.save(run / "students" / "advised-0")
    coadvise.push(run, "me/colours", private=True)
    assert hub.private == {"me/colours": True}
    there, here = coadvise.load("hf-hub:me/colours"), coadvise.load(run)
    assert (there.fit, there.network.values) == ("pad", (0.0, 4095.0))
    images = torch.rand(2, 3, 16, 16)
    for answer in ("class", "conv", "average"):
        torch.testing.assert_close(there.answering(answer)(images), here.answering(answer)(images))


def test_a_timm_student_goes_there_as_timm_s_model(
    hub: _Server, tiny_images: Path, tiny_preset: str, tmp_path: Path
) -> None:
    few = [f"{part}.recipe.epochs=1" for part in ("student", "teachers.conv", "teachers.inv")]
    few += ["student.model=vit_tiny_patch16_224", "student.model_kwargs={patch_size: 8, embed_dim: 24, depth: 1}"]
    run = fit(tiny_images, tiny_preset, tmp_path / "run", overrides=few)
    coadvise.push(run, "me/colours")
    there, here = coadvise.load("hf-hub:me/colours"), coadvise.load(run)
    assert (there.tokens, type(there.model).__module__.partition(".")[0]) == (("class",), "timm")
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(there.answering()(images), here.answering()(images))
    assert "import coadvise.models" not in hub.repositories["me/colours"]["README.md"].decode()


def test_a_model_of_others_is_not_a_student(hub: _Server) -> None:
    hub.repositories["me/theirs"] = {"config.json": b'{"architecture": "resnet18"}'}
    hub.repositories["me/broken"] = {"config.json": b'{"architecture": "resnet18", "coadvise": {"image_size": -3}}'}
    for name, said in (
        ("me/theirs", "was not pushed by coadvise"),
        ("me/missing", "could not be loaded: "),
        ("me/broken", "config.json': '.*this does not describe a network"),
    ):
        with pytest.raises(UserError, match=said):
            coadvise.load(f"hf-hub:{name}")


def test_a_module_cannot_be_pushed(tiny_images: Path, tiny_preset: str, tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    few = ["student.recipe.epochs=1", "teachers.inv.recipe.epochs=1"]
    run = fit(tiny_images, tiny_preset, tmp_path / "run", teachers={"conv": teacher}, overrides=few)
    with pytest.raises(UserError, match="cannot be pushed: timm does not know its code"):
        coadvise.push(run, "me/colours", "teachers/conv", dry_run=True)
    assert not (run / "hub").exists()
