"""How the cost of training grows with context, vocabulary and parameters: SmallLM's own step, a point at a time.

    uv run python benchmarks/cost_growth.py --json cost_growth.json --png docs/cost_growth.png

Every point is a `smalllm bench train` of its own process, so that memory and compiled code of one point do not reach the
next, and MFU is against a peak measured between the steps of that very point. What is equal for all points: one optimizer
step over one micro-batch of 4,096 tokens. A longer context has fewer rows in it, so its head and MLP have as much to do as
those of a short one, and only attention grows. The shape is that of smalllm-20m, except for what varies; models that grow
have a vocabulary of 4,096, or the small ones would be little but embedding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator
from train_throughput import run

from smalllm.config import RunConfig, UserError, load_recipe
from smalllm.model import GPT

CONTEXTS = (128, 256, 512, 1024, 2048)
VOCABULARIES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
SIZES = ("6x128", "6x256", "8x384", "10x512", "12x640", "16x768")  # 2 M to 117 M parameters
SIZES_VOCABULARY, HEAD_WIDTH = 4_096, 64
INK, GRID, SPEED, MFU = "#1f2933", "#e4e7eb", "#2563eb", "#d97706"


@dataclass(frozen=True)
class Point:
    """One measurement to make: where it stands in which panel, and the settings that make it."""

    panel: str
    recipe: str
    overrides: tuple[str, ...]

    def config(self) -> RunConfig:
        return load_recipe(self.recipe, self.overrides)

    def parameters(self) -> int:
        with torch.device("meta"):
            return GPT(self.config().model).parameters_count()

    def place(self) -> int:
        """Where on the axis of its panel."""
        model = self.config().model
        return {"context": model.context, "vocabulary": model.vocab_size, "parameters": self.parameters()}[self.panel]


def points(options: argparse.Namespace) -> Iterator[Point]:
    """Everything that was asked for, in the order of the panels."""
    base = load_recipe(options.base)
    vocabulary = f"model.vocab_size={base.model.vocab_size or base.data.vocab_size}"
    for context in options.contexts:
        yield Point("context", options.base, (vocabulary, *step_of(options.tokens, context)))
    for size in options.vocabularies:
        yield Point(
            "vocabulary", options.base, (f"model.vocab_size={size}", *step_of(options.tokens, base.model.context))
        )
    for size in options.sizes:
        yield Point("parameters", options.base, (*shape_of(size), *step_of(options.tokens, base.model.context)))


def step_of(tokens: int, context: int) -> tuple[str, ...]:
    """A step of one micro-batch of so many tokens."""
    if tokens % context:
        raise UserError(f"--tokens {tokens} must be a multiple of the context {context}")
    return (f"model.context={context}", f"train.batch_tokens={tokens}", f"train.micro_batch={tokens // context}")


def shape_of(size: str) -> tuple[str, ...]:
    """``8x384`` is 8 layers of width 384, with heads 64 wide and an MLP of 4 x width."""
    layers, _, width = size.partition("x")
    if not (layers.isdigit() and width.isdigit()):
        raise UserError(f"--sizes {size}: write LAYERSxWIDTH, for example 8x384")
    heads = max(1, int(width) // HEAD_WIDTH)
    return (f"model.layers={layers}", f"model.width={width}", f"model.heads={heads}", f"model.mlp_width={4 * int(width)}",
            f"model.vocab_size={SIZES_VOCABULARY}")  # fmt: skip


def measure(point: Point, seconds: float) -> dict[str, Any]:
    """The figures of `smalllm bench train` at this point, and where it stands."""
    command = [sys.executable, "-m", "smalllm", "bench", "train", point.recipe, *point.overrides]
    done = subprocess.run([*command, "--seconds", f"{seconds:g}", "--json"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(point.overrides)}: {done.stderr.strip().splitlines()[-1]}")
    model = point.config().model
    return {
        **asdict(point), "place": point.place(), "context": model.context, "vocabulary": model.vocab_size,
        "layers": model.layers, "width": model.width, "parameters": point.parameters(), **json.loads(done.stdout),
    }  # fmt: skip


HEADER = """\
| varies | context | vocabulary | layers x width | parameters | MFLOP a token | tokens/s | MFU | memory |
|---|---|---|---|---|---|---|---|---|"""


def row(figures: dict[str, Any]) -> str:
    """A line of the table."""
    return (
        f"| {figures['panel']} | {figures['context']:,} | {figures['vocabulary']:,}"
        f" | {figures['layers']} x {figures['width']} | {figures['parameters'] / 1e6:.1f} M"
        f" | {figures['flops_per_token'] / 1e6:.0f} | {figures['tokens_per_second']:,.0f} | {figures['mfu']:.1%}"
        f" | {figures['memory_bytes'] / 2**30:.2f} GiB |"
    )


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """A panel for each thing that varies: tokens per second on the left, MFU on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(figures["panel"] for figures in results))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), dpi=120, layout="constrained", squeeze=False
    )
    for here, panel in zip(axes[0], panels, strict=True):
        draw_panel(here, panel, [figures for figures in results if figures["panel"] == panel])
    figure.savefig(file)
    pyplot.close(figure)


def draw_panel(axes: Any, panel: str, results: Sequence[dict[str, Any]]) -> None:
    """Speed and MFU over what varies. Speed falls a hundredfold as parameters grow, which only a logarithmic axis shows."""
    places = [figures["place"] for figures in results]
    right = axes.twinx()
    for side, key, colour, label in ((axes, "tokens_per_second", SPEED, "tokens/s"), (right, "mfu", MFU, "MFU")):
        values = [figures[key] for figures in results]
        side.plot(places, values, color=colour, marker="o", markersize=3.5, linewidth=1.4)
        side.set_ylabel(label, color=colour, fontsize=9)
        side.tick_params(labelsize=8, colors=INK)
        side.spines["top"].set_visible(False)
    axes.set_title(f"over {panel}", fontsize=10, loc="left", color=INK)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [shown(place) for place in places])
    axes.set_xticks([], minor=True)
    axes.grid(color=GRID)
    if panel == "parameters":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.set_yticks([], minor=True)
    else:
        axes.set_ylim(0)
    axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:,.0f}")
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def shown(place: int) -> str:
    """A number short enough for an axis.

    >>> shown(2048), shown(16_000), shown(20_340_480)
    ('2048', '16k', '20M')
    """
    return f"{place / 1e6:.0f}M" if place >= 1e6 else f"{place / 1e3:.0f}k" if place >= 1e4 else str(place)


def parser() -> argparse.ArgumentParser:
    """The options; an empty list leaves a panel out."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS, help=f"default: {CONTEXTS}")
    found.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES, help=f"default: {VOCABULARIES}")
    found.add_argument("--sizes", nargs="*", default=SIZES, metavar="LAYERSxWIDTH", help=f"default: {' '.join(SIZES)}")
    found.add_argument(
        "--base", default="smalllm-20m", metavar="RECIPE", help="what does not vary; default smalllm-20m"
    )
    found.add_argument("--tokens", type=int, default=4096, help="of a micro-batch, which is a step; default 4096")
    found.add_argument("--seconds", type=float, default=15.0, help="of measuring at each point; default 15")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    found.add_argument("--png", type=Path, metavar="FILE", help="draw the panels there")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, printing each row when it is known; then the files."""
    options = parser().parse_args(arguments)
    wanted, results = list(points(options)), []
    for point in wanted:
        point.config()  # a mistake shows now and not after an hour
    print(HEADER, flush=True)
    for point in wanted:
        results.append(measure(point, options.seconds))
        print(row(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.png and results:
        draw(results, options.png)
    return 0


if __name__ == "__main__":
    run(main)
