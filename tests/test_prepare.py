"""From sources to a dataset: the tokens are the documents, the sides are apart, the result is repeatable."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smalllm.commands.prepare import prepare as command
from smalllm.config import UserError
from smalllm.data import prepare as module
from smalllm.data import spool
from smalllm.data.prepare import prepare
from smalllm.data.shards import TokenDataset
from smalllm.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>\n"
NAMES = ("Lily", "Tom", "Anna", "Ben")
TEXTS = [
    f"Story {number}. {NAMES[number % 4]} went to the park and saw {number * 7919 % 1000} birds.\nThe end. é🙂\u2581"
    for number in range(600)
]
SIZE = 350  # vocabulary


def write(path: Path, texts: list[str] = TEXTS) -> str:
    path.write_text("".join(f"{text}\n{SEPARATOR}" for text in texts), encoding="utf-8")
    return str(path)


def documents_of(folder: Path, side: str) -> list[str]:
    dataset = TokenDataset.open(folder)
    tokenizer = dataset.tokenizer()
    found = getattr(dataset, side).iterate_documents()
    return [tokenizer.decode(document.tolist()) for document in found]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("text") / "stories.txt")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "data"
    return out, prepare([source], out, vocab_size=SIZE)


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as error:
        prepare(*args, **{"vocab_size": SIZE, **options})
    assert "\n" not in str(error.value)
    return str(error.value)


# -- what is in the folder


def test_all_tokens_decode_to_all_documents(made):
    out, result = made
    train, valid = documents_of(out, "train"), documents_of(out, "valid")
    assert collections.Counter(train + valid) == collections.Counter(TEXTS)
    assert (result.train_documents, result.valid_documents) == (len(train), len(valid))
    assert 3 <= len(valid) <= 30
    assert train != sorted(train, key=TEXTS.index)  # shuffled


def test_figures_are_exact(made):
    out, result = made
    dataset = TokenDataset.open(out)
    for side in ("train", "valid"):
        texts, split = documents_of(out, side), getattr(dataset, side)
        size = sum(len(text.encode()) for text in texts)
        assert split.text_bytes == size == getattr(result, f"{side}_bytes")
        assert split.tokens == getattr(result, f"{side}_tokens")
    held_out = b"".join(text.encode() + b"\0" for text in documents_of(out, "valid"))
    assert dataset.manifest.valid.text_sha256 == hashlib.sha256(held_out).hexdigest()
    tokens = result.train_tokens + result.valid_tokens
    assert result.bytes_per_token == pytest.approx((result.train_bytes + result.valid_bytes) / tokens, abs=1e-4)
    assert result.vocab_size == SIZE and result.fingerprint == dataset.fingerprint and not result.reused


def test_nothing_of_this_machine_and_nothing_left_over(made, source):
    out, _ = made
    assert sorted(contents(out)) == ["manifest.json", "tokenizer.model", "train-00000.bin", "valid-00000.bin"]
    assert str(Path(source).parent) not in (out / "manifest.json").read_text()


def test_order_worked_by_hand():
    """splitmix64 of 0, 1, 2 from a key: the published first outputs for a state that starts at 0."""
    numbers = np.arange(1, 4, dtype=np.uint64)
    key = int.from_bytes(hashlib.blake2b(b"order 42", digest_size=8).digest(), "little")
    shifted = numbers - np.uint64(key)  # so that the key cancels and the state is 0, 1, 2 steps
    assert [f"{value:x}" for value in spool._mixed(shifted, 42)] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f4",
        "6c45d188009454f",
    ]


# -- repeatable


def test_result_does_not_depend_on_workers_or_batches(made, source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 999)
    for workers in (1, 2):
        out = tmp_path / str(workers)
        prepare([source], out, vocab_size=SIZE, workers=workers)
        assert contents(out) == contents(made[0])


def test_result_does_not_depend_on_a_compiler(made, source, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "_word_encoder", None)
    prepare([source], tmp_path / "out", vocab_size=SIZE)
    assert contents(tmp_path / "out") == contents(made[0])


def test_seed_changes_split_and_order(made, source, tmp_path):
    prepare([source], tmp_path / "out", vocab_size=SIZE, seed=7)
    assert set(documents_of(tmp_path / "out", "valid")) != set(documents_of(made[0], "valid"))


def test_more_text_keeps_old_documents_on_their_side(made, tmp_path):
    prepare([write(tmp_path / "a.txt", TEXTS + [f"new {n}" for n in range(300)])], tmp_path / "out", vocab_size=SIZE)
    assert set(documents_of(made[0], "valid")) <= set(documents_of(tmp_path / "out", "valid"))


def test_same_settings_reuse_and_other_settings_are_refused(source, tmp_path):
    out, other = tmp_path / "out", write(tmp_path / "stories.txt", TEXTS[:-1])
    prepare([source], out, vocab_size=SIZE)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare([source], out, vocab_size=SIZE).reused
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    words = "holds a dataset already, with other settings or sources; choose another --out or delete the folder"
    assert words in refusal([source], out, seed=1)
    assert words in refusal([other], out)  # the same name, another text
    (out / "train-00000.bin").write_bytes(b"")
    assert "train-00000.bin is truncated" in refusal([source], out)


CHILD = """
import sys, time
from pathlib import Path
from smalllm.data import prepare as module
from smalllm.data import spool
module.REPORT_SECONDS, module.BATCH_BYTES = 0.0, 5_000
def report(state):
    if state.stage == sys.argv[3] and state.documents > 50:
        print("ready", flush=True)
        time.sleep(60)
module.prepare([sys.argv[1]], Path(sys.argv[2]), vocab_size=350, progress=report)
"""


@pytest.mark.parametrize(
    ("stage", "signal_number"), [("read", signal.SIGKILL), ("encode", signal.SIGKILL), ("encode", signal.SIGINT)]
)
def test_interrupted_prepare_leaves_no_manifest_and_is_mended_by_the_next(made, source, tmp_path, stage, signal_number):
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, source, str(out), stage], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    if stage == "read":
        assert "is being written by another prepare" in refusal([source], out)
    child.send_signal(signal_number)
    child.wait(20)
    child.stdout.close()
    assert not (out / "manifest.json").exists()
    if signal_number == signal.SIGINT:
        assert not out.exists()  # it could clean up
    prepare([source], out, vocab_size=SIZE)
    assert contents(out) == contents(made[0])


# -- sides


def test_no_text_is_on_both_sides(tmp_path):
    texts = [f"{number % 200}" for number in range(1000)]  # each five times
    result = prepare([write(tmp_path / "a.txt", texts)], tmp_path / "out", vocab_size=271, valid_fraction=0.3)
    train, valid = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "valid")
    assert not set(train) & set(valid) and len(valid) == len(set(valid)) and set(train) | set(valid) == set(texts)
    assert len(train) == 5 * len(set(train))  # training keeps its own copies
    assert result.duplicates == 4 * len(valid) == 1000 - len(train) - len(valid)


def test_validation_documents_are_kept_out_of_training(source, tmp_path):
    valid = write(tmp_path / "valid.txt", [*TEXTS[:5], "held out", "held out"])
    result = prepare([source], tmp_path / "out", vocab_size=SIZE, valid=valid)
    assert sorted(documents_of(tmp_path / "out", "valid")) == sorted([*TEXTS[:5], "held out"])
    assert sorted(documents_of(tmp_path / "out", "train")) == sorted(TEXTS[5:])
    assert result.duplicates == 6


def test_storyworld_brings_its_validation(tmp_path):
    result = prepare(["storyworld:200"], tmp_path / "out", vocab_size=600)
    assert (result.train_documents + result.duplicates, result.valid_documents) == (200, 5)
    assert TokenDataset.open(tmp_path / "out").manifest.settings["valid"] == "storyworld:5@1000000000"
    split = prepare(["storyworld:200"], tmp_path / "split", vocab_size=600, valid_fraction=0.5)
    assert 70 < split.valid_documents < 130


def test_few_documents_still_give_two_sides(tmp_path):
    for count in (2, 3):
        for fraction in (0.001, 0.999):
            out = tmp_path / f"{count}-{fraction}"
            result = prepare([write(tmp_path / "a.txt", TEXTS[:count])], out, vocab_size=330, valid_fraction=fraction)
            assert result.train_documents >= 1 and result.valid_documents >= 1


def test_a_book_in_one_file_becomes_many_documents(tmp_path):
    book = "\n\n".join(text.replace("\n", " ") for text in TEXTS)
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    result = prepare([str(tmp_path / "book.txt")], tmp_path / "out", vocab_size=SIZE)
    assert result.train_documents + result.valid_documents > 10
    joined = "".join(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "valid"))
    assert sorted(joined) == sorted(book.replace("\n\n", "")) or len(joined) >= len(book) - 2 * 600


# -- which documents


def test_sample_rate_and_limit_choose_the_data(source, tmp_path):
    half = prepare([source], tmp_path / "half", vocab_size=SIZE, sample_rate=0.5)
    assert 220 < half.train_documents + half.valid_documents < 380
    few = prepare([source, "storyworld"], tmp_path / "few", vocab_size=SIZE, limit=100)
    found = documents_of(tmp_path / "few", "train") + documents_of(tmp_path / "few", "valid")
    assert sorted(found) == sorted(TEXTS[:100]) and few.train_documents + few.valid_documents == 100


def test_folder_glob_and_several_sources_give_the_same(tmp_path):
    (tmp_path / "text").mkdir()
    first, second = write(tmp_path / "text/a.txt", TEXTS[:300]), write(tmp_path / "text/b.txt", TEXTS[300:])
    found = []
    for number, sources in enumerate(([str(tmp_path / "text")], [str(tmp_path / "text" / "*.txt")], [first, second])):
        prepare(sources, tmp_path / str(number), vocab_size=SIZE)
        found.append({name: data for name, data in contents(tmp_path / str(number)).items() if name != "manifest.json"})
    assert found[0] == found[1] == found[2]
    one = prepare([str(tmp_path / "text")], tmp_path / "one", vocab_size=SIZE, num_files=1)
    assert one.train_documents + one.valid_documents == 300


def test_standard_input(made, source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(source).read_bytes())))
    prepare(["-"], tmp_path / "out", vocab_size=SIZE)
    for name in ("train-00000.bin", "valid-00000.bin", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (made[0] / name).read_bytes()
    assert "standard input cannot be compared" in refusal(["-"], tmp_path / "out")


def test_empty_documents_are_counted(tmp_path):
    result = prepare([write(tmp_path / "a.txt", ["a b", " ", "a b c", "\t"])], tmp_path / "out", vocab_size=264)
    assert (result.empty, result.train_documents, result.valid_documents) == (2, 1, 1)


# -- tokenizer


def test_given_tokenizer_is_used(made, source, tmp_path):
    given = made[0] / "tokenizer.model"
    result = prepare([write(tmp_path / "a.txt", TEXTS[:50])], tmp_path / "out", tokenizer=given)
    assert result.vocab_size == SIZE and (tmp_path / "out/tokenizer.model").read_bytes() == given.read_bytes()
    (tmp_path / "bad").write_bytes(b"no model")
    assert "bad tokenizer" in refusal([source], tmp_path / "out2", tokenizer=tmp_path / "bad")


def test_vocabulary_learns_from_training_text_only(source, tmp_path):
    valid = write(tmp_path / "valid.txt", ["zzzzqqqq zzzzqqqq " * 2_000])
    prepare([source], tmp_path / "out", vocab_size=SIZE, valid=valid)
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer.model")
    assert not [id for id in range(SIZE) if "zz" in tokenizer.piece(id)]


def test_vocabulary_sample_is_bounded_and_even(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", 5_000)
    seen: list[str] = []
    learn = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: learn(seen.extend(texts) or seen, size))
    prepare([source], tmp_path / "out", vocab_size=330)
    numbers = [TEXTS.index(text) for text in seen]
    assert 5_000 <= sum(len(text.encode()) for text in seen) < 5_200
    assert min(numbers) < 100 and max(numbers) > 500


# -- refusals


def test_mistakes_are_one_sentence_and_leave_nothing(source, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "one.txt").write_text("one short text")
    (tmp_path / "empty.txt").write_text("")
    same = write(tmp_path / "same.txt", ["a text"] * 9)
    for arguments, options, words in (
        ([], {}, "source is missing"),
        ([str(tmp_path / "none.txt")], {}, "does not exist"),
        ([str(tmp_path / "empty.txt")], {}, "empty.txt is empty (0 bytes)"),
        (
            [str(tmp_path / "one.txt")],
            {"vocab_size": 270},
            "the sources give only one short document, and training and",
        ),
        ([same], {"vocab_size": 266}, "the sources give 9 documents that are all the same"),
        ([source], {"valid": source}, "valid holds every document of the sources"),
        ([source], {"valid": "x", "valid_fraction": 0.1}, "valid=x and valid_fraction=0.1 exclude each other"),
        ([source], {"valid_fraction": 1.0}, "valid_fraction=1.0 must be above 0 and below 1"),
        ([source], {"vocab_size": 50_000}, "vocab_size=50000 is larger than this text allows: the largest possible"),
        ([source], {"vocab_size": 265}, "vocab_size=265 is too small for the characters of this text"),
        ([source], {"vocab_size": -1}, "vocab_size=-1 is not possible"),
        ([source], {"seed": -1}, "seed=-1 must be from 0"),
        ([source], {"workers": 0}, "workers=0 must be from 1"),
        (["-", "-"], {}, "can be read only once"),
    ):
        assert words in refusal(arguments, out, **options)
        assert not out.exists()


def test_folders_that_are_not_for_us(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.doc").write_text("years of work")
    assert "holds other files (first: thesis.doc); choose a new or empty folder" in refusal([source], tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.doc": b"years of work"}
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal([source], tmp_path / "file")
    assert "cannot be written" in refusal([source], tmp_path / "file" / "below")


def test_full_disk_is_one_sentence(source, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.Spool, "add", full)
    assert "cannot be written (No space left on device); free space" in refusal([source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the face


def test_json_has_the_keys_of_the_contract(source, tmp_path, capsys):
    command(source, out=tmp_path / "out", vocab_size=SIZE, json_output=True)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert set(json.loads(printed)) >= {
        "out", "train_documents", "valid_documents", "train_tokens", "valid_tokens", "train_bytes", "valid_bytes",
        "vocab_size", "bytes_per_token", "seconds", "megabytes_per_second",
    }  # fmt: skip


def test_misspelt_options_are_no_sources(source, tmp_path):
    with pytest.raises(UserError, match="option --vocab is unknown; see `smalllm prepare --help`"):
        command(source, "--vocab", "300", out=tmp_path / "out")


def test_summary_says_what_to_do_next(source, tmp_path, capsys):
    out = tmp_path / "out\x1b[31m[/b]"
    command(source, out=out, vocab_size=SIZE)
    printed = capsys.readouterr()
    assert printed.out.endswith(f"next: smalllm train --data {str(out).replace(chr(27), '')}\n")
    assert "\x1b" not in printed.out + printed.err
    command(source, out=out, vocab_size=SIZE)
    assert capsys.readouterr().out.startswith("unchanged: ")


def test_near_copies_are_counted_and_the_worst_pair_is_shown(tmp_path, capsys):
    words = " ".join(f"word{number}" for number in range(60))
    valid = write(tmp_path / "valid.txt", [f"\x1b[31mOnce {words}", *TEXTS[:20]])
    source = write(tmp_path / "train.txt", [f"Twice {words}", *TEXTS[20:300]])
    options = {"out": tmp_path / "out", "vocab_size": SIZE, "valid": valid}
    command(source, **options)
    printed = capsys.readouterr().out
    assert (
        "leaks       1 of 21 validation documents, 281 training documents compared: similarity 0.8 or more" in printed
    )
    assert "most alike  0.97" in printed and "[31mOnce word0" in printed and "Twice word0" in printed
    assert "\x1b" not in printed
    command(source, **options, json_output=True)  # unchanged: the figures are those of the manifest
    leaks = json.loads(capsys.readouterr().out)["leaks"]
    assert (leaks["near"], leaks["exact"], leaks["threshold"]) == (1, 0, 0.8)


def test_no_leaks_are_said(source, tmp_path, capsys):
    command(source, out=tmp_path / "out", vocab_size=SIZE)
    assert "leaks       none found among " in capsys.readouterr().out


def test_progress_reaches_the_end_of_each_stage(source, tmp_path):
    states = []
    prepare([source], tmp_path / "out", vocab_size=SIZE, progress=states.append)
    assert states[-1].stage == "encode" and states[-1].done_bytes == states[-1].total_bytes
    assert states[-1].documents == 600
