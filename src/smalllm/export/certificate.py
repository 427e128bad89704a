"""The proof of an export: read back, does it compute what the model computes?

An independent reader is asked where one is installed: transformers for a Hugging Face folder, llama.cpp (xllamacpp) for
GGUF; else our own. This module alone imports them, when it is asked to. Both models get the same ids, so that one pass over
each gives all figures:

    max_logit_difference      the greatest difference of any logit
    token_agreement           over 20 prompts, the share of our greedy tokens that it would choose as well, given those before;
                              1.0 means that its own greedy text is the same
    bits_per_byte_difference  of the same documents, without sign
    tokenizer_agreement       the share of 1,000 hard strings with equal ids; null where a format cannot encode
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from smalllm.checkpoint import LoadedRun
from smalllm.config import UserError
from smalllm.evaluation import windows
from smalllm.model import GPT, KVCache
from smalllm.tokenizer import SPACE_MARK, Tokenizer

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 20, 8, 32
TEXT_TOKENS = 4096  # of documents that are scored
STRINGS = 1000


class Exported(Protocol):
    """An export as someone else reads it. What can encode has ``encode(text) -> list[int]`` too."""

    reader: str

    def logits(self, ids: list[int]) -> Tensor:
        """float32 [T, V] of ids [T], each of which sees those before it."""


@dataclass(frozen=True)
class Tolerance:
    """How much an export may differ: of the logits as a share of the largest, of bits per byte as a share of them."""

    logits: float
    tokens: float
    bits: float


TOLERANCES = {
    "f32": Tolerance(logits=1e-4, tokens=0.995, bits=1e-5),
    "f16": Tolerance(logits=0.01, tokens=0.97, bits=0.001),
    "bf16": Tolerance(logits=0.08, tokens=0.85, bits=0.01),
    "int8": Tolerance(logits=0.08, tokens=0.85, bits=0.005),
    "q8_0": Tolerance(logits=0.08, tokens=0.85, bits=0.005),
}
"""By dtype. Between float16 and these lies what rounding of weights does to random models (docs/export.md)."""
COARSE = {("xllamacpp", "starcoder2"): 2e-3, ("xllamacpp", "gpt2"): 2e-3}
"""A share of the largest logit that a reader may always differ by: llama.cpp looks GELU up in a table of float16 values."""


# ── readers ──


class OwnReader:
    """Our own reading of an export."""

    reader = "smalllm"

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model, self.encode = model.eval(), tokenizer.encode

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids], device=self.model.embedding.weight.device))[0].float().cpu()


class TransformersReader:
    """A Hugging Face folder as transformers reads it, in float32. Nothing is looked for on a network."""

    reader = "transformers"

    def __init__(self, path: Path, turns: bool) -> None:
        import transformers

        quiet = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(path), dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        finally:
            transformers.logging.set_verbosity(quiet)
        model, report = loaded
        if wrong := sorted([*report["missing_keys"], *report["unexpected_keys"]]):
            raise UserError(f"transformers does not know what to do about {wrong[0]}; report this with its version")
        self.model = model.eval()
        self.options = {"split_special_tokens": True} if turns else {}

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids])).logits[0].float()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; of user's text where the vocabulary has turn markers (see `fast_tokenizer`)."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **self.options)["input_ids"])


def installed(reader: str) -> bool:
    """Whether this independent reader can be imported here."""
    return importlib.util.find_spec(reader) is not None


# ── the comparison ──


def certify(run: LoadedRun, exported: Exported, texts: Sequence[str], dtype: str, path: Path) -> dict[str, Any]:
    """The certificate of an export of a run, with bits per byte on these documents."""
    documents = _documents(run, texts)
    answers = _answers(run, [id for ids in documents for id in ids])
    agreed, worst = _agreement(run, exported, answers)
    bits, worst_bits, difference = _bits(run, exported, documents)
    return {
        "path": str(path),
        "architecture": run.model.config.architecture,
        "dtype": dtype,
        "reader": exported.reader,
        "max_logit_difference": max(worst, worst_bits),
        "largest_logit": _largest(run, answers),
        "token_agreement": agreed,
        "bits_per_byte": bits,
        "bits_per_byte_difference": difference,
        "tokenizer_agreement": tokenizer_agreement(run.tokenizer, exported),
        "step": run.step,
        "fingerprint": run.tokenizer.fingerprint,
    }


def faults(certificate: dict[str, Any]) -> list[str]:
    """What is wrong with an export, in words; nothing for one that can be trusted."""
    limit = TOLERANCES[certificate["dtype"]]
    logits = max(limit.logits, COARSE.get((certificate["reader"], certificate["architecture"]), 0.0))
    scale, bits = max(1.0, certificate["largest_logit"]), certificate["bits_per_byte"]
    told = {
        "logits differ by": (certificate["max_logit_difference"], logits * scale),
        "bits per byte differ by": (certificate["bits_per_byte_difference"], limit.bits * bits + 1e-6),
        "greedy tokens disagree in a share of": (1.0 - certificate["token_agreement"], 1.0 - limit.tokens),
        "tokenizers disagree in a share of": (1.0 - (certificate["tokenizer_agreement"] or 1.0), 0.0),
    }
    if certificate["tokenizer_agreement"] == 0.0:
        told["tokenizers disagree in a share of"] = (1.0, 0.0)
    return [f"{what} {value:.3g}, more than {most:.3g}" for what, (value, most) in told.items() if not value <= most]


def _documents(run: LoadedRun, texts: Sequence[str]) -> list[list[int]]:
    """Documents as ids, begin to end, until they are enough; the last one is cut."""
    found: list[list[int]] = []
    left = TEXT_TOKENS
    for text in texts:
        if left > 0 and text:
            found.append(run.tokenizer.encode_document(text[: 16 * left])[:left])
            left -= len(found[-1])
    if not found:
        raise UserError("there is no text to compare on; give --text FILE with some")
    return found


@torch.inference_mode()
def _answers(run: LoadedRun, stream: list[int]) -> Tensor:
    """Beginnings from a text with what the model continues them with greedily: ids [PROMPTS, T]."""
    context = run.model.config.context
    size = max(1, min(PROMPT_TOKENS, context // 2))
    stream = stream * math.ceil(PROMPTS * size / len(stream))
    starts = [index * (len(stream) - size) // PROMPTS for index in range(PROMPTS)]
    prompts = [[run.tokenizer.bos_id, *stream[start : start + size]][:size] for start in starts]
    device = run.model.embedding.weight.device
    ids = torch.tensor(prompts, device=device)
    cache = KVCache(run.model.config, PROMPTS, device=device)
    read = ids
    for _ in range(min(ANSWER_TOKENS, context - size)):
        read = run.model(read, cache)[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, read], dim=1)
    return ids.cpu()


def _agreement(run: LoadedRun, exported: Exported, answers: Tensor) -> tuple[float, float]:
    """The share of greedy tokens that it would choose too, and the greatest difference of a logit on the way."""
    begin, equal, worst = max(1, min(PROMPT_TOKENS, run.model.config.context // 2)), [], 0.0
    for row in answers.tolist():
        ours, theirs = _both(run, exported, row[:-1])
        worst = max(worst, _difference(ours, theirs))
        equal += (theirs.argmax(dim=-1) == torch.tensor(row[1:]))[begin - 1 :].tolist()
    return sum(equal) / max(1, len(equal)), worst


def _bits(run: LoadedRun, exported: Exported, documents: Sequence[list[int]]) -> tuple[float, float, float]:
    """Our bits per byte on documents, the greatest difference of a logit, and that of the bits per byte."""
    ours_nats = theirs_nats = worst = 0.0
    size = sum(len(run.tokenizer.bytes_of(id)) for ids in documents for id in ids)
    for ids in documents:
        for start, end, scored in windows(len(ids), run.model.config.context):
            wanted = torch.tensor(ids[scored : end + 1])
            ours, theirs = _both(run, exported, ids[start:end])
            worst = max(worst, _difference(ours, theirs))
            ours_nats += float(F.cross_entropy(ours[scored - start - 1 :].double(), wanted, reduction="sum"))
            theirs_nats += float(F.cross_entropy(theirs[scored - start - 1 :].double(), wanted, reduction="sum"))
    per_byte = 1.0 / (math.log(2) * max(1, size))
    return ours_nats * per_byte, worst, abs(ours_nats - theirs_nats) * per_byte


@torch.inference_mode()
def _both(run: LoadedRun, exported: Exported, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of our model and of the export; UserError when the export's have another shape."""
    device = run.model.embedding.weight.device
    ours = run.model(torch.tensor([ids], device=device))[0].float().cpu()
    theirs = exported.logits(ids)
    if theirs.shape != ours.shape:
        raise UserError(
            f"{exported.reader} gives logits of shape {list(theirs.shape)} for {list(ours.shape)} of the model"
        )
    return ours, theirs.float()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference; infinite where the export has NaN."""
    return float((ours - theirs).abs().nan_to_num(nan=math.inf, posinf=math.inf).max())


@torch.inference_mode()
def _largest(run: LoadedRun, answers: Tensor) -> float:
    return float(run.model(answers[:4].to(run.model.embedding.weight.device)).abs().max())


# ── strings ──

FRAGMENTS = (
    "</s>", "<s>", "<unk>", "<0x41>", "<0x0A>", "<|user|>", "<|end|>", "<|endoftext|>", SPACE_MARK, " ", "  ", "   ", "\n",
    "\n\n", "\r\n", "\t", "\0", "1234567890", "3.14", "the", " the", "Once upon a time", "é", "e\u0301", "ﬁ", "日本語", "Ωμέγα",
    "🙂", "👩\u200d👩\u200d👧", "\u200d", "\ufeff", "\ufffd", "\u2028", "\u00a0", "\u3000", "\x7f", "\x85", "\U0010ffff", "aaaaaaaaa",
    "\\n", "'s", "—", "\u202e", "x" * 40,
)  # fmt: skip

CONFUSED = {"xllamacpp": SPACE_MARK}
"""A character that a reader takes for another one, known and told in docs/export.md; strings without it are compared."""


def strings(count: int = STRINGS, seed: int = 0) -> Iterator[str]:
    """Texts that tokenizers stumble over: special tokens as words, spaces of all kinds, emoji, digits, any character."""
    draw = random.Random(seed)
    for _ in range(count):
        parts = (draw.choice(FRAGMENTS) if draw.random() < 0.8 else _character(draw) for _ in range(draw.randrange(12)))
        yield "".join(parts)


def tokenizer_agreement(tokenizer: Tokenizer, exported: Exported) -> float | None:
    """The share of `strings` that an export encodes as we do; None where it cannot encode."""
    encode = getattr(exported, "encode", None)
    if encode is None:
        return None
    confused = CONFUSED.get(exported.reader, "\0\0")
    equal = [encode(text) == tokenizer.encode(text) for text in strings() if confused not in text]
    return sum(equal) / len(equal)


def _character(draw: random.Random) -> str:
    """ASCII, the first alphabets, or anything but surrogates."""
    first, last = draw.choice(((0x20, 0x7E), (0xA0, 0x5FF), (0xE000, 0x1FAFF)))
    return chr(draw.randint(first, last))
