"""The page as a file: what is written into it, and what Debian's chromium tells from it, offline.

Where there is no browser the tests that need one skip; with SMALLLM_REQUIRE_BROWSER=1 a missing one fails.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_settings
from export_runs import SHAPES, random_model, random_run, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.checkpoint import model_weights, open_run
from smalllm.config import ModelConfig, UserError
from smalllm.export import html
from smalllm.export.card import Card
from smalllm.export.pieces import Kind, model_of, pieces_of
from smalllm.generation import Generator, Row, SamplingParams
from smalllm.tokenizer import Tokenizer
from smalllm.training.trainer import train

REQUIRED = os.environ.get("SMALLLM_REQUIRE_BROWSER") == "1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
try:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
except ImportError:
    if REQUIRED:
        raise
    CHROMIUM = None

PARTS = Path(html.__file__).parent / "page"
NAME = "tiny <img src=x onerror=alert(1)> & {model} </script>"
BEGINNING = "Once upon a time"
PROMPTS = (BEGINNING, "", "The little cat 🙂 é\n\n  <b>日本</b> " * 3)
PAYLOADS = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</textarea><svg onload=alert(1)>", "${alert(1)}{{7*7}}",
    "<a href='javascript:alert(1)'>x</a>", "&lt;b&gt; &amp; \"'><u>", "\u2028<!--<script>", "\u202eevil<style>*{display:none}",
)  # fmt: skip
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setTimeout\(['\"]|srcdoc"
    r"|createContextualFragment|https?:|fetch|XMLHttpRequest|WebSocket|sendBeacon|EventSource|importScripts"
)
GREEDY = {
    "temperature": 0,
    "max_tokens": 90,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1,
    "seed": 1,
    "stop": [],
}
STRINGS = (
    "", " ", "   a  b ", "</s><s><unk>", "<0x0A>", "▁", "a▁▁b", "\0", "\r\n\t", "1234567", "é e\u0301 ﬁ ①", "👩‍👩‍👧🙂",
    "\ufeffa", "\ufffd", "日本語 のテキスト", "aaaaaaaaaaaaaaaa", "Once upon a time, there was", "\U0010ffff\u200d", "<|user|>",
)  # fmt: skip


# ── the file ──


def page_bytes(shape: str, name: str = NAME) -> bytes:
    """A page of random weights."""
    return html.page_of(random_model(ModelConfig(**SHAPES[shape])), tokenizer(), name, 12)


def endless_page() -> bytes:
    """A page whose model never says that a text ends."""
    model = random_model(ModelConfig(**SHAPES["starcoder2-untied"]))
    with torch.no_grad():
        model.norm.bias[0], model.head.weight[2] = 6.0, 0.0
        model.head.weight[2, 0] = -20.0
    return html.page_of(model, tokenizer(), NAME, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_a_page_gives_the_rounded_weights_bit_for_bit(shape, tmp_path):
    run = random_run(tmp_path / "run", shape)
    html.write(run, tmp_path / "page.html", card=Card(name="A page"))
    model, words = html.read(tmp_path / "page.html")
    assert model.config == run.model.config and words.model_bytes == run.tokenizer.model_bytes
    weights = model_weights(model)
    for name, own in model_weights(run.model).items():
        matrix, expected = weights[name].detach().numpy(), own.detach().numpy()
        if expected.ndim == 2 and name != "position_embedding.weight":
            numbers, scales = html.quantize(expected)
            assert np.abs(html.dequantize(numbers, scales, expected.shape[1]) - expected).max() <= scales.max() / 1.99
            expected = html.dequantize(numbers, scales, expected.shape[1])
        assert (matrix == expected).all(), name


def test_a_weight_that_is_not_what_it_was_makes_the_export_fail(tmp_path, monkeypatch):
    run, pack = random_run(tmp_path / "run"), html.pack
    monkeypatch.setattr(html, "pack", lambda weight: bytes([pack(weight)[0] ^ 1]) + pack(weight)[1:])
    with pytest.raises(UserError, match=r"was read back and differs in embedding.weight"):
        html.write(run, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_rounding_by_hand():
    numbers, scales = html.quantize(np.array([[127.0, -63.5, 0.49, 0.0], [0, 0, 0, 0]], np.float32))
    assert numbers[:, 0, :5].tolist() == [[127, -64, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert scales.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 130), (33, 63)])
def test_panels_come_back(shape):
    weight = np.random.default_rng(0).standard_normal(shape, np.float32)
    packed = html.pack(weight)
    assert len(packed) % html.ALIGNMENT == 0
    for own, found in zip(html.quantize(weight), html.unpack(packed, *shape), strict=True):
        assert (own == found).all()


def test_where_a_weight_stands_in_a_panel():
    """Row 6 = the second four, its third row; column 64 + 7 = group 1, step 1, second half, second weight."""
    weight = np.zeros((16, 128), np.float32)
    weight[6, 71] = 1.0
    packed = np.frombuffer(html.pack(weight), np.int8)
    assert np.flatnonzero(packed[: html.GROUP_BYTES + 1024]).tolist() == [html.GROUP_BYTES + 64 + 16 + 8 + 2 * 2 + 1]


def test_the_same_model_gives_the_same_bytes_and_nothing_is_left_beside_it(tmp_path):
    run = random_run(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    html.write(run, out / "a.html")
    html.write(run, out / "b.html")
    assert (out / "a.html").read_bytes() == (out / "b.html").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["a.html", "b.html"]
    with pytest.raises(UserError, match=r"exists and is not an earlier export"):
        html.write(run, out / "a.html")


def test_a_page_asks_for_nothing_and_lets_only_its_own_script_run():
    page = page_bytes("llama").decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page[:1024])
    assert policy is not None and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy[1] and "unsafe-eval" not in policy[1].replace("wasm-unsafe-eval", "")
    assert not re.search(r"<\w[^>]*\s(?:src|href)=", page)
    assert page.count("<script") == page.count("</script>") == 3 and "<title>tiny &lt;img" in page
    for part in PARTS.glob("*.js"):
        text = part.read_text(encoding="utf-8")
        assert not FORBIDDEN.search(text) and "</script" not in text and "<!--" not in text, part.name


def test_what_no_page_can_hold_is_refused(tmp_path):
    run = random_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"--dtype f16 has no place in a page; use int8"):
        html.write(run, tmp_path / "page.html", "f16")
    with pytest.raises(UserError, match=r"too large for a page"):
        html.page_of(
            random_model(ModelConfig(**SHAPES["llama"] | {"context": 1 << 20, "layers": 40})), tokenizer(), "", 0
        )
    pieces = pieces_of(tokenizer().model_bytes)
    pieces[300] = pieces[300]._replace(kind=Kind.USER_DEFINED)
    with pytest.raises(UserError, match=r"more than merge pieces"):
        html.page_of(run.model, Tokenizer(model_of(pieces)), "", 0)
    run.model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match=r"norm.weight are not finite"):
        html.write(run, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _without(key: str) -> Callable[[str], str]:
    return lambda page: page.replace(f'"{key}": ', '"other": ')


@pytest.mark.parametrize(
    "damage",
    [
        lambda page: page[: len(page) // 2], lambda page: "", lambda page: "<script>", _without("model"), _without("tokenizer"),
        lambda page: page.replace('"layers": 2', f'"layers": {1 << 62}'), lambda page: page.replace('"width": 64', '"width": 4096'),
        lambda page: page.replace('"layers": 2', '"layers": 1'), lambda page: page.replace('"context": 64', '"context": "x"'),
        lambda page: page.replace('"size": ', '"size": 99999999'), lambda page: page.replace('"size": ', '"size": -'),
        lambda page: page[:-2000] + page[-1600:], lambda page: page[:-800] + "!" + page[-799:],
        lambda page: re.sub(r'id="about">[^<]*', 'id="about">' + "[" * 100_000, page),
    ],
)  # fmt: skip
def test_a_damaged_page_is_named_in_one_sentence(damage, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(damage(page_bytes("llama").decode()), encoding="utf-8")
    with pytest.raises(UserError, match=r"page.html is not a whole page of this version .*; export it again"):
        html.read(path)


HOSTILE = [2**62, -1, 0, True, None, "", "x" * 5000, 1e308, [], {}, [[]], 10**400, 2**31, 4096, "\0"]


def test_whatever_a_page_says_of_itself_reading_ends_soon(tmp_path):
    """A model or one sentence: settings and sizes of any kind, bytes changed anywhere."""
    text, draw, path, refused = page_bytes("gpt2").decode(), random.Random(0), tmp_path / "page.html", 0
    about = json.loads(html._block(text, "application/json", "about"))
    for _ in range(150):
        damaged = json.loads(json.dumps(about))
        part = draw.choice([damaged, damaged["model"], damaged["tokenizer"]])
        part[draw.choice(list(part))] = draw.choice(HOSTILE)
        page = re.sub(r'id="about">[^<]*', lambda _: 'id="about">' + json.dumps(damaged).replace("<", ""), text)  # noqa: B023
        if draw.random() < 0.5:
            place = page.index('id="model"') + draw.randrange(len(page) // 2)
            page = page[:place] + draw.choice("A/+=<\n") + page[place + 1 :]
        path.write_text(page, encoding="utf-8")
        began = time.monotonic()
        try:
            html.read(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
        assert time.monotonic() - began < 2
    assert 50 < refused < 150


def test_a_page_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"No such file or directory; give a page of"):
        html.read(tmp_path / "page.html")
    (tmp_path / "page.html").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"it is not UTF-8; give a page of"):
        html.read(tmp_path / "page.html")


def test_the_decoder_is_what_its_text_says():
    pytest.importorskip("wasmtime")
    from build_decoder import built

    assert html.decoder_bytes() == built(), "run: python tests/build_decoder.py"


# ── a browser ──


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("no chromium here; run: apt-get install chromium", pytrace=False) if REQUIRED else pytest.skip(
            "no chromium or playwright here; run: uv sync and apt-get install chromium"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


TELL = """async ([prompts, params]) => {
  const texts = [];
  for (const prompt of prompts) {
    const mine = Math.floor(1e6 + Math.random() * 1e9);
    texts.push(await new Promise((resolve, reject) => {
      let text = "";
      const listen = ({ data }) => {
        if (data.trouble) reject(new Error(data.trouble));
        if (data.told !== mine) return;
        text += data.text;
        if (data.finish) { port.removeEventListener("message", listen); resolve(text); }
      };
      port.addEventListener("message", listen);
      port.postMessage({ tell: mine, prompt, params });
    }));
  }
  return texts;
}"""


@dataclass
class Visit:
    """A page that was opened from the disk, what went wrong in it, and what it asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def texts(self, prompts: tuple[str, ...], **params: Any) -> list[str]:
        """What the engine tells, asked as the page asks it."""
        return self.page.evaluate(TELL, [list(prompts), GREEDY | params])

    def set(self, selector: str, value: object) -> None:
        if not self[selector].is_visible():
            self["#settings-fold summary"].click()
        self[selector].fill(str(value))

    def told(self) -> str:
        expect(self["#edit"]).to_be_visible()
        return self["#tale"].text_content() or ""

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Visit]]:
    """``visit(data, width=360)`` opens a page; errors, warnings and violations of its policy fail the test, and so does
    every request but that of the file itself and of its Worker."""
    contexts: list[BrowserContext] = []
    visits: list[Visit] = []

    def open_page(data: bytes, width: int = 1280, awake: bool = True, init: str = "", **options: Any) -> Visit:
        path = tmp_path / f"a page & {len(visits)}.html"
        path.write_bytes(data)
        context = browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        opened = Visit(page)
        visits.append(opened)
        page.on("console", lambda m: opened.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: opened.problems.append(str(error)))
        page.on("dialog", lambda dialog: opened.problems.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: opened.requests.append(request.url))
        if init:
            page.add_init_script(init)
        page.goto(path.as_uri())
        if awake:
            expect(opened["#state"]).to_have_text("works offline")
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for opened in visits for problem in opened.problems] == []
    urls = [url for opened in visits for url in opened.requests]
    assert all(url.startswith(("file:///", "blob:null/")) for url in urls) and len(urls) <= 2 * len(visits)


def own_texts(data: bytes, tmp_path: Path, prompts: tuple[str, ...], **params: Any) -> list[str]:
    """What smalllm tells from the weights of a page, in float32."""
    path = tmp_path / "own.html"
    path.write_bytes(data)
    given = GREEDY | params
    sampling = SamplingParams(**given | {"top_k": given["top_k"] or None})
    return [Generator(*html.read(path), weights="fp32").complete(prompt, sampling).text for prompt in prompts]


# ── what it tells ──


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_smalllms_of_the_same_weights(shape, visit, tmp_path):
    """90 tokens and a context of 64: the text rolls on."""
    data = page_bytes(shape)
    texts = visit(data).texts(PROMPTS)
    assert texts == own_texts(data, tmp_path, PROMPTS)
    assert all(len(text) > 20 for text in texts) and len(set(texts)) > 1


ODD = {"layers": 1, "context": 23, "vocab_size": 512, "norm": "layernorm", "activation": "gelu"}


@pytest.mark.parametrize(
    "model",
    [
        ODD | {"width": 30, "heads": 6, "positions": "learned", "mlp_width": 37},
        ODD | {"width": 36, "heads": 2, "vocab_size": 530, "bias": True, "mlp_width": 70},
        ODD | {"width": 200, "heads": 2, "norm": "rmsnorm", "activation": "swiglu", "mlp_width": 130, "qk_norm": True},
    ],
    ids=["heads-of-5", "heads-of-18", "heads-of-100"],
)
def test_widths_that_fill_no_vector_and_pieces_that_have_no_text(model, visit, tmp_path):
    data = html.page_of(random_model(ModelConfig(**model)), tokenizer(), NAME, 0)
    assert visit(data).texts(PROMPTS) == own_texts(data, tmp_path, PROMPTS)


SAMPLING: list[dict[str, Any]] = [
    {}, {"top_k": 1}, {"top_k": 5, "seed": 123456}, {"top_p": 0.5}, {"min_p": 0.2}, {"repetition_penalty": 1.7},
    {"temperature": 2.0, "top_k": 100, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 999_999_999_999_999},
    {"temperature": 0.0, "repetition_penalty": 1.3}, {"stop": ["e", "th"]}, {"stop": [" ", "\n"], "temperature": 0.0},
    {"max_tokens": 1},
]  # fmt: skip


def test_settings_and_seeds_mean_what_they_mean_in_the_terminal(visit, tmp_path):
    data = page_bytes("qwen3-untied")
    opened = visit(data)
    for changes in SAMPLING:
        params = {"temperature": 0.8, "max_tokens": 30} | changes
        assert opened.texts(PROMPTS, **params) == own_texts(data, tmp_path, PROMPTS, **params), changes


@pytest.fixture(scope="module")
def engine(browser: Browser) -> Iterator[Page]:
    """A blank page with the engine's classes."""
    page = browser.new_page()
    page.add_script_tag(content="\n".join((PARTS / name).read_text(encoding="utf-8") for name in html.ENGINE))
    page.evaluate("model => { globalThis.words = new Tokenizer(new Uint8Array(model)) }", list(tokenizer().model_bytes))
    yield page
    page.close()


def encoded(engine: Page, texts: list[str]) -> list[list[int]]:
    return engine.evaluate("texts => texts.map((text) => words.encode(text))", texts)


def test_hard_strings_have_the_ids_of_our_tokenizer(engine):
    texts = [*STRINGS, *(a + b for a in STRINGS for b in STRINGS), "word " * 3000, "x" * 5000]
    texts += [
        letter * count for letter in "oelstp .\n1" for count in range(2, 9)
    ]  # of equal merges, the leftmost is first
    assert encoded(engine, texts) == [tokenizer().encode(text) for text in texts]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab <>▁\n1🙂é\u200d\0")))
def test_any_string_has_the_ids_of_our_tokenizer(engine, texts):
    assert encoded(engine, texts) == [tokenizer().encode(text) for text in texts]


def test_tokens_in_any_order_stream_the_text_of_our_tokenizer(engine):
    """Bytes that are not UTF-8 among them; begin and end add nothing."""
    draw = random.Random(0)
    rows = [[draw.choice((draw.randrange(3, 259), draw.randrange(3, 512))) for _ in range(40)] for _ in range(60)]
    rows += [
        [*tokenizer().encode("\ufeffa"), 300],
        [3 + byte for byte in "\ufeff".encode()],
        [3 + 0xF0, 3 + 0x9F, 300, 3 + 0xE2, 3 + 0x82],
    ]
    told = engine.evaluate(
        "rows => rows.map((ids) => { const row = new Row([1], {stop: [], max_tokens: ids.length}, words);"
        " return ids.map((id) => row.push(id)).join('') })",
        rows,
    )
    assert told == [tokenizer().decode(ids) for ids in rows]


def test_a_beginning_of_a_stop_string_is_held_back_as_ours_is(engine):
    """Piece by piece, over several tokens."""
    draw, words = random.Random(1), tokenizer()
    for _ in range(40):
        ids = [draw.randrange(3, 512) for _ in range(30)]
        text = words.decode(ids)
        stops = [text[at : at + draw.randrange(1, 9)] for at in draw.sample(range(len(text) - 9), 2)]
        own = Row([1], SamplingParams(max_tokens=30, stop=stops), words)
        expected = [own.push(id) for id in ids if own.finish_reason is None]
        told = engine.evaluate(
            "([ids, stop]) => { const row = new Row([1], {stop, max_tokens: 30}, words);"
            " return [ids.map((id) => row.finish ? null : row.push(id)).filter((t) => t !== null), row.finish] }",
            [ids, stops],
        )
        assert told == [expected, own.finish_reason]


def test_of_equally_likely_tokens_the_first_are_kept(engine):
    """Four equals: half of the mass is the first two. Three of five numbers tie for the second place of two."""
    chosen = """([logits, params]) => choose(Float32Array.from(logits),
      {temperature: 1, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, ...params}, [], [], {uniform: () => 0.999})"""
    assert engine.evaluate(chosen, [[1, 1, 1, 1], {}]) == 3
    assert engine.evaluate(chosen, [[1, 1, 1, 1], {"top_p": 0.5}]) == 1
    assert engine.evaluate(chosen, [[2, 1, 1, 1, 0], {"top_k": 2}]) == 3
    assert engine.evaluate(chosen, [[2, 1, 1, 1, 0], {"min_p": 0.9}]) == 0
    assert engine.evaluate(chosen, [[1, 1, 1, 1], {"temperature": 0}]) == 0


def test_the_random_numbers_are_pythons(engine):
    for seed in (0, 1, 42, 999_999_999_999_999):
        own = random.Random(f"{seed} 0")
        drawn = engine.evaluate(
            "text => { const r = new Random(text); return Array.from({length: 700}, () => r.uniform()) }", f"{seed} 0"
        )
        assert drawn == [own.getrandbits(24) / (1 << 24) for _ in range(700)]


# ── the page ──


def test_a_story_by_hand(visit, tmp_path):
    data = page_bytes("llama")
    opened = visit(data)
    assert opened["h1"].text_content() == NAME
    opened["#prompt"].fill(BEGINNING)
    opened.set("#max_tokens", 40)
    opened.set("#seed", 7)
    opened.set("#top_k", 9)
    opened["#tell"].click()
    text = opened.told()
    assert (
        text == BEGINNING + own_texts(data, tmp_path, (BEGINNING,), temperature=0.8, max_tokens=40, seed=7, top_k=9)[0]
    )
    expect(opened["#figures"]).to_have_text(re.compile(r"40 pieces · .*seed 7"))
    opened["#continue"].click()
    assert opened.told().startswith(text) and len(opened.told()) > len(text)
    opened["#edit"].click()
    assert opened["#prompt"].input_value().startswith(text)
    opened["#reset"].click()
    assert [opened[f"#{key}-value"].text_content() for key in ("temperature", "max_tokens", "top_k")] == [
        "0.80",
        "200",
        "off",
    ]


def test_without_a_seed_the_one_that_was_used_tells_the_story_again(visit):
    opened = visit(page_bytes("llama"))
    opened["#beginnings button"].first.click()
    opened.page.keyboard.press("Control+Enter")
    first = opened.told()
    opened["#seed-used"].click()
    opened["#tell"].click()
    assert opened.told() == first


@pytest.mark.parametrize("how", ["button", "key"])
def test_a_telling_stops_at_once_and_the_next_one_is_whole(how, visit, tmp_path):
    data = endless_page()
    opened = visit(data)
    opened.page.evaluate("values.max_tokens = 1e7")
    opened["#tell"].click()
    expect(opened["#tale"]).not_to_be_empty()
    opened["#tell"].click() if how == "button" else opened.page.keyboard.press("Escape")
    expect(opened["#tell"]).to_have_text("Tell another")
    text = opened["#tale"].text_content()
    long = {"max_tokens": 2000}  # more than the engine tells between two looks at its messages
    assert opened.texts((BEGINNING,), **long) == own_texts(data, tmp_path, (BEGINNING,), **long)
    assert opened["#tale"].text_content() == text


def test_where_a_browser_allows_no_worker_the_page_tells_itself(visit, tmp_path):
    data = page_bytes("gpt2")
    old = "globalThis.Worker = class { constructor() { throw new Error('no') } }; delete Uint8Array.fromBase64"
    opened = visit(data, init=old)
    assert opened.page.evaluate("port instanceof MessagePort")
    assert opened.texts(PROMPTS) == own_texts(data, tmp_path, PROMPTS)


def test_a_browser_without_simd_is_told(visit):
    opened = visit(
        page_bytes("llama"), awake=False, init="delete globalThis.Worker; WebAssembly.validate = () => false"
    )
    expect(opened["#trouble"]).to_contain_text("this browser has no WebAssembly SIMD")
    expect(opened["#tell"]).to_be_disabled()


def test_text_never_becomes_an_element(visit):
    opened = visit(endless_page())
    elements = "document.querySelectorAll('*').length"
    for payload in PAYLOADS:
        opened["#prompt"].fill(payload)
        opened.page.evaluate("values.max_tokens = 1e7")
        opened["#tell"].click()
        before = opened.page.evaluate(elements)
        opened.page.evaluate(
            "text => { telling = true; hear({ data: { told: number, text, tokens: 1, finish: 'stop' } }) }", payload
        )
        assert (opened["#tale"].text_content() or "").endswith(payload)
        assert opened.page.evaluate(elements) == before
        opened.page.evaluate("port.postMessage({ stop: true })")
        opened["#new"].click()
    assert opened["img, iframe, #tale script, a, u"].count() == 0


def test_on_a_phone_and_in_the_dark(visit):
    opened = visit(page_bytes("llama", "x" * 120), width=360, color_scheme="dark", has_touch=True)
    assert opened.fits()
    opened["#settings-fold summary"].click()
    opened["#prompt"].fill("W" * 300)
    opened["#tell"].click()
    opened.told()
    assert opened.fits()
    dark = opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    opened["#theme"].click()
    assert opened["html"].get_attribute("data-theme") == "light"
    assert opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != dark


def test_everything_that_can_be_pressed_has_a_name(visit):
    opened = visit(page_bytes("llama"))
    nameless = """() => [...document.querySelectorAll("button, input, textarea")]
      .filter((node) => !node.textContent && !node.getAttribute("aria-label") && !node.labels?.length).map((node) => node.id)"""
    assert opened.page.evaluate(nameless) == []
    opened.page.keyboard.press("Tab")
    assert opened["#theme"].evaluate("node => node === document.activeElement")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda page: page[: len(page) // 2], "This file is not complete. Ask for it again."),
        (lambda page: page[: page.index(b'id="about"') + 40], "This file is not complete. Ask for it again."),
        (lambda page: page[:-800] + page[-400:], "damaged"),
    ],
)  # fmt: skip
def test_a_file_that_lost_something_on_its_way_says_so(damage, sentence, visit):
    opened = visit(damage(page_bytes("llama")), awake=False)
    expect(opened["#trouble"]).to_contain_text(sentence)


def test_broken_numbers_are_told(visit, monkeypatch):
    monkeypatch.setattr(
        html, "_finite", lambda name, tensor: tensor.detach().numpy() * (np.nan if name == "norm.weight" else 1)
    )
    opened = visit(page_bytes("llama"))
    opened["#tell"].click()
    expect(opened["#trouble"]).to_contain_text("numbers are broken")


@pytest.mark.slow
def test_fifty_prompts_to_a_trained_model(visit, dataset_folder, tmp_path):
    model = {"layers": 4, "width": 192, "heads": 3, "context": 256, "qk_norm": True, "tie_embeddings": False}
    settings = {"steps": 150, "evaluate_every": 150, "batch_tokens": 2048}
    train(tiny_settings(dataset_folder, model=model, train=settings), tmp_path / "run")
    run = open_run(tmp_path / "run")
    data = html.page_of(run.model, run.tokenizer, "trained", run.step)
    prompts = tuple(a + b for a in (BEGINNING, "One day", "The cat", "Tom", "It was") for b in ["", *"abcdefghi"])
    assert visit(data).texts(prompts, max_tokens=200) == own_texts(data, tmp_path, prompts, max_tokens=200)
    assert len(prompts) == 50
