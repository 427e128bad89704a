"""`smalllm export`: from a run to files with a certificate, or one sentence and nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from export_runs import random_run
from model_hub import model_hub

from smalllm.cli import run as smalllm
from smalllm.config import UserError
from smalllm.conversation import CONTROL
from smalllm.export import card, certificate, gguf, hub, huggingface, names
from smalllm.export.destination import certificate_file, check_free, replacing
from smalllm.generation import SamplingParams

KEYS = {"path", "architecture", "max_logit_difference", "token_agreement", "bits_per_byte_difference"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    random_run(folder)
    (folder / "curve.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Short stories and texts: what is compared is compared in test_certificate.py."""
    monkeypatch.setattr(card, "STORY", SamplingParams(max_tokens=5, seed=0))
    monkeypatch.setattr(certificate, "TEXT_TOKENS", 300)


@pytest.fixture
def asked(capsys):
    """``asked(words ...)``: exit code, standard output and standard error."""

    def ask(*words: object) -> tuple[int, str, str]:
        code = smalllm([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return ask


@pytest.mark.parametrize(
    ("to", "name", "readers"),
    [
        ("huggingface", "folder", {"transformers"}),
        ("gguf", "m.gguf", {"xllamacpp", "smalllm"}),
        ("llama2c", "l2c", {"smalllm"}),
        ("html", "p.html", {"smalllm"}),
    ],
)
def test_every_format_comes_with_its_certificate(llama, tmp_path, asked, to, name, readers):
    out = tmp_path / name
    code, printed, err = asked("export", llama, "--to", to, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(printed)
    assert told.keys() >= KEYS and told["architecture"] == "llama" and told["path"] == str(out)
    assert told["token_agreement"] > 0.95 and told["tokenizer_agreement"] == 1.0 and told["reader"] in readers
    assert json.loads(certificate_file(out).read_bytes()) == told | {"path": name}
    kept = [path.name for path in tmp_path.iterdir()]
    assert sorted(kept) == sorted({name, *([] if out.is_dir() else ["certificate.json"])})


def test_a_second_export_takes_the_place_of_the_first(llama, tmp_path, asked):
    out = tmp_path / "folder"
    assert asked("export", llama, "--to", "huggingface", "--out", out)[0] == 0
    code, printed, _ = asked("export", llama, "--to", "huggingface", "--out", out, "--dtype", "f16")
    assert code == 0 and "f16" in printed
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_damaged_tensor_ends_with_exit_1_and_nothing(llama, tmp_path, asked, monkeypatch):
    real = names.to_huggingface

    def damaged(*arguments):
        found = real(*arguments)
        found["model.layers.0.self_attn.o_proj.weight"] = found["model.layers.0.self_attn.o_proj.weight"].flip(1)
        return found

    monkeypatch.setattr(huggingface, "to_huggingface", damaged)
    code, out, err = asked("export", llama, "--to", "huggingface", "--out", tmp_path / "folder")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "was not written: read back by transformers, its logits differ by" in err
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_survives_a_failing_one(llama, tmp_path, asked, monkeypatch):
    out = tmp_path / "m.gguf"
    assert asked("export", llama, "--to", "gguf", "--out", out)[0] == 0
    before = out.read_bytes()

    def fails(*arguments):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(gguf, "write", fails)
    code, _, err = asked("export", llama, "--to", "gguf", "--out", out)
    assert code == 1 and "No space left" in err
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_without_an_independent_reader_our_own_is_asked(llama, tmp_path, asked, monkeypatch):
    from smalllm.commands import export

    monkeypatch.setattr(export, "installed", lambda reader: False)
    for to, name in (("huggingface", "folder"), ("gguf", "m.gguf")):
        code, out, _ = asked("export", llama, "--to", to, "--out", tmp_path / name, "--json")
        assert code == 0 and json.loads(out)["reader"] == "smalllm"


def test_the_card_tells_what_the_run_was(llama, tmp_path, asked):
    text = tmp_path / "text.txt"
    text.write_text("One day a hen met a fox.\n<|endoftext|>\nThey ran away.\n")
    words = ["--out", tmp_path / "folder", "--text", text, "--author", "A: b\n---", "--licence", "mit"]
    assert asked("export", llama, "--to", "huggingface", *words)[0] == 0
    page = (tmp_path / "folder" / "README.md").read_text()
    assert 'license: "mit"' in page and "bits per byte** (95 % interval" in page and "on 2 documents" in page
    assert "![Loss and learning rate over the steps](curve.png)" in page and "[model]" in page
    assert (tmp_path / "folder" / "curve.png").read_bytes() == b"\x89PNG"
    assert str(tmp_path) not in page


def test_turn_markers_come_with_a_template(tmp_path, asked):
    random_run(tmp_path / "run", "llama", CONTROL)
    code, _, err = asked("export", tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "folder")
    assert code == 0, err
    assert (tmp_path / "folder" / "chat_template.jinja").exists()
    generation = json.loads((tmp_path / "folder" / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2


MISTAKES = [
    (("--to", "huggingface", "--out", "{run}"), 1, "exists and is not an earlier export"),
    (("--to", "huggingface", "--out", "{tmp}/no/where"), 1, "there is no folder"),
    (("--to", "huggingface", "--out", "/"), 1, "names no file or folder"),
    (("--to", "huggingface", "--out", "{tmp}/x", "--dtype", "q8_0"), 1, "--dtype q8_0 has no place"),
    (("--to", "huggingface", "--out", "{tmp}/x", "--dtype", "f64"), 1, "--dtype f64 has no place"),
    (("--to", "llama2c", "--out", "{tmp}/x", "--dtype", "bf16"), 1, "--dtype bf16 has no place"),
    (("--to", "gguf", "--out", "{tmp}/x", "--push", "me/x"), 1, "--push uploads a Hugging Face folder"),
    (("--to", "huggingface", "--out", "{tmp}/x", "--push", "../x"), 1, "is not OWNER/NAME"),
    (("--to", "huggingface", "--out", "{tmp}/x", "--checkpoint", "77"), 1, "no checkpoint at step 77"),
    (("--to", "huggingface", "--out", "{tmp}/x", "--text", "{tmp}/none.txt"), 1, "none.txt"),
    (("--to", "onnx", "--out", "{tmp}/x"), 2, "onnx"),
    (("--out", "{tmp}/x"), 2, "--to"),
    (("--to", "huggingface"), 2, "--out"),
]


@pytest.mark.parametrize(("words", "code", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence(llama, tmp_path, asked, words, code, sentence):
    filled = [word.format(run=llama, tmp=tmp_path) for word in words]
    found, out, err = asked("export", llama, *filled)
    assert (found, out) == (code, "") and sentence in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ── the place ──


def test_only_earlier_exports_are_replaced(tmp_path):
    out = tmp_path / "m.bin"
    out.write_text("mine")
    with pytest.raises(ValueError, match="not an earlier export"):
        check_free(out)
    (tmp_path / "certificate.json").write_text(json.dumps({"path": "/elsewhere/m.bin"}))
    check_free(out)
    for damaged in ("[", "[]", '{"path": 5}', '{"path": "other.bin"}', "[" * 100_000):
        (tmp_path / "certificate.json").write_text(damaged)
        with pytest.raises(ValueError, match="not an earlier export"):
            check_free(out)


@pytest.mark.parametrize("name", ["x" * 250, "a\0b", "a\ud800", "a" + "/b" * 3000])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="no file can have this name"), replacing(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


def test_two_files_in_a_folder_have_two_certificates(tmp_path):
    (tmp_path / "certificate.json").write_text(json.dumps({"path": "a.gguf"}))
    assert certificate_file(tmp_path / "a.gguf").name == "certificate.json"
    assert certificate_file(tmp_path / "b.gguf").name == "b.gguf.certificate.json"


def test_a_failing_block_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "certificate.json").write_text(json.dumps({"path": str(out)}))
    with pytest.raises(KeyboardInterrupt), replacing(out) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "certificate.json").exists()
    with replacing(out) as temporary:
        temporary.mkdir()
        (temporary / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


# ── upload ──


def test_push_uploads_every_file(llama, tmp_path, asked, monkeypatch):
    from huggingface_hub import constants

    with model_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        server.token = "hf_canary"
        out = tmp_path / "folder"
        code, printed, err = asked(
            "export", llama, "--to", "huggingface", "--out", out, "--push", "me/stories", "--json"
        )
        assert code == 0, err
        assert json.loads(printed)["pushed"] == f"{server.endpoint}/me/stories"
        assert server.files == {path.name: path.read_bytes() for path in out.iterdir()} and server.commits == 1
        assert server.made[0]["visibility"] == "private"
        assert not any(b"hf_canary" in data for data in server.files.values())


def test_what_the_hub_refuses_is_told(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's attempts
    (tmp_path / "README.md").write_text("x")
    with model_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.token = "another"
        with pytest.raises(UserError, match="wants a token that may write there; set HF_TOKEN"):
            hub.push(tmp_path, "me/stories")
        server.token, server.status = None, 500
        with pytest.raises(UserError, match="answered with status 500"):
            hub.push(tmp_path, "me/stories")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        hub.push(tmp_path, "me/stories")
