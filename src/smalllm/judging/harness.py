"""A run as a model of the LM Evaluation Harness (https://github.com/EleutherAI/lm-evaluation-harness), package ``lm-eval``.

    python -m smalllm.judging.harness run --model smalllm --model_args run=runs/quickstart --tasks blimp

is lm-eval's own command line, with a model ``smalllm`` more. The package is optional and imported only there; `Answers` does
the work without it, for anything that has ``args``. Texts are cut into tokens and windows as lm-eval does for models of
transformers, so that figures compare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from smalllm.checkpoint import LoadedRun, open_run
from smalllm.config import UserError
from smalllm.generation import Generator, SamplingParams
from smalllm.hardware import pick_device
from smalllm.model import GPT

BATCH_TOKENS = 4096  # positions of a forward pass, padding included
LOGITS_AT_ONCE = 1 << 23
ANSWER_TOKENS = 256  # lm-eval's own default
MISSING = "lm-eval is not installed; install it with: uv sync --extra eval"


class Request(Protocol):
    """What lm-eval calls an Instance."""

    @property
    def args(self) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Span:
    """Ids of which those from place ``first`` on are to be predicted, from all before them: at most context + 1 ids."""

    ids: Sequence[int]
    first: int


class Answers:
    """The three questions of the harness, answered by a run."""

    def __init__(self, run: LoadedRun) -> None:
        self.run, self.model, self.tokenizer = run, run.model, run.tokenizer

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln p of the continuation, and whether greedy decoding would say it. A context
        that is too long loses its beginning."""
        spans = [self._continuation(*request.args) for request in requests]
        return self._summed([list(split(span, self.model.config.context)) for span in spans])

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): ln p of all its tokens after the begin token; the end-of-text token is not one of them."""
        bos, context = self.tokenizer.bos_id, self.model.config.context
        spans = [Span([bos, *self.tokenizer.encode(request.args[0])], 1) for request in requests]
        return [total for total, _ in self._summed([list(split(span, context)) for span in spans])]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): what follows, up to the first of ``until``; greedy unless ``do_sample`` is set."""
        wishes = [sampling(request.args[1]) for request in requests]
        alike: dict[str, list[int]] = defaultdict(list)
        for place, wish in enumerate(wishes):
            alike[repr(wish)].append(place)
        texts = [""] * len(requests)
        on_cpu = self.model.embedding.weight.device.type == "cpu"
        generator = Generator(self.model, self.tokenizer, "fp32" if on_cpu else "auto")  # as the scores: not rounded
        for places in alike.values():
            told = generator.batch([requests[place].args[0] for place in places], wishes[places[0]])
            for place, completion in zip(places, told, strict=True):
                texts[place] = completion.text
        return texts

    def _continuation(self, context: str, continuation: str) -> Span:
        """Spaces at the end of a context belong to what follows; the two are cut into tokens together."""
        given = context.rstrip()
        whole = self.tokenizer.encode(given + context[len(given) :] + continuation)
        return Span([self.tokenizer.bos_id, *whole], 1 + len(self.tokenizer.encode(given)))

    def _summed(self, spans: Sequence[Sequence[Span]]) -> list[tuple[float, bool]]:
        """Sum of ln p, and whether all were the likeliest ones, over the spans of each request."""
        flat = [(place, span) for place, parts in enumerate(spans) for span in parts]
        totals, greedy = np.zeros(len(spans)), np.ones(len(spans), bool)
        for batch in _batches(flat):
            for (place, _), (total, likeliest) in zip(
                batch, scored(self.model, [span for _, span in batch]), strict=True
            ):
                totals[place] += total
                greedy[place] &= likeliest
        return [(float(total), bool(all_)) for total, all_ in zip(totals, greedy, strict=True)]


def split(span: Span, context: int) -> Iterator[Span]:
    """Parts of at most ``context`` predictions from at most ``context`` ids, each prediction once, with all the ids before it
    that fit.

    >>> [(list(part.ids), part.first) for part in split(Span(range(8), 1), context=3)]
    [([0, 1, 2, 3], 1), ([3, 4, 5, 6], 1), ([4, 5, 6, 7], 3)]
    """
    for first in range(span.first, len(span.ids), context):
        end = min(first + context, len(span.ids))
        start = max(0, end - 1 - context)
        yield Span(span.ids[start:end], first - start)


@torch.inference_mode()
def scored(model: GPT, spans: Sequence[Span]) -> list[tuple[float, bool]]:
    """For each span the sum of ln p of its predicted ids, and whether each was the likeliest; all read at once."""
    longest = max(len(span.ids) for span in spans) - 1
    ids, targets = np.zeros((len(spans), longest), np.int64), np.full((len(spans), longest), -1, np.int64)
    for row, span in enumerate(spans):
        ids[row, : len(span.ids) - 1] = span.ids[:-1]
        targets[row, span.first - 1 : len(span.ids) - 1] = span.ids[span.first :]
    device = model.embedding.weight.device
    wanted = torch.from_numpy(targets).to(device)
    counted = wanted >= 0
    hidden = model.hidden(torch.from_numpy(ids).to(device))[counted]
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    losses, right = torch.zeros(wanted.shape, device=device), torch.ones(wanted.shape, dtype=torch.bool, device=device)
    logits = [
        (model.head(some).float(), some_ids)
        for some, some_ids in zip(hidden.split(at_once), wanted[counted].split(at_once), strict=True)
    ]
    losses[counted] = torch.cat([F.cross_entropy(some, some_ids, reduction="none") for some, some_ids in logits])
    right[counted] = torch.cat([some.argmax(-1) == some_ids for some, some_ids in logits])
    return list(zip((-losses.double().sum(1)).tolist(), right.all(1).tolist(), strict=True))


def sampling(settings: Mapping[str, Any]) -> SamplingParams:
    """lm-eval's settings of a generation as ours."""
    until = settings.get("until") or ()
    return SamplingParams(
        max_tokens=int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or ANSWER_TOKENS),
        temperature=float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0,
        top_p=settings.get("top_p") if settings.get("do_sample") else None,
        stop=(until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
        seed=0,
    )


def _batches(work: Sequence[tuple[int, Span]]) -> Iterator[list[tuple[int, Span]]]:
    """Spans with the place of their request, the longest first, in groups of at most ``BATCH_TOKENS`` padded ids."""
    left = sorted((item for item in work if len(item[1].ids) > 1), key=lambda item: -len(item[1].ids))
    while left:
        rows = max(1, BATCH_TOKENS // len(left[0][1].ids))
        yield left[:rows]
        left = left[rows:]


# ── lm-eval ──


def register() -> type[Any]:
    """Make the model ``smalllm`` known to lm-eval; returns its class. UserError where lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError(MISSING) from None

    class SmallLM(Answers, LM):  # type: ignore[misc]
        """``--model smalllm --model_args run=RUN,checkpoint=best``; ``--device`` is ours, the batch size is our own choice."""

        def __init__(
            self, run: str | None = None, checkpoint: str = "best", device: str | None = None, **_: Any
        ) -> None:
            LM.__init__(self)
            Answers.__init__(self, open_run(run, str(checkpoint), _device(device)))

        @property
        def tokenizer_name(self) -> str:
            return self.tokenizer.fingerprint

    register_model("smalllm")(SmallLM)
    return SmallLM


def _device(wish: str | None) -> torch.device:
    """lm-eval wishes for cuda:0 where the user has wished for nothing."""
    return pick_device("auto" if wish is None or (wish == "cuda:0" and not torch.cuda.is_available()) else wish)


if __name__ == "__main__":
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
