"""Trials of data: D1 to D7 of docs/reliability.md. Damaged shards, killed prepares, odd texts, slow disks, order, downloads."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import test_batches
import test_hub
import test_prepare
import test_shards
import test_tokenizer
import torch
from conftest import tiny_settings
from hub_server import Hub, hub
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars

from smalllm.checkpoint import RunFolder
from smalllm.config import UserError
from smalllm.data import prepare as prepare_module
from smalllm.data.batches import IGNORE, Batch, Batches, Prefetch
from smalllm.data.prepare import prepare
from smalllm.data.shards import Manifest, TokenDataset
from smalllm.data.sources import Counts, documents
from smalllm.reliability.trials import Trial
from smalllm.tokenizer import Tokenizer
from smalllm.training.trainer import train

SOON = 5.0  # seconds in which what is broken must be told


def said_by(action: Callable[[], object]) -> str | None:
    """The sentence of its UserError; None when there was none. Any other error is the caller's failure."""
    try:
        action()
    except UserError as error:
        sentence = str(error)
        assert "\n" not in sentence and 10 < len(sentence) < 600, sentence[:2000]
        return sentence
    return None


# ── D1: damaged shards and manifests ──

CONTEXT, ROWS = 24, 4


def some_dataset(given: Path) -> None:
    """39 documents in 9 shards, and another tokenizer."""
    (folder := given / "data").mkdir()
    test_shards.make(folder)
    Tokenizer.train(["another text"] * 9, 275).save(given / "other.model")
    assert len(TokenDataset.open(folder).manifest.train.shards) > 5


def flip(draw: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def zero_page(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    zeroed = data[:start] + bytes(len(data[start : start + 64])) + data[start + 64 :]
    return zeroed if zeroed != data else flip(draw, data)


CONTENTS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "cut": lambda draw, data: data[: draw.randrange(len(data))],
    "grown": lambda draw, data: data + draw.randbytes(draw.choice([1, 2, 4096])),
    "flipped": flip,
    "zeroed": zero_page,
    "empty": lambda draw, data: b"",
    "other": lambda draw, data: draw.randbytes(len(data)),
    "wide": lambda draw, data: np.frombuffer(data[: len(data) // 2 * 2], "<u2").astype("<u4").tobytes(),
    "swapped ends": lambda draw, data: np.frombuffer(data[: len(data) // 2 * 2], "<u2").astype(">u2").tobytes(),
}


def damaged_data(number: int, folder: Path, given: Path) -> None:
    """Damage one file of a dataset, before it is opened or while it is read; nothing of it may reach a batch."""
    draw, data = random.Random(number), folder / "data"
    shutil.copytree(given / "data", data)
    right = list(batches_of(TokenDataset.open(given / "data")))
    if number % 2:
        damage_while_open(draw, data, right)
    else:
        damage_before(draw, data, given / "other.model")


def batches_of(dataset: TokenDataset) -> Iterator[list[Batch]]:
    """Two epochs, as a trainer reads them."""
    batches = Batches(dataset.train, CONTEXT, CONTEXT * ROWS, seed=5)
    prefetch = Prefetch(batches)
    for step in range(2 * batches.rows.count // ROWS + 1):
        yield prefetch.step(step, 2)
    prefetch.close()


def damage_before(draw: random.Random, data: Path, other: Path) -> None:
    kind, path = (
        draw.choice([*CONTENTS, "missing", "no file", "other tokenizer", "lying manifest", "unsigned manifest"]),
        None,
    )
    path = draw.choice(sorted(data.iterdir()))
    match kind:
        case "missing":
            path.unlink()
        case "no file":
            path.unlink()
            draw.choice(
                [
                    lambda: os.mkfifo(path),
                    path.mkdir,
                    lambda: path.symlink_to("/dev/zero"),
                    lambda: path.symlink_to(path),
                ]
            )()
        case "other tokenizer":
            path = data / "tokenizer.model"
            shutil.copy(other, path)
        case "unsigned manifest":
            path = data / "manifest.json"
            text = path.read_text()
            path.write_text(text.replace('"seed": 42', '"seed": 43').replace('"text_bytes": ', '"text_bytes": 1'))
        case "lying manifest":
            path = data / "manifest.json"
            resign(data, **lie(draw))
        case _:
            path.write_bytes(CONTENTS[kind](draw, path.read_bytes()))
    sentence = said_by(lambda: list(batches_of(open_as_trainer(data))))
    assert sentence is not None, f"{kind} of {path.name} was not noticed"
    assert str(data / path.name) in sentence or kind == "lying manifest", sentence


def open_as_trainer(data: Path) -> TokenDataset:
    dataset = TokenDataset.open(data)
    dataset.tokenizer()
    return dataset


def lie(draw: random.Random) -> dict[str, Any]:
    """Fields of a manifest that do not fit its files or each other."""
    return draw.choice([
        {"dtype": "uint32"}, {"dtype": "float16"}, {"vocab_size": 70_000}, {"vocab_size": 1 << 70}, {"vocab_size": 200},
        {"tokenizer_fingerprint": "0" * 64}, {"tokenizer_fingerprint": "x"}, {"version": 2}, {"bos_id": 2}, {"eos_id": -1},
        {"extra": []}, {"seed": None}, {"train": {}}, {"train": None}, {"settings": {"limit": [1]}},
    ])  # fmt: skip


def resign(data: Path, **changes: Any) -> None:
    """Change a manifest and sign it again: its SHA-256 is no secret."""
    fields = {**json.loads((data / "manifest.json").read_bytes()), **changes}
    fields.pop("sha256", None)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    (data / "manifest.json").write_text(json.dumps({**fields, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def damage_while_open(draw: random.Random, data: Path, right: list[list[Batch]]) -> None:
    """In place, what is wrong is named; moved away or replaced, the file that was verified is read on."""
    reader = batches_of(open_as_trainer(data))
    read = [next(reader) for _ in range(draw.randrange(1, 6))]
    path = draw.choice(sorted(data.glob("train-*.bin")))
    kind = draw.choice([*CONTENTS, "missing", "replaced"])
    content = path.read_bytes()
    match kind:
        case "missing":
            path.unlink()
        case "replaced":
            (data / "new").write_bytes(flip(draw, content))
            os.replace(data / "new", path)
        case _:
            path.write_bytes(CONTENTS[kind](draw, content))
    sentence = said_by(lambda: read.extend(reader))
    for made, expected in zip(read, right, strict=False):
        assert all(
            torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
            for a, b in zip(made, expected, strict=True)
        )
    if kind in ("missing", "replaced"):
        assert sentence is None and len(read) == len(right)
    else:
        assert sentence is not None and str(path) in sentence, f"{kind}: {sentence}"


# ── D2: ids that are none ──


def wrong_id(number: int, folder: Path, given: Path) -> None:
    """One id beyond the vocabulary, in a manifest that vouches for it: its shard, place and value are named."""
    draw = random.Random(number)
    vocab = draw.choice([280, 4096, 65_535, 70_000])
    test_shards.make(
        folder, [[1, *(3 + draw.randrange(250) for _ in range(draw.randint(1, 60))), 2] for _ in range(40)]
    )
    manifest, wide = TokenDataset.open(folder).manifest, vocab > 65_536
    bad = draw.choice([vocab, (1 << 32) - 1 if wide else 65_535])
    train_record, valid_record = manifest.train.model_dump(), manifest.valid.model_dump()
    victim = draw.choice(train_record["shards"])
    place = draw.randrange(victim["tokens"])
    for shard in train_record["shards"] + valid_record["shards"]:
        tokens = np.fromfile(folder / shard["file"], "<u2").astype("<u4" if wide else "<u2")
        if shard is victim:
            tokens[place] = bad
        (folder / shard["file"]).write_bytes(tokens.tobytes())
        shard["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    resign(folder, vocab_size=vocab, dtype="uint32" if wide else "uint16", train=train_record, valid=valid_record)
    expected = f"{folder / victim['file']} holds id {bad} at token {place}, outside the vocabulary of {vocab};"
    dataset = TokenDataset.open(folder)
    ways: list[Callable[[], object]] = [
        lambda: dataset.train.read(0, dataset.train.tokens),
        lambda: list(dataset.train.iterate_documents()),
        lambda: list(batches_of(dataset)),
        lambda: Batches(dataset.train, CONTEXT, CONTEXT, seed=1, packing="documents"),
    ]
    sentence = said_by(ways[number % len(ways)])
    assert sentence is not None and expected in sentence, f"{sentence} is not {expected}"


# ── D3: killed prepares ──


def clean_prepare(given: Path) -> None:
    """The folder that must come out, and how long it takes to make."""
    test_prepare.write(given / "stories.txt", test_prepare.TEXTS * 4)
    began = time.monotonic()
    run_prepare(given, given / "clean")
    names = ["manifest.json", "tokenizer.model", "train-00000.bin", "valid-00000.bin"]
    assert sorted(os.listdir(given / "clean")) == names
    (given / "seconds").write_text(str(time.monotonic() - began))


def run_prepare(given: Path, out: Path) -> None:
    """In small steps, so that every stage is long enough to be killed in."""
    prepare_module.BATCH_BYTES = 20_000
    prepare([str(given / "stories.txt")], out, vocab_size=test_prepare.SIZE, workers=2)


def killed_prepare(number: int, folder: Path, given: Path) -> None:
    """Kill it once to three times; what it leaves is no dataset, or the whole one; the next makes it whole."""
    draw, out = random.Random(number), folder / "out"
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kill_after(draw.uniform(0.0, 1.1) * float((given / "seconds").read_text()), lambda: run_prepare(given, out))
        if (out / "manifest.json").exists():
            listed = Manifest.load(out)
            assert {shard.file for shard in [*listed.train.shards, *listed.valid.shards]} <= set(os.listdir(out))
            TokenDataset.open(out)
        elif out.exists():
            assert said_by(lambda: TokenDataset.open(out)) is not None
    run_prepare(given, out)
    assert test_prepare.contents(out) == test_prepare.contents(given / "clean")


def kill_after(seconds: float, action: Callable[[], object]) -> None:
    """Run it in a process group of its own, and end all of it so much later, however far it came."""
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # threads and all
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "prepare failed by itself"


# ── D4: texts ──

STRINGS = 200
SCRIPTS = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x7FF), (0x2000, 0x206F), (0x2580, 0x2590), (0x3040, 0x9FFF), (0xE000, 0xE0FF), (0xFE00, 0xFEFF), (0x1F300, 0x1FAFF), (0xE0000, 0xE01EF), (0, 0x10FFFF)]  # fmt: skip
WORDS = [
    *test_tokenizer.ODD,
    "\u202e\u2066",
    "\u0301" * 40,
    "<|user|>",
    "<0xE2>",
    "▁",
    "\r",
    "\x85",
    "\u2029",
    "Lily",
    " the",
]


def odd_string(draw: random.Random) -> str:
    """Any text that UTF-8 can express, with a liking for what goes wrong."""
    parts = []
    for _ in range(draw.choice([0, 1, 2, 3, 5, 9])):
        low, high = draw.choice(SCRIPTS)
        letters = (chr(draw.randint(low, high)) for _ in range(draw.choice([1, 2, 5, 20])))
        parts.append(
            draw.choice(WORDS)
            if draw.random() < 0.4
            else "".join(c for c in letters if unicodedata.category(c) != "Cs")
        )
    return "".join(parts)


def strings_come_back(number: int, folder: Path, given: Path) -> int:
    """decode(encode(x)) == x for one of twelve kinds of vocabulary, alone, as a stream and from the memory of words."""
    draw = random.Random(number)
    models = list(test_tokenizer.MODELS.values())
    tokenizer = models[0] if number % 2 else models[number // 2 % len(models)]
    strings = [odd_string(draw) for _ in range(STRINGS)]
    for text, ids in zip(strings, test_tokenizer.documents(tokenizer, strings, 1), strict=True):
        assert ids == tokenizer.encode_document(text), repr(text)
        assert tokenizer.decode(ids) == text == test_tokenizer.stream(tokenizer, ids), repr(text)
        assert tokenizer.bos_id not in ids[1:] and tokenizer.eos_id not in ids[:-1], repr(text)
    return STRINGS


def separated(*texts: str) -> bytes:
    return "".join(f"{text}\n<|endoftext|>\n" for text in texts).encode(errors="surrogatepass")


STORY = "A story."
FILES: list[tuple[str, Callable[[], bytes], list[str] | str, int]] = [
    ("a.txt", lambda: b"abc\xffdef", "is not UTF-8 at byte offset 3 (0xFF)", 0),
    ("a.txt", lambda: b"\xef\xbb\xbf" + separated(STORY), [STORY], 0),
    ("a.txt", lambda: separated(STORY).replace(b"\n", b"\r\n"), [STORY], 0),
    ("a.txt", lambda: separated("a\0b"), "is a binary file (byte 0 at offset 1)", 0),
    ("a.txt", lambda: separated("\ud800 x"), "is not UTF-8 at byte offset 0", 0),
    ("a.txt", lambda: separated("a\u2028b\u2029c\x85d"), ["a\u2028b\u2029c\x85d"], 0),
    ("a.txt", lambda: separated("\u202eabc\u2066"), ["\u202eabc\u2066"], 0),
    ("a.txt", lambda: separated("e" + "\u0301" * 1_000_000), ["e" + "\u0301" * 1_000_000], 0),
    ("a.txt", lambda: separated("a <|endoftext|> b"), ["a <|endoftext|> b"], 0),
    ("a.txt", lambda: separated("<|endoftext|>", STORY), [STORY], 2),
    ("a.txt", lambda: separated(STORY, "", " \t", "\u3000", STORY), [STORY, STORY], 3),
    ("a.txt", lambda: b"", "is empty (0 bytes)", 0),
    ("a.txt", lambda: separated("", " "), "holds no text (2 empty documents)", 0),
    ("a.txt", lambda: b"\xff\xfe" + STORY.encode("utf-16-le"), "is not UTF-8 at byte offset 0|is a binary file", 0),
    ("a.txt", lambda: STORY.encode("utf-32"), "is a binary file", 0),
    ("a.txt", lambda: b"\xc0\xaf overlong", "is not UTF-8 at byte offset 0 (0xC0)", 0),
    ("a.txt", lambda: b"\xed\xa0\x80 surrogate", "is not UTF-8 at byte offset 0 (0xED)", 0),
    ("a.txt", lambda: b"cut \xf0\x9f", "is not UTF-8 at byte offset 4 (0xF0)", 0),
    ("a.jsonl", lambda: b'"\\ud800"\n', "line 1 has a lone surrogate", 0),
    ("a.jsonl", lambda: b'"a\\u0000b"\n"\\u2028"\n""\nnull\n', ["a\0b"], 3),
    ("a.jsonl", lambda: b'{"\x1b[2J\\n": 1, "b": 2}\n', "is not JSON|no field text", 0),
    ("a.json", lambda: b"[" * 100_000, "is not whole JSON", 0),
    ("a.json", lambda: b'["' + b"9" * 5000 + b'", ' + b"9" * 5000 + b"]", "is not whole JSON", 0),
    ("a.csv", lambda: b'text\n"a\r\nb"\n"<|endoftext|>"\n', ["a\r\nb", "<|endoftext|>"], 0),
    ("a.csv", lambda: b'text\n"open', "is not CSV", 0),
    ("a.txt.gz", lambda: gzip.compress(separated(STORY))[:-9], "is damaged", 0),
    ("a.txt.gz", lambda: gzip.compress(separated(STORY)) + b"junk", "is damaged", 0),
    ("a.txt.gz", lambda: bomb(b"a" * (1 << 20), 400), "holds a line or document of more than", 0),
    ("a.jsonl.gz", lambda: bomb(b'"' + b"a" * (1 << 20), 400), "holds a line or document of more than|is not JSON", 0),
    ("a.txt", lambda: b"word " * 20_000_000 + b"\n" + separated("", STORY), ["word " * 20_000_000, STORY], 0),
    ("a.txt.gz", lambda: bomb(b"<|endoftext|>\n" * 10_000, 500), "holds no text", 5_000_000),
]  # fmt: skip


def bomb(block: bytes, times: int) -> bytes:
    """Some hundred megabytes in a few hundred kilobytes."""
    sink = io.BytesIO()
    with gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=1) as file:
        for _ in range(times):
            file.write(block)
    return sink.getvalue()


def odd_file(number: int, folder: Path, given: Path) -> None:
    """A file of texts is read as it is, counted, or refused in words that name it."""
    name, make, expected, empty = FILES[number]
    (folder / name).write_bytes(make())
    found, counts = list[str](), Counts()
    sentence = said_by(lambda: found.extend(documents(str(folder / name), counts=counts)))
    if isinstance(expected, str):
        assert sentence is not None and any(words in sentence for words in expected.split("|")), sentence
        assert name in sentence
    else:
        assert sentence is None and found == expected and (counts.kept, counts.empty) == (len(expected), empty), (
            sentence
        )
        tokenizer = test_tokenizer.MODEL
        assert all(tokenizer.decode(tokenizer.encode(text[:3_000_000])) == text[:3_000_000] for text in found)


# ── D5: slow disks, dead threads ──


def stories_and_run(given: Path) -> None:
    """Data, and the weights of an uninterrupted run on it."""
    prepare(["storyworld:120"], given / "data", vocab_size=400, seed=1)
    train(small_run(given / "data"), given / "run")


def small_run(data: Path) -> Any:
    return tiny_settings(data, train={"steps": 8, "checkpoint_every": 2, "evaluate_every": 8, "sample_tokens": 0})


def reader_breaks(number: int, folder: Path, given: Path) -> None:
    """The thread that makes batches is slow, fails, dies or is never heard of again: told in time, and resumed exactly."""
    draw = random.Random(number)
    dataset, step = TokenDataset.open(given / "data"), draw.randrange(6)
    whole = Batches(dataset.train, 32, 256, seed=3)
    broken, told = Batches(TokenDataset.open(given / "data").train, 32, 256, seed=3), list[str]()
    prefetch = Prefetch(broken, warn=told.append, slow=0.15, patience=1.0)
    for earlier in range(step):
        prefetch.step(earlier, 4)
    if prefetch.coming:
        prefetch.coming.thread.join()
    read = broken.split.read
    kind = list(READERS)[number % len(READERS)]
    broken.split.read = READERS[kind](read)  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        made = [prefetch.step(later, 4) for later in range(step, step + 3)]
        assert kind == "slow" and told and len(told) == 1, f"{kind} was not noticed"
        assert_same(made, [list(whole.micro_batches(later, 4)) for later in range(step, step + 3)])
    except (UserError, OSError, MemoryError, SystemExit, KeyboardInterrupt) as error:
        assert kind != "slow" and time.monotonic() - began < SOON, repr(error)
        assert TOLD[kind] in repr(error), f"{error!r} was told of {kind}"
    broken.split.read = read  # type: ignore[method-assign]
    again = Prefetch(broken)
    assert_same([again.step(step, 4)], [list(whole.micro_batches(step, 4))])


def assert_same(made: list[list[Batch]], expected: list[list[Batch]]) -> None:
    for some, others in zip(made, expected, strict=True):
        assert all(
            torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
            for a, b in zip(some, others, strict=True)
        )


def failing(error: BaseException) -> Callable[[Any], Any]:
    def fail(*_: int) -> None:
        raise error

    return lambda read: fail


def slowly(read: Any) -> Any:
    return lambda start, count: (time.sleep(0.02), read(start, count))[1]


READERS: dict[str, Callable[[Any], Any]] = {
    "slow": slowly,
    "disk": failing(OSError(5, "Input/output error")),
    "memory": failing(MemoryError()),
    "refused": failing(UserError("the shard is damaged; prepare it again")),
    "exit": failing(SystemExit(3)),
    "interrupt": failing(KeyboardInterrupt()),
    "silent": lambda read: lambda start, count: time.sleep(60),
}


TOLD = {
    "disk": "Input/output error", "memory": "MemoryError", "refused": "the shard is damaged", "exit": "SystemExit(3)",
    "interrupt": "KeyboardInterrupt", "silent": "did not come within 1 s",
}  # fmt: skip
"""What must be said of each."""


def thread_is_gone(number: int, folder: Path, given: Path) -> None:
    """A process that was forked from the one whose thread makes its batches: told at once instead of waited for."""
    draw = random.Random(number)
    batches = Batches(TokenDataset.open(given / "data").train, 32, 256, seed=3)
    batches.split.read = slowly(batches.split.read)  # type: ignore[method-assign]
    prefetch = Prefetch(batches)
    for step in range(draw.randrange(1, 4)):
        prefetch.step(step, 4)
    child = os.fork()
    if child == 0:
        sentence = said_by(lambda: prefetch.step(prefetch.coming.key[0], 4))  # type: ignore[union-attr]
        os._exit(0 if sentence and "died" in sentence else 1)
    until = time.monotonic() + SOON
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < until, "it hangs"
        time.sleep(0.01)
    assert ended[1] == 0


class Breaking:
    """A display that breaks the data when a step is logged."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.at, self.action = step, action

    def progress(self, record: dict[str, Any]) -> None:
        if record["step"] == self.at:
            self.action()

    def story(self, step: int, prompt: str, text: str) -> None: ...

    def note(self, message: str) -> None: ...


def data_breaks_in_training(number: int, folder: Path, given: Path) -> None:
    """A shard is cut, emptied or overwritten while a model learns from it: the run ends in a sentence, in time, and goes on
    to the very weights of an uninterrupted one when the shard is mended."""
    draw, data = random.Random(number), folder / "data"
    shutil.copytree(given / "data", data)
    shard = data / "train-00000.bin"
    content, began = shard.read_bytes(), [0.0]
    damage = CONTENTS[draw.choice([kind for kind in CONTENTS if kind != "wide"])]

    def break_it() -> None:
        began[0] = time.monotonic()
        shard.write_bytes(damage(draw, content))

    display = Breaking(draw.randrange(1, 6), break_it)
    sentence = said_by(lambda: train(small_run(data), folder / "run", display=display))
    assert sentence is not None and str(shard) in sentence and time.monotonic() - began[0] < SOON, sentence
    shard.write_bytes(content)
    train(small_run(data), folder / "run")
    ours, theirs = (RunFolder(place / "run").choose("latest").weights() for place in (folder, given))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def prepare_breaks(number: int, folder: Path, given: Path) -> None:
    """A thread of prepare fails or is out of memory: it ends in time, leaves nothing, and the next one is whole."""
    draw, out, encode = random.Random(number), folder / "out", Tokenizer.encode_documents
    left = [draw.randrange(8)]
    error = draw.choice(
        [
            OSError(28, "No space left on device"),
            MemoryError(),
            UserError("it cannot be; change it"),
            KeyboardInterrupt(),
        ]
    )

    def fail(self: Tokenizer, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return encode(self, *args)

    Tokenizer.encode_documents = fail  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        run_prepare(given, out)
    except (UserError, MemoryError, KeyboardInterrupt):
        assert time.monotonic() - began < SOON and not out.exists()
    else:
        raise AssertionError("the error was swallowed")
    Tokenizer.encode_documents = encode  # type: ignore[method-assign]
    run_prepare(given, out)
    assert test_prepare.contents(out) == test_prepare.contents(given / "clean")


# ── D6: order ──


def order_of_an_epoch(number: int, folder: Path, given: Path) -> None:
    """Every target of two epochs exactly once, whatever ranks share them, also from a step in the middle on."""
    draw = random.Random(number)
    context, rows, world, micro = (
        draw.randint(2, 48),
        draw.randint(1, 16),
        draw.choice([1, 2, 3, 8]),
        draw.randint(1, 5),
    )
    packing, seed = draw.choice(["stream", "documents"]), draw.randrange(1 << 40)
    lengths = [draw.randint(2, draw.choice([5, 60, 200])) for _ in range(draw.randint(1, 60))]

    def made() -> Batches:
        return Batches(test_batches.Documents(lengths), context, context * rows, seed, packing)  # type: ignore[arg-type]

    batches, begins = made(), set(np.cumsum([0, *lengths])[:-1].tolist())
    targets = set(range(sum(lengths))) - (begins if packing == "documents" else set())
    steps = -(-2 * batches.rows.count // rows)
    resumed, middle = made(), draw.randrange(steps)
    seen = [row for step in range(steps) for row in shared(batches if step < middle else resumed, step, micro, world)]
    for epoch in range(2):
        rows_of_epoch = seen[epoch * batches.rows.count : (epoch + 1) * batches.rows.count]
        assert Counter(target for row in rows_of_epoch for target in row) == Counter(targets), f"epoch {epoch}"


def shared(batches: Batches, step: int, micro: int, world: int) -> list[list[int]]:
    """The targets of each row of a step in its order, put together from what every rank sees of it."""
    ranks = [
        [
            [t for t in row if t != IGNORE]
            for batch in batches.micro_batches(step, micro, rank, world)
            for row in batch.targets.tolist()
        ]
        for rank in range(world)
    ]
    found = [ranks[index % world][index // world] for index in range(sum(map(len, ranks)))]
    assert batches.tokens(step) == sum(map(len, found))
    return found


def sides_are_apart(number: int, folder: Path, given: Path) -> None:
    """No text is on both sides of a dataset, and none is lost, whatever is given twice."""
    draw = random.Random(number)
    texts = [f"{draw.randrange(150)} {STORY}" for _ in range(400)]
    source, held_out = test_prepare.write(folder / "a.txt", texts), None
    own = [f"{draw.randrange(150)} {STORY}" for _ in range(30)]
    if number % 2:
        held_out = test_prepare.write(folder / "valid.txt", own)
    options = {"valid": held_out} if held_out else {"valid_fraction": draw.choice([0.02, 0.3, 0.7])}
    prepare([source], folder / "out", vocab_size=280, seed=draw.randrange(99), workers=1, **options)
    train_side, valid_side = (set(test_prepare.documents_of(folder / "out", side)) for side in ("train", "valid"))
    assert not train_side & valid_side
    assert train_side | valid_side == set(texts) | set(own if held_out else ())


# ── D7: downloads ──


def point_client(server: Hub, cache: Path) -> None:
    """The hub's client of this process asks our server; it is a process that ends after the case."""
    disable_progress_bars()
    constants.ENDPOINT, constants.HF_HUB_CACHE = server.endpoint, str(cache)
    constants.HUGGINGFACE_CO_URL_TEMPLATE = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = 1


ARRIVES = ""
DOWNLOADS: list[tuple[str, dict[str, Any], str]] = [
    ("not there", {"status": 404}, "no such dataset"),
    ("broken", {"status": 500}, "status 500"),
    ("away", {"status": 503}, "status 503"),
    ("forbidden", {"status": 403}, "set HF_TOKEN"),
    ("cut once", {"cut_after": 1}, ARRIVES),
    ("cut always", {"cut_after": 1, "cut_always": True}, "cannot be reached"),
    ("login page", {"web_page": True}, "did not answer like a hub"),
    ("page for file", {"swapped": b"<!DOCTYPE html>"}, "it is a web page"),
    ("pointer", {"swapped": b"version https://git-lfs.github.com/spec/v1\n"}, "it is a Git LFS pointer"),
    ("shorter", {"swapped": None}, "bytes instead of"),
    ("longer", {"swapped": b""}, "bytes instead of"),
    ("other bytes", {"announced": "0" * 64}, "its SHA-256 is not the one"),
    ("elsewhere", {"elsewhere": "here"}, ARRIVES),
    ("elsewhere, other bytes", {"elsewhere": "changed"}, "its SHA-256 is not the one"),
    ("slow", {"seconds": 2.0}, ARRIVES),
    ("silent", {"silent": True}, "cannot be reached"),
]  # fmt: skip
NAME = "train.txt"


def download(number: int, folder: Path, given: Path) -> None:
    """What the hub sends arrives whole or not at all, in bounded time; the next try is not misled by what is left."""
    draw = random.Random(number)
    label, changes, words = DOWNLOADS[number % len(DOWNLOADS)]
    text = test_hub.TEXT + draw.randbytes(draw.randrange(2000)).hex().encode()
    changed = text[:-1] + b"?"
    os.environ["HF_TOKEN"] = token = "hf_secretsecretsecret"
    with hub(test_hub.REPO, {NAME: text}) as server, hub(test_hub.REPO, {NAME: text}) as other:
        point_client(server, folder / "cache")
        server.token = token
        misbehave(server, other, changes, text, changed, draw)
        found, source, began = list[str](), f"hf://datasets/{test_hub.REPO}/{NAME}", time.monotonic()
        sentence = said_by(lambda: found.extend(documents(source)))
        server.silent = False
        assert time.monotonic() - began < 20, f"{label} took {time.monotonic() - began:.0f} s"
        if words is ARRIVES:
            assert sentence is None and found == texts_of(text), f"{label}: {sentence}"
        else:
            assert sentence is not None and words in sentence, f"{label}: {sentence}"
            finals = [path for path in (folder / "cache").rglob(NAME) if path.exists()]
            assert not finals, f"{label}: a file with the final name"
        assert not any(entry[3] for entry in other.requests), "the token went to another server"
        server.__dict__.update(vars(Hub(server.repo, server.files, endpoint=server.endpoint, token=token)))
        assert list(documents(source)) == texts_of(text), f"{label} misleads the next try"
    assert not [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def misbehave(
    server: Hub, other: Hub, changes: dict[str, Any], text: bytes, changed: bytes, draw: random.Random
) -> None:
    for key, value in changes.items():
        match key:
            case "swapped":
                served = text[:-1] if value is None else value.ljust(len(text), b" ") if value else text + b"more"
                server.swapped[NAME] = served
            case "announced":
                server.announced[NAME] = value
            case "elsewhere":
                server.elsewhere = other.endpoint.replace("127.0.0.1", "localhost")
                other.swapped = {NAME: changed} if value == "changed" else {}
            case "cut_after":
                server.cut_after = draw.randrange(1, len(text))
            case _:
                setattr(server, key, value)


def texts_of(text: bytes) -> list[str]:
    return [part.strip("\n") for part in text.decode().split("<|endoftext|>\n") if part.strip()]


TRIALS: list[Trial] = [
    Trial("D1", "damaged shards and manifests are named before use", damaged_data, 80, 500, some_dataset, together=20),
    Trial("D2", "ids outside the vocabulary are named with shard and place", wrong_id, 24, 100, together=10),
    Trial("D3", "a killed prepare leaves nothing false, and the next is the clean one", killed_prepare, 6, 100, clean_prepare),
    Trial("D4-strings", "decode(encode(text)) is the text", strings_come_back, 10, 500, together=5),
    Trial("D4-files", "odd files of text are counted or refused by name", odd_file, 26, len(FILES), together=2),
    Trial("D5-reader", "a slow, failing, dying or silent reader is told in time", reader_breaks, 2 * len(READERS), 50, stories_and_run),
    Trial("D5-thread", "a thread that is gone is no hang", thread_is_gone, 3, 50, stories_and_run, together=5),
    Trial("D5-training", "data that breaks in training ends it in a sentence, and it resumes exactly", data_breaks_in_training, 4, 50, stories_and_run),
    Trial("D5-prepare", "a prepare that fails leaves nothing", prepare_breaks, 4, 50, clean_prepare),
    Trial("D6-order", "every target of an epoch once, across ranks, packings and resumes", order_of_an_epoch, 100, 1000, together=25),
    Trial("D6-sides", "no text in training and validation", sides_are_apart, 4, 50, together=5),
    Trial("D7", "downloads arrive whole or not at all", download, 2 * len(DOWNLOADS), 64),
]  # fmt: skip
