"""How fast a corpus is encoded: SentencePiece on N threads, and the memory of words that `smalllm prepare` uses.

    uv run python benchmarks/prepare_encode.py stories.txt --threads 2

The ways take turns, and the table shows medians in MB of UTF-8 text a second. "first" begins with an empty memory, as
`prepare` does; "again" knows every word already, as in the later parts of a large corpus. Neither has the compilation of
the C++, some half a second, once in a home folder. All ids are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from smalllm.data.prepare import BATCH_BYTES
from smalllm.data.sources import documents
from smalllm.tokenizer import BOS, EOS, Tokenizer

Encode = Callable[[], Sequence[Sequence[int]] | np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a source of documents, as for `smalllm prepare`")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    texts = list(documents(options.text))
    tokenizer = Tokenizer.train(texts, options.vocab_size)
    if tokenizer._word_encoder is None:
        raise SystemExit("there is no C++ compiler here, so there is nothing to compare")
    ways = ways_to_encode(tokenizer, texts, options.threads, options.repeats + 1)
    seconds = measure(ways, options.repeats)
    size = sum(len(text.encode()) for text in texts)
    result = {
        "text": Path(options.text).name, "bytes": size, "documents": len(texts), "vocab_size": options.vocab_size,
        "threads": options.threads, "repeats": options.repeats, "machine": platform.processor() or platform.machine(),
        "seconds": seconds, "ids": "equal",
    }  # fmt: skip
    print(f"{size / 1e6:.1f} MB, {len(texts):,} documents, {options.vocab_size:,} pieces, {options.threads} threads")
    print_table(seconds, size)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def ways_to_encode(tokenizer: Tokenizer, texts: list[str], threads: int, times: int) -> dict[str, Encode]:
    """Each way encodes everything, so many times."""
    fresh = [Tokenizer(tokenizer.model_bytes) for _ in range(times)]
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    batches = in_batches([text.encode() for text in texts])
    return {
        "SentencePiece": lambda: processor.encode(texts, num_threads=threads),
        "words, first": lambda: encode(fresh.pop(), batches, threads),
        "words, again": lambda: encode(tokenizer, batches, threads),
    }


def in_batches(texts: list[bytes]) -> list[list[bytes]]:
    """Batches of the size that `prepare` takes."""
    numbers = np.cumsum([0, *map(len, texts[:-1])]) // BATCH_BYTES
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return [texts[start:end] for start, end in zip(starts, [*starts[1:], len(texts)], strict=True)]


def encode(tokenizer: Tokenizer, batches: list[list[bytes]], threads: int) -> np.ndarray:
    """(ids,) int32 of all documents, begin and end included."""
    return np.concatenate([tokenizer.encode_documents(batch, threads)[0] for batch in batches])


def measure(ways: dict[str, Encode], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition of each way; SystemExit if their ids differ."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = None
    for _ in range(repeats + 1):  # the first one warms up
        for name, way in ways.items():
            start = time.perf_counter()
            ids = way()
            seconds[name].append(time.perf_counter() - start)
            if not isinstance(ids, np.ndarray):
                ids = np.array([id for document in ids for id in (BOS, *document, EOS)], np.int32)
            expected = ids if expected is None else expected
            if not np.array_equal(ids, expected):
                raise SystemExit(f"{name} gives other ids")
    return {name: values[1:] for name, values in seconds.items()}


def print_table(seconds: dict[str, list[float]], size: int) -> None:
    """One line for each way, compared with the first."""
    base = statistics.median(next(iter(seconds.values())))
    print(f"{'':14} {'median':>8} {'slowest':>9} {'fastest':>9}   times SentencePiece")
    for name, values in seconds.items():
        middle, slowest, fastest = (
            size / 1e6 / value for value in (statistics.median(values), max(values), min(values))
        )
        print(f"{name:14} {middle:8.1f} {slowest:9.1f} {fastest:9.1f} MB/s {base / statistics.median(values):6.1f}")
    print("all ids are equal")


if __name__ == "__main__":
    main()
