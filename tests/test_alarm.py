"""The alarm: silent on healthy runs, and it rings in the first tenth of the run that the ancestor lost."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from smalllm.checkpoint import RunFolder
from smalllm.config import load_recipe
from smalllm.data.prepare import prepare
from smalllm.model import GPT
from smalllm.ngrams import Floor, Floors
from smalllm.reliability.promises import Recorder
from smalllm.runtime import Runtime
from smalllm.training import trainer as trainer_module
from smalllm.training.alarm import Alarm, zero_share
from smalllm.training.trainer import Trainer, train

FLOORS = [Floor("unigram", 6.0, 2.2), Floor("bigram", 3.76, 1.36), Floor("5-gram", 3.1, 1.12)]
# Mean losses that healthy runs of these recipes had after so many steps, measured on a 2-core CPU.
LAPTOP = {1: 8.175, 2: 8.131, 4: 7.955, 8: 7.385, 16: 6.102, 32: 4.778, 50: 4.513, 64: 4.277, 100: 4.095, 128: 3.814}
QUICKSTART = {1: 7.573, 2: 7.505, 4: 7.302, 8: 6.686, 16: 5.005, 32: 2.101, 50: 1.36, 64: 1.026}
STORY_FLOORS = [Floor("unigram", 5.623, 1.706), Floor("bigram", 2.112, 0.641), Floor("5-gram", 0.849, 0.258)]


def heard(
    losses, steps: int, plan: int, *, warmup: int = 20, zeros: float = 0.0, floors=FLOORS, alarm=None
) -> list[str]:
    """What an alarm says of ``steps`` steps of a run of ``plan``; ``losses`` is a function of the step."""
    alarm = alarm or Alarm(floors, "fp16", 1e-3)
    said = []
    for step in range(1, steps + 1):
        said += alarm.hear(step, losses(step), min(1.0, step / warmup), step / plan, lambda: zeros)
    return said


def curve(points: dict[int, float]):
    return lambda step: float(np.interp(math.log(step), [math.log(s) for s in points], list(points.values())))


# ── the signs ──


@pytest.mark.parametrize("points, floors", [(LAPTOP, FLOORS), (QUICKSTART, STORY_FLOORS)])
@pytest.mark.parametrize("plan", [128, 640, 1000, 1280])
def test_silent_on_measured_curves_of_healthy_runs(points, floors, plan: int):
    assert heard(curve(points), max(points), plan, floors=floors) == []


def test_a_loss_that_is_not_below_the_unigram_rings_once_in_the_first_tenth():
    said = heard(lambda step: 6.01, 400, 1000, warmup=1)
    assert len(said) == 1 and said[0].startswith("alarm at step 64: after 6% of the run the loss is 6.01")
    assert "6.00" in said[0] and "train.precision=bf16 or fp32" in said[0] and "optim.lr=0.001" in said[0]


def test_a_loss_that_stands_above_the_bigram_rings_in_the_first_tenth():
    """The ancestor's 3.8 nats."""
    said = heard(lambda step: max(3.8, 8.0 - 0.2 * step), 100, 1000)
    assert len(said) == 1 and said[0].startswith("alarm at step 64: after 6% of the run the loss stands at 3.80")
    assert heard(lambda step: max(3.7, 8.0 - 0.2 * step), 1000, 1000) == []  # below the bigram it may stand


def test_a_loss_that_falls_is_no_alarm():
    """3 % for each doubling of the steps is the limit: 1 - 2^-0.05 = 3.4 %, 1 - 2^-0.04 = 2.7 %."""
    assert heard(lambda step: 5.9 * step**-0.05, 1000, 1000, warmup=1) == []
    assert len(heard(lambda step: 5.9 * step**-0.04, 1000, 1000, warmup=1)) == 1


@pytest.mark.parametrize("plan", [650, 999, 1280, 5000, 20_000, 12_345])
def test_every_run_is_asked_between_a_twentieth_and_a_tenth(plan: int):
    assert len(heard(lambda step: 7.0, plan // 10, plan, warmup=1)) == 1


def test_warmup_and_short_runs_do_not_ring():
    assert heard(lambda step: 8.0, 128, 2000, warmup=2000, zeros=0.0) == []
    assert heard(lambda step: 8.0, 20, 20, warmup=2) == []


def test_a_starved_gradient_rings_but_not_before_two_full_updates():
    said = heard(lambda step: 5.0, 8, 10_000, warmup=1, zeros=0.4)
    assert len(said) == 1 and "40% of the gradient of the blocks is exactly zero" in said[0]
    assert "train.precision=bf16 or fp32" in said[0]
    assert heard(lambda step: 5.0, 8, 10_000, warmup=1000, zeros=0.9) == []  # projections begin at zero
    assert heard(lambda step: 5.0, 64, 10_000, warmup=1, zeros=0.05) == []


def test_steps_without_a_finite_loss_do_not_count():
    assert heard(lambda step: math.nan, 2000, 2000) == []
    assert heard(lambda step: math.inf if step % 2 else 3.0, 2000, 2000) == []


def test_without_floors_only_the_gradient_is_looked_at():
    assert heard(lambda step: 9.0, 1000, 1000, floors=[]) == []


@pytest.mark.parametrize("stop", [7, 50, 64, 100])
def test_what_is_said_does_not_depend_on_a_resume(stop: int):
    def loss(step: int) -> float:
        return 3.9 + 0.1 * math.sin(step)

    whole = heard(loss, 300, 1000, zeros=0.2)
    first, second = Alarm(FLOORS, "fp16", 1e-3), Alarm(FLOORS, "fp16", 1e-3)
    said = heard(loss, stop, 1000, zeros=0.2, alarm=first)
    second.restore(first.to_json())
    for step in range(stop + 1, 301):
        said += second.hear(step, loss(step), min(1.0, step / 20), step / 1000, lambda: 0.2)
    assert said == whole and len(whole) == 2


def test_zeros_are_counted_in_the_matrices_of_the_blocks():
    from smalllm.config import ModelConfig

    model = GPT(ModelConfig(layers=2, width=16, heads=2, context=8, vocab_size=30))
    assert zero_share(model) == 0.0  # no gradient yet
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    assert zero_share(model) == 1.0
    matrices[0].grad.fill_(1.0)
    assert zero_share(model) == pytest.approx(1 - matrices[0].numel() / sum(p.numel() for p in matrices))


# ── real runs ──


def alarms(display: Recorder) -> list[str]:
    return [note for note in display.notes if note.startswith("alarm")]


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories") / "data"
    prepare(["storyworld-small:1000"], folder, vocab_size=512, seed=1)
    return folder


def first_steps(tiny, stories: Path, run: Path, steps: int, plan: int, lr: float = 3e-3, **train_settings) -> list[str]:
    """The alarms of the first steps of a run of ``plan`` steps."""
    train_settings |= {"steps": plan, "batch_tokens": 512}
    config = tiny(model={"context": 64}, optim={"lr": lr, "warmup_steps": 10}, train=train_settings)
    config = config.replace(data={"path": str(stories)})
    display = Recorder()
    trainer = Trainer(config, RunFolder(run), display=display)
    trainer.count_floors()
    trainer.begin()
    for _ in range(steps):
        trainer.step()
    trainer.saver.close()
    trainer.prefetch.close()
    return alarms(display)


def test_the_ancestors_fault_rings_in_the_first_tenth(
    tiny, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """fp16 whose gradients are not scaled up. A scale of 2^-8 makes those of 512 tokens as small as those of the ancestor's
    batch of 131,072 are without any."""
    monkeypatch.setattr(
        Runtime, "make_scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=2.0**-8, growth_interval=10**9)
    )
    (said,) = first_steps(tiny, stories, tmp_path / "run", 10, 100, precision="fp16")
    assert said.startswith("alarm at step 8: ") and "too small for fp16" in said and "train.precision=bf16" in said


def test_fp16_with_loss_scaling_does_not_ring(tiny, stories: Path, tmp_path: Path):
    assert first_steps(tiny, stories, tmp_path / "run", 16, 160, precision="fp16") == []


def test_blocks_that_do_not_learn_stand_above_the_bigram(
    tiny, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the ancestor's run came to: embeddings and head learn, the blocks get nothing, and the loss stands."""
    unscaled_norm = Trainer.unscaled_norm

    def starved(self) -> float:
        for parameter in self.model.blocks.parameters():
            parameter.grad.zero_()
        return unscaled_norm(self)

    monkeypatch.setattr(Trainer, "unscaled_norm", starved)
    said = first_steps(tiny, stories, tmp_path / "run", 128, 1280, lr=2e-2)
    assert len(said) == 2 and "100% of the gradient" in said[0]
    assert said[1].startswith("alarm at step 128: after 10% of the run the loss stands at ")


def test_a_healthy_run_does_not_ring(tiny, stories: Path, tmp_path: Path):
    assert first_steps(tiny, stories, tmp_path / "run", 128, 1280) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "laptop", "smalllm-20m", "smolergpt-12m"])
def test_recipes_scaled_down_do_not_ring(recipe: str, stories: Path, tmp_path: Path):
    shape = [
        "model.layers=2",
        "model.width=64",
        "model.heads=2",
        "model.context=128",
        "model.vocab_size=512",
        "train.minutes=0",
    ]
    length = ["train.steps=640", "optim.warmup_steps=20", "train.batch_tokens=1024", "train.evaluate_every=640"]
    rest = [f"data.path={stories}", "train.device=cpu", "train.patience=0", "train.sample_tokens=0"]
    mlp = ["model.mlp_width=256"] if recipe == "smalllm-20m" else []
    display = Recorder()
    train(load_recipe(recipe, [*shape, *length, *rest, *mlp]), tmp_path / "run", display=display)
    assert alarms(display) == []


# ── floors that are beaten ──


def easy(*nats: float) -> Floors:
    """Floors of so many nats for each of 1,000 documents of 100 tokens and 400 bytes."""
    named = zip(("unigram", "bigram", "5-gram"), nats, strict=True)
    return Floors(
        train_tokens=2_000_000, whole=False, tokens=[100] * 1000, bytes=[400] * 1000,
        nats={name: [n] * 1000 for name, n in named},
    )  # fmt: skip


def test_the_best_floor_that_is_beaten_is_said_once_also_across_a_resume(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(trainer_module, "floors", lambda dataset: easy(9e4, 8e4, 1e-3))
    display = Recorder()
    train(tiny(train={"steps": 8}), tmp_path / "run", display=display)
    train(tiny(train={"steps": 12}), tmp_path / "run", display=display)
    better = [note for note in display.notes if note.startswith("now better")]
    bits = 8e4 / math.log(2) / 400
    assert better == [f"now better than a bigram of 2.0M training tokens ({bits:.2f} bits per byte)"]
    state = RunFolder(tmp_path / "run").choose("latest").state()["training"]
    assert state["beaten"] == "bigram" and [floor["name"] for floor in state["floors"]] == [
        "unigram",
        "bigram",
        "5-gram",
    ]


def test_floors_change_no_bit_of_a_run(tiny, tmp_path: Path, monkeypatch):
    """With floors far away, near, and none at all the weights are the same."""
    weights = []
    for name, found in (("a", easy(9e4, 8e4, 7e4)), ("b", easy(3e-3, 2e-3, 1e-3)), ("c", None)):
        monkeypatch.setattr(trainer_module, "floors", lambda dataset, found=found: found)
        train(tiny(), tmp_path / name)
        weights.append(RunFolder(tmp_path / name).choose("latest").read("model.safetensors"))
    assert weights[0] == weights[1] == weights[2]


def test_floors_are_those_of_the_documents_that_are_scored(tiny, tmp_path: Path):
    trainer = Trainer(tiny(), RunFolder(tmp_path / "run"))
    trainer.count_floors()
    trainer.begin()
    trainer.validate()
    documents = len(trainer._validation_documents())
    assert documents < trainer.dataset.valid.documents and trainer.floors is not None
    assert trainer.state.floors == [vars(floor) for floor in trainer.floors.on(documents)]
    trainer.saver.close()
    trainer.prefetch.close()
