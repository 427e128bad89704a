"""The page in a real browser: Debian's chromium against the real server and a run of twelve steps.

Where there is no browser these tests skip; with SMALLLM_REQUIRE_BROWSER=1 a missing one fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_settings

from smalllm.serve.server import Service, Settings
from smalllm.training.trainer import train

REQUIRED = os.environ.get("SMALLLM_REQUIRE_BROWSER") == "1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
try:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, Route, expect, sync_playwright
except ImportError:
    if REQUIRED:
        raise
    pytest.skip("playwright is not installed; run: uv sync", allow_module_level=True)
if CHROMIUM is None:
    if REQUIRED:
        pytest.fail("no chromium here; run: apt-get install chromium", pytrace=False)
    pytest.skip("no chromium here; run: apt-get install chromium", allow_module_level=True)

PAGE = Path(__file__).parents[1] / "src" / "smalllm" / "serve" / "page"
NAME = "tiny <img src=x onerror=alert(1)> & co"  # a run's name is the name of its folder
BEGINNING = "Once upon a time"
PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "</textarea><b>bold</b>",
    "<a href='javascript:alert(1)'>x</a>", "<iframe srcdoc='<script>alert(1)</script>'></iframe>", "${alert(1)}{{7*7}}",
    "\u2028<!--<script>", "&lt;b&gt; &amp; \"'><u>", "\U0001f600 \u202eevil <style>*{display:none}</style>",
]  # fmt: skip
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setTimeout\(['\"]|srcdoc|createContextualFragment"
)


# ── a run, a server, a browser ──


@pytest.fixture(scope="module")
def run_folder(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / NAME
    settings = tiny_settings(
        dataset_folder,
        model={"context": 128},
        train={"checkpoint_every": 4, "keep": 9, "micro_batch": 2, "sample_tokens": 12},
    )
    train(settings, folder)
    return folder


def serving(folder: Path, key: str | None = None) -> Iterator[Service]:
    service = Service(Settings(folder, port=0, api_key=key), drain_seconds=0.5)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(20)


@pytest.fixture(scope="module")
def service(run_folder: Path) -> Iterator[Service]:
    yield from serving(run_folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that was opened, and what went wrong in it."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def tell(self, prompt: str = BEGINNING, seed: str = "5", length: int = 30) -> str:
        """Tell a story by hand; its whole text."""
        self["#prompt"].fill(prompt)
        self.set("#max_tokens", length)
        self.set("#seed", seed)
        self["#tell"].click()
        return self.told()

    def told(self) -> str:
        expect(self["#edit"]).to_be_visible()
        return self["#tale"].text_content() or ""

    def set(self, selector: str, value: object) -> None:
        if not self[selector].is_visible():
            self["#settings-fold summary"].click()
        self[selector].fill(str(value))

    def open(self, view: str) -> None:
        self[f"#tab-{view}"].click()
        expect(self[f"#panel-{view}"]).to_be_visible()

    def poll(self) -> None:
        """What the page does every two seconds, and when it becomes visible again: now."""
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def fits(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def answer(self, pattern: str, change: Callable[[Any], Any]) -> None:
        """From now on, the JSON that the server answers is changed on its way."""

        def handle(route: Route) -> None:
            route.fulfill(json=change(route.fetch().json()))

        self.page.route(pattern, handle)
        self.poll()


@pytest.fixture
def visit(service: Service, browser: Browser) -> Iterator[Callable[..., Visit]]:
    """``visit(width=360, color_scheme="dark")`` opens the page; console errors and violations of the CSP fail the test."""
    contexts: list[BrowserContext] = []
    visits: list[Visit] = []

    def open_page(width: int = 1280, url: str = service.url, ready: bool = True, **options: Any) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        opened = Visit(page, url)
        visits.append(opened)
        page.on("console", lambda m: opened.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: opened.problems.append(str(error)))
        page.on("dialog", lambda dialog: opened.problems.append(f"dialog {dialog.message}"))
        page.goto(url)
        if ready:
            expect(opened["#step"]).not_to_be_empty()
        return opened

    yield open_page
    for opened in visits:
        opened.page.unroute_all(behavior="ignoreErrors")
    for context in contexts:
        context.close()
    assert [problem for opened in visits for problem in opened.problems] == []


def complete(service: Service, **body: Any) -> str:
    """The text of the API, without the page."""
    request = urllib.request.Request(
        f"{service.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["choices"][0]["text"]


def told_events(pieces: list[str], finish: str = "stop") -> str:
    """Events of a model that says exactly these pieces, with the same pieces as alternatives."""
    tops = [{other: -1.0 - i for i, other in enumerate(pieces)} for _ in pieces]
    logprobs = {"tokens": pieces, "token_logprobs": [-1.0] * len(pieces), "top_logprobs": tops, "text_offset": []}
    choice = {"index": 0, "text": "".join(pieces), "logprobs": logprobs, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"


# ── story ──


def test_a_story_is_the_text_of_the_api_for_its_seed(visit, service):
    opened = visit()
    text = opened.tell(seed="5", length=40)
    assert text == BEGINNING + complete(service, prompt=BEGINNING, seed=5, max_tokens=40, temperature=0.8)
    assert opened["#tale .token"].count() > 10
    expect(opened["#figures"]).to_contain_text(re.compile(r"\d+ pieces .*the first after \d+ ms .*seed 5"))


def test_without_a_seed_the_one_that_was_used_tells_the_story_again(visit):
    opened = visit()
    first = opened.tell(seed="")
    opened["#seed-used"].click()
    assert opened["#seed"].input_value() in (opened["#seed-used"].text_content() or "")
    opened["#tell"].click()
    assert opened.told() == first


def test_another_piece_branches_and_the_old_telling_stays(visit, service):
    opened = visit()
    old = opened.tell()
    node = opened["#tale .token"].nth(6)
    before = node.evaluate(
        "node => { const r = new Range(); r.setStart(node.parentNode, 0); r.setEndBefore(node); return r.toString() }"
    )
    node.click()
    rows = opened["#alternatives .alternative"]
    assert rows.count() >= 8
    expect(opened["#alternatives [aria-current=true] .piece"]).to_have_count(1)
    chances = [float(text.strip(" <%")) for text in opened["#alternatives .chance"].all_text_contents()]
    assert chances[:8] == sorted(chances[:8], reverse=True) and 0 < sum(chances) <= 101
    with opened.page.expect_request("**/v1/completions") as asked:
        opened["#alternatives .alternative:not([aria-current], :disabled)"].first.click()
    prompt = asked.value.post_data_json["prompt"]
    assert prompt.startswith(before.rstrip()) and len(prompt) > len(before) and not old.startswith(prompt)
    new = opened.told()
    assert new == prompt + complete(service, prompt=prompt, seed=5, max_tokens=30, temperature=0.8)
    expect(opened["#tale .token.mine"]).to_have_text(prompt.removeprefix(before.rstrip()))
    expect(opened["#branch-list li"]).to_have_count(2)
    opened["#branch-list button"].first.click()
    assert opened.told() == old
    expect(opened["#branch-list button"].first).to_have_attribute("aria-current", "true")


def test_alternatives_open_for_a_resting_pointer_and_close_behind_it(visit):
    opened = visit()
    opened.tell()
    opened["#tale .token"].nth(4).hover()
    expect(opened["#alternatives"]).to_be_visible()
    opened["h1"].hover()
    expect(opened["#alternatives"]).to_be_hidden()


def test_certainty_tints_every_piece_by_its_probability(visit):
    opened = visit()
    opened.tell()
    opened["#certainty"].check(force=True)
    expect(opened["#legend"]).to_be_visible()
    tints = opened.page.evaluate(
        "[...document.querySelectorAll('#tale .sure-4')].map(n => getComputedStyle(n).backgroundColor)"
    )
    assert tints and set(tints).isdisjoint({"rgba(0, 0, 0, 0)"})


def test_continue_edit_and_new(visit):
    opened = visit()
    opened.page.route("**/v1/completions", lambda route: route.fulfill(body=told_events([" more"], "length")))
    assert opened.tell() == f"{BEGINNING} more"
    opened["#continue"].click()
    expect(opened["#tale"]).to_have_text(f"{BEGINNING} more more")
    opened["#edit"].click()
    assert opened["#prompt"].input_value() == f"{BEGINNING} more more"
    opened["#tell"].click()
    opened["#new"].click()
    assert opened["#prompt"].input_value() == ""
    opened["#beginnings button"].first.click()
    assert opened["#prompt"].input_value() == BEGINNING


def test_a_text_that_has_ended_says_so(visit):
    opened = visit()
    opened.page.route("**/v1/completions", lambda route: route.fulfill(body=told_events([" done", "."], "stop")))
    opened.tell()
    expect(opened["#ending"]).to_have_text("The end")
    expect(opened["#continue"]).to_be_hidden()


def test_characters_spread_over_pieces_are_whole(visit):
    logprobs = {"tokens": [" a", "\ufffd", "\ufffd"], "token_logprobs": [-1, -1, -1], "top_logprobs": [{}, {}, {}]}
    choice = {"text": " a😀", "logprobs": logprobs, "finish_reason": "length"}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    opened = visit()
    opened.page.route("**/v1/completions", lambda route: route.fulfill(body=body))
    assert opened.tell() == f"{BEGINNING} a😀"


def test_pieces_that_arrive_together_stay_apart(visit):
    """A busy server sends several tokens in one event; a character of several bytes among them joins no others."""
    pieces = [" a", "\ufffd", "\ufffd", " b", "c", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "d", " e"]
    logprobs = {"tokens": pieces, "token_logprobs": [-1] * 11, "top_logprobs": [{}] * 11}
    choice = {"text": " aé bc“\ufffdd e", "logprobs": logprobs, "finish_reason": "length"}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    opened = visit()
    opened.page.route("**/v1/completions", lambda route: route.fulfill(body=body))
    assert opened.tell() == f"{BEGINNING} aé bc“\ufffdd e"
    assert opened["#tale .token"].all_text_contents() == ["a", "é", "b", "c", "“\ufffd", "d", "e"]


def test_settings_are_sent_and_remembered(visit):
    opened = visit()
    wanted = {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "max_tokens": 20}
    for name, value in wanted.items():
        opened[f"#{name}"].fill(str(value))
    for _ in range(2):
        with opened.page.expect_request("**/v1/completions") as asked:
            opened.tell(length=20)
        sent = asked.value.post_data_json
        assert {name: sent.get(name) for name in wanted} == wanted and sent["seed"] == 5 and sent["stream"] is True
        opened.page.reload()
        expect(opened["#step"]).not_to_be_empty()
    opened["#reset"].click()
    with opened.page.expect_request("**/v1/completions") as asked:
        opened.tell(length=20)
    assert not {"top_k", "top_p", "min_p", "repetition_penalty"} & set(asked.value.post_data_json)


def test_a_text_beyond_the_context_goes_on_from_its_end(visit):
    opened = visit()
    text = opened.tell(prompt="a little rabbit " * 60)
    assert len(text) > 16 * 60
    expect(opened["#figures"]).to_contain_text("only the end of the text")
    assert opened.problems and all("400" in problem for problem in opened.problems)
    opened.problems.clear()


def test_a_busy_server_is_asked_again(visit):
    opened, tries = visit(), []

    def handle(route: Route) -> None:
        tries.append(route)
        busy = {"error": {"message": "busy", "type": "server_error", "param": None, "code": "overloaded"}}
        if len(tries) == 1:
            route.fulfill(status=503, headers={"Retry-After": "1"}, json=busy)
        else:
            route.fulfill(body=told_events([" there"]))

    opened.page.route("**/v1/completions", handle)
    assert opened.tell() == f"{BEGINNING} there"
    assert len(tries) == 2
    opened.problems.clear()  # the browser notes the 503 itself


def test_an_error_is_a_sentence(visit):
    opened = visit()
    error = {"error": {"message": "temperature = 9 is <b>not</b> possible", "type": "x", "param": None, "code": None}}
    opened.page.route("**/v1/completions", lambda route: route.fulfill(status=400, json=error))
    opened.tell()
    expect(opened["#trouble"]).to_have_text("temperature = 9 is <b>not</b> possible")
    opened.problems.clear()


def test_a_model_with_turns_talks(visit, service):
    opened = visit()
    opened.answer("**/run", lambda info: {**info, "has_turns": True})
    expect(opened["#tab-story"]).to_have_text("Chat")
    opened["#message"].fill("Hello")
    opened.page.keyboard.press("Control+Enter")
    expect(opened["#messages .user .tale"]).to_have_text("Hello")
    expect(opened["#messages .assistant .tale"]).not_to_be_empty()
    expect(opened["#send"]).to_have_text("Send")


# ── training and checkpoints ──


def test_curves_are_drawn_and_grow_with_the_run(visit, run_folder):
    opened = visit()
    opened.open("training")
    line = opened["#chart-loss path.train"]
    expect(line).to_be_attached()
    before = line.get_attribute("d") or ""
    assert before.count("L") == 11 and opened["#chart-loss path.valid"].count() == 1
    assert opened["#chart-speed path"].count() == opened["#chart-memory path"].count() == 1
    row = {"step": 13, "tokens": 3400, "seconds": 9.0, "train_loss": 5.0, "lr": 1e-3, "tokens_per_second": 900.0}
    with open(run_folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "memory_bytes": 10**9, "<script>alert(1)</script>": "<b>"}) + "\n")
    opened.poll()
    expect(opened["#tiles dd"].first).to_have_text("13")
    assert (line.get_attribute("d") or "").count("L") == 12
    expect(opened["#samples li"]).to_have_count(3)
    expect(opened["#samples b"].first).to_have_text("Step 12")


def test_what_counting_reaches_is_drawn_above_the_least_that_is_possible(visit):
    opened = visit()
    opened.open("training")
    expect(opened["#chart-loss .mark-line"]).to_have_count(3)
    assert opened["#chart-loss .mark-name"].all_text_contents() == ["a unigram", "a bigram", "a 5-gram"]
    heights = [float(line.get_attribute("y1")) for line in opened["#chart-loss .mark-line"].all()]
    assert heights == sorted(heights) and heights[-1] < float(opened["#chart-loss .floor"].get_attribute("y1"))


def test_curves_can_be_read_by_keys_and_over_time(visit):
    opened = visit()
    opened.open("training")
    plot = opened["#chart-loss .plot"]
    plot.focus()
    opened.page.keyboard.press("Home")
    expect(plot).to_have_attribute("aria-valuetext", re.compile(r"^Step 1, training loss \d\.\d{3}"))
    opened.page.keyboard.press("ArrowRight")
    expect(opened["#chart-at"]).to_contain_text("step 2 ·")
    opened.page.get_by_role("radio", name="Steps").focus()
    opened.page.keyboard.press("ArrowRight")
    expect(opened.page.get_by_role("radio", name="Time")).to_be_checked()
    expect(opened["#chart-loss text.tick"].last).to_contain_text(re.compile(r"\d+ (s|min)"))


def test_checkpoints_tell_side_by_side(visit, service):
    opened = visit()
    opened.open("checkpoints")
    columns = opened["#columns .column"]
    expect(columns).to_have_count(3)
    expect(opened["#columns h2"]).to_have_text(["Step 4", "Step 8", "Step 12"])
    expect(columns.first).to_contain_text("bits per byte")
    columns.nth(1).get_by_role("button", name="Remove").click()
    opened["#compare"].click()
    expect(opened["#compare"]).to_have_text("Tell all")
    for column, step in ((columns.first, 4), (columns.last, 12)):
        expect(column.locator(".telling")).to_have_count(0)
        text = complete(service, model=f"{NAME}@{step}", prompt=BEGINNING, seed=1, max_tokens=200, temperature=0.8)
        shown = column.locator(".tale").text_content() or ""
        assert shown.removesuffix("The end") == BEGINNING + text
    slider = columns.first.get_by_role("slider")
    slider.focus()
    with opened.page.expect_request("**/v1/completions") as asked:
        opened.page.keyboard.press("ArrowRight")
    assert asked.value.post_data_json["model"] == f"{NAME}@8"
    expect(columns.first.locator("h2")).to_have_text("Step 8")


# ── the whole page ──


def test_a_newer_checkpoint_is_told(visit, service):
    opened = visit()
    opened.tell()
    opened.answer("**/run", lambda info: {**info, "step": 1200, "steps": [*info["steps"], 1200]})
    expect(opened["#step"]).to_have_text("now step 1,200")
    expect(opened["#live"]).to_have_text("now step 1,200")
    expect(opened["#figures"]).to_contain_text("step 1,200 has come since")


def test_a_checkpoint_saved_meanwhile_is_served(visit, service, run_folder, dataset_folder):
    opened = visit()
    config = tiny_settings(
        dataset_folder,
        model={"context": 128},
        train={"steps": 14, "checkpoint_every": 4, "keep": 9, "micro_batch": 2, "sample_tokens": 12},
    )
    train(config, run_folder)
    service.models.look()
    opened.poll()
    expect(opened["#step"]).to_have_text("now step 14")
    assert opened.tell() == BEGINNING + complete(
        service, model=f"{NAME}@14", prompt=BEGINNING, seed=5, max_tokens=30, temperature=0.8
    )


def test_hostile_text_is_nothing_but_text(visit):
    opened = visit()
    assert opened["h1"].text_content() == NAME
    elements = opened.page.evaluate("document.querySelectorAll('*').length")
    opened.page.route("**/v1/completions", lambda route: route.fulfill(body=told_events(PAYLOADS)))
    everything = "".join(PAYLOADS)
    assert opened.tell(prompt=everything) == 2 * everything
    opened["#tale .token"].first.click()
    expect(opened["#alternatives .piece"]).to_have_count(len(PAYLOADS))
    opened["#alternatives .alternative"].nth(1).click()
    opened.told()
    rows = [{"step": 99, "prompt": text, "text": text} for text in PAYLOADS]
    opened.answer("**/run/samples", lambda _: {"rows": rows})
    opened.answer("**/run/metrics*", lambda answer: {"rows": [{**row, "train_loss": 3.0} | {p: p for p in PAYLOADS} for row in answer["rows"]]})  # fmt: skip
    opened.open("training")
    expect(opened["#samples li"]).to_have_count(6)
    opened.answer("**/run", lambda info: {**info, "name": everything})
    expect(opened["h1"]).to_have_text(everything, use_inner_text=True)
    assert opened.page.evaluate("document.querySelectorAll('*').length") > elements
    foreign = "main :is(script, style, iframe, object, embed, link, a, b:not(.readout b, .when b), u, img), h1 *, .tale :not(.prompt, .token), .piece :not(.blank)"  # fmt: skip
    assert opened[foreign].count() == 0
    assert opened.page.evaluate("[...document.querySelectorAll('*')].flatMap(n => [...n.attributes]).filter(a => a.name.startsWith('on')).length") == 0  # fmt: skip


def test_hostile_storage_is_ignored(visit):
    opened = visit()
    for value in ('{"temperature": "<img src=x onerror=alert(1)>", "top_k": 1e9}', "null", "[", '"x"'):
        opened.page.evaluate("value => localStorage.setItem('smalllm.settings', value)", value)
        opened.page.reload()
        expect(opened["#temperature-value"]).to_have_text("0.80")
        expect(opened["#top_k-value"]).to_have_text("off")


def test_dark_and_light(visit):
    opened = visit(color_scheme="dark")

    def page_colour() -> str:
        return opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    assert page_colour() == "rgb(22, 23, 26)"
    opened["#theme"].click()
    assert page_colour() == "rgb(246, 242, 235)"
    opened.page.reload()
    assert page_colour() == "rgb(246, 242, 235)"
    opened["#theme"].click()
    opened["#theme"].click()
    assert page_colour() == "rgb(22, 23, 26)"


def test_a_phone_never_scrolls_sideways(visit):
    opened = visit(width=360, has_touch=True)
    opened.tell(prompt="W" * 80)
    opened.answer("**/run", lambda info: {**info, "name": "a-very-long-name-of-a-run-" * 4})
    expect(opened["h1"]).to_contain_text("long-name")
    opened["#tale .token"].nth(5).tap()
    expect(opened["#alternatives"]).to_be_visible()
    assert opened.fits()
    opened.page.keyboard.press("Escape")
    for view in ("training", "checkpoints"):
        opened.open(view)
        expect(opened["#chart-loss path:visible, .column:visible"].first).to_be_visible()
        assert opened.fits(), view


def test_keys_are_enough(visit):
    opened = visit()
    keys = opened.page.keyboard
    opened.set("#seed", 5)
    opened["#prompt"].focus()
    keys.type(BEGINNING)
    keys.press("Control+Enter")
    opened.told()
    for _ in range(20):  # from wherever one is, Tab leads to the text
        if opened["#tale .token:focus"].count():
            break
        keys.press("Shift+Tab")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    expect(opened["#tale .token"].nth(2)).to_be_focused()
    keys.press("Enter")
    expect(opened["#alternatives [aria-current]"]).to_be_focused()
    keys.press("Escape")
    expect(opened["#alternatives"]).to_be_hidden()
    expect(opened["#tale .token"].nth(2)).to_be_focused()
    keys.press("Enter")
    keys.press("Home")
    keys.press("ArrowDown")
    if opened["#alternatives [aria-current]:focus"].count():
        keys.press("ArrowUp")
    keys.press("Enter")
    expect(opened["#tale .token.mine"]).to_have_count(1)
    opened.told()
    opened["#tab-story"].focus()
    keys.press("ArrowRight")
    expect(opened["#panel-training"]).to_be_visible()
    expect(opened["#tab-training"]).to_be_focused()
    keys.press("End")
    expect(opened["#panel-checkpoints"]).to_be_visible()


def test_escape_stops(visit):
    opened, unanswered = visit(), []
    opened.page.route("**/v1/completions", lambda route: unanswered.append(route))
    opened["#prompt"].fill(BEGINNING)
    with opened.page.expect_event("requestfailed"):
        opened["#tell"].click()
        expect(opened["#tell"]).to_have_text("Stop")
        opened.page.keyboard.press("Escape")
    expect(opened["#tell"]).to_have_text("Tell another")
    expect(opened["#trouble"]).to_be_hidden()


def test_everything_one_can_press_has_a_name(visit):
    opened = visit()
    opened.tell()
    for view in ("story", "training", "checkpoints"):
        opened.open(view)
        nameless = opened.page.evaluate(
            """[...document.querySelectorAll("button, input, textarea, [tabindex='0']")].filter(n => n.checkVisibility()
               && !n.textContent.trim() && !n.ariaLabel && !n.labels?.length).map(n => n.id || n.className)"""
        )
        assert nameless == [], view


def test_a_server_that_is_away_is_said_calmly(visit):
    opened = visit()
    opened.page.route("**/run", lambda route: route.abort())
    opened.poll()
    expect(opened["#banner"]).to_contain_text("does not answer")
    opened.page.unroute("**/run")
    opened.poll()
    expect(opened["#banner"]).to_be_hidden()
    expect(opened["#activity"]).to_have_text("idle")
    opened.problems.clear()


def test_the_key_is_asked_for_once(visit, run_folder):
    running = serving(run_folder, key="open sesame")
    service = next(running)
    try:
        opened = visit(url=service.url, ready=False)
        for key in ("wrong", "open sesame"):
            opened["#key"].fill(key)
            opened.page.keyboard.press("Enter")
            if key == "wrong":
                expect(opened["#key-text"]).to_contain_text("not accepted")
        expect(opened["#step"]).not_to_be_empty()
        assert opened.tell().startswith(BEGINNING)
        opened.page.reload()
        expect(opened["#step"]).not_to_be_empty()
        assert opened.page.evaluate("Object.keys(localStorage).join()").find("key") < 0
        opened.problems.clear()  # the browser notes each 401 itself
    finally:
        running.close()


def test_a_link_tells_nothing_by_itself(visit, service):
    sent: list[Request] = []
    opened = visit(url=f"{service.url}/?prompt=x&tell=1#tell")
    opened.page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    opened.page.wait_for_timeout(300)
    assert sent == [] and opened["#prompt"].input_value() == ""


# ── the files ──


def test_no_file_makes_elements_from_text():
    for path in sorted(PAGE.glob("*.js")):
        assert FORBIDDEN.findall(path.read_text(encoding="utf-8")) == [], path.name


def test_the_page_needs_nothing_from_elsewhere():
    for path in sorted(PAGE.iterdir()):
        addresses = set(re.findall(r"https?://[^\"'\s)]+", path.read_text(encoding="utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path.name


def test_nothing_is_inline():
    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = {name for name, _ in attrs}
            assert tag != "style" and "style" not in names and not any(name.startswith("on") for name in names), tag
            assert tag != "script" or "src" in names

    Reader().feed((PAGE / "index.html").read_text(encoding="utf-8"))
