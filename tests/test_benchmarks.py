"""The scripts in benchmarks/: they start, they measure a tiny shape, and what they print is what they measured."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from smalllm import hardware
from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import RunConfig, UserError, load_recipe
from smalllm.evaluation import bits_per_byte

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
sys.path.insert(0, str(SCRIPTS[0].parent))  # as Python itself does for a script: what they share is found beside them
TINY = """
[model]
layers = 1
width = 32
heads = 2
context = 32
vocab_size = 300
activation = "gelu"
norm = "layernorm"
positions = "{positions}"
{bias}
[train]
steps = 10
batch_tokens = 64
"""
PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def load(name: str) -> ModuleType:
    """A script as a module."""
    path = next(path for path in SCRIPTS if path.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of starcoder2 shape that takes a moment."""
    (tmp_path / "tiny.toml").write_text(TINY.format(positions="rope", bias="bias = true"))
    return tmp_path / "tiny.toml"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_explains_itself(script: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        load(script.stem).main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and f"uv run python benchmarks/{script.name}" in said
    assert f"## {script.name}" in (script.parent / "README.md").read_text()


def test_prepare_scale_adds_up_what_the_parts_took(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "stories.txt"
    text.write_text("".join(f"Story {number} of a rabbit.\n<|endoftext|>\n" for number in range(400)))
    script = load("prepare_scale")
    script.main([
        "--text", str(text), "--copies", "1", "3", "--parts", "2", "--vocab-size", "290", "--json", str(tmp_path / "f.json"),
    ])  # fmt: skip
    one, three = json.loads((tmp_path / "f.json").read_text())
    texts = sum(len(f"Story {number} of a rabbit.") for number in range(400))
    assert (one["documents"], one["bytes"], one["read_bytes"], three["read_bytes"]) == (400, texts, texts, 3 * texts)
    assert one["documents"] < three["documents"] < 1_200 and three["parts"] == 2 and three["peak_bytes"] > 1e7
    assert capsys.readouterr().out.count("\n") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "stories.txt"]


def test_cost_growth_measures_draws_and_tells(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    files = ["--json", str(tmp_path / "c.json"), "--png", str(tmp_path / "c.png")]
    asked = [
        "--base",
        str(recipe),
        "--tokens",
        "64",
        "--seconds",
        "0.01",
        "--vocabularies",
        "--sizes",
        "--contexts",
        "16",
    ]
    assert load("cost_growth").main([*asked, *files]) == 0
    told = capsys.readouterr().out.splitlines()
    (figures,) = json.loads((tmp_path / "c.json").read_text())
    assert len(told) == 3 and told[2].startswith("| context | 16 | 300 | 1 x 32 |")
    assert figures["tokens_per_second"] > 0 and figures["place"] == 16 and figures["parameters"] > 300 * 32
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_points_differ_in_what_their_panel_says():
    growth = load("cost_growth")
    points = list(growth.points(growth.parser().parse_args([])))
    assert [point.place() for point in points if point.panel == "context"] == list(growth.CONTEXTS)
    assert [point.place() for point in points if point.panel == "vocabulary"] == list(growth.VOCABULARIES)
    sizes = [point.place() for point in points if point.panel == "parameters"]
    assert sizes == sorted(sizes) and 1.5e6 < sizes[0] < 2.5e6 and 110e6 < sizes[-1] < 125e6
    for point in points:
        train = point.config().train
        assert train.batch_tokens == 4096 == train.micro_batch * point.config().model.context
    with pytest.raises(UserError, match="LAYERSxWIDTH"):
        growth.shape_of("big")


def test_a_point_that_fails_is_one_sentence(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    growth = load("cost_growth")
    failed = subprocess.CompletedProcess([], 1, "", "some note\nerror: out of memory\n")
    monkeypatch.setattr(growth.subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(UserError, match="model.context=16: error: out of memory"):
        growth.measure(growth.Point("context", str(recipe), ("model.context=16",)), 1.0)


def test_impossible_points_show_before_the_first_is_measured(recipe: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(UserError, match="multiple of the context 24"):
        load("cost_growth").main(["--base", str(recipe), "--tokens", "64", "--contexts", "16", "24"])
    with pytest.raises(UserError, match="model.width = 193 must be divisible by model.heads"):
        load("cost_growth").main(["--sizes", "1x193", "--contexts"])
    assert capsys.readouterr().out == ""


def test_throughput_races_a_process_of_its_own(recipe: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", cache(lambda device, dtype: 1e9))
    files = ["--json", str(tmp_path / "t.json")]
    asked = ["--shapes", f"{recipe}:2", "--contenders", "smalllm", "--repeats", "2"]
    assert load("train_throughput").main([*asked, *files]) == 0
    told = capsys.readouterr().out
    (shape,) = json.loads((tmp_path / "t.json").read_text())["shapes"]
    (result,) = shape["results"]
    assert "vocabulary 300, micro-batch 2" in told and "| smalllm | 0.02 M |" in told
    assert len(result["seconds"]) == 2 == len(shape["peak_flops"]["bf16"]) and result["relative"] == 1.0
    assert result["tokens_per_second"] == pytest.approx(2 * 64 / sum(result["seconds"]))
    assert result["loss"] == pytest.approx(5.7, abs=0.2)  # ln 300


def test_a_contender_that_fails_says_why(recipe: Path, tmp_path: Path):
    throughput = load("train_throughput")
    with pytest.raises(UserError, match="nanogpt-fp32 failed: .*model.py"):
        throughput.race(throughput.Shape(str(recipe), 2), ["nanogpt-fp32"], 1, tmp_path / "missing")


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("name", ["transformers-fp32", "transformers-bf16", "nanogpt-fp32"])
def test_peers_learn(name: str, positions: str, tmp_path: Path):
    """Their loops train: the same batch again and again is known by heart."""
    (tmp_path / "tiny.toml").write_text(TINY.format(positions=positions, bias=""))
    (tmp_path / "model.py").write_text(PEER)
    throughput = load("train_throughput")
    shape = throughput.Shape(str(tmp_path / "tiny.toml"), 2)
    config = shape.config().replace(optim={"lr": 0.1})
    torch.manual_seed(0)
    batches = throughput.random_batches(config, tmp_path / "first", torch.device("cpu"))
    same = next(batches)
    throughput.random_batches = lambda *ignored: iter(lambda: same, None)
    contender = throughput.make_contender(name, config, tmp_path / "second", tmp_path)
    losses = [contender.step() for _ in range(12)]
    assert losses[0] == pytest.approx(5.7, abs=1.5) and losses[-1] < 0.8 * losses[0]
    assert contender.parameters >= 300 * 32


def test_peers_have_the_shape(tmp_path: Path):
    """Starcoder2 has SmallLM's parameters exactly; GPT-2 has biases besides."""
    throughput = load("train_throughput")
    for recipe, beside in (("smalllm-20m", 0), ("smolergpt-12m", (6 * (3 + 1 + 4 + 1 + 2) + 1) * 384)):
        shape = load_recipe(recipe).model
        with torch.device("meta"):
            peer, own = throughput.transformers_model(shape), throughput.GPT(shape)
        assert sum(parameter.numel() for parameter in peer.parameters()) == own.parameters_count() + beside


def test_all_contenders_see_the_same_tokens(recipe: Path, tmp_path: Path):
    throughput = load("train_throughput")
    config: RunConfig = throughput.Shape(str(recipe), 2).config()
    ours = throughput.TrainingBench(
        config.replace(train={"compile": "off", "device": "cpu"}), tmp_path / "ours"
    ).trainer
    theirs = throughput.random_batches(config, tmp_path / "theirs", torch.device("cpu"))
    for step in range(3):
        assert torch.equal(next(ours.batches.micro_batches(step, 2)).inputs, next(theirs).inputs)


@pytest.mark.parametrize("text", ["smalllm-20m", "smalllm-20m:", ":8", "smalllm-20m:0", "smalllm-20m:many"])
def test_a_shape_that_cannot_be_read_is_one_sentence(text: str):
    with pytest.raises(UserError, match="write RECIPE:MICRO_BATCH"):
        load("train_throughput").Shape.parse(text)


def test_nanogpt_needs_its_folder(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        load("train_throughput").main(["--contenders", "nanogpt-fp32"])
    assert ended.value.code == 2 and "--nanogpt FOLDER" in capsys.readouterr().err


# ── decode.py and serve.py ──

FAMILIES = {
    "llama": {"activation": "swiglu", "norm": "rmsnorm", "bias": False},
    "qwen3": {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "qk_norm": True, "tie_embeddings": False},
    "starcoder2": {"bias": False},
}
SMALL = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp_width": 96, "context": 64, "vocab_size": 400}


@pytest.fixture
def random_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``random_run("llama")``: a run with random weights, made as the scripts make theirs."""
    models = importlib.import_module("peers.models")

    def make(family: str) -> LoadedRun:
        monkeypatch.setitem(models.SHAPES, "small", {**SMALL, **FAMILIES[family]})
        return open_run(models.random_run("small", tmp_path / "run"))

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_our_weights(random_run, family: str):
    models, run = importlib.import_module("peers.models"), random_run(family)
    assert run.model.config.architecture == family
    ids = torch.tensor(models.prompts(run.tokenizer, 3))
    with torch.inference_mode():
        difference = models.transformers_model(run)(ids).logits - run.model(ids)
    assert ids.shape == (3, models.PROMPT_TOKENS) and difference.abs().max() < 1e-4


def test_nobody_says_a_special_token(random_run):
    assert importlib.import_module("peers.models").forbidden(random_run("llama").tokenizer) == [0, 1, 2]


def test_decoders_race_and_are_judged(random_run, tmp_path: Path, capsys: pytest.CaptureFixture, native: None):
    run = random_run("llama")
    names = ["smalllm-fp32", "transformers-fp32"]
    asked = ["--shape", "small", "--contenders", *names, "--rows", "1", "3", "--tokens", "8", "--repeats", "2"]
    assert load("decode").main([*asked, "--no-first-token", "--json", str(tmp_path / "d.json")]) == 0
    told = capsys.readouterr().out
    results = json.loads((tmp_path / "d.json").read_text())["results"]
    assert "(llama), 2 layers x 64, vocabulary 400, context 64; 8 tokens" in told
    assert [(one["contender"], one["rows"]) for one in results] == [(name, rows) for rows in (1, 3) for name in names]
    for one in results:
        assert one["off_by"] < 1e-3 and len(one["rates"]) == 2 and one["slowest"] <= one["tokens_per_second"]
    assert results[0]["relative"] == 1.0 and run.model.config.layers == 2


def test_a_wrong_answer_is_seen(random_run):
    models, run = importlib.import_module("peers.models"), random_run("llama")
    (prompt,) = models.prompts(run.tokenizer, 1)
    logits = run.model(torch.tensor([prompt]))[0, -1].detach()
    logits[models.forbidden(run.tokenizer)] = -torch.inf
    best, *_, worst = logits.argsort(descending=True)[:397].tolist()
    assert models.regret(run, prompt, [best]) == 0.0
    assert models.regret(run, prompt, [worst]) == pytest.approx(float(logits[best] - logits[worst]))


def test_what_smaller_weights_cost(random_run, native: None):
    decode, run = load("decode"), random_run("llama")
    texts = ["Once there was a boy. " * 20, "The end."]
    costs = decode.weight_costs(run, texts)
    assert costs["fp32"]["bits_per_byte"] == pytest.approx(
        bits_per_byte(run.model, run.tokenizer, texts).bits_per_byte, rel=1e-5
    )
    assert costs["fp32"]["difference"] == 0.0 < abs(costs["int8"]["difference"]) < 0.1
    assert "| bf16 |" in decode.weight_costs_table(costs, 2)


def test_the_first_token_is_timed_as_whole_processes(random_run):
    decode, run = load("decode"), random_run("llama")
    seconds = decode.first_token(run, 1, 1)
    assert all(len(own) == 1 and own[0] > 0.1 for own in seconds.values())
    assert "| difference |" in decode.first_token_table(seconds)


def test_a_contender_that_ends_says_why():
    race = importlib.import_module("peers.race")
    with pytest.raises(UserError, match="odd failed: too bad"):
        race.Racer("odd", [sys.executable, "-c", "import sys; sys.exit('too bad')"], 1)


STREAM = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'


async def answered(answer: bytes) -> Any:
    """What the client makes of this answer."""
    client = importlib.import_module("peers.client")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/completions HTTP/1.1") and b"Content-Length: 15" in head
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await client.ask(f"http://127.0.0.1:{port}", "/v1/completions", {"prompt": "a"})


@pytest.mark.parametrize(
    "head, body, expected",
    [
        ("200 OK\r\nContent-Type: text/event-stream", STREAM + b"data: [DONE]\n\n", (200, 7, True, False)),
        ("200 OK\r\nContent-Type: text/event-stream", STREAM + b"data: [DONE]\n\n\r\n0\r\n\r\n", (200, 7, True, False)),
        ("200 OK\r\nContent-Type: text/event-stream", STREAM, (200, 7, False, False)),
        ("200 OK", b'{"usage":{"completion_tokens":5,"total_tokens":9}}', (200, 5, True, False)),
        ("503 Busy\r\nRetry-After: 1", b'{"error": {}}', (503, 0, False, True)),
    ],
)
def test_the_client_sees_how_an_answer_ended(head: str, body: bytes, expected: tuple):
    found = asyncio.run(answered(f"HTTP/1.1 {head}\r\n\r\n".encode() + body))
    assert (found.status, found.tokens, found.whole, found.retry_after) == expected


def test_the_client_sees_a_broken_connection():
    found = asyncio.run(answered(b""))
    assert found.status == 0 and not found.whole


def test_a_crowd_is_judged():
    whole = {"status": 200, "whole": True, "retry_after": False, "seconds": 1.5}
    told = {"status": 503, "whole": False, "retry_after": True, "seconds": 0.5}
    silent = {"status": 503, "whole": False, "retry_after": False, "seconds": 0.7}
    figures = load("serve").judged({"seconds": 2.0, "answers": [whole, whole, told, silent]})
    assert list(figures.values()) == [2, 1, 0.5, 1, 2.0]


def test_our_server_is_measured(random_run, tmp_path: Path, capsys: pytest.CaptureFixture, native: None):
    random_run("llama")
    asked = [
        "--shape",
        "small",
        "--contenders",
        "smalllm",
        "--slots",
        "3",
        "--tokens",
        "8",
        "--repeats",
        "1",
        "--crowd",
        "9",
    ]
    files = ["--json", str(tmp_path / "s.json")]
    assert load("serve").main([*asked, *files, "--firsts", "2", "--crowd-tokens", "4"]) == 0
    told, figures = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert "| smalllm | streamed |" in told and len(figures["first"]["smalllm"]) == 2
    assert figures["crowd"]["smalllm"]["whole"] == 9 and figures["leave"]["smalllm"][0] < 5.0
    assert figures["crowd"]["smalllm"]["peak"] >= figures["crowd"]["smalllm"]["before"] > 1e7


def test_ranks_correlate_as_spearman_has_it():
    """Worked by hand: 1 - 6 sum d^2 / (n (n^2 - 1)) without ties."""
    spearman = load("scorecard").spearman
    order = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(order, order**3) == pytest.approx(1.0) and spearman(-order, order) == pytest.approx(-1.0)
    assert spearman(np.array([2.0, 1.0, 4.0, 3.0, 5.0]), order) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(np.zeros(5), order) == 0.0
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.75**0.5)
