"""The engine: texts that do not depend on company, slots that are freed, fair turns, failures that stay small, and
checkpoints that come and go under it."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generation import save_run

from smalllm.checkpoint import DamagedCheckpoint
from smalllm.generation import Generator, SamplingParams, Token
from smalllm.serve.engine import Busy, Closing, End, Engine, Job, reserve
from smalllm.serve.meters import Meters, Rate
from smalllm.serve.models import AllInUse, Models, NoSuchModel, Served

SLOTS = 4
CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("engine") / "tale", dataset_folder, [3, 4])


def make_run(path: Path, data: Path, steps: list[int]) -> Path:
    from conftest import tiny_settings

    for step in steps:
        save_run(path, tiny_settings(data, model={"context": CONTEXT}, train={"micro_batch": 2}), step, seed=step)
    return path


@pytest.fixture
def models(folder: Path) -> Models:
    return open_models(folder)


def open_models(folder: Path, notes: list[str] | None = None) -> Models:
    return Models(folder, SLOTS + reserve(SLOTS), "cpu", (notes if notes is not None else []).append)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Engine]:
    engine = Engine(Meters(), **{"slots": SLOTS} | options)
    engine.start(asyncio.get_running_loop())
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 1.0, "seed": 1, "logit_bias": {2: -100.0}} | settings)


def prompt(served: Served, text: str = "Once") -> list[int]:
    return [served.tokenizer.bos_id, *served.tokenizer.encode(text)]


def submit(engine: Engine, served: Served, sampling: SamplingParams | None = None, **options: Any) -> Job:
    ids = prompt(served, options.pop("text", "Once"))
    return engine.submit(options.pop("client", "me"), served, ids, sampling or params(), **options)


async def finished(job: Job) -> tuple[str, End]:
    """The text and the end of the only choice."""
    items: list[Token | End] = []
    while some := await job.more():
        items += some
    end = items[-1]
    assert isinstance(end, End)
    return "".join(item.text for item in items if isinstance(item, Token)), end


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Wait for something to become true; returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen"
        await asyncio.sleep(0.002)
    return time.monotonic() - began


def idle(engine: Engine) -> bool:
    gauges = engine.gauges()
    return not gauges["active_slots"] and not gauges["queue_length"]


class Slow:
    """A batch whose steps take a while, or raise."""

    def __init__(self, batch: Any, seconds: float = 0.0, error: BaseException | None = None, adds: bool = True) -> None:
        self.batch, self.seconds, self.error, self.adds = batch, seconds, error, adds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)

    def add(self, row: Any) -> None:
        if not self.adds:
            raise MemoryError
        self.batch.add(row)

    def step(self) -> list[Token]:
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return self.batch.step()


# ── texts ──


def test_a_text_is_the_one_it_would_be_alone(models):
    served = models.current
    generator = Generator(served.run.model, served.tokenizer)

    async def main() -> None:
        async with running() as engine:
            cases = [
                (text, params(seed=seed, temperature=temperature), stream)
                for text, seed in (("Once", 1), ("The cat", 2), ("A", 3), ("One day", 4))
                for temperature in (0.0, 1.0)
                for stream in (False, True)
            ]
            jobs = [submit(engine, served, p, text=text, client=text, stream=stream) for text, p, stream in cases]
            cancelled = [submit(engine, served, params(max_tokens=60), client="other") for _ in range(3)]
            for job in cancelled:
                await asyncio.sleep(0.003)
                job.cancel()
            for (text, sampling, _), job in zip(cases, jobs, strict=True):
                said, end = await finished(job)
                alone = generator.complete(text, sampling)
                assert (said, end.reason, end.tokens) == (alone.text, alone.finish_reason, alone.tokens)
            assert idle(engine) and served.users == 0 and served.batch.free == SLOTS + reserve(SLOTS)

    asyncio.run(main())


def test_choices_are_numbered_and_differ(models):
    served = models.current
    alone = Generator(served.run.model, served.tokenizer).batch(["Once"] * 3, params())

    async def main() -> None:
        async with running() as engine:
            job = submit(engine, served, choices=3)
            texts = ["", "", ""]
            for item in await job.more():
                if isinstance(item, Token):
                    texts[item.row.index] += item.text
            assert texts == [completion.text for completion in alone] and len(set(texts)) == 3
            assert await job.more() == []

    asyncio.run(main())


def test_a_stop_id_ends_a_text_with_what_was_held_back(models):
    served = models.current
    said = Generator(served.run.model, served.tokenizer).complete("Once", params())
    last = said.ids[6]
    first = said.ids.index(last)
    before = served.tokenizer.decode(said.ids[:first])

    async def main() -> None:
        async with running() as engine:
            sampling = params(stop=(before[-1:] + "\0never",))  # holds the last character back
            text, end = await finished(submit(engine, served, sampling, stop_ids=[last], stream=True))
            assert (text, end.reason, end.tokens) == (before, "stop", first)
            await until(lambda: idle(engine))

    asyncio.run(main())


def test_a_stream_that_nobody_reads_is_gathered(models):
    async def main() -> None:
        async with running() as engine:
            job = submit(engine, models.current, params(max_tokens=60), stream=True)
            await until(lambda: idle(engine))
            await asyncio.sleep(0.02)
            assert len(await job.more()) == 61 and await job.more() == []

    asyncio.run(main())


# ── leaving, waiting ──


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_slot_and_queue(models, stream):
    async def main() -> None:
        async with running() as engine:
            models.current.batch = Slow(models.current.new_batch(), 0.005)
            jobs = [submit(engine, models.current, params(max_tokens=80), stream=stream) for _ in range(3 * SLOTS)]
            await until(lambda: engine.gauges()["active_slots"] == SLOTS)
            waiter = asyncio.ensure_future(jobs[0].more() if not stream else finished_or_left(jobs[0]))
            await asyncio.sleep(0.01)
            for job in jobs:
                job.cancel()
                job.cancel()  # a second time is nothing
            assert await until(lambda: idle(engine)) < 1.0
            assert await waiter == []
            assert models.current.users == 0 and not models.current.batch.rows

    asyncio.run(main())


async def finished_or_left(job: Job) -> list[Any]:
    while some := await job.more():
        pass
    return some


def test_the_queue_is_bounded_and_a_newcomer_gets_in(models):
    async def main() -> None:
        async with running(queue=3) as engine:
            models.current.batch = Slow(models.current.new_batch(), 0.005)
            jobs = [submit(engine, models.current) for _ in range(SLOTS)]
            await until(lambda: engine.gauges()["active_slots"] == SLOTS)
            jobs += [submit(engine, models.current) for _ in range(3)]
            with pytest.raises(Busy):
                submit(engine, models.current)
            jobs.append(submit(engine, models.current, client="newcomer"))
            assert [(await finished(job))[1].reason for job in jobs] == ["length"] * 8

    asyncio.run(main())


def test_a_place_in_the_queue_is_kept_while_a_request_is_read(models):
    served = models.current

    async def main() -> None:
        async with running(slots=1, queue=1) as engine:
            with (
                engine.place("me"),
                engine.place("me"),
                engine.place("me"),
            ):  # a slot, and a newcomer's two in the queue
                assert engine.busy("me")
                with pytest.raises(Busy), engine.place("me"):
                    pass
                jobs = [submit(engine, served)]  # has a place
            assert not engine.busy("me")
            await finished(jobs[0])

    asyncio.run(main())


def test_clients_take_turns(models):
    """With one slot left, the waiting texts of three clients start one of each at a time."""
    order: list[str] = []

    async def main() -> None:
        async with running(slots=1) as engine:
            models.current.batch = Slow(models.current.new_batch(), 0.01)
            first = submit(engine, models.current, params(max_tokens=4), client="a")
            await until(lambda: engine.gauges()["active_slots"] == 1)
            jobs = [submit(engine, models.current, params(max_tokens=1), client=name) for name in "aaabbbc"]

            async def note(name: str, job: Job) -> None:
                await finished(job)
                order.append(name)

            await asyncio.gather(*[note(name, job) for name, job in zip("aaabbbc", jobs, strict=True)])
            await finished(first)

    asyncio.run(main())
    assert sorted(order[:3]) == ["a", "b", "c"] or order[0] in "bc"  # a newcomer may take the reserve before
    assert order[-1] in "ab" and order.index("c") <= 2


def test_short_texts_do_not_wait_for_anothers_long_ones(models):
    """S17: one client posts 64 long jobs, another posts short ones; p95 below three times the value alone."""
    served = models.current
    short = params(max_tokens=5)

    async def measure(engine: Engine) -> list[float]:
        seconds = []
        for _ in range(12):
            began = time.monotonic()
            await finished(submit(engine, served, short, client="short"))
            seconds.append(time.monotonic() - began)
        return sorted(seconds)

    async def main() -> tuple[list[float], list[float]]:
        async with running(queue=64) as engine:
            served.batch = Slow(served.new_batch(), 0.004)
            alone = await measure(engine)
            long = [submit(engine, served, params(max_tokens=90), client="long") for _ in range(64)]
            await until(lambda: engine.gauges()["active_slots"] == SLOTS)
            beside = await measure(engine)
            assert engine.gauges()["active_slots"] >= SLOTS, "the long ones fill the slots all the time"
            for job in long:
                job.cancel()
            return alone, beside

    alone, beside = asyncio.run(main())
    assert beside[-2] < 3 * statistics.median(alone)


def test_what_takes_too_long_is_ended(models):
    async def main() -> None:
        async with running(slots=1, deadline_seconds=0.15) as engine:
            models.current.batch = Slow(models.current.new_batch(), 0.02)
            jobs = [submit(engine, models.current, params(max_tokens=90)) for _ in range(4)]
            ends = [(await finished(job))[1] for job in jobs]
            assert {end.reason for end in ends} == {"error"} and "longer than 0.15 s" in ends[-1].error
            assert idle(engine)

    asyncio.run(main())


# ── failures ──


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), KeyError("row")])
def test_a_failed_step_ends_its_rows_and_nothing_else(models, error):
    async def main() -> None:
        async with running() as engine:
            other = models.get("tale@3")
            models.current.batch = Slow(models.current.new_batch(), 0.01, error)
            bystander = submit(engine, other, params(max_tokens=40))
            failed = await submit(engine, models.current, choices=2).more()
            assert failed == [End(index, "error", 0, "the model failed") for index in range(2)]
            assert (await finished(submit(engine, models.current)))[1].reason == "length"
            assert (await finished(bystander))[1].reason == "length"
            assert engine.healthy() and engine.meters.failures == 1

    asyncio.run(main())


def test_three_failures_in_a_minute_are_not_healthy(models):
    async def main() -> None:
        async with running() as engine:
            for count in range(3):
                assert engine.healthy()
                models.current.batch = Slow(models.current.new_batch(), 0.0, RuntimeError(str(count)))
                await finished(submit(engine, models.current))
            assert not engine.healthy()
            assert (await finished(submit(engine, models.current)))[1].reason == "length"

    asyncio.run(main())


def test_a_row_that_cannot_begin_is_alone(models):
    async def main() -> None:
        async with running() as engine:
            models.current.batch = Slow(models.current.new_batch(), adds=False)
            assert (await finished(submit(engine, models.current)))[1].reason == "error"
            models.current.batch = models.current.new_batch()
            assert (await finished(submit(engine, models.current)))[1].reason == "length"
            assert models.current.users == 0

    asyncio.run(main())


def test_numbers_that_are_not_finite_end_a_text_with_an_error(folder):
    models = open_models(folder)
    with torch.no_grad():
        models.current.run.model.head.weight.fill_(float("nan"))
    models.current.batch = models.current.new_batch()

    async def main() -> None:
        async with running() as engine:
            end = (await finished(submit(engine, models.current)))[1]
            assert end.reason == "error" and "not finite" in end.error
            assert (await finished(submit(engine, models.get("tale@3"))))[1].reason == "length"

    asyncio.run(main())


def test_a_mistake_in_the_engine_itself_does_not_end_it(models, monkeypatch):
    async def main() -> None:
        async with running() as engine:
            monkeypatch.setattr(engine, "_step", lambda served: 1 / 0)
            assert (await finished(submit(engine, models.current)))[1].error == "the engine failed"
            monkeypatch.undo()
            assert (await finished(submit(engine, models.current)))[1].reason == "length"

    asyncio.run(main())


# ── the end ──


def test_a_drain_lets_finish_what_runs_and_refuses_the_rest(models):
    async def main() -> None:
        async with running() as engine:
            models.current.batch = Slow(models.current.new_batch(), 0.005)
            jobs = [submit(engine, models.current) for _ in range(2 * SLOTS)]
            closing = asyncio.ensure_future(asyncio.to_thread(engine.close, 10.0))
            await until(lambda: not engine.healthy())
            with pytest.raises(Closing):
                submit(engine, models.current)
            assert [(await finished(job))[1].reason for job in jobs] == ["length"] * len(jobs)
            await asyncio.wait_for(closing, 5.0)

    asyncio.run(main())


def test_what_a_drain_does_not_finish_ends_with_an_error(models):
    async def main() -> None:
        async with running() as engine:
            models.current.batch = Slow(models.current.new_batch(), 0.05)
            jobs = [submit(engine, models.current, params(max_tokens=90)) for _ in range(2 * SLOTS)]
            began = time.monotonic()
            closing = asyncio.ensure_future(asyncio.to_thread(engine.close, 0.2))
            ends = [(await finished(job))[1] for job in jobs]
            assert {end.error for end in ends} == {"the server is shutting down"}
            await closing
            assert time.monotonic() - began < 2.0

    asyncio.run(main())


# ── checkpoints ──


def test_names_and_steps(models):
    assert models.names() == ["tale", "tale@4", "tale@3"]
    assert models.get(None) is models.get("tale") is models.get("tale@4") is models.current
    assert models.get("tale@3") is models.get("tale@3") and models.get("tale@3").run.step == 3
    for name in (
        "",
        "other",
        "tale@",
        "tale@5",
        "tale@-3",
        "tale@3x",
        "other@3",
        "../tale@3",
        "tale@" + "9" * 50,
        "tale@٣",
    ):
        with pytest.raises(NoSuchModel):
            models.get(name)


def test_milestones_have_names_too(tmp_path, dataset_folder):
    folder = make_run(tmp_path / "tale", dataset_folder, [1, 5])
    kept = folder / "checkpoints" / "step-00000001"
    (folder / "milestones").mkdir()
    kept.rename(folder / "milestones" / kept.name)
    models = open_models(folder)
    assert models.names() == ["tale", "tale@5", "tale@1"] and models.get("tale@1").run.step == 1


def test_a_newer_checkpoint_takes_over_and_running_texts_finish_on_the_old_one(tmp_path, dataset_folder):
    folder, notes = make_run(tmp_path / "tale", dataset_folder, [1]), []
    models = open_models(folder, notes)
    old = models.current
    expected = Generator(old.run.model, old.tokenizer).complete("Once", params(max_tokens=60)).text

    async def main() -> None:
        async with running() as engine:
            old.batch = Slow(old.new_batch(), 0.003)
            job = submit(engine, old, params(max_tokens=60))
            await until(lambda: engine.gauges()["active_slots"] == 1)
            make_run(folder, dataset_folder, [2])
            models.look()
            assert models.current.run.step == 2 and notes == ["now step 2"]
            fresh = await finished(submit(engine, models.current, params(max_tokens=60)))
            assert (await finished(job))[0] == expected != fresh[0]

    asyncio.run(main())


def test_a_corrupt_checkpoint_is_named_once_and_passed_over(tmp_path, dataset_folder):
    folder, notes = make_run(tmp_path / "tale", dataset_folder, [1, 2]), []
    models = open_models(folder, notes)
    make_run(folder, dataset_folder, [3])
    weights = folder / "checkpoints" / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    for _ in range(3):
        models.look()
    assert models.current.run.step == 2 and len(notes) == 1 and "step 3 cannot be loaded" in notes[0]
    with pytest.raises(DamagedCheckpoint):
        models.get("tale@3")
    make_run(folder, dataset_folder, [4])
    models.look()
    assert models.current.run.step == 4


def test_a_run_is_followed_in_the_background(tmp_path, dataset_folder):
    folder = make_run(tmp_path / "tale", dataset_folder, [1])
    models = open_models(folder)
    models.follow(every=0.02)
    make_run(folder, dataset_folder, [2])
    deadline = time.monotonic() + 5
    while models.current.run.step != 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    models.stop()
    assert models.current.run.step == 2


def test_one_checkpoint_is_served_as_it_is(folder):
    models = open_models(folder / "checkpoints" / "step-00000003")
    assert models.current.run.step == 3
    before = set(threading.enumerate())  # of other tests some may be ending
    models.follow(every=0.01)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "follow"]


def test_few_checkpoints_are_kept_and_none_that_is_in_use_is_forgotten(tmp_path, dataset_folder):
    models = open_models(make_run(tmp_path / "tale", dataset_folder, [1, 2, 3, 4, 5, 6]))
    first = models.get("tale@1")
    for step in (2, 3, 1, 4):
        models.get(f"tale@{step}")
    assert models.get("tale@1") is first and sorted(models._numbered) == [1, 3, 4]
    for step in (1, 3, 4):
        models.get(f"tale@{step}").users += 1
    with pytest.raises(AllInUse):
        models.get("tale@5")
    models.get("tale@3").users -= 1
    models.get("tale@5")
    assert sorted(models._numbered) == [1, 4, 5]


# ── meters ──


def test_counters_tell_what_happened(models):
    async def main() -> str:
        async with running() as engine:
            await finished(submit(engine, models.current, choices=2))
            return engine.meters.exposition(engine.gauges())

    page = asyncio.run(main())
    assert "smalllm_tokens_total 24" in page and "smalllm_time_to_first_token_seconds_count 1" in page
    assert "smalllm_active_slots 0" in page and f"smalllm_slots {SLOTS}" in page


def test_a_rate_forgets():
    now = [100.0]
    rate = Rate(5.0, lambda: now[0])
    for _ in range(10):
        rate.add(10)
    assert rate.value() == 20.0
    now[0] += 6
    assert rate.value() == 0.0
