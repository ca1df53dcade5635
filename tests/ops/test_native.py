"""Compiling C sources: what is cached, what a library is for, and what happens where one cannot be built."""

import shutil
import subprocess
from pathlib import Path

import pytest

from coadvise.ops import native

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_kernel: None) -> Path:
    """A small source, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "source.c"
    source.write_text("int number(void) { return NUMBER; }\n")
    return source


@needs_compiler
def test_a_failing_build_is_reported_with_its_cause(source: Path, tmp_path: Path) -> None:
    source.write_text("#error not today\n")
    with pytest.warns(RuntimeWarning, match="slow: .*not today"):
        assert native.load(source, "slow") is None
    assert native.function(None, "number") is None
    assert not list(tmp_path.glob("coadvise/*"))


def test_the_environment_switches_it_off_silently(
    source: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("COADVISE_NATIVE", "0")
    assert native.load(source, "slow", "-DNUMBER=16") is None
    assert not recwarn.list


@needs_compiler
def test_a_library_is_built_once_and_again_when_damaged(source: Path, tmp_path: Path) -> None:
    first = native.build(source, "-DNUMBER=16")
    made = first.stat().st_mtime_ns
    assert native.build(source, "-DNUMBER=16") == first
    assert first.stat().st_mtime_ns == made
    first.write_bytes(b"garbage")
    library = native.load(source, "slow", "-DNUMBER=16")
    number = native.function(library, "number")
    assert number is not None
    assert number() == 16
    assert list(tmp_path.glob("coadvise/*")) == [first]


def test_a_library_is_for_one_source_compiler_processor_runtime_and_torch(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of any of them makes another library, so that machines can share a home directory."""
    said = {"version": "gcc 1"}

    def run(arguments: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        if "-o" in arguments:
            Path(arguments[-1]).write_bytes(b"")
        return subprocess.CompletedProcess(arguments, 0, said["version"], "")

    monkeypatch.setattr(native.shutil, "which", lambda name: name)
    monkeypatch.setattr(native.subprocess, "run", run)
    found = [native.build(source)]
    assert native.build(source) == found[0]
    for change in (
        lambda: source.write_text("two"),
        lambda: said.update(version="gcc 2"),
        lambda: monkeypatch.setattr(native, "_processor", lambda: "another"),
        lambda: monkeypatch.setattr(native, "_openmp_runtime", lambda: Path("/another/libgomp.so")),
        lambda: monkeypatch.setattr(native.torch, "__version__", "another"),
    ):
        change()
        found.append(native.build(source))
    found.append(native.build(source, "-DX"))
    assert len(set(found)) == len(found) == 7


@needs_compiler
def test_a_cache_that_cannot_be_written_is_read_and_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.build(source, "-DNUMBER=16")
    monkeypatch.setattr(native, "cache_folder", lambda: None)
    native._process_folder.cache_clear()
    assert native.build(source, "-DNUMBER=16") == first
    with pytest.warns(RuntimeWarning, match="cannot be written") as said:
        private = native.build(source, "-DNUMBER=8").parent
    assert len(said) == 1
    assert native.build(source, "-DNUMBER=4").parent == private != first.parent
    native._process_folder.cache_clear()
