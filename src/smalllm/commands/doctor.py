"""`smalllm doctor`: is this installation whole, is this machine right, how fast is it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smalllm import hardware
from smalllm.config import UserError, load_recipe, recipe_names
from smalllm.native import build
from smalllm.terminal import plain

PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "pydantic", "cyclopts", "rich", "huggingface_hub", "pyarrow",
            "starlette", "uvicorn", "matplotlib", "gguf", "tomli_w")  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    detail: str


def doctor(
    *,
    reliability: Annotated[bool, Parameter(name="--reliability", negative="")] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Check packages, device arithmetic, number formats, disk, recipes, and a tiny training run from text to story.

    Parameters
    ----------
    reliability
        Instead, put the promises of docs/reliability.md to the test on the disk of the current folder, in a minute or
        two: kill runs, crash and break the disk under them, cut its power, damage their files; count what was lost.
    json_output
        Print one JSON object to standard output.
    """
    if reliability:
        return _report(promises_kept(), json_output, "No promise was broken.")
    checks = (packages, device, formats, fused_kernels, disk, recipes, tiny_run)
    found = (finding for examine in checks for finding in _safely(examine))
    return _report(found, json_output, "Everything works. Next: smalllm train")


def _report(found: Iterator[Finding], json_output: bool, well: str) -> int:
    findings = []
    for finding in found:
        findings.append(finding)
        if not json_output:
            print(plain(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<18} {finding.detail}"), flush=True)
    healthy = all(finding.ok for finding in findings)
    if json_output:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
    else:
        print(well if healthy else "Something is wrong; see the lines with FAIL.")
    return 0 if healthy else 1


def _safely(examine: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that breaks is a finding, not the end of the report."""
    try:
        yield from examine()
    except Exception as error:  # whatever is broken here is what the user wants to read
        yield Finding(examine.__name__, False, f"{type(error).__name__}: {error}")


def packages() -> Iterator[Finding]:
    """Every package that a verb may import."""
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        yield Finding("packages", False, f"missing: {', '.join(missing)}; run: uv sync")
    else:
        yield Finding("packages", True, f"{len(PACKAGES)} there, torch {metadata.version('torch')}")


def device() -> Iterator[Finding]:
    """The device that training would take, and whether it computes rightly."""
    chosen = hardware.pick_device()
    errors = hardware.self_test(chosen)
    yield Finding(
        "device", True,
        f"{hardware.device_name(chosen)} ({chosen}), {hardware.total_memory(chosen) / 2**30:.0f} GiB,"
        f" largest arithmetic error {max(errors.values()):.1g}",
    )  # fmt: skip


def formats() -> Iterator[Finding]:
    """Number formats and their measured peaks."""
    import torch

    chosen = hardware.pick_device()
    fast = (
        ", ".join(str(dtype).removeprefix("torch.") for dtype in hardware.fast_dtypes(chosen)) or "none besides float32"
    )
    peaks = {
        name: hardware.peak_flops(chosen, dtype) / 1e9
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    yield Finding(
        "number formats",
        True,
        f"fast: {fast}; " + ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in peaks.items()),
    )


def fused_kernels() -> Iterator[Finding]:
    """Whether the C++ that makes CPUs fast can be built and loaded here."""
    try:
        build.load("kernels")
        detail = f"built with {build.compiler()}"
    except build.Unavailable as error:
        detail = f"none: {error}; training on the CPU works, slower"
    yield Finding("fused CPU kernels", True, detail)


def disk() -> Iterator[Finding]:
    """Room for checkpoints in the current folder."""
    free = shutil.disk_usage(Path.cwd()).free
    writable = os.access(Path.cwd(), os.W_OK)
    detail = (
        f"{free / 2**30:.1f} GiB free here"
        if writable
        else f"{Path.cwd()} cannot be written; change to a folder of yours"
    )
    yield Finding(
        "disk", writable and free > 2**30, detail if free > 2**30 or not writable else f"{detail}: too little to train"
    )


def recipes() -> Iterator[Finding]:
    """Every recipe of the package loads."""
    names = recipe_names()
    for name in names:
        load_recipe(name)
    yield Finding("recipes", True, ", ".join(names))


def tiny_run() -> Iterator[Finding]:
    """From text to a story in a temporary folder: prepare, preflight, a few steps, resume, sample."""
    from smalllm.checkpoint import open_run
    from smalllm.generation import Generator, SamplingParams
    from smalllm.training.trainer import train

    with tempfile.TemporaryDirectory(prefix="smalllm-doctor-") as folder:
        config = load_recipe("quickstart", [
            f"data.path={folder}/data", "data.source=storyworld:200", "data.vocab_size=512", "model.width=32", "model.heads=2",
            "model.layers=2", "model.context=64", "train.minutes=0", "train.steps=8", "train.batch_tokens=256",
            "train.sample_tokens=0", "train.compile=off", "train.precision=fp32",
        ])  # fmt: skip
        first = train(config, Path(folder) / "run")
        second = train(config.replace(train={"steps": 12}), Path(folder) / "run")
        run = open_run(Path(folder) / "run")
        text = Generator(run.model, run.tokenizer).complete("Once", SamplingParams(max_tokens=8, temperature=0)).text
        if second.step != 12 or not text:
            raise UserError("a tiny run did not resume or told nothing")
        yield Finding(
            "tiny run",
            True,
            f"loss {first.valid_loss:.2f} -> {second.valid_loss:.2f}, resumed, told {len(text)} characters",
        )


def promises_kept() -> Iterator[Finding]:
    """The trials of runs and checkpoints, in short, in a folder here: this is the disk that has to keep them."""
    import torch

    from smalllm.reliability import promises, trials

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # children are forked: one thread each, and nothing computed before
    try:
        with tempfile.TemporaryDirectory(prefix=".smalllm-doctor-", dir=Path.cwd()) as folder:
            for trial in promises.TRIALS:
                outcome = trials.run(trial, trials.some(trial, trial.short), Path(folder) / trial.name)
                broken = "".join(
                    f"; case {failure.case}: {failure.message.strip().splitlines()[-1]}"
                    for failure in outcome.failures[:1]
                )
                yield Finding(
                    trial.name,
                    not outcome.failures,
                    f"{outcome.tries:>5} tries, {len(outcome.failures)} failures: {trial.promise}{broken}",
                )
    finally:
        torch.set_num_threads(threads)
