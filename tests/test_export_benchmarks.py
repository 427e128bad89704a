"""The scripts that measure exports: they say what the formats' own programs say, and what they print they measured."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_runs import random_run

from smalllm.config import UserError
from smalllm.export import llama2c

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
llama2c_script = importlib.import_module("export_llama2c")


@pytest.mark.parametrize(
    "ids, text",
    [
        ([1, 3, 4], b"Once a\n"),  # no space after begin
        ([4, 3], b" Once\n"),
        ([1, 3, 5], b"Once\xe2\x82\n"),
        ([1, 3, 6], b"Once\n"),  # a single byte that is no character cannot be printed
        ([3, 2], b"\n</s>\n\n"),
        ([3, 7, 8, 9], b"\t\n"),  # neither NUL nor BEL
    ],
)
def test_ids_are_spoken_as_run_c_does(ids: list[int], text: bytes):
    pieces = [
        b"<unk>",
        b"\n<s>\n",
        b"\n</s>\n",
        b" Once",
        b" a",
        b"\xe2\x82",
        b"<0xAC>",
        b"<0x00>",
        b"<0x09>",
        b"<0x07>",
    ]
    assert llama2c_script.spoken(pieces, ids) == text


def test_greedy_ids_are_those_of_the_whole_model(tmp_path: Path):
    run = random_run(tmp_path / "run")
    ids = llama2c_script.greedy(run.model, [1, 300, 301], 20)
    with torch.inference_mode():
        chosen = run.model(torch.tensor([ids]))[0].argmax(dim=-1).tolist()
    assert len(ids) == 21 or chosen[-1] == 1
    assert ids[:3] == [1, 300, 301] and ids[3:] == chosen[2 : len(ids) - 1]
    assert llama2c_script.greedy(run.model, [1, 300, 301], 1) == [1, 300]


def test_the_pieces_of_a_file(tmp_path: Path):
    run = random_run(tmp_path / "run")
    pieces = llama2c_script.piece_bytes(llama2c.tokenizer_bytes(run.tokenizer))
    assert len(pieces) == 512 and pieces[1:4] == [b"\n<s>\n", b"\n</s>\n", b"<0x00>"]


def test_logits_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Against a program that computes our own model, and one that is wrong by a known amount."""
    run, script = random_run(tmp_path / "run"), llama2c_script

    def answer(program: float, export: Path, requests: list[bytes]) -> bytes:
        (request,) = requests
        ids = struct.unpack_from(f"<{len(request) // 4 - 2}i", request, 8)
        with torch.inference_mode():
            logits = run.model(torch.tensor([ids]))[0].numpy()
        logits[:, 7] += program
        return logits.astype(np.float32).tobytes()

    monkeypatch.setattr(script, "asked", answer)
    greatest, equal, bits, difference = script.compare_logits(0.0, tmp_path, run, ["Once upon a time", "A cat."])
    assert greatest == 0.0 and equal == 1.0 and bits > 1 and difference == 0.0
    greatest, equal, _, difference = script.compare_logits(50.0, tmp_path, run, ["Once upon a time"])
    assert greatest == pytest.approx(50.0, rel=1e-3) and equal < 0.5 and difference > 1


def test_a_folder_that_is_not_llama2c_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no .*run.c; clone https://github.com/karpathy/llama2.c"):
        llama2c_script.compile_programs(tmp_path, tmp_path, "f32")


def test_exports_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture):
    random_run(tmp_path / "run")
    exports = importlib.import_module("exports")
    asked = ["--run", str(tmp_path / "run"), "--exports", "llama2c f32", "--tokens", "8", "--repeats", "1"]
    assert exports.main([*asked, "--json", str(tmp_path / "e.json")]) == 0
    (result,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert "| llama2c f32 | 0.5 | smalllm |" in capsys.readouterr().out
    assert (
        result["megabytes"] == pytest.approx(0.49, rel=0.1) and result["load_seconds"] > 0 < result["tokens_per_second"]
    )


def test_what_has_no_export_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    run, exports = random_run(tmp_path / "run", "qwen3"), importlib.import_module("exports")
    assert dict(exports.write_all(run, tmp_path, ["run", "llama2c f32"])) == {"run": run.checkpoint.path}
    assert "llama2c f32 left out: model.qk_norm = true" in capsys.readouterr().err
