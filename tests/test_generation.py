"""Generation: filters on distributions written by hand, cached decode against the plain model, text that streams."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smalllm import cli
from smalllm.checkpoint import RunFolder, Snapshot, model_weights
from smalllm.config import ModelConfig, RunConfig, UserError
from smalllm.decoder import Decoder, TorchDecoder, make_decoder
from smalllm.generation import (
    Batch,
    Generator,
    Row,
    SamplingParams,
    StopSearch,
    _choose_plainly,
    choose,
    filter_logits,
    forbid,
    forbid_repeated_ngrams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
    scale_temperature,
)
from smalllm.model import GPT
from smalllm.native import decode
from smalllm.native.decode import Part
from smalllm.tokenizer import Tokenizer

CONTEXT = 32
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "qwen3": {"kv_heads": 1, "qk_norm": True, "tie_embeddings": False},
    "starcoder2": {"norm": "layernorm", "activation": "gelu", "bias": True, "kv_heads": 2},
    "gpt2": {"norm": "layernorm", "activation": "gelu", "bias": True, "positions": "learned"},
}
PROMPTS = ["Once", "", "the cat sat on the mat", "é🙂", "a b c", "zzz", "One day a dog", "x" * 31]


FORBIDDEN = torch.tensor([0, 1], dtype=torch.int32)
MakeDecoder = Callable[[GPT, int], Decoder]
decoders = pytest.mark.parametrize(
    "make", [TorchDecoder, lambda model, slots: make_decoder(model, slots, "fp32")], ids=["torch", "native"]
)


class Bytes:
    """A tokenizer whose ids are the bytes of the text, after <unk>, <s> and </s>."""

    bos_id, eos_id, vocab_size = 1, 2, 259

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def bytes_of(self, id: int) -> bytes:
        return bytes([id - 3]) if id >= 3 else b""

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**settings)


class Script(torch.nn.Module):
    """A model whose logits depend on the last token only: row ``id`` of a table [V, V]."""

    def __init__(self, table: Tensor, context: int = CONTEXT) -> None:
        super().__init__()
        self.config = config(layers=1, width=8, heads=1, context=context, vocab_size=len(table))
        self.embedding = torch.nn.Embedding(len(table), len(table), _weight=table, _freeze=True)
        self.head = torch.nn.Identity()

    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        cache.advance(ids.shape[1])
        return self.embedding.weight[ids]

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        return self.hidden(ids, cache)


def save_run(path: Path, settings: RunConfig, step: int, seed: int = 0) -> Path:
    """Add a checkpoint of a random model, its tokenizer that of the settings' data, to a run folder."""
    tokenizer = Tokenizer.load(settings.data_path / "tokenizer.model")
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder.tokenizer_file)
    folder.write_text(folder.config_file, settings.to_toml())
    model = make_model(seed, **settings.model.model_dump(exclude_none=True) | {"vocab_size": tokenizer.vocab_size})
    folder.save(Snapshot(step, model.config, model_weights(model), {}, {}), keep=9)
    return path


def bytes_tokenizer() -> Any:
    return Bytes()


def make_model(seed: int = 0, **settings: Any) -> GPT:
    """A random model that is sharp enough for greedy texts to be unambiguous."""
    torch.manual_seed(seed)
    model = GPT(config(**{"layers": 2, "width": 32, "heads": 4, "context": CONTEXT, "vocab_size": 259} | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def make_generator(**settings: Any) -> Generator:
    return Generator(make_model(**settings), bytes_tokenizer(), weights="fp32")


def read(decoder: Decoder, *parts: tuple[int, int, Sequence[int]]) -> Tensor:
    """Logits [parts, V] after parts (slot, position, ids) were added."""
    return decoder.forward([Part(*part) for part in parts])


def says(text: bytes, context: int = CONTEXT) -> Generator:
    """A generator that, after the begin token, says ``text`` (each byte once) and then ends."""
    table = torch.full((259, 259), -100.0)
    ids = [1, *(byte + 3 for byte in text), 2]
    for id, following in itertools.pairwise(ids):
        table[id, following] = 100.0
    model: Any = Script(table, context)
    return Generator(model, bytes_tokenizer())


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits: Tensor) -> list[int]:
    return torch.nonzero(logits[0] > -math.inf)[:, 0].tolist()


# ── filters, by hand ──


def test_top_k_keeps_the_k_most_likely_and_ties() -> None:
    logits = logits_of(0.1, 0.4, 0.2, 0.2, 0.1)
    assert kept(keep_top_k(logits, 1)) == [1]
    assert kept(keep_top_k(logits, 2)) == [1, 2, 3]
    assert kept(keep_top_k(logits, 99)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, [1]), (0.49, [1]), (0.51, [1, 3]), (0.8, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_token_that_crosses_p(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(logits_of(0.15, 0.5, 0.1, 0.25), p)) == expected


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = logits_of(0.5, 0.26, 0.24, 0.0)
    assert kept(keep_min_p(logits, 0.5)) == [0, 1]
    assert kept(keep_min_p(logits, 1.0)) == [0]
    assert kept(keep_min_p(logits, 0.1)) == [0, 1, 2]


def test_temperature_sharpens_and_flattens() -> None:
    logits = logits_of(0.8, 0.2)
    assert torch.allclose(scale_temperature(logits, 0.5).softmax(-1), torch.tensor([[16 / 17, 1 / 17]]))
    assert torch.allclose(scale_temperature(logits, 2.0).softmax(-1), torch.tensor([[2 / 3, 1 / 3]]))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_its_own_row() -> None:
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0], [2.0, -2.0, 4.0, -4.0]])
    penalized = penalize_repetition(logits, [[0, 1, 1], [3]], 2.0)
    assert penalized.tolist() == [[1.0, -4.0, 4.0, -4.0], [2.0, -2.0, 4.0, -8.0]]


@pytest.mark.parametrize(
    ("row", "n", "banned"),
    [([5, 6, 7, 5, 6], 3, [7]), ([5, 6, 5, 7, 5], 2, [6, 7]), ([5, 6], 1, [5, 6]), ([5], 3, []), ([5, 6], 2, [])],
)
def test_repeated_ngrams_are_forbidden(row: list[int], n: int, banned: list[int]) -> None:
    filtered = forbid_repeated_ngrams(torch.zeros(1, 9), [row], n)
    assert torch.nonzero(filtered[0] == -math.inf)[:, 0].tolist() == banned


def test_forbidden_tokens_are_ruled_out_in_every_row() -> None:
    assert forbid(torch.zeros(2, 3), torch.tensor([1])).tolist() == [[0.0, -math.inf, 0.0]] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=7),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.2),
        SamplingParams(temperature=1.0, repetition_penalty=1.3),
        SamplingParams(temperature=1.0, no_repeat_ngram=2),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2, no_repeat_ngram=3),
    ],
)
def test_filters_equal_those_of_transformers(params: SamplingParams) -> None:
    from transformers.generation import logits_process

    reference: Any = logits_process

    torch.manual_seed(3)
    ids, logits = torch.randint(0, 6, (4, 12)), 3 * torch.randn(4, 40)
    expected = logits.clone()
    if params.repetition_penalty != 1.0:
        expected = reference.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, expected)
    if params.no_repeat_ngram:
        expected = reference.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram)(ids, expected)
    expected = (
        reference.TemperatureLogitsWarper(params.temperature)(ids, expected) if params.temperature != 1.0 else expected
    )
    if params.top_k:
        expected = reference.TopKLogitsWarper(params.top_k)(ids, expected)
    if params.top_p:
        expected = reference.TopPLogitsWarper(params.top_p)(ids, expected)
    if params.min_p:
        expected = reference.MinPLogitsWarper(params.min_p)(ids, expected)
    actual = filter_logits(logits, ids.tolist(), params)
    assert torch.equal(actual == -math.inf, expected == -math.inf)
    assert torch.allclose(actual.softmax(-1), expected.softmax(-1), atol=1e-6)


# ── the choice ──

WISHES = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.5, "top_k": 299},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 5.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 5.0},
    {"temperature": 1.0, "no_repeat_ngram": 2},
    {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -math.inf, 200: -1.0}},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "no_repeat_ngram": 3},
]


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_cpp_chooses_as_the_filters_do(wish: dict[str, Any], spread: float, native: None) -> None:
    """The same numbers drawn, the same tokens chosen, whole rows of logits long and with ties."""
    params = SamplingParams(**wish, seed=3, logprobs=5)
    torch.manual_seed(8)
    logits = torch.cat([spread * torch.randn(60, 300), spread * torch.randint(0, 5, (4, 300)).float()])
    ids = torch.randint(2, 12, (64, 30)).tolist()
    plain, fast = ([Row(row, params, bytes_tokenizer(), n) for n, row in enumerate(ids)] for _ in range(2))
    slow = [_choose_plainly(forbid(logits[n : n + 1], FORBIDDEN.long()), row) for n, row in enumerate(plain)]
    for n, (expected, chosen) in enumerate(zip(slow, choose(logits.clone(), fast, FORBIDDEN), strict=True)):
        assert chosen.id == expected.id > 1
        assert chosen.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [log for _, log in chosen.alternatives] == pytest.approx(
            [log for _, log in expected.alternatives], abs=1e-4
        )
        if n < 60:  # without ties
            assert [id for id, _ in chosen.alternatives] == [id for id, _ in expected.alternatives]


def test_cpp_draws_what_the_distribution_says(native: None) -> None:
    probabilities = torch.tensor([0.0, 0.0, 0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    params, draws = SamplingParams(temperature=1.0, seed=1), 100_000
    row = Row([1], params, bytes_tokenizer())
    logits = probabilities.log().expand(draws, -1).clone()
    ids = torch.tensor([choice.id for choice in choose(logits, [row] * draws, FORBIDDEN)])
    counts, expected = torch.bincount(ids, minlength=8).double(), draws * probabilities.double()
    assert float(((counts - expected) ** 2 / expected)[2:].sum()) < 25.7  # p = 1e-4 at 5 degrees of freedom


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-24])
@pytest.mark.parametrize("vocab", [300, 16_000])
def test_cpp_draws_at_the_ends_of_the_interval(uniform: float, vocab: int, native: None) -> None:
    logits = torch.full((1, vocab), -1e30)
    logits[0, [7, 290]] = 0.0
    wish = decode.Wish(1.0, 0, 1.0, 0.0, 1.0, uniform)
    assert decode.choose(logits, [wish], FORBIDDEN)[0].id == (7 if uniform < 0.5 else 290)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_does_not_touch_its_neighbours(broken: float) -> None:
    logits = torch.zeros(3, 300)
    logits[:, 77] = 50.0
    logits[1, 5] = broken
    rows = [Row([1], SamplingParams(), bytes_tokenizer(), n) for n in range(3)]
    assert [choice.id for choice in choose(logits, rows, FORBIDDEN)] == [77, -1, 77]
    assert choose(torch.full((1, 300), -math.inf), rows[:1], FORBIDDEN)[0].id == -1


# ── rows that come and go ──


def test_rows_join_and_leave_at_any_step_without_touching_each_other() -> None:
    generator = make_generator()
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4)
    alone = [generator.batch([prompt], params, [n])[0] for n, prompt in enumerate(PROMPTS)]
    batch = Batch(generator.model, bytes_tokenizer(), slots=3, weights="fp32")
    waiting = [Row([1, *bytes_tokenizer().encode(p)], params, bytes_tokenizer(), n) for n, p in enumerate(PROMPTS)]
    rows, texts = list(waiting), dict.fromkeys(waiting, "")
    guests: list[Row] = []
    while waiting or batch.rows:
        while waiting and batch.free > 1:
            batch.add(waiting.pop(0))
        if batch.free:
            guests.append(Row([1, 50], SamplingParams(seed=len(guests)), bytes_tokenizer()))
            batch.add(guests[-1])
        for token in batch.step():
            texts[token.row] = texts.get(token.row, "") + token.text
        if guests[-1] in batch.rows:
            batch.remove(guests[-1])  # cancelled after one step
    assert [texts[row] for row in rows] == [done.text for done in alone]
    assert [row.generated for row in rows] == [list(done.ids) for done in alone]


def test_long_prompts_are_read_in_pieces_beside_rows_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smalllm.generation.CHUNK", 7)
    generator, params = make_generator(), SamplingParams(max_tokens=9, temperature=0.0)
    batch = Batch(generator.model, bytes_tokenizer(), slots=3, weights="fp32")
    rows = [Row([1, *[60 + n] * length], params, bytes_tokenizer()) for n, length in enumerate((2, 30, 20))]
    for row in rows:
        batch.add(row)
    steps = []
    while batch.rows:
        steps.append([token.row for token in batch.step()])
    assert steps[0] == rows[:1] and all(rows[0] in step for step in steps[:9])
    assert sum(rows[1] in step for step in steps[:4]) == 0 and rows[1] in steps[5]
    for row in rows:
        text = generator.batch([bytes_tokenizer().decode(row.ids[: row.prompt_length])], params)[0]
        assert list(text.ids) == row.generated


# ── edges ──


def test_extreme_temperatures_stay_distributions() -> None:
    logits = torch.tensor([[3.0, 2.999, -math.inf]])
    assert scale_temperature(logits, 5e-324).softmax(-1).tolist() == [[1.0, 0.0, 0.0]]
    assert scale_temperature(logits, 1e300).softmax(-1).tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=p)
        for temperature in (0.0, 1e-9, 1.0, 1e9)
        for k, p in ((0, 0.0), (1, 1.0), (9, 0.5))
    ],
)
def test_one_possible_token_is_always_chosen(params: SamplingParams) -> None:
    logits = torch.full((1, 259), -math.inf)
    logits[0, 77] = -5.0
    row = Row([1, 70], params, bytes_tokenizer())
    assert {choose(logits.clone(), [row], FORBIDDEN)[0].id for _ in range(20)} == {77}


@pytest.mark.parametrize("weights", ["auto", "fp32"])
@pytest.mark.parametrize("tensor", ["norm.weight", "blocks.0.attention.qkv.weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_k=3, top_p=0.9, min_p=0.1)])
def test_logits_that_are_not_numbers_are_an_error(
    bad: float, params: SamplingParams, tensor: str, weights: Any
) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(tensor)[3] = bad
    with pytest.raises(UserError, match="not finite"):
        Generator(model, bytes_tokenizer(), weights).complete("abc", params)


def test_sampled_frequencies_fit_the_distribution() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01, 0.0])
    draws = 100_000
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(5))
    counts = torch.bincount(sample(probabilities.log().expand(draws, -1), uniforms), minlength=7).double()
    expected = draws * probabilities.double()
    assert counts[6] == 0
    chi_square = float(((counts - expected) ** 2 / expected)[:6].sum())
    assert chi_square < 25.7  # p = 1e-4 at 5 degrees of freedom


def test_the_ends_of_the_unit_interval_hit_the_first_and_last_possible_token() -> None:
    logits = torch.tensor([0.0, 0.1, 0.2, 0.0]).log().expand(2, -1)
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_row_numbers_are_uniform_and_differ_between_rows_and_seeds() -> None:
    rows = [
        Row([1], SamplingParams(seed=seed), bytes_tokenizer(), index)
        for seed, index in ((1, 0), (1, 1), (2, 0), (1, 0))
    ]
    numbers = torch.tensor([[row.uniform() for _ in range(2000)] for row in rows], dtype=torch.float64)
    assert torch.equal(numbers[0], numbers[3])
    assert abs(torch.corrcoef(numbers[:3]) - torch.eye(3)).max() < 0.1
    assert float((numbers - 0.5).mean().abs()) < 0.02 and float(numbers.max()) < 1.0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1),
        ("top_p", 1.01), ("top_p", -0.1), ("min_p", math.nan), ("repetition_penalty", 0.0), ("no_repeat_ngram", -1), ("stop", ["a", ""]),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{setting} = .* is not possible; use "):
        SamplingParams(**{setting: value})


def test_a_single_stop_string_is_not_taken_for_its_characters() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


# ── cache ──


def uncached_greedy(model: GPT, ids: list[int], tokens: int) -> tuple[list[int], list[Tensor]]:
    """Greedy continuation by full forward passes over all that was said; the tokens and the logits they came from."""
    ids, found = list(ids), []
    for _ in range(tokens):
        with torch.inference_mode():
            found.append(model(torch.tensor([ids]))[0, -1])
        logits = found[-1].clone()
        logits[:2] = -math.inf
        ids.append(int(logits.argmax()))
    return ids[-tokens:], found


@decoders
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_logits_equal_uncached_ones(architecture: str, make: MakeDecoder) -> None:
    model = make_model(**ARCHITECTURES[architecture])
    assert model.config.architecture == architecture
    ids = [1, *bytes_tokenizer().encode("cats and d")]
    tokens, expected = uncached_greedy(model, ids, 20)
    decoder = make(model, 1)
    logits = read(decoder, (0, 0, ids))
    for at, (token, wanted) in enumerate(zip(tokens, expected, strict=True), start=len(ids)):
        assert float((logits[0] - wanted).abs().max()) < 1e-4
        logits = read(decoder, (0, at, [token]))


@decoders
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_parts_equal_each_row_alone(architecture: str, make: MakeDecoder) -> None:
    """Prompts of many lengths, some in two pieces, beside rows that decode already, in slots that were used before."""
    model = make_model(**ARCHITECTURES[architecture])
    decoder = make(model, len(PROMPTS))
    prompts = [[1, *bytes_tokenizer().encode(prompt)][:20] for prompt in PROMPTS]
    decoder.forward([Part(slot, 0, [9] * 30) for slot in range(len(PROMPTS))])
    early, late = range(0, len(PROMPTS), 2), range(1, len(PROMPTS), 2)
    seen = dict(zip(early, read(decoder, *((slot, 0, prompts[slot]) for slot in early))[:, None], strict=True))
    first = [Part(slot, len(prompts[slot]), [50 + slot]) for slot in early]
    decoder.forward([*first, *(Part(slot, 0, prompts[slot][:2], 0) for slot in late if len(prompts[slot]) > 2)])
    rest = [(slot, 2, prompts[slot][2:]) if len(prompts[slot]) > 2 else (slot, 0, prompts[slot]) for slot in late]
    seen |= dict(zip(late, read(decoder, *rest)[:, None], strict=True))
    decoder.forward([Part(slot, len(prompts[slot]), [50 + slot]) for slot in late])
    for slot, prompt in enumerate(prompts):
        both = decoder.forward([Part(slot, len(prompt) + 1, [51, 52], 2)])
        with torch.inference_mode():
            alone = model(torch.tensor([[*prompt, 50 + slot, 51, 52]]))[0]
        assert float((seen[slot] - alone[len(prompt) - 1]).abs().max()) < 1e-4
        assert float((both - alone[-2:]).abs().max()) < 1e-4


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_in_cpp_are_the_same_bits_alone_and_in_company(architecture: str, weights: str, native: None) -> None:
    """At a time, token by token, and in the middle of a batch."""
    model = make_model(**ARCHITECTURES[architecture], width=80, heads=4, vocab_size=261)
    ids = torch.randint(3, 259, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = decode.Decoder(model, 5, weights)
    whole = decoder.forward([Part(0, 0, ids, len(ids))])
    single = torch.cat([read(decoder, (1, at, [id])) for at, id in enumerate(ids)])
    crowd = torch.cat(
        [
            decoder.forward([Part(slot, at, [id] if slot == 3 else [7 * slot + 5]) for slot in range(5)])[3:4]
            for at, id in enumerate(ids)
        ]
    )
    assert torch.equal(whole, single) and torch.equal(whole, crowd)
    with torch.inference_mode():
        exact = model(torch.tensor([ids]))[0]
    allowed = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.1}[weights]
    assert float((whole - exact).abs().max()) < allowed * float(exact.abs().max())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_says_the_same_alone_and_in_a_batch_of_sixteen(architecture: str, temperature: float) -> None:
    generator = make_generator(**ARCHITECTURES[architecture])
    params = SamplingParams(max_tokens=50, temperature=temperature, seed=11)  # beyond the context of 32
    prompts = PROMPTS * 2
    together = generator.batch(prompts, params)
    alone = [generator.batch([prompt], params, indices=[row])[0] for row, prompt in enumerate(prompts)]
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert [(c.text, c.finish_reason) for c in together] == [(c.text, c.finish_reason) for c in alone]
    assert len({c.ids for c in together}) > (15 if temperature else 7)
    if temperature:  # rows end at different times, so that places in the cache were exchanged
        assert {c.finish_reason for c in together} == {"stop", "length"}


def test_a_batch_beyond_the_row_limit_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, params = make_generator(), SamplingParams(max_tokens=8, seed=2)
    whole = [c.ids for c in generator.batch(PROMPTS, params)]
    monkeypatch.setattr("smalllm.generation.ROWS", 3)
    assert [c.ids for c in generator.batch(PROMPTS, params)] == whole
    assert [c.prompt for c in generator.batch(PROMPTS, params)] == PROMPTS
    assert generator.batch([], params) == []


@pytest.mark.parametrize("context", [2, 3, 8, 33])
def test_text_rolls_beyond_the_context(context: int) -> None:
    """Reference: full forward passes over the window, which shrinks to half a context whenever it is full."""
    generator = make_generator(context=context)
    ids, window = [1, 70], [1, 70]
    for _ in range(3 * context):
        token = uncached_greedy(generator.model, window, 1)[0][0]
        ids, window = [*ids, token], [*window, token]
        window = window if len(window) <= context else window[-(context // 2) :]
    completion = generator.complete("C", SamplingParams(max_tokens=3 * context, temperature=0.0))
    said = [*completion.ids, 2] if completion.finish_reason == "stop" else list(completion.ids)
    assert said == ids[2 : 2 + len(said)] and len(said) > context


def test_a_prompt_beyond_the_context_keeps_its_last_half_context() -> None:
    generator, params = make_generator(), SamplingParams(max_tokens=5, temperature=0.0)
    prompt = "the quick brown fox jumps over the lazy dog" * 3
    expected, _ = uncached_greedy(generator.model, bytes_tokenizer().encode(prompt)[-CONTEXT // 2 :], 5)
    assert list(generator.complete(prompt, params).ids) == expected


def test_neither_unk_nor_bos_nor_an_id_without_text_is_ever_said() -> None:
    generator = make_generator(vocab_size=300)
    with torch.no_grad():
        generator.model.embedding.weight[[0, 1, 280, 299]] *= 40.0  # tied: they would win often
    said = {
        id for c in generator.batch(PROMPTS, SamplingParams(max_tokens=60, temperature=1.5, seed=0)) for id in c.ids
    }
    assert len(said) > 20 and said <= set(range(3, 259))


# ── text ──


def test_a_text_ends_at_the_end_token_a_stop_string_or_its_length() -> None:
    generator = says(b"abcdefgh")
    whole = generator.complete("", SamplingParams(temperature=0.0))
    assert (whole.text, whole.tokens, whole.finish_reason) == ("abcdefgh", 8, "stop")
    short = generator.complete("a", SamplingParams(max_tokens=3))
    assert (short.text, short.tokens, short.finish_reason) == ("bcd", 3, "length")
    cut = generator.complete("", SamplingParams(stop=["xyz", "ef"]))
    assert (cut.text, cut.tokens, cut.finish_reason) == ("abcd", 6, "stop")


def test_text_that_may_begin_a_stop_string_is_held_back_and_released() -> None:
    pieces = [chunk.text for chunk in says(b"abcdefgh").stream("", SamplingParams(stop=["cdx", "gh!"]))]
    assert pieces == ["a", "b", "", "", "cde", "f", "", "", "gh"]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hello wor", "ld and"], ["world"], "hello "),
        (["aaab"], ["aab"], "a"),
        (["a", "a", "a", "b"], ["aab"], "a"),
        (["xabcd"], ["abcd", "bc"], "xa"),
        (["x", "a", "b", "c", "d"], ["abcd", "bc"], "xa"),
        (["never"], ["ever!"], "never"),
    ],
)
def test_the_stop_string_completed_first_cuts_wherever_the_pieces_are_cut(
    pieces: list[str], stops: list[str], expected: str
) -> None:
    search, shown = StopSearch(stops), ""
    for piece in pieces:
        shown += search.push(piece)
        if search.found:
            break
    else:
        shown += search.finish()
    assert shown == expected


def test_streamed_pieces_are_whole_characters() -> None:
    text = "né🙂я"
    chunks = list(says(text.encode()).stream("", SamplingParams()))
    assert [chunk.text for chunk in chunks if chunk.text] == ["n", "é", "🙂", "я"]
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_a_character_cut_by_the_length_is_one_replacement_sign_at_the_end() -> None:
    chunks = list(says("a🙂".encode()).stream("", SamplingParams(max_tokens=3)))
    assert [chunk.text for chunk in chunks] == ["a", "", "\ufffd"]


def test_stream_complete_and_decode_agree_on_a_real_tokenizer() -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat. héllo 🙂🙃 wörld\n"] * 30, vocab_size=300)
    generator = Generator(make_model(vocab_size=300), tokenizer)
    for seed in range(12):
        params = SamplingParams(max_tokens=60, temperature=1.2, seed=seed)
        chunks = list(generator.stream("the 🙂", params))
        completion = generator.complete("the 🙂", params)
        assert "".join(chunk.text for chunk in chunks) == completion.text == tokenizer.decode(completion.ids)
        assert chunks[-1].tokens == completion.tokens == len(completion.ids)
        assert chunks[-1].finish_reason == completion.finish_reason


def test_the_same_seed_gives_the_same_text_and_no_seed_another() -> None:
    generator, params = make_generator(), SamplingParams(max_tokens=30, temperature=1.0, seed=4)
    assert generator.complete("a", params).text == generator.complete("a", params).text
    assert generator.complete("a", params).text != generator.complete("a", dataclasses.replace(params, seed=5)).text
    unseeded = {generator.complete("a", dataclasses.replace(params, seed=None)).text for _ in range(4)}
    assert len(unseeded) == 4


def test_a_model_in_training_is_sampled_without_dropout_and_trains_on() -> None:
    generator, params = make_generator(dropout=0.5), SamplingParams(max_tokens=20, temperature=0.0)
    expected = generator.complete("a", params).text
    generator.model.train()
    assert generator.complete("a", params).text == expected
    assert generator.model.training
    generator.model(torch.tensor([[1, 70]])).sum().backward()


def test_a_stream_that_is_dropped_midway_leaves_the_model_as_it_was() -> None:
    generator = make_generator()
    generator.model.train()
    stream = generator.stream("a", SamplingParams(max_tokens=20))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    assert generator.model.training


def test_repetition_settings_reach_the_text() -> None:
    generator = says(b"")
    generator.model.embedding.weight[:] = 0.0
    generator.model.embedding.weight[:, 100:103] = torch.tensor([3.0, 2.0, 1.0])
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    assert generator.complete("", greedy).ids == (100, 100, 100)
    assert generator.complete("", dataclasses.replace(greedy, no_repeat_ngram=1)).ids == (100, 101, 102)
    assert generator.complete("", dataclasses.replace(greedy, repetition_penalty=2.0)).ids == (100, 101, 100)


# ── the command ──


@pytest.fixture
def run_folder(tmp_path: Path, tiny: Callable[..., RunConfig]) -> Path:
    return save_run(tmp_path / "run", tiny(), step=4)


def sampled(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(["sample", *arguments]) == 0
    return capsys.readouterr().out


def test_sample_prints_json_lines_that_equal_the_library(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--count", "3", "--seed", "5", "--max-tokens", "20", "--temperature", "1.1", "--prompt", "One [/b]")
    lines = [json.loads(line) for line in sampled(capsys, str(run_folder), "--json", *arguments).splitlines()]
    assert [set(line) for line in lines] == [{"prompt", "text", "tokens", "finish_reason", "seconds"}] * 3
    checkpoint, folder = RunFolder(run_folder).choose("latest"), RunFolder(run_folder)
    params = SamplingParams(max_tokens=20, seed=5, temperature=1.1)
    expected = Generator(checkpoint.load_model(), folder.tokenizer()).batch(["One [/b]"] * 3, params)
    assert [line["text"] for line in lines] == [completion.text for completion in expected]
    assert [line["tokens"] for line in lines] == [completion.tokens for completion in expected]


def test_every_sampling_option_reaches_the_text(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = {"--seed": ["1"], "--max-tokens": ["40"]}

    def text(**options: list[str]) -> str:
        merged = usual | {"--" + name.replace("_", "-"): values for name, values in options.items()}
        return sampled(capsys, str(run_folder), *(word for name, values in merged.items() for word in (name, *values)))

    plain = text()
    assert text() == plain
    for options in (
        {"temperature": ["0"]}, {"top_k": ["1"]}, {"top_p": ["0.1"]}, {"min_p": ["0.9"]}, {"repetition_penalty": ["9"]},
        {"no_repeat_ngram": ["1"]}, {"seed": ["2"]}, {"max_tokens": ["39"]}, {"prompt": ["A dog"]},
        {"stop": ["zzz", plain[30:32]]},
    ):  # fmt: skip
        assert text(**options) != plain, options


def test_printed_text_holds_no_control_characters(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model says bytes, escape sequences among them; JSON keeps them, the terminal does not get them."""
    arguments = (
        str(run_folder),
        "--count",
        "20",
        "--seed",
        "3",
        "--max-tokens",
        "60",
        "--temperature",
        "2",
        "--prompt",
    )
    texts = [json.loads(line)["text"] for line in sampled(capsys, *arguments, "a", "--json").splitlines()]
    assert any(ord(c) < 32 and c not in "\n\t" for text in texts for c in text)
    printed = sampled(capsys, *arguments, "a\x1b]52;c;aGk=\x07\x9b2J\r")
    assert not [c for c in printed if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]
    assert printed.startswith("a]52;c;aGk=2J")


def test_on_a_terminal_the_prompt_is_bold_and_the_text_streams(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (str(run_folder), "--seed", "1", "--max-tokens", "20", "--temperature", "0.5", "--prompt", "[b]One[/b]")
    piped = sampled(capsys, *arguments)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = sampled(capsys, *arguments)
    assert shown.replace("\x1b[1m", "", 1).replace("\x1b[0m", "", 1) == piped
    assert shown.startswith("\x1b[1m[b]One[/b]\x1b[0m")


def test_a_prompt_of_one_dash_is_standard_input(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Ein Bär\n".encode())))
    assert json.loads(sampled(capsys, str(run_folder), "--prompt", "-", "--json"))["prompt"] == "Ein Bär"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert cli.run(["sample", str(run_folder), "--prompt", "-"]) == 1
    assert "not UTF-8 text at byte 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--count", "0"], "count = 0 is not possible"),
        (["--top-p", "7"], "top_p = 7.0 is not possible"),
        (["--checkpoint", "9"], "no checkpoint at step 9"),
        (["--prompt", "a\udc80"], "lone surrogate"),
    ],
)
def test_mistakes_are_sentences(
    arguments: list[str], sentence: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sample", str(run_folder), *arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and not captured.out
