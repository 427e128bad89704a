"""llama.cpp as a reader of GGUF files that knows nothing of ours: what it computes, says and how it cuts text.

It comes with xllamacpp, where that is installed; it is not needed to export. Cache and attention are in float32, so that
what differs comes from the file, and from llama.cpp's GELU, which is a table of float16 values (ggml-cpu/vec.h).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import signal
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalllm.config import UserError
from smalllm.export import gguf
from smalllm.tokenizer import BOS

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 600.0  # seconds for one answer


def installed() -> bool:
    """Is there an xllamacpp?"""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A file in llama.cpp, until `close` or the end of a ``with``; UserError for one that it does not load.

    `logits` are its states before the head times the file's head in float32, all positions at once. It tells what it
    makes of the head itself at one position at a time: `log_probabilities`, and what it says: `greedy`. With several
    threads its short computations wait for each other, and on a busy machine for seconds.
    """

    reader = "xllamacpp"

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        model, _ = gguf.read(path)
        self.context, self.vocab_size, self._head = model.config.context, model.config.vocab_size, model.head.weight
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with _own_signals():
            self._server = _server(path, self.context, threads)
            self._address: str = self._server.listening_address
            self.greedy([BOS], 1)  # until it answers, it may still take the signals

    def close(self) -> None:
        self._server = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V], float32."""
        answer = self._ask("embedding", {"content": list(ids)})
        return torch.tensor(answer[0]["embedding"]) @ self._head.T

    def log_probabilities(self, ids: Sequence[int], likeliest: int | None = None) -> Tensor:
        """Of the token after ids [V], float32, as llama.cpp's own head and softmax make them; of so many, the others -inf.
        It tells none where it would end the text or begin a character, so it is made to say a letter: that changes what is
        chosen, not these."""
        letter = {"n_probs": likeliest or self.vocab_size, "logit_bias": [[self.encode("a")[0], 1e4]]}
        answer = self._ask("completion", {**_greedy(ids, 1), **letter})
        found = torch.full((self.vocab_size,), -math.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def greedy(self, ids: Sequence[int], tokens: int, forbidden: Sequence[int] = ()) -> list[int]:
        """The likeliest continuation, so many tokens or up to the end of text, which is left out."""
        bias = [[id, False] for id in forbidden]
        answer = self._ask("completion", {**_greedy(ids, tokens), "logit_bias": bias})
        return list(answer["tokens"])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special words in it as text."""
        asked = {"content": text, "add_special": False, "parse_special": False}
        return list(self._ask("tokenize", asked)["tokens"])

    def template(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the file's template writes it, up to where the model answers."""
        return str(self._ask("apply-template", {"messages": list(messages)})["prompt"])

    def _ask(self, route: str, question: dict[str, Any]) -> Any:
        data, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._address}/{route}", data, kind)
        with self._opener.open(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())


def _greedy(ids: Sequence[int], tokens: int) -> dict[str, Any]:
    return {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": True}


def _server(path: Path, context: int, threads: int) -> Any:
    """llama.cpp's server in this process, on a free port of this machine alone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = str(path), 0  # any free one; its address is 127.0.0.1 unless told otherwise
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_parallel, params.warmup, params.verbosity, params.cache_ram_mib = 1, False, -1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise UserError(f"llama.cpp does not load {path} ({error}); export it again") from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ctrl-C stays Python's: llama.cpp takes it when it starts."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                with contextlib.suppress(TypeError):  # one that Python did not set
                    signal.signal(number, handler)
