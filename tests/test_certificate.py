"""The certificate: it passes what is right, says how right it is, and stops what is damaged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from export_runs import random_model, random_run
from torch import Tensor

from smalllm.checkpoint import LoadedRun
from smalllm.config import UserError
from smalllm.data import storyworld
from smalllm.evaluation import bits_per_byte
from smalllm.export import huggingface
from smalllm.export.certificate import OwnReader, TransformersReader, certify, faults, strings, tokenizer_agreement

TEXTS = list(storyworld.stories(seed=3, count=6))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return random_run(tmp_path_factory.mktemp("certificate") / "run", "qwen3")


class Spoilt(OwnReader):
    """A reader of the run itself, with something added to its logits or its ids."""

    def __init__(self, run: LoadedRun, logit: float = 0.0, ids: bool = False) -> None:
        super().__init__(run.model, run.tokenizer)
        self.logit = logit
        if ids:
            encode = self.encode
            self.encode = lambda text: encode(text)[1:]

    def logits(self, ids: list[int]) -> Tensor:
        found = super().logits(ids)
        found[:, 5] += self.logit
        return found


def test_the_model_itself_is_perfect(run):
    told = certify(run, OwnReader(run.model, run.tokenizer), TEXTS, "f32", Path("x"))
    assert faults(told) == []
    assert (told["max_logit_difference"], told["bits_per_byte_difference"]) == (0.0, 0.0)
    assert (told["token_agreement"], told["tokenizer_agreement"], told["reader"]) == (1.0, 1.0, "smalllm")
    assert told["architecture"] == "qwen3" and told["path"] == "x"


def test_bits_per_byte_are_those_of_evaluation(run):
    text = [TEXTS[0][:700]]
    told = certify(run, OwnReader(run.model, run.tokenizer), text, "f32", Path("x"))
    assert told["bits_per_byte"] == pytest.approx(bits_per_byte(run.model, run.tokenizer, text).bits_per_byte, rel=1e-6)


def test_a_known_difference_is_told(run):
    told = certify(run, Spoilt(run, logit=0.25), TEXTS, "f32", Path("x"))
    assert told["max_logit_difference"] == pytest.approx(0.25, abs=1e-5)
    assert told["bits_per_byte_difference"] > 0.0


def test_transformers_is_asked(run, tmp_path):
    huggingface.write(run, tmp_path / "out", "f32")
    told = certify(run, TransformersReader(tmp_path / "out", turns=False), TEXTS, "f32", tmp_path / "out")
    assert faults(told) == [] and told["reader"] == "transformers" and told["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_norm.weight"]
)
def test_a_damaged_tensor_is_found(run, tmp_path, name, dtype, monkeypatch):
    real = huggingface.to_huggingface

    def damaged(*arguments: object) -> dict[str, Tensor]:
        return {key: tensor.flip(0) if key == name else tensor for key, tensor in real(*arguments).items()}

    monkeypatch.setattr(huggingface, "to_huggingface", damaged)
    huggingface.write(run, tmp_path / "out", dtype)
    monkeypatch.undo()
    told = certify(run, OwnReader(*huggingface.read(tmp_path / "out")), TEXTS, dtype, tmp_path / "out")
    assert any("logits differ" in fault for fault in faults(told))


def test_what_is_no_number_is_a_fault(run):
    told = certify(run, Spoilt(run, logit=math.nan), TEXTS, "bf16", Path("x"))
    assert told["max_logit_difference"] == math.inf
    assert [fault.split(" differ")[0] for fault in faults(told)][:2] == ["logits", "bits per byte"]


def test_one_string_that_differs_is_a_fault(run):
    told = certify(run, Spoilt(run, ids=True), TEXTS, "f32", Path("x"))
    assert told["tokenizer_agreement"] < 0.2
    assert [fault.split(" in")[0] for fault in faults(told)] == ["tokenizers disagree"]
    assert tokenizer_agreement(run.tokenizer, Spoilt(run, ids=True)) == told["tokenizer_agreement"]


def test_a_reader_that_cannot_encode(run):
    class Mute:
        reader = "mute"
        logits = OwnReader(run.model, run.tokenizer).logits

    told = certify(run, Mute(), TEXTS, "f32", Path("x"))
    assert told["tokenizer_agreement"] is None and faults(told) == []


def test_logits_of_another_shape(run):
    class Other(OwnReader):
        def logits(self, ids: list[int]) -> Tensor:
            return torch.zeros(len(ids), 3)

    with pytest.raises(UserError, match="gives logits of shape"):
        certify(run, Other(run.model, run.tokenizer), TEXTS, "f32", Path("x"))


def test_other_weights_disagree_about_tokens(run):
    told = certify(run, OwnReader(random_model(run.model.config, seed=1), run.tokenizer), TEXTS, "q8_0", Path("x"))
    assert told["token_agreement"] < 0.5
    assert [fault.split()[0] for fault in faults(told)] == ["logits", "greedy"]


@pytest.mark.parametrize("texts", [["a"], ["", "b"], TEXTS])
def test_any_text_will_do(run, texts):
    assert certify(run, OwnReader(run.model, run.tokenizer), texts, "f32", Path("x"))["token_agreement"] == 1.0


def test_without_text(run):
    with pytest.raises(UserError, match="no text to compare on"):
        certify(run, OwnReader(run.model, run.tokenizer), ["", ""], "f32", Path("x"))


def test_strings_hold_what_breaks_tokenizers():
    joined = "".join(strings(300))
    for part in ("</s>", "\u2581", "\0", "\u200d", "🙂", "<0x41>", "<|user|>", "   ", "\r\n"):
        assert part in joined
    assert list(strings(50)) == list(strings(50))
