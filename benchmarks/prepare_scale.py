"""What `smalllm prepare` takes as the text grows: time by stage, processor time, memory and disk.

    uv run python benchmarks/prepare_scale.py --stories 20000 200000 800000
    uv run python benchmarks/prepare_scale.py --stories 200000 --parts 2
    uv run python benchmarks/prepare_scale.py --text stories.txt --copies 1 6 36

Every row is a dataset of its own, made by processes of their own, one after the other: a part of it each (--parts), the last
of which also makes one dataset of the parts. The tokenizer, 4,096 pieces of 20,000 stories, is learned before. Seconds are
those of all parts together; memory is the largest of any process. With --text, copies of a file take the place of stories that
are made on the way: the same words come again, and training documents too, but neither generation nor the disk takes time.
Bytes are of UTF-8 text; a megabyte is 10^6. Processor seconds matter where other programs run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smalllm.data.prepare import PrepareProgress, prepare


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stories", type=int, nargs="+", default=[], help="sizes in stories, of 1,044 bytes in the mean"
    )
    parser.add_argument("--text", type=Path, help="a text file to use instead")
    parser.add_argument("--copies", type=int, nargs="+", default=[1], help="how often it comes")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the arguments of one `prepare`, as JSON
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(one(**json.loads(options.child))))
        return
    with tempfile.TemporaryDirectory(dir=".", prefix=".prepare-scale-") as name:
        folder = Path(name)
        learned = folder / "learned"
        prepare([str(options.text or "storyworld:20000")], learned, vocab_size=options.vocab_size, limit=20_000)
        results = []
        print(HEADER)
        for size in options.copies if options.text else options.stories:
            source = copies(options.text, size, folder) if options.text else f"storyworld:{size}"
            results.append(measure(source, folder / "out", learned / "tokenizer.model", options.parts, options.workers))
            print(row(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def copies(text: Path, count: int, folder: Path) -> str:
    """A folder in which a file stands so many times, as links that take no room."""
    found = folder / f"copies-{count}"
    found.mkdir()
    for number in range(count):
        os.symlink(text.resolve(), found / f"{number:06d}{text.suffix}")
    return str(found)


def measure(source: str, out: Path, tokenizer: Path, parts: int, workers: int | None) -> dict[str, Any]:
    """Make a dataset in parts, remove it, and add up what the parts took."""
    found = []
    for number in range(1, parts + 1):
        child = {
            "source": source, "out": str(out), "tokenizer": str(tokenizer), "shard": f"{number}/{parts}", "workers": workers,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(child)], check=True, stdout=subprocess.PIPE, text=True
        )
        found.append(json.loads(done.stdout))
    disk = sum(path.stat().st_size for path in out.iterdir())
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
    last = found[-1]
    return {
        "source": Path(source).name,
        "parts": parts,
        "bytes": last["train_bytes"] + last["valid_bytes"],
        "read_bytes": sum(part["read_bytes"] for part in found),
        "documents": last["train_documents"] + last["valid_documents"],
        "tokens": last["train_tokens"] + last["valid_tokens"],
        "peak_bytes": max(part["peak_bytes"] for part in found),
        "dataset_bytes": disk,
        **{key: round(sum(part[key] for part in found), 1) for key in ("seconds", "cpu", "read", "encode", "merge")},
    }


def one(source: str, out: str, tokenizer: str, shard: str, workers: int | None) -> dict[str, Any]:
    """One `prepare` in this process: what it made and what it took. `read` and `encode` are processor seconds of those
    stages, and `merge` of what comes behind."""
    ends = {"read": 0.0, "encode": 0.0}
    read = 0

    def report(state: PrepareProgress) -> None:
        nonlocal read
        ends[state.stage] = time.process_time()
        if state.stage == "encode":
            read = state.total_bytes or 0

    begin = time.process_time()
    result = prepare([source], Path(out), tokenizer=Path(tokenizer), shard=shard, workers=workers, progress=report)
    end = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    figures = ("train_bytes", "valid_bytes", "train_documents", "valid_documents", "train_tokens", "valid_tokens")
    return {
        **{name: getattr(result, name) for name in (*figures, "seconds")},
        "read_bytes": read,
        "read": ends["read"] - begin,
        "encode": ends["encode"] - ends["read"],
        "merge": end - ends["encode"],
        "cpu": end - begin,
        "peak_bytes": peak,
    }


HEADER = """| text read | kept | documents | tokens | parts | seconds | processor | reading | encoding | memory | dataset |
|---|---|---|---|---|---|---|---|---|---|---|"""


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    megabytes = {name: found[name] / 1e6 for name in ("bytes", "read_bytes", "peak_bytes", "dataset_bytes")}
    rates = (f"{megabytes['read_bytes'] / max(found[stage], 1e-3):.0f} MB/s" for stage in ("read", "encode"))
    cells = (
        f"{megabytes['read_bytes']:,.0f} MB", f"{megabytes['bytes']:,.0f} MB", f"{found['documents']:,}",
        f"{found['tokens']:,}", str(found["parts"]), f"{found['seconds']:.0f}", f"{found['cpu']:.0f} s", *rates,
        f"{megabytes['peak_bytes']:,.0f} MB", f"{megabytes['dataset_bytes']:,.0f} MB",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
