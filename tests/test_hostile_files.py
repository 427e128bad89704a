"""Files that somebody made to hurt the reader: an import ends with a model or with one sentence, at once, and runs nothing.

Every case is a function of its number, so that `hostile("llama2c", 17, folder)` makes again what failed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_runs import random_run
from test_untrusted import strange

from smalllm.config import UserError
from smalllm.export import gguf, huggingface, llama2c

FORMATS: dict[str, tuple[Any, str]] = {
    "huggingface": (huggingface, "f32"), "llama2c": (llama2c, "f32"), "llama2c-q8_0": (llama2c, "q8_0"), "gguf": (gguf, "f16"),
}  # fmt: skip
"""Module and dtype of each; every module has a `write` and a `read`."""
READ = ("config.json", "model.safetensors", "tokenizer.model", "model.bin", "tokenizer.bin")
"""The files of a folder that are read; others may hold what they like."""
CASES = 40  # of each format; many thousands are tried by tests/reliability (F1)
SLOWEST = 1.0
ROOM = 100 << 20
NUMBERS = [0, 1, -1, 2, 7, 255, 2**15, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *NUMBERS, -(2**31), 10**400, 0.5, 1e308, 1e-320, True, False, None, "", "0", "llama", "\ud800", "\0", "../up", "x" * 5000,
    1024, 2**20, [], [0], [2**62, 2**62], [2**62] * 100_000, [-1, 4], [0, 8], [[]], {}, {"a": {}}, {"rope_type": "linear", "factor": 2.0},
    {"rope_theta": 10**400}, {"rope_theta": "1"}, {"rope_type": "default", "rope_theta": -1.0},
]  # fmt: skip
TEXTS = [
    b"", b"[" * 100_000, b'{"a":' * 100_000, b"{" + b'"a":1,' * 3 + b'"a":2}', b'{"a": NaN}', b'{"a": -Infinity}',
    b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"9" * 4000 + b"}", b"null", b"[]", b'"x"', b"\xff\xfe",
    b"\xef\xbb\xbf{}", b'{"a": "\\ud800"}', b"{}" + b" " * 100_000, b"{", b'{"__metadata__": {"a": 1}}', b"\0" * 100,
]  # fmt: skip
"""Not one of them is what any JSON file of a model says."""


@pytest.fixture(scope="module", params=FORMATS)
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that is as it should be, named after its format."""
    folder, (module, dtype) = tmp_path_factory.mktemp("good"), FORMATS[request.param]
    module.write(random_run(folder / "run"), folder / request.param, dtype)
    module.read(folder / request.param)
    return folder / request.param


only_huggingface = pytest.mark.parametrize("good", ["huggingface"], indirect=True)


# ── cases ──


def hostile(good: Path, number: int, folder: Path) -> Path:
    """Case so-and-so: a copy of an export with one or two of its files damaged."""
    draw, path = random.Random(number), folder / good.name
    shutil.copytree(good, path) if good.is_dir() else shutil.copy(good, path)
    files = [path / name for name in READ if (path / name).exists()] if path.is_dir() else [path]
    for file in draw.sample(files, min(len(files), draw.choice([1, 1, 1, 2]))):
        damage(draw, file)
    return path


def damage(draw: random.Random, file: Path) -> None:
    """Change a file as its kind suggests, or as any file."""
    ways = [flipped, cut, grown, numbered, replaced]
    own = {
        ".json": [json_text, json_key] * 3,
        ".safetensors": [tensors_header] * 6,
        ".bin": [numbered] * 5,
        "": [numbered_anywhere] * 5,
    }  # "": GGUF
    data = draw.choice([*ways, *own.get(file.suffix, [])])(draw, file.read_bytes())
    file.write_bytes(data)


def flipped(draw: random.Random, data: bytes) -> bytes:
    """Some bytes at the beginning, where the structure is."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if changed:
            changed[draw.randrange(min(len(changed), draw.choice([8, 64, 4096])))] = draw.randrange(256)
    return bytes(changed)


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.choice([0, 1, 7, 8, 9, 27, 28, 255, len(data) // 2, len(data) - 1])]


def grown(draw: random.Random, data: bytes) -> bytes:
    return data + bytes(draw.choice([1, 4, 4096]))


def numbered(draw: random.Random, data: bytes) -> bytes:
    """Another number at one of the first places of a file."""
    size = draw.choice([4, 8])
    place = draw.randrange(0, 64, size)
    value = draw.choice(NUMBERS) % (1 << 8 * size)
    return data[:place] + value.to_bytes(size, "little") + data[place + size :]


def numbered_anywhere(draw: random.Random, data: bytes) -> bytes:
    """Another number where lengths, counts and types stand between texts."""
    place, size = draw.randrange(min(len(data), draw.choice([200, 2000, 20_000]))), draw.choice([4, 8])
    return data[:place] + (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little") + data[place + size :]


def replaced(draw: random.Random, data: bytes) -> bytes:
    return draw.choice([*TEXTS, pickle.dumps({"a": 1}), b"PK\x03\x04" + data[4:], data[::-1], bytes(len(data))])


def json_text(draw: random.Random, data: bytes) -> bytes:
    return draw.choice(TEXTS)


def json_key(draw: random.Random, data: bytes) -> bytes:
    """One value anywhere in a JSON file becomes another, or goes, or comes twice."""
    value = json.loads(data)
    inner = draw.choice(list(dictionaries(value)))
    key = draw.choice([*inner, "auto_map", "trust_remote_code", "more"])
    match draw.randrange(4):
        case 0:
            inner.pop(key, None)
        case 1:
            text = json.dumps(value)
            return text.replace("{", '{"%s": 1, "%s": 2, ' % (key, key), 1).encode()  # noqa: UP031
        case _:
            inner[key] = draw.choice(VALUES)
    return json.dumps(value).encode()


def dictionaries(value: Any) -> Iterator[dict]:
    """Every object in a JSON value that has keys."""
    if isinstance(value, dict) and value:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from dictionaries(inner)


def tensors_header(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header: its length, its text, or what it says of a tensor."""
    (length,) = struct.unpack_from("<Q", data)
    header, rest = data[8 : 8 + length], data[8 + length :]
    match draw.randrange(4):
        case 0:
            return (
                struct.pack("<Q", draw.choice([*NUMBERS[:2], length + 1, length - 1, 100 << 20, *NUMBERS[9:]]) % 2**64)
                + data[8:]
            )
        case 1:
            header = draw.choice(TEXTS)
        case 2:
            value = json.loads(header)
            tensor = value[draw.choice([name for name in value if name != "__metadata__"])]
            key = draw.choice(["shape", "dtype", "data_offsets"])
            tensor[key] = draw.choice([*VALUES, "F64", "BOOL", "I8", "F8_E4M3", [0, 2**62], [2**62, 2**62 + 4], [4, 0]])
            header = json.dumps(value).encode()
        case _:
            header = json_key(draw, header)
    return struct.pack("<Q", len(header)) + header + rest


# ── what must hold ──


def read(good: Path, path: Path) -> str | None:
    """What the reader says of a file; None where it takes it."""
    began = (
        time.process_time()
    )  # of this process: others may keep the machine busy, and a reader that waits runs into the timeout
    try:
        FORMATS[good.name][0].read(path)
        said = None
    except UserError as error:
        said = str(error)
    assert time.process_time() - began < SLOWEST
    return said


def check_cases(good: Path, folder: Path, count: int) -> int:
    """Try so many cases; how many were refused."""
    refused, base = 0, memory("VmRSS")
    reset_peak()
    for number in range(count):
        path = hostile(good, number, folder)
        try:
            said = read(good, path)
        except Exception as error:
            raise AssertionError(f"case {number} of {good.name}: {error!r}") from error
        if said is not None:
            refused += 1
            assert "\n" not in said and 10 < len(said) < 1000, f"case {number}: {said[:2000]!r}"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert memory("VmHWM") - base < ROOM
    return refused


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def test_hostile_files_are_refused(good: Path, tmp_path: Path):
    assert CASES / 2 < check_cases(good, tmp_path, CASES) <= CASES


# ── pickles ──


class Bomb:
    """Whoever unpickles this makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


def payload(kind: str, canary: Path, folder: Path) -> bytes:
    """A file that runs code when it is loaded as what its kind says."""
    match kind.split():
        case ["pickle", protocol]:
            return pickle.dumps({"weight": Bomb(canary)}, int(protocol))
        case ["torch", "zip"]:
            with zipfile.ZipFile(folder / "bomb.zip", "w") as archive:
                archive.writestr("archive/data.pkl", payload("pickle 2", canary, folder))
                archive.writestr("archive/version", "3")
            return (folder / "bomb.zip").read_bytes()
        case ["torch", "legacy"]:
            magic = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
            return b"".join([*magic, payload("pickle 2", canary, folder)])
    np.save(folder / "bomb.npy", np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    return (folder / "bomb.npy").read_bytes()


PAYLOADS = ["pickle 0", "pickle 2", "pickle 4", "pickle 5", "torch zip", "torch legacy", "numpy"]
"""Protocols 0 to 2 begin with text or bytes that other formats have too."""


def test_the_bombs_work(tmp_path: Path):
    pickle.loads(payload("pickle 4", tmp_path / "canary", tmp_path))  # noqa: S301
    np.save(tmp_path / "a.npy", np.array([Bomb(tmp_path / "other")], dtype=object), allow_pickle=True)
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "canary").is_dir() and (tmp_path / "other").is_dir()


@pytest.mark.parametrize("kind", PAYLOADS)
def test_no_pickle_is_ever_run(good: Path, kind: str, tmp_path: Path):
    bomb, out = payload(kind, tmp_path / "canary", tmp_path), tmp_path / good.name
    for name in [name for name in READ if (good / name).exists()] if good.is_dir() else [""]:
        shutil.rmtree(out, ignore_errors=True)
        if name:
            shutil.copytree(good, out)
        (out / name if name else out).write_bytes(bomb)
        assert read(good, out) is not None
    assert not (tmp_path / "canary").exists()


@only_huggingface
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_by_their_name(good: Path, name: str, tmp_path: Path):
    shutil.copytree(good, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(payload("pickle 2", tmp_path / "canary", tmp_path))
    said = read(good, tmp_path / "model")
    assert said is not None and f"{name}: pickle files are refused" in said
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["pickle 2", "pickle 4", "pickle 5", "torch zip", "torch legacy"])
def test_a_pickle_is_not_taken_for_a_model_bin(kind: str, tmp_path: Path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(payload(kind, tmp_path / "canary", tmp_path))
    with pytest.raises(UserError, match="pytorch_model.bin: pickle files are refused"):
        llama2c.read(path)
    assert not (tmp_path / "canary").exists()


# ── names ──

TRICKS = [
    "../outside.safetensors", "..\\outside.safetensors", "/etc/passwd", "%2e%2e/outside.safetensors", "sub/../../outside.safetensors",
    "model\0.safetensors", "-rf", "-rf.safetensors", "CON", "", ".", "..", "~/outside.safetensors", "x" * 5000 + ".safetensors",
    "a\nb.safetensors", "file:///etc/passwd", "https://example.org/x.safetensors", ".hidden.safetensors", None, 7, ["a"], {},
    "outside.safetensors/../../outside.safetensors", "\ud800.safetensors", "\u202e.safetensors", "model.bin",
]  # fmt: skip


@only_huggingface
@pytest.mark.parametrize("trick", TRICKS, ids=repr)
def test_an_index_cannot_point_elsewhere(good: Path, trick: Any, tmp_path: Path):
    """The weights lie outside of the folder, so that whoever followed the name would have a whole model."""
    shutil.copytree(good, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": trick}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    said = read(good, tmp_path / "model")
    assert said is not None and len(said) < 500 and "\n" not in said


@pytest.mark.parametrize(
    "good, name",
    [("huggingface", name) for name in READ[:3]] + [("llama2c", name) for name in READ[3:]],
    indirect=["good"],
)
@pytest.mark.parametrize("thing", ["pipe", "folder", "device", "loop", "sparse"])
def test_what_is_no_file_is_refused_at_once(good: Path, name: str, thing: str, tmp_path: Path):
    shutil.copytree(good, tmp_path / "model")
    path = tmp_path / "model" / name
    path.unlink()
    strange(path, thing)
    base = memory("VmRSS")
    reset_peak()
    assert read(good, tmp_path / "model") is not None
    assert memory("VmHWM") - base < ROOM
