"""Tiny things that many tests share: a corpus, its dataset, settings of a run that takes a fraction of a second."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smalllm.config import RunConfig, parse_config
from smalllm.data.prepare import prepare
from smalllm.native import build

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup does
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # two test processes share two cores, and bits depend on the number of threads


@pytest.fixture(scope="session")
def native() -> None:
    """Skips a test that needs native code where there is none: no compiler, not Linux, or switched off."""
    try:
        for name in ("kernels", "words", "suffixes", "decode"):
            build.load(name)
    except build.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared storyworld stories: 300 documents, 512 pieces."""
    folder = tmp_path_factory.mktemp("data") / "stories"
    prepare(["storyworld:300"], folder, vocab_size=512, seed=1)
    return folder


def tiny_settings(data: Path, **sections: dict) -> RunConfig:
    """A run of 12 steps of 2 x 32 wide; ``model={"layers": 3}`` changes single keys."""
    settings: dict = {
        "name": "tiny", "seed": 7,
        "data": {"path": str(data)},
        "model": {"layers": 2, "width": 32, "heads": 2, "context": 32},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "train": {
            "steps": 12, "batch_tokens": 256, "micro_batch": 8, "precision": "fp32", "compile": "off", "device": "cpu",
            "log_every": 1, "evaluate_every": 4, "evaluate_tokens": 500, "sample_tokens": 5, "preflight": False,
        },
    }  # fmt: skip
    for section, values in sections.items():
        settings[section] = {**settings[section], **values}
    return parse_config(settings)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Until it holds; AssertionError when it does not in time."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def tiny(dataset_folder: Path):
    """``tiny(train={"steps": 5})``: settings of a tiny run."""
    return lambda **sections: tiny_settings(dataset_folder, **sections)
