"""Compiling native code: once, for this processor, and a sentence when it cannot be done."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smalllm.native import build

SOURCE = 'extern "C" int answer() { return 42; }'
needs_native = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; and a package whose only source is ``toy.cpp``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SMALLLM_NATIVE", raising=False)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "toy.cpp").write_text(SOURCE)
    build._load.cache_clear()
    return tmp_path / "cache" / "smalllm"


@needs_native
def test_a_library_is_built_once(cache_folder: Path):
    assert build.load("toy").answer() == 42
    (built,) = cache_folder.iterdir()
    before = built.stat().st_mtime_ns
    build._load.cache_clear()
    assert build.load("toy").answer() == 42
    assert [(path, path.stat().st_mtime_ns) for path in cache_folder.iterdir()] == [(built, before)]


@needs_native
@pytest.mark.parametrize("change", ["source", "flags", "processor"])
def test_another_source_flag_or_processor_is_another_library(
    change: str, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build.load("toy")
    match change:
        case "source":
            (tmp_path / "toy.cpp").write_text(SOURCE.replace("42", "43"))
        case "flags":
            monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DNEW"))
        case "processor":
            monkeypatch.setattr(build, "_cpu", lambda: b"another")
    build._load.cache_clear()
    assert build.load("toy").answer() == (43 if change == "source" else 42)
    assert len(list(cache_folder.iterdir())) == 2


@needs_native
def test_several_threads_get_one_library(cache_folder: Path):
    with ThreadPoolExecutor(8) as pool:
        libraries = list(pool.map(build.load, ["toy"] * 8))
    assert all(library is libraries[0] for library in libraries)
    assert len(list(cache_folder.iterdir())) == 1


@needs_native
def test_begin_builds_beside_other_work_and_swallows_what_fails(tmp_path: Path):
    build.begin("toy")
    build.wait()
    assert len(list(build.cache_folder().glob("toy-*.so"))) == 1
    assert build.load("toy").answer() == 42
    (tmp_path / "broken.cpp").write_text("no C++")
    build.begin("broken")
    with pytest.raises(build.Unavailable, match="could not build broken.cpp: .*error"):
        build.load("broken")


def test_without_a_compiler_the_reason_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.Unavailable, match="no C\\+\\+ compiler here"):
        build.load("toy")


@needs_native
def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'fatal error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.Unavailable, match="broken-compiler could not build toy.cpp: fatal error"):
        build.load("toy")


def test_a_cache_that_cannot_be_written_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.Unavailable):
        build.load("toy")


def test_native_code_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SMALLLM_NATIVE", "0")
    with pytest.raises(build.Unavailable, match="SMALLLM_NATIVE=0"):
        build.load("toy")


@needs_native
def test_a_damaged_library_is_a_sentence(cache_folder: Path):
    path = build.compiler()
    assert path is not None
    cache_folder.mkdir(parents=True)
    fingerprint = build._fingerprint(build.FOLDER / "toy.cpp", path)
    (cache_folder / f"toy-{fingerprint}.so").write_bytes(b"not a library")
    with pytest.raises(build.Unavailable, match="could not build toy.cpp"):
        build.load("toy")


def test_the_cache_is_in_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert build.cache_folder() == tmp_path / ".cache" / "smalllm"
