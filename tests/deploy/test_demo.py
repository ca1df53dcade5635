"""What the demo refuses before it serves anything; tests/extras/test_demo.py drives the page in a browser."""

import shutil
import socket
import sys
from pathlib import Path

import pytest

from coadvise.deploy import demo
from coadvise.deploy.demo import listening, serve
from coadvise.errors import UserError
from coadvise.training.listener import Silent


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_what_cannot_be_served_is_refused(
    finished: Path, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        serve(tmp_path, None, "127.0.0.1", free_port, Silent())
    unfinished = shutil.copytree(finished, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "students")
    with pytest.raises(UserError, match="no finished student yet"):
        serve(unfinished, None, "127.0.0.1", free_port, Silent())
    with pytest.raises(UserError, match=r"'teachers/conv' is a teacher.*give a student"):
        serve(finished, "teachers/conv", "127.0.0.1", free_port, Silent())
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'coadvise\[demo\]'"):
        serve(finished, None, "127.0.0.1", free_port, Silent())
    assert "gradio" not in sys.modules


def test_a_port_in_use_and_an_address_of_others_are_refused(finished: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1, port {port}: Address already in use; choose another --port"):
            serve(finished, None, "127.0.0.1", port, Silent())
    for host in ("192.0.2.1", "no.such.host.invalid"):  # the first is for documentation alone
        with pytest.raises(UserError, match=f"at {host}, .*choose another --port or --host"):
            listening(host, port)
    listening("127.0.0.1", port).close()
