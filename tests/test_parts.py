"""Several machines, one dataset: the parts are what one machine makes, whoever is last and whatever was killed."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.commands.prepare import prepare as command
from smalllm.config import UserError
from smalllm.data import parts as module
from smalllm.data import prepare as prepare_module
from smalllm.data.parts import Part
from smalllm.data.prepare import PrepareResult, prepare
from smalllm.data.shards import TokenDataset
from smalllm.locks import Lock

SEPARATOR = "<|endoftext|>\n"
TEXTS = [f"Story {n}. {('Lily', 'Tom', 'Anna')[n % 3]} saw {n * 7919 % 1000} birds. é🙂" for n in range(300)]


def write(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n{SEPARATOR}" for text in texts), encoding="utf-8")
    return str(path)


def documents_of(folder: Path, side: str) -> list[str]:
    dataset = TokenDataset.open(folder)
    tokenizer = dataset.tokenizer()
    return [tokenizer.decode(ids.tolist()) for ids in getattr(dataset, side).iterate_documents()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    write(folder / "a.txt", TEXTS[:170])
    (folder / "b.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS[170:]), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("first")
    prepare([source], out, vocab_size=330)
    return out / "tokenizer.model"


@pytest.fixture(scope="module")
def three(source, tokenizer, tmp_path_factory) -> Path:
    """The dataset that three machines made."""
    out = tmp_path_factory.mktemp("three")
    assert in_parts([source], out, tokenizer, 3).complete
    return out


def in_parts(
    sources: list[str], out: Path, tokenizer: Path, of: int, order: list[int] | None = None, **options
) -> PrepareResult:
    """All parts, one after the other; the result of the last one."""
    for number in order or range(1, of + 1):
        result = prepare(sources, out, tokenizer=tokenizer, shard=f"{number}/{of}", **options)
    return result


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as error:
        prepare(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- the same data


@settings(max_examples=12, deadline=None)
@given(
    again=st.lists(st.integers(0, 100), max_size=150),
    files=st.integers(1, 4),
    of=st.integers(2, 6),
    seed=st.integers(0, 1000),
    explicit=st.booleans(),
    rate=st.sampled_from([1.0, 0.7]),
)
def test_parts_hold_what_one_machine_holds(tokenizer, tmp_path_factory, again, files, of, seed, explicit, rate):
    """Documents that come several times, over several files; validation of a fraction, or of a source."""
    folder = tmp_path_factory.mktemp("data")
    choice = random.Random(seed).sample([*range(70), *again], 70 + len(again))
    for number in range(files):
        write(folder / "text" / f"{number}.txt", [TEXTS[index] for index in choice[number::files]] + [" "])
    sources = [str(folder / "text")]
    side = (
        {"valid": write(folder / "valid.txt", [*TEXTS[:9], *TEXTS[:3], "new"])} if explicit else {"valid_fraction": 0.3}
    )
    options = {**side, "seed": seed, "sample_rate": rate}
    order = random.Random(seed).sample(range(1, of + 1), of)
    one = prepare(sources, folder / "one", tokenizer=tokenizer, **options)
    many = in_parts(sources, folder / "many", tokenizer, of, order, **options)
    assert many.complete and many.missing == []
    for name in ("documents", "tokens", "bytes"):
        for split in ("train", "valid"):
            assert getattr(one, f"{split}_{name}") == getattr(many, f"{split}_{name}")
    assert (one.duplicates, one.empty) == (many.duplicates, many.empty)
    for split in ("train", "valid"):
        found = [collections.Counter(documents_of(folder / name, split)) for name in ("one", "many")]
        assert found[0] == found[1]


def test_validation_does_not_depend_on_the_number_of_parts(source, tokenizer, three, tmp_path):
    in_parts([source], tmp_path / "five", tokenizer, 5)
    name = "valid-00000.bin"
    assert (tmp_path / "five" / name).read_bytes() == (three / name).read_bytes()
    assert documents_of(three, "valid") != documents_of(tokenizer.parent, "valid")  # another order than one machine's


@pytest.mark.parametrize("order", itertools.permutations([1, 2, 3]))
def test_whoever_is_last_makes_the_same_bytes(source, tokenizer, three, tmp_path, order):
    results = [
        prepare([source], tmp_path / "out", tokenizer=tokenizer, shard=f"{number}/3", workers=number)
        for number in order
    ]
    assert [result.complete for result in results] == [False, False, True]
    assert results[0].missing == [f"{number}/3" for number in sorted(order[1:])]
    assert contents(tmp_path / "out") == contents(three)
    assert results[2].fingerprint == TokenDataset.open(three).fingerprint and results[0].fingerprint == ""


def test_files_are_listed_in_turns(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "ShardWriter", lambda *args: module.ShardWriter(*args, shard_tokens=500))
    in_parts([source], tmp_path / "out", tokenizer, 3)
    names = [shard.file for shard in TokenDataset.open(tmp_path / "out").manifest.train.shards]
    assert names[:4] == [
        "train-0001-of-0003-00000.bin", "train-0002-of-0003-00000.bin", "train-0003-of-0003-00000.bin",
        "train-0001-of-0003-00001.bin",
    ]  # fmt: skip
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "valid")) == sorted(TEXTS)


def test_one_part_of_one_is_the_whole(source, tokenizer, tmp_path):
    prepare([source], tmp_path / "out", vocab_size=330, shard="1/1")
    assert contents(tmp_path / "out") == contents(tokenizer.parent)


def test_more_parts_than_files_that_cannot_be_cut(tokenizer, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    result = in_parts([str(tmp_path / "a.json")], tmp_path / "out", tokenizer, 4)
    assert result.train_documents + result.valid_documents == len(TEXTS)


def test_parts_made_in_folders_of_their_own_are_put_together(source, tokenizer, three, tmp_path):
    for number in (1, 2, 3):
        prepare([source], tmp_path / str(number), tokenizer=tokenizer, shard=f"{number}/3")
        shutil.copytree(tmp_path / str(number), tmp_path / "all", dirs_exist_ok=True)
    assert not (tmp_path / "all" / "manifest.json").exists()
    assert prepare([source], tmp_path / "all", tokenizer=tokenizer, shard="2/3").complete
    assert contents(tmp_path / "all") == contents(three)


# -- leaks


def test_near_copies_in_other_parts_are_found(tokenizer, tmp_path):
    words = " ".join(f"word{number}" for number in range(60))
    valid = write(tmp_path / "valid.txt", [f"Once {words}", *TEXTS[:20]])
    for near in (30, 150, 270):  # a text of the first, the second and the third part
        source = write(tmp_path / "train.txt", [*TEXTS[20:near], f"Twice {words}", *TEXTS[near:]])
        out = tmp_path / f"out{near}"
        leaks = in_parts([source], out, tokenizer, 3, valid=valid).leaks
        assert (leaks["near"], leaks["exact"], leaks["valid_documents"], leaks["train_documents"]) == (1, 0, 21, 281)
        assert documents_of(out, "train")[leaks["worst"]["train"]] == f"Twice {words}"
        assert documents_of(out, "valid")[leaks["worst"]["valid"]] == f"Once {words}"


# -- killed, and started again


CHILD = """
import sys, time
from pathlib import Path
from smalllm.data import prepare as module
module.REPORT_SECONDS, module.BATCH_BYTES = 0.0, 1_000
def report(state):
    if state.stage == sys.argv[4] and state.documents > 20:
        print("ready", flush=True)
        time.sleep(60)
module.prepare([sys.argv[1]], Path(sys.argv[2]), tokenizer=Path(sys.argv[3]), shard="2/3", progress=report)
"""


@pytest.mark.parametrize("stage", ["read", "encode"])
def test_a_part_that_was_killed_is_made_again(source, tokenizer, three, tmp_path, stage):
    out = tmp_path / "out"
    prepare([source], out, tokenizer=tokenizer, shard="1/3")
    command = [sys.executable, "-c", CHILD, source, str(out), str(tokenizer), stage]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    assert "is being written by another prepare" in refusal([source], out, tokenizer=tokenizer, shard="2/3")
    assert prepare([source], out, tokenizer=tokenizer, shard="3/3").missing == ["2/3"]
    child.send_signal(signal.SIGKILL)
    child.wait(20)
    child.stdout.close()
    assert prepare([source], out, tokenizer=tokenizer, shard="1/3").missing == ["2/3"]
    assert prepare([source], out, tokenizer=tokenizer, shard="2/3").complete
    assert contents(out) == contents(three)


@pytest.mark.parametrize(
    "step", ["_merge_valid", "_audit", "Tokenizer.save", "ShardWriter._finish", "Manifest.save", "tidy"]
)
def test_a_merge_that_was_killed_is_made_again(source, tokenizer, three, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    in_parts([source], out, tokenizer, 3, [1, 3])
    prepare([source], tmp_path / "second", tokenizer=tokenizer, shard="2/3")
    shutil.copytree(tmp_path / "second", out, dirs_exist_ok=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        place, _, name = step.rpartition(".")
        patch.setattr(getattr(module, place) if place else prepare_module if step == "tidy" else module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out, tokenizer=tokenizer, shard="1/3")
    assert prepare([source], out, tokenizer=tokenizer, shard="1/3").complete
    assert contents(out) == contents(three)


def test_two_that_finish_together_do_not_both_merge(source, tokenizer, three, tmp_path):
    out = tmp_path / "out"
    in_parts([source], out, tokenizer, 3, [1, 2])
    lock = Lock.acquire(out / ".lock")
    assert lock is not None
    result = prepare([source], out, tokenizer=tokenizer, shard="3/3")
    assert (result.complete, result.missing) == (False, [])
    lock.release()
    assert prepare([source], out, tokenizer=tokenizer, shard="3/3").complete
    assert contents(out) == contents(three)


def test_a_part_that_is_there_is_kept(source, tokenizer, tmp_path):
    out = tmp_path / "out"
    first = prepare([source], out, tokenizer=tokenizer, shard="1/3")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = prepare([source], out, tokenizer=tokenizer, shard="1/3")
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert (again.train_tokens, again.missing) == (first.train_tokens, ["2/3", "3/3"])


def test_the_finished_dataset_is_kept(source, tokenizer, three):
    before = contents(three)
    result = prepare([source], three, tokenizer=tokenizer, shard="2/3")
    assert result.reused and result.complete and contents(three) == before
    assert "holds a dataset already" in refusal([source], three, tokenizer=tokenizer, shard="1/2")
    assert "holds a dataset already" in refusal([source], three, tokenizer=tokenizer)


# -- refusals


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "-1/3", "1/0", "1/10000", "", "1/2/3"])
def test_what_is_no_part(source, tokenizer, tmp_path, shard):
    words = refusal([source], tmp_path / "out", tokenizer=tokenizer, shard=shard)
    assert words.startswith(f"shard={shard} is not one of n parts; the first of 4 machines gives 1/4")
    assert not (tmp_path / "out").exists()


def test_what_parts_cannot_do(source, tokenizer, tmp_path):
    out = tmp_path / "out"
    words = refusal([source], out, shard="1/3")
    assert (
        "needs one tokenizer for all parts; learn it with `smalllm prepare " in words and "--tokenizer FOLDER/" in words
    )
    assert "limit=5 counts the documents of all parts" in refusal(
        [source], out, tokenizer=tokenizer, shard="1/3", limit=5
    )
    assert "cannot be shared by several machines" in refusal(["-"], out, tokenizer=tokenizer, shard="1/3")
    assert not out.exists()


def test_parts_that_do_not_belong_together(source, tokenizer, tmp_path):
    prepare([source], tmp_path / "other", vocab_size=320)
    other = tmp_path / "other" / "tokenizer.model"
    out = tmp_path / "out"
    prepare([source], out, tokenizer=tokenizer, shard="1/3")
    before = contents(out)
    for options in ({"tokenizer": other}, {"tokenizer": tokenizer, "seed": 1}):
        for shard in ("1/3", "2/3"):
            assert "has part 1/3 of other settings" in refusal([source], out, **{**options, "shard": shard})
    assert "a part of another number of parts (part-0001-of-0003.json)" in refusal(
        [source], out, tokenizer=tokenizer, shard="2/4"
    )
    assert "holds other files (first: part-0001-of-0003.json)" in refusal([source], out, tokenizer=tokenizer)
    assert contents(out) == before
    prepare([source], tmp_path / "second", tokenizer=other, shard="2/2")  # put together by hand
    prepare([source], tmp_path / "first", tokenizer=tokenizer, shard="1/2")
    shutil.copytree(tmp_path / "second", tmp_path / "first", dirs_exist_ok=True)
    assert "from other settings than part 1/2" in refusal(
        [source], tmp_path / "first", tokenizer=tokenizer, shard="1/2"
    )


def test_folders_that_are_not_for_parts(source, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train-00000.bin").write_bytes(b"of an interrupted prepare")
    words = refusal([source], tmp_path / "mine", tokenizer=tokenizer, shard="1/2")
    assert "holds other files (first: train-00000.bin); choose a new or empty folder" in words


def test_too_few_documents_for_parts(tokenizer, tmp_path):
    source = write(tmp_path / "a.txt", TEXTS[:2])
    prepare([source], tmp_path / "out", tokenizer=tokenizer, shard="1/2", valid_fraction=0.001)
    assert "has too few documents for 2 parts: one side is empty; delete the folder and leave --shard out" in refusal(
        [source], tmp_path / "out", tokenizer=tokenizer, shard="2/2", valid_fraction=0.001
    )


def test_a_damaged_part_is_named(source, tokenizer, tmp_path):
    out = tmp_path / "out"
    prepare([source], out, tokenizer=tokenizer, shard="1/2")
    (out / "valid-0001-of-0002-00000.bin").write_bytes(b"")
    assert "valid-0001-of-0002-00000.bin is truncated" in refusal([source], out, tokenizer=tokenizer, shard="2/2")
    (out / "part-0001-of-0002.json").write_text("{}")
    assert "part-0001-of-0002.json is damaged" in refusal([source], out, tokenizer=tokenizer, shard="2/2")


# -- the face


def test_summary_says_which_parts_are_missing(source, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    command(source, out=out, tokenizer=tokenizer, shard="2/3")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}, part 2/3 alone\n")
    assert printed.endswith(
        "next: the parts that are missing (2): 1/3, 3/3; the last one to finish makes one dataset of them\n"
    )
    command(source, out=out, tokenizer=tokenizer, shard="1/3", json_output=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["shard"], found["complete"], found["missing"]) == ("1/3", False, ["3/3"])
    command(source, out=out, tokenizer=tokenizer, shard="3/3")
    assert capsys.readouterr().out.endswith(f"next: smalllm train --data {out}\n")


def test_labels():
    assert [str(part) for part in Part(2, 3).fellows] == ["1/3", "2/3", "3/3"]
    assert Part.parse("12/345").label == "0012-of-0345"


# -- many at once


RANDOM = """
import sys
from pathlib import Path
from smalllm.config import UserError
from smalllm.data import prepare as module
module.BATCH_BYTES = 500
source, out, tokenizer, shard = sys.argv[1:]
try:
    module.prepare([source], Path(out), tokenizer=Path(tokenizer), shard=shard)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_processes_that_are_killed_at_random_times_end_in_the_same_bytes(source, tokenizer, three, tmp_path):
    chance = random.Random(5)
    out = tmp_path / "out"

    def begin(number: int) -> subprocess.Popen:
        command = [sys.executable, "-c", RANDOM, source, str(out), str(tokenizer), f"{number}/3"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    for trial in range(8):
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(3):
            children = [begin(number) for number in (1, 2, 3)]
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.communicate(timeout=chance.uniform(0.1, 1.2))
                child.kill()
                child.communicate()
        children = [begin(number) for number in (1, 2, 3)]
        for child in children:
            assert child.communicate(timeout=60)[1] == "", f"trial {trial}"
        if not (out / "manifest.json").exists():  # the last ones met at the door: one of them is run again
            assert begin(1).communicate(timeout=60)[1] == ""
        assert {name: data for name, data in contents(out).items() if not name.startswith(".lock")} == contents(three)
