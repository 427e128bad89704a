"""`smalllm import`: a model of another program is a run like any other, or one sentence and nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_settings
from export_runs import SHAPES, random_run, tokenizer

import smalllm
from smalllm.checkpoint import model_weights, open_run
from smalllm.cli import run as command
from smalllm.commands.export import write
from smalllm.config import UserError, load_recipe
from smalllm.data.prepare import prepare
from smalllm.data.shards import TokenDataset
from smalllm.export.card import Card
from smalllm.training.trainer import train

IDS = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked(capsys):
    """``asked(words ...)``: exit code, standard output and standard error."""

    def ask(*words: object) -> tuple[int, str, str]:
        code = command([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return ask


@pytest.mark.parametrize("to", ["huggingface", "gguf", "llama2c"])
def test_what_was_exported_comes_back_bit_for_bit(tmp_path, asked, to):
    run = random_run(tmp_path / "run")
    out = tmp_path / ("m.gguf" if to == "gguf" else "out")
    write(to, run, out, "f32", Card("x"))
    code, printed, err = asked("import", out, "--out", tmp_path / "again", "--json")
    assert code == 0, err
    assert json.loads(printed) == {
        "run": str(tmp_path / "again"), "architecture": "llama", "parameters": run.model.parameters_count(),
        "context": 64, "vocab_size": 512, "space_first": False,
    }  # fmt: skip
    again = open_run(tmp_path / "again")
    ours, theirs = model_weights(run.model), model_weights(again.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
    assert again.tokenizer.encode("Once </s> \u2581") == run.tokenizer.encode("Once </s> \u2581")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_of_every_architecture(tmp_path, shape):
    run = random_run(tmp_path / "run", shape)
    write("huggingface", run, tmp_path / "out", "f32", Card("x"))
    assert command(["import", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    again = open_run(tmp_path / "again")
    assert torch.equal(again.model(IDS), run.model(IDS))
    assert again.model.config.model_copy(update={"mlp_width": 0, "rope_theta": None}) == run.model.config.model_copy(
        update={"mlp_width": 0, "rope_theta": None}
    )
    assert load_recipe(tmp_path / "again" / "config.toml").model == again.model.config


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("imported")
    write("huggingface", random_run(place / "run"), place / "out", "bf16", Card("x"))
    assert command(["import", str(place / "out"), "--out", str(place / "model")]) == 0
    return place / "model"


def test_the_other_verbs_open_it(imported, tmp_path, asked):
    text = tmp_path / "text.txt"
    text.write_text("One day a hen met a fox.\n")
    assert asked("sample", imported, "--max-tokens", 5, "--seed", 1)[0] == 0
    code, out, err = asked("evaluate", imported, "--text", text, "--json")
    assert code == 0, err
    assert json.loads(out)["documents"] == 1
    assert smalllm.load(imported).complete("Once", max_tokens=3, seed=0) is not None
    assert asked("export", imported, "--to", "huggingface", "--out", tmp_path / "back", "--text", text)[0] == 0


def test_training_goes_on_from_it(tmp_path, asked):
    write("huggingface", random_run(tmp_path / "run", "starcoder2"), tmp_path / "out", "f32", Card("x"))
    model, data = tmp_path / "model", tmp_path / "data"
    asked("import", tmp_path / "out", "--out", model)
    prepare(["storyworld:60"], data, tokenizer=model / "tokenizer.model", seed=1)
    before = open_run(model).model.embedding.weight.clone()
    short = ["train.steps=3", "train.batch_tokens=256", "train.evaluate_tokens=100", "train.sample_tokens=0"]
    short += ["train.device=cpu", "train.precision=fp32", "train.compile=off", "optim.lr=1e-9", "optim.warmup_steps=0"]
    words = ("train", model / "config.toml", *short, "--data", data, "--out", model)
    code, out, err = asked(*words)
    assert code == 0, err
    assert "training goes on from the imported model" in out
    after = open_run(model, "3")
    assert after.step == 3 and torch.allclose(after.model.embedding.weight, before, atol=1e-6)
    assert not torch.equal(after.model.embedding.weight, before)
    assert asked(*words)[0] == 0  # and continues as any run does


def test_training_on_data_of_another_vocabulary_is_refused(imported, dataset_folder):
    model = load_recipe(imported / "config.toml").model.model_dump(exclude_none=True)
    assert TokenDataset.open(dataset_folder).manifest.vocab_size == tokenizer().vocab_size
    settings = tiny_settings(dataset_folder, model=model, train={"batch_tokens": 512})
    with pytest.raises(UserError, match=r"another tokenizer .*; prepare data with --tokenizer .*tokenizer.model"):
        train(settings, imported)


def test_training_with_another_shape_is_refused(tmp_path, asked):
    write("huggingface", random_run(tmp_path / "run"), tmp_path / "out", "f32", Card("x"))
    asked("import", tmp_path / "out", "--out", tmp_path / "model")
    prepare(["storyworld:60"], tmp_path / "data", tokenizer=tmp_path / "model" / "tokenizer.model", seed=1)
    words = ("train", tmp_path / "model" / "config.toml", "--data", tmp_path / "data", "--out", tmp_path / "model")
    code, _, err = asked(*words, "model.rope_theta=500")
    assert code == 1 and "has another shape than [model] says" in err


def test_a_vocabulary_that_put_a_space_first_is_told(tmp_path, asked):
    from smalllm.export.pieces import model_of, pieces_of

    write("huggingface", random_run(tmp_path / "run"), tmp_path / "out", "f32", Card("x"))
    plain = model_of(pieces_of(tokenizer().model_bytes))
    assert b"identity\x18\x00" in plain
    (tmp_path / "out" / "tokenizer.model").write_bytes(plain.replace(b"identity\x18\x00", b"identity\x18\x01"))
    code, out, _ = asked("import", tmp_path / "out", "--out", tmp_path / "model")
    assert code == 0 and "begin prompts with a space" in out
    assert open_run(tmp_path / "model").tokenizer.encode("Once") == tokenizer().encode("Once")


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, asked):
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04")
    (tmp_path / "archive.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    cases = [
        ("nowhere", "does not exist"),
        ("empty", "config.json: No such file"),
        ("archive.tar.gz", "is not a folder; unpack archives first"),
        ("weights.bin", "weights.bin"),
        ("m.gguf", "m.gguf"),
    ]
    before = sorted(tmp_path.iterdir())
    for name, sentence in cases:
        code, out, err = asked("import", tmp_path / name, "--out", tmp_path / "model")
        assert (code, out) == (1, "") and sentence in err and err.count("\n") == 1, err
    code, _, err = asked("import", tmp_path / "empty", "--out", tmp_path / "empty")
    assert code == 1 and "is not an earlier export; choose another --out" in err
    assert sorted(tmp_path.iterdir()) == before
