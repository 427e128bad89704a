"""Trials of files that nobody vouches for: F1 to F7 of docs/reliability.md. Whatever a file holds, reading it ends soon, with
what was asked for or one sentence, and runs nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import test_hostile_files as hostile_files
import test_shards
import test_sources
import test_tokenizer
import tomli_w
import torch
from data_trials import resign, said_by
from export_runs import random_run

from smalllm import api, untrusted
from smalllm.checkpoint import RunFolder, find_run, open_run
from smalllm.commands import import_
from smalllm.config import UserError, load_recipe
from smalllm.data.batches import Batches
from smalllm.data.shards import TokenDataset
from smalllm.data.sources import documents, open_source
from smalllm.export import huggingface
from smalllm.export.destination import replacing
from smalllm.export.pieces import _bytes, _encoded
from smalllm.metrics import read_records
from smalllm.reliability.trials import Trial
from smalllm.tokenizer import Tokenizer, _varint

ROOM = 100 << 20  # bytes of memory beyond the sizes of files
LONGEST_TABLES = 256 << 20  # bytes that the positions of a small model take with the longest context that there is


def bounded(action: Callable[[], object], seconds: float = 2.0, room: int = ROOM) -> str | None:
    """As `said_by`, within this time of the processor and this room in memory."""
    base, began = hostile_files.memory("VmRSS"), time.process_time()
    hostile_files.reset_peak()
    sentence = said_by(action)
    took, grew = time.process_time() - began, hostile_files.memory("VmHWM") - base
    assert took < seconds and grew < room, f"it took {took:.1f} s and {grew >> 20} MiB: {sentence}"
    return sentence


def link_tree(source: Path, target: Path) -> None:
    """A copy that costs nothing: files are to be replaced in it and never changed."""
    shutil.copytree(source, target, copy_function=os.link)


def put(path: Path, data: bytes) -> None:
    """Replace a file of a linked tree."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# ── F1: models of other programs ──


def good_exports(given: Path) -> None:
    """One of each format."""
    for name, (module, dtype) in hostile_files.FORMATS.items():
        module.write(random_run(given / f"run-{name}"), given / name, dtype)


def damaged_import(number: int, folder: Path, given: Path) -> None:
    """Case so-and-so of tests/test_hostile_files.py, of each format in turn."""
    names = list(hostile_files.FORMATS)
    good = given / names[number % len(names)]
    path = hostile_files.hostile(good, number // len(names), folder)
    bounded(lambda: hostile_files.FORMATS[good.name][0].read(path), hostile_files.SLOWEST)


# ── F2: pickles ──


def everything(given: Path) -> None:
    """A run, its data, texts and models of other programs."""
    good_exports(given)
    random_run(given / "run")
    shutil.copy(given / "gguf", given / "model.gguf")
    (given / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n')
    (given / "data").mkdir()
    test_shards.make(given / "data")


CHECKPOINT = "checkpoints/step-00000000"


def use_run(path: Path) -> None:
    """All that reads a run."""
    for read in (
        lambda: RunFolder(path).config(),
        lambda: api.load(path),
        lambda: list(read_records(path / "metrics.jsonl")),
    ):
        said_by(read)
    for checkpoint in RunFolder(path).checkpoints():
        for part in (
            checkpoint.verify,
            checkpoint.state,
            checkpoint.optimizer,
            checkpoint.weights,
            checkpoint.model_config,
        ):
            said_by(part)


def use_data(path: Path) -> None:
    """As a trainer does."""
    dataset = TokenDataset.open(path)
    dataset.tokenizer()
    batches = Batches(dataset.train, 16, 64, seed=1, packing="documents")
    for batch in batches.micro_batches(0, 4):
        assert batch.tokens


PICKLE_PLACES: list[tuple[str, str, Callable[[Path], object]]] = [
    *(("run", f"{CHECKPOINT}/{name}", use_run) for name in ("model.safetensors", "optimizer.safetensors", "model.json", "state.json", "manifest.json")),
    *(("run", name, use_run) for name in ("config.toml", "tokenizer.model", "metrics.jsonl", "best", "latest", "environment.json")),
    *(("data", name, use_data) for name in ("manifest.json", "tokenizer.model", "train-00000.bin", "valid-00000.bin")),
    *(("huggingface", name, huggingface.read) for name in ("model.safetensors", "config.json", "tokenizer.model", "tokenizer.json", "pytorch_model.bin", "model.pt", "training_args.bin")),
    *(("llama2c", name, import_.read) for name in ("model.bin", "tokenizer.bin")),
    *(("", name, import_.read) for name in ("a.gguf", "a.bin", "pytorch_model.bin", "a.pt")),
    *(("", name, lambda path: list(documents(str(path)))) for name in ("a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz", "a.tar.gz", "a.npy", "a.pkl")),
]  # fmt: skip


def pickle_somewhere(number: int, folder: Path, given: Path) -> None:
    """A file that runs code for whoever unpickles it, in a place where a file is read: it runs for nobody."""
    forbid_unpickling()
    base, name, use = PICKLE_PLACES[number // len(hostile_files.PAYLOADS)]
    canary, kind = folder / "canary", hostile_files.PAYLOADS[number % len(hostile_files.PAYLOADS)]
    target = folder / (base or name)
    if base:
        link_tree(given / base, target)
    bomb = hostile_files.payload(kind, canary, folder)
    put(target / name if base else target, bomb)
    if name.startswith(CHECKPOINT) and "manifest" not in name:
        sign_checkpoint(target / CHECKPOINT)
    if base == "huggingface" and name in ("pytorch_model.bin", "model.pt"):
        (target / "model.safetensors").unlink()
    said_by(lambda: use(target))
    assert not canary.exists(), f"{kind} in {base}/{name} was run"


def forbid_unpickling() -> None:
    """In this process, from here on: whoever tries has failed, whether or not the pickle does harm."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    pickle.load = pickle.loads = pickle.Unpickler = refuse  # type: ignore[assignment, misc]
    torch.load = refuse  # type: ignore[assignment]


def sign_checkpoint(path: Path) -> None:
    """Make the manifest vouch for the files as they are now: whoever makes a file can make its digest."""
    import hashlib

    manifest = json.loads((path / "manifest.json").read_bytes())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    put(path / "manifest.json", json.dumps(manifest).encode())


# ── F3: our own files ──

OUR_VALUES: list[Any] = [
    *hostile_files.VALUES,
    10**9,
    -3,
    10**6,
    1024,
    65_536,
    1_048_576,
    1.5,
    "nan",
    "step-²",
    "../..",
    ["x"] * 3,
    {"model": 1},
    2**31,
    1e-9,
]
OUR_TEXTS = [
    *hostile_files.TEXTS,
    b"{}",
    b'{"model": {}}',
    b'{"model": null}',
    b'{"files": {"../../x": {"size": 1, "sha256": "x"}}, "version": 1, "step": 0}',
]
OUR_LINES = [
    b'{"step": 1, "loss": NaN}',
    b'{"step": 1e400}',
    b'{"step": true}',
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": -1}',
    b"[" * 100_000,
    b"\xff",
    b"{",
    b'{"step": 2, "step": 3}',
]
TOML_TEXTS = [
    b"", b"[" * 100_000, b"a = " + b"[" * 100_000, b"a." * 50_000 + b"b = 1", b"a = " + b"9" * 5000, b"[model]\nlayers = nan", b"[model]\nlayers = inf",
    b"[model]\nlayers = 1\nlayers = 2", b"[model]\n[model]", b"\xff\xfe", b"\xef\xbb\xbfname = 'a'", b"name = '\\ud800'", b'name = "\\ud800"', b'name = "\\u0000"',
    b"model = 1", b"model = []", b"[[model]]", b"train = {steps = 1e9}", b"name = 1979-05-27", b"[data]\npath = '/dev/zero'", b"seed = -1", b"[optim]\nbetas = [nan, nan]",
    b"x = '" + b"y" * 1_000_000 + b"'", b"[model]\nlayers = 1000000", b"[model]\nwidth = 1000000000", b"[model]\nlayers = -1",
]  # fmt: skip
OUR_FILES = [
    "config.toml", "config.toml", *(f"{CHECKPOINT}/{name}" for name in ("model.json", "model.json", "state.json", "manifest.json", "model.safetensors")),
    "metrics.jsonl", "best", "latest", "manifest.json", "manifest.json",
]  # fmt: skip


def damaged_own_file(number: int, folder: Path, given: Path) -> None:
    """One of the files of a run, or the manifest of its data, says something else than we wrote."""
    draw = random.Random(number)
    name = draw.choice(OUR_FILES)
    if name == "manifest.json":
        damaged_manifest(draw, folder, given)
        return
    path = folder / "run"
    link_tree(given / "run", path)
    file = path / name
    put(file, our_damage(draw, file.name, file.read_bytes() if file.exists() else b"step-00000000\n"))
    if "checkpoint" in name and "manifest" not in name and draw.random() < 0.8:
        sign_checkpoint(path / CHECKPOINT)
    bounded(lambda: RunFolder(path).config())
    bounded(lambda: api.load(path).complete("Once", max_tokens=2, seed=1), room=LONGEST_TABLES)
    bounded(lambda: [checkpoint.state() for checkpoint in RunFolder(path).checkpoints()])
    bounded(lambda: (RunFolder(path).steps(), RunFolder(path).best_step(), list(read_records(path / "metrics.jsonl"))))


def damaged_manifest(draw: random.Random, folder: Path, given: Path) -> None:
    path = folder / "data"
    link_tree(given / "data", path)
    file = path / "manifest.json"
    put(file, our_damage(draw, file.name, file.read_bytes()))
    if draw.random() < 0.7:
        try:
            signable = isinstance(json.loads(file.read_bytes()), dict)
        except (ValueError, RecursionError):
            signable = False
        if signable:
            resign(path)
    bounded(lambda: use_data(path))


def our_damage(draw: random.Random, name: str, data: bytes) -> bytes:
    ways: list[Callable[[random.Random, bytes], bytes]] = [
        hostile_files.flipped,
        hostile_files.cut,
        hostile_files.replaced,
    ]
    own = {
        ".json": [json_text, json_value] * 3,
        ".toml": [toml_text, toml_value, toml_value] * 2,
        ".jsonl": [json_lines] * 6,
        ".safetensors": [hostile_files.tensors_header] * 3,
    }
    return draw.choice([*ways, *own.get(Path(name).suffix, [hostile_files.replaced, hint])])(draw, data)


def json_text(draw: random.Random, data: bytes) -> bytes:
    return draw.choice(OUR_TEXTS)


def json_value(draw: random.Random, data: bytes) -> bytes:
    """A value anywhere in it becomes another, goes, or comes twice."""
    value = json.loads(data)
    for _ in range(draw.choice([1, 1, 2])):
        change(draw, draw.choice(list(hostile_files.dictionaries(value))))
    text = json.dumps(value)
    return (text.replace("{", '{"step": 1, "step": 2, ', 1) if draw.random() < 0.1 else text).encode()


def change(draw: random.Random, inner: dict[str, Any]) -> None:
    key = draw.choice([*inner, "more", "../x", "x" * 5000, "a\nb\x1b[2J"])
    if draw.random() < 0.2:
        inner.pop(key, None)
    else:
        inner[key] = draw.choice(OUR_VALUES)


def toml_text(draw: random.Random, data: bytes) -> bytes:
    return draw.choice(TOML_TEXTS)


def toml_value(draw: random.Random, data: bytes) -> bytes:
    value = tomllib.loads(data.decode())
    change(draw, draw.choice(list(hostile_files.dictionaries(value))))
    try:
        return tomli_w.dumps(value).encode(errors="surrogatepass")
    except (TypeError, ValueError):  # what TOML has no words for, such as null
        return data + b"\n[model]\nlayers = 1\n"


def json_lines(draw: random.Random, data: bytes) -> bytes:
    lines = [*data.splitlines(), *draw.sample(OUR_LINES, 3)]
    draw.shuffle(lines)
    return b"\n".join(lines)


def hint(draw: random.Random, data: bytes) -> bytes:
    return draw.choice(
        ["step-²", "step-" + "9" * 5000, "-1", "step-00000000/../../x", "../step-00000000", "٣", ""]
    ).encode()


# ── F4: vocabularies ──

SEEDS = [
    test_tokenizer.MODEL.model_bytes, test_tokenizer.trained_raw(vocab_size=400), test_tokenizer.trained_raw(model_type="unigram", vocab_size=330),
    test_tokenizer.trained_raw(model_type="char"), test_tokenizer.trained_raw(normalization_rule_name="nmt_nfkc"),
    test_tokenizer.trained_raw(vocab_size=450, user_defined_symbols=["a b", "<sep>"]),
]  # fmt: skip
PROBES = [
    "hello there 12\n",
    " a  b é 日本 🙂\u2581x",
    "a" * 5000,
    "\0\x01<s></s>",
    "Once upon a time, there was Lily. " * 20,
    "".join(map(chr, range(256))),
]
Field = tuple[int, int, Any]
"""Number, type on the wire and value of a field of a serialized message."""


def fields_of(message: bytes) -> list[Field]:
    found, place = list[Field](), 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7 == 0:
            value, place = _varint(message, place)
            found.append((key >> 3, 0, value))
            continue
        size, place = _varint(message, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
        found.append((key >> 3, key & 7, message[place : place + size]))
        place += size
    return found


def message_of(fields: list[Field]) -> bytes:
    return b"".join(
        _bytes(number, value) if kind == 2 else _encoded(number << 3 | kind) + (_encoded(value) if kind == 0 else value)
        for number, kind, value in fields
    )


NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), 0.0, 1e38, -1e38, 0.5]
SPELLINGS = [
    b"",
    b"\xff",
    b"\xe2\x96",
    b"\0",
    b"a",
    b"a" * 1000,
    b"a" * 100_000,
    "▁".encode() * 50,
    b"<s>",
    b"</s>",
    b"<0x41>",
    b"<0xZZ>",
    b"<unk>",
]


def mutated(draw: random.Random, field: Field) -> Field:
    """Another value of the same type."""
    number, kind, value = field
    if kind == 0:
        return number, kind, draw.choice([*NUMBERS, draw.randrange(600)])
    if kind == 5:
        return number, kind, struct.pack("<f", draw.choice(FLOATS))
    return (
        number,
        kind,
        draw.choice([*SPELLINGS, draw.randbytes(20), hostile_files.flipped(draw, value), value + value]),
    )


def mutated_model(draw: random.Random) -> bytes:
    """A vocabulary whose bytes, or whose pieces and settings, are others."""
    model = draw.choice(SEEDS)
    match draw.randrange(4):
        case 0:
            damaged = bytearray(model)
            for _ in range(draw.randint(1, 8)):
                damaged[draw.randrange(len(model))] = draw.randrange(256)
            return bytes(damaged)
        case 1:
            return hostile_files.cut(draw, model)
    fields = fields_of(model)
    settings = [place for place, field in enumerate(fields) if field[0] != 1]
    for _ in range(draw.randint(1, 4)):
        place = draw.choice(settings) if draw.random() < 0.4 else draw.randrange(len(fields))
        number, kind, value = fields[place]
        if not (inner := fields_of(value)):
            continue
        which = draw.randrange(len(inner))
        match draw.randrange(6):
            case 0:
                inner.pop(which)
            case 1:
                inner.append(mutated(draw, inner[which]))
            case _:
                inner[which] = mutated(draw, inner[which])
        fields[place] = (number, kind, message_of(inner))
        if draw.random() < 0.1:
            fields.append((draw.choice([1, 2, 3, 4, 5, 6]), 2, draw.choice([message_of(inner), draw.randbytes(30)])))
        if draw.random() < 0.05:  # a table of normalization, which is a compiled trie
            fields.append((3, 2, _bytes(2, draw.randbytes(draw.choice([4, 16, 1028])))))
    return message_of(fields)


def damaged_vocabulary(number: int, folder: Path, given: Path) -> None:
    """It is refused, or it is a whole vocabulary: every byte has its piece, and every text comes back."""
    limit_memory()
    (folder / "tokenizer.model").write_bytes(mutated_model(random.Random(number)))
    began = time.process_time()
    said_by(lambda: check_vocabulary(Tokenizer.load(folder / "tokenizer.model")))
    assert time.process_time() - began < 10.0


def check_vocabulary(tokenizer: Tokenizer) -> None:
    assert {tokenizer.bytes_of(id) for id in range(tokenizer.vocab_size)} >= {bytes([byte]) for byte in range(256)}
    for text in PROBES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < tokenizer.vocab_size
    ids, _ = tokenizer.encode_documents([text.encode() for text in PROBES], 1)
    assert ids.tolist() == [id for text in PROBES for id in tokenizer.encode_document(text)]


def limit_memory() -> None:
    """Two gigabytes more than this process has now, of which torch takes the most."""
    most = hostile_files.memory("VmSize") + (2 << 30)
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


# ── F5: names ──

TRICKS = [trick for trick in hostile_files.TRICKS if isinstance(trick, str)] + [
    "..", "../..", "../outside", "a/../../outside", "/", "//", "/outside", "./x", "x/", "x/.", "..%5c..", "%2e%2e%2f", "..\\..", "C:\\x", "\\\\host\\x",
    "NUL", "COM1", "aux.", "x.", "x ", " x", "\t", "\r\n", "\x7f", "\x1b[2J", "$(touch x)", "`x`", "; rm x", "|x", "*", "?", "[a]", "{a,b}", "~root",
    "step-00000000", "step-²", "step-٣", "step--1", "step-0x1", "step-1e3", "step-" + "9" * 300, "²", "٣", "9" * 5000, "-1", "0", "best", "latest",
    "\u2025/x", "\uff0e\uff0e/x", "e\u0301" * 200, "é", "日本", "🙂", "x" * 255, "x" * 256, "a/" * 2000, ".tmp-1", ".trash-x", ".lock", ".git/config", "\0", "\udcff",
]  # fmt: skip


def refused(action: Callable[[], object]) -> bool:
    """Whether it is a UserError, however long: it may repeat the name."""
    try:
        action()
    except UserError:
        return True
    return False


def trick(number: int) -> str:
    """A name that somebody made up: one of the known tricks, or several put together."""
    if number < len(TRICKS):
        return TRICKS[number]
    draw = random.Random(number)
    return draw.choice(["", "/", " ", "-", "\n", "%00"]).join(draw.choice(TRICKS) for _ in range(draw.randint(2, 4)))


def a_name(number: int, folder: Path, given: Path) -> None:
    """One field with one name: what is opened or written lies under its root, or the name is refused."""
    field, name = list(NAME_FIELDS)[number % len(NAME_FIELDS)], trick(number // len(NAME_FIELDS))
    root = folder / "root"
    root.mkdir()
    random_decoy(folder, given)
    before = listing(folder, root)
    os.chdir(root)
    NAME_FIELDS[field](name, root, given)
    os.chdir("/")
    assert listing(folder, root) == before, f"{field} {name[:80]!r} changed what lies outside"


def random_decoy(folder: Path, given: Path) -> None:
    """A good run and good data outside of the root, for whoever follows a name there."""
    link_tree(given / "run", folder / "outside")
    link_tree(given / "data", folder / "outside-data")


def listing(folder: Path, root: Path) -> dict[str, int]:
    """Everything outside of the root, with the time of its last change."""
    found = [path for path in folder.rglob("*") if root != path and root not in path.parents]
    return {str(path): path.lstat().st_mtime_ns for path in found if path.parent != folder or path.is_dir()}


def name_of_run(name: str, root: Path, given: Path) -> None:
    """In a config.toml that somebody gave away."""
    text = tomli_w.dumps({"name": name}) if name.isprintable() else f"name = {json.dumps(name)}"
    (root / "x.toml").write_text(text, encoding="utf-8", errors="surrogateescape")
    folders = list[Path]()
    refused(lambda: folders.append(root / "runs" / load_recipe(root / "x.toml").name))
    assert all(path.resolve().parent == (root / "runs").resolve() for path in folders)


def name_of_recipe(name: str, root: Path, given: Path) -> None:
    refused(lambda: load_recipe(name))


def name_of_shard(name: str, root: Path, given: Path) -> None:
    """In a signed manifest; only the shards' own names are opened."""
    link_tree(given / "data", root / "data")
    fields = json.loads((root / "data" / "manifest.json").read_bytes())
    fields["train"]["shards"][0]["file"] = name
    put(root / "data" / "manifest.json", json.dumps(fields).encode())
    resign(root / "data")
    with watched_opens() as opened:
        refused(lambda: TokenDataset.open(root / "data"))
    assert opened and all(Path(path).parent == root / "data" for path in opened), opened


@contextmanager
def watched_opens() -> Iterator[list[str]]:
    """What `untrusted` opens while the block runs."""
    found, was = list[str](), untrusted._at_once
    untrusted._at_once = lambda path, flags: (found.append(path), was(path, flags))[1]
    try:
        yield found
    finally:
        untrusted._at_once = was


def name_in_index(name: str, root: Path, given: Path) -> None:
    """Of a Hugging Face folder."""
    link_tree(given / "huggingface", root / "model")
    (root / "model" / "model.safetensors").unlink()
    os.link(given / "huggingface" / "model.safetensors", root / "outside.safetensors")
    (root / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    assert refused(lambda: huggingface.read(root / "model"))


def name_for_open(name: str, root: Path, given: Path) -> None:
    """Of a run, where runs are looked for: below runs/, or the very path that was typed."""
    (root / "runs").mkdir()
    link_tree(given / "run", root / "runs" / "mine")
    found = list[Path]()
    refused(lambda: found.append(find_run(name)[0].path))
    for path in found:
        assert path in (Path(name), Path(name).parent.parent) or (root / "runs").resolve() in path.resolve().parents


def name_of_checkpoint(name: str, root: Path, given: Path) -> None:
    """As ``--checkpoint``."""
    link_tree(given / "run", root / "run")
    steps = list[int]()
    refused(lambda: steps.append(open_run(root / "run", name).step))
    assert steps in ([], [0])


def name_among_checkpoints(name: str, root: Path, given: Path) -> None:
    """A folder or a link to outside that lies among the checkpoints, under any name that a file can have."""
    link_tree(given / "run", root / "run")
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(name.encode(errors="replace")) > 255:
        name = "step-00000007"
    name = name.encode(errors="replace").decode()
    place = root / "run" / "checkpoints" / name
    if not place.exists():
        place.symlink_to(root.parent / "outside" / CHECKPOINT)
    refused(lambda: RunFolder(root / "run").steps())
    assert open_run(root / "run", "latest").step == 0


def name_in_hint(name: str, root: Path, given: Path) -> None:
    """In the files best and latest."""
    link_tree(given / "run", root / "run")
    for hint_file in ("best", "latest"):
        put(root / "run" / hint_file, name.encode(errors="surrogateescape") if "\ud800" not in name else b"\xff")
    assert open_run(root / "run").step == 0


def name_of_export(name: str, root: Path, given: Path) -> None:
    """As ``--out``, below the root: it is written there, or refused, and nothing is left beside it."""
    if name.startswith(("/", "~")) or ".." in Path(name).parts:
        name = name.replace("..", "__").lstrip("/~")  # where the user sends an export is the user's matter

    def write() -> None:
        with replacing(Path(name)) as temporary:
            temporary.write_bytes(b"x")

    was_refused = refused(write)
    left = [path for path in root.rglob("*") if not path.is_dir()]
    assert left == ([] if was_refused else [root / name]), (was_refused, left)


def name_of_import(name: str, root: Path, given: Path) -> None:
    """The run that an import makes is called after its folder."""
    config = import_.run_config(open_run(given / "run").model.config, name)
    assert (root / "runs" / config.name).resolve().parent == root / "runs"


def name_of_tokenizer(name: str, root: Path, given: Path) -> None:
    assert refused(lambda: Tokenizer.load(Path(name)))


def name_of_data(name: str, root: Path, given: Path) -> None:
    assert refused(lambda: TokenDataset.open(Path(name)))


def name_of_source(name: str, root: Path, given: Path) -> None:
    refused(lambda: open_source(name))


def name_in_archive(name: str, root: Path, given: Path) -> None:
    """Of an entry: read, never written."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        member = tarfile.TarInfo(name.replace("\ud800", "x") + ".txt")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"story"))
    (root / "a.tar.gz").write_bytes(archive.getvalue())
    refused(lambda: list(documents(str(root / "a.tar.gz"))))
    assert os.listdir(root) == ["a.tar.gz"]


NAME_FIELDS: dict[str, Callable[[str, Path, Path], None]] = {
    "name in config.toml": name_of_run, "recipe": name_of_recipe, "shard": name_of_shard, "safetensors index": name_in_index, "run": name_for_open,
    "--checkpoint": name_of_checkpoint, "checkpoint folder": name_among_checkpoints, "hint": name_in_hint, "--out": name_of_export,
    "import": name_of_import, "--tokenizer": name_of_tokenizer, "data.path": name_of_data, "source": name_of_source, "archive": name_in_archive,
}  # fmt: skip


# ── F6: archives ──

entry = test_sources.entry
TEXT_ENTRY = entry("good.json", data=b'["text"]')


def pax(**records: str) -> bytes:
    """A header of this kind for the entry that follows."""
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(body), len(body) + 20) if len(str(n)) + len(body) == n)
        lines += str(length).encode() + body
    return entry("pax", tarfile.XHDTYPE, lines)


def linked(kind: bytes, target: str) -> bytes:
    member = tarfile.TarInfo("link.json")
    member.type, member.linkname = kind, target
    return member.tobuf(tarfile.GNU_FORMAT)


ABSOLUTE = f"/tmp/smalllm-{os.getpid()}-was-here.json"
ARCHIVES: list[tuple[Callable[[], bytes], str]] = [
    *((lambda name=name: entry(name, data=b'["text"]'), "text") for name in ("../a.json", ABSOLUTE, "a/../../b.json", "C:\\a.json", "./a.json", "a\x1b[2J.json", "-rf.json")),
    *((lambda kind=kind, target=target: linked(kind, target) + TEXT_ENTRY, "text") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) for target in ("/etc/passwd", "../x", "good.json")),
    *((lambda kind=kind: entry("a.json", kind, b"") + TEXT_ENTRY, "text") for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE)),
    (lambda: entry("a.json", tarfile.GNUTYPE_SPARSE, b"", 1 << 40) + TEXT_ENTRY, "sparse"),
    (lambda: pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_name="a.json") + TEXT_ENTRY, "sparse"),
    (lambda: pax(GNU_sparse_map="0,1,99999999999999,1", GNU_sparse_size="99999999999999") + entry("a.json", data=b'["text"]'), ""),
    (lambda: pax(size="-512") + TEXT_ENTRY, ""),
    (lambda: pax(size="99999999999999999999") + TEXT_ENTRY, "damaged"),
    (lambda: pax(path="../../x.json") + TEXT_ENTRY, "text"),
    (lambda: pax(path="x" * 60_000 + ".json") + TEXT_ENTRY, "text"),
    (lambda: entry("a", tarfile.GNUTYPE_LONGNAME, b"../../a.json\0") + TEXT_ENTRY, "text"),
    (lambda: entry("a", tarfile.GNUTYPE_LONGNAME, b"", 1 << 62), "damaged"),
    (lambda: entry("a", tarfile.XHDTYPE, bytes(300 << 20)), "damaged"),
    (lambda: entry("a", tarfile.XGLTYPE, b"10 path=x\n") * 5000, "damaged"),
    (lambda: pax(path="x") * 5000 + TEXT_ENTRY, "damaged"),
    (lambda: entry("a.json", size=-1) + TEXT_ENTRY, "damaged"),
    (lambda: entry("a.json", size=1 << 60), "damaged"),
    (lambda: TEXT_ENTRY * 100, "text"),
    (lambda: entry("a.txt", data=b"a" * (300 << 20)), "holds a line or document"),
    (lambda: entry("a.json", data=b"[" * 1_000_000), "not whole JSON"),
    (lambda: TEXT_ENTRY[:-100], ""),
    (lambda: TEXT_ENTRY[:700], ""),
    (lambda: b"\xff" * 5000, "damaged"),
    (lambda: b"", "no text|damaged"),
    (lambda: bytes(10240), "no text"),
    (lambda: random.Random(1).randbytes(100_000), "damaged"),
    (lambda: TEXT_ENTRY + b"\x01" * 512 + TEXT_ENTRY, ""),
    (lambda: entry("a.md", data=b"") * 1_000_000, "more than 200,000 entries"),
]  # fmt: skip
"""What stands in an archive, and what must be read or said (nothing: either)."""


def archive_of(number: int, folder: Path, given: Path) -> None:
    """Texts of entries or a sentence; nothing is written, and no entry makes memory or time without end."""
    make, expected = ARCHIVES[number]
    box = folder / "box"
    box.mkdir()
    with gzip.open(box / "a.tar.gz", "wb", compresslevel=1) as file:
        file.write(make() + bytes(1024))
    found = list[str]()
    sentence = bounded(lambda: found.extend(documents(str(box / "a.tar.gz"))), seconds=60.0, room=512 << 20)
    assert sorted(folder.rglob("*")) == [box, box / "a.tar.gz"] and not Path(ABSOLUTE).exists()
    if expected == "text":
        assert sentence is None and set(found) == {"text"}, sentence
    elif expected:
        assert sentence is not None and any(words in sentence for words in expected.split("|")), sentence


# ── F7: folders that ask for code ──

EVIL = "import os; os.mkdir({canary!r})\nclass Model: ...\n"
JINJA = "{{% for x in ().__class__.__base__.__subclasses__() %}}{{% if 'warning' in x.__name__ %}}{{{{x()._module.__builtins__['__import__']('os').mkdir({canary!r})}}}}{{% endif %}}{{% endfor %}}"
CONFIG_CHANGES: list[dict[str, Any]] = [
    {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Model"}}, {"auto_map": {"AutoConfig": "evil/repo--modeling_evil.Model"}}, {"trust_remote_code": True},
    {"_attn_implementation_internal": "evil/kernel"}, {"_attn_implementation": "evil/kernel"}, {"custom_pipelines": {"x": {"impl": "modeling_evil.Model"}}},
    {"architectures": ["Evil"]}, {"model_type": "evil"}, {"quantization_config": {"quant_method": "evil"}}, {"_name_or_path": "https://example.org/x"},
    {"transformers_version": "999"}, {"task_specific_params": {"x": "modeling_evil.Model"}},
]  # fmt: skip
OTHER_FILES: list[tuple[str, str]] = [
    ("modeling_evil.py", EVIL), ("__init__.py", EVIL), ("sitecustomize.py", EVIL), ("torch.py", EVIL), ("chat_template.jinja", JINJA), ("chat_template.json", JINJA),
    ("requirements.txt", "evil"), ("setup.py", EVIL), ("conftest.py", EVIL), ("tokenizer.py", EVIL),
]  # fmt: skip
TOKENIZER_CHANGES: list[dict[str, Any]] = [
    {"auto_map": {"AutoTokenizer": ["tokenization_evil.Tokenizer", None]}}, {"tokenizer_class": "modeling_evil.Model"}, {"chat_template": JINJA}, {"added_tokens_decoder": {"0": {"content": "\x1b[2J"}}},
]  # fmt: skip


def good_huggingface(given: Path) -> None:
    huggingface.write(random_run(given / "run"), given / "huggingface", "f32")


def folder_with_code(number: int, folder: Path, given: Path) -> None:
    """What asks for code is refused, what merely lies there is ignored; nothing is imported, run or asked of the network."""
    path, canary = folder / "model", folder / "canary"
    link_tree(given / "huggingface", path)
    (path / "modeling_evil.py").write_text(EVIL.format(canary=str(canary)))
    kinds = len(CONFIG_CHANGES), len(CONFIG_CHANGES) + len(OTHER_FILES)
    if number < kinds[0]:
        merge(path / "config.json", CONFIG_CHANGES[number])
    elif number < kinds[1]:
        name, text = OTHER_FILES[number - kinds[0]]
        put(path / name, text.format(canary=str(canary)).encode())
    else:
        merge(path / "tokenizer_config.json", TOKENIZER_CHANGES[number - kinds[1]])
    os.chdir(path)
    block_network()
    imported, told = set(sys.modules), list[str | None]()
    told.append(said_by(lambda: import_.write_run(*import_.read(path), folder / "out")))
    os.chdir("/")
    fresh = {name.partition(".")[0] for name in set(sys.modules) - imported}
    assert not canary.exists() and not fresh & {
        "modeling_evil",
        "jinja2",
        "transformers",
        "sitecustomize",
        "setup",
        "conftest",
    }, fresh
    harmless = number >= kinds[0] or CONFIG_CHANGES[number].keys() <= {
        "_name_or_path",
        "transformers_version",
        "task_specific_params",
    }
    assert (told[0] is None) == harmless, told[0]


def merge(path: Path, changes: dict[str, Any]) -> None:
    put(path, json.dumps({**json.loads(path.read_bytes()), **changes}).encode())


def block_network() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse  # type: ignore[assignment, method-assign]


PICKLES = len(PICKLE_PLACES) * len(hostile_files.PAYLOADS)
CODES = len(CONFIG_CHANGES) + len(OTHER_FILES) + len(TOKENIZER_CHANGES)
TRIALS: list[Trial] = [
    Trial("F1", "damaged models of other programs are refused at once", damaged_import, 800, 20_000, good_exports, together=100),
    Trial("F2", "no pickle is ever run", pickle_somewhere, PICKLES, PICKLES, everything, together=20),
    Trial("F3", "our own files, damaged or forged, are one sentence", damaged_own_file, 400, 10_000, everything, together=100),
    Trial("F4", "damaged vocabularies are refused, or whole", damaged_vocabulary, 500, 5_000, together=50),
    Trial("F5", "no name leads out of its root", a_name, 420, 300 * len(NAME_FIELDS), everything, together=20),
    Trial("F6", "archives are read as a stream and write nothing", archive_of, 30, len(ARCHIVES)),
    Trial("F7", "no code of a model's folder is run", folder_with_code, CODES, CODES, good_huggingface),
]  # fmt: skip
