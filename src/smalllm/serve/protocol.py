"""What a client may ask and what it is answered: OpenAI's completions and chat completions as data.

Bytes of a body in, bytes of an answer out; the module knows nothing of sockets, threads or checkpoints. A field that
is not known is refused by its name, and so is one that cannot be honoured: nothing that was asked is ignored in silence.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smalllm.conversation import Message, role_ids
from smalllm.generation import SamplingParams, Token
from smalllm.tokenizer import Tokenizer

MAX_CHOICES, MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS, MAX_BIASES, MAX_MESSAGES = 4, 4, 64, 10, 300, 1024
DEFAULT_TOKENS = 200
DONE = b"data: [DONE]\n\n"


class Refusal(Exception):
    """A request that is answered with an error: one sentence, without paths or tracebacks."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> bytes:
        """The error in OpenAI's shape."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return _json({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})

    def event(self) -> bytes:
        """The error in the middle of a stream."""
        return b"data: " + self.body() + b"\n\n"


# ── requests ──


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """``include_usage``: one more event before the end, with the number of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_Strict):
    """Only text can be had."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Request(_Strict):
    """The fields that completions and chat share. Those without effect are there because clients send them by default,
    with the only values that change nothing."""

    model: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    # beyond OpenAI
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram: Annotated[int, Field(ge=0, le=1024)] | None = None
    # without effect
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def check(self) -> None:
        """Refuse what is well formed and cannot be honoured."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise Refusal(400, f"{name} is not supported here; use repetition_penalty, for example 1.1", param=name)
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options is only for stream = true; leave it out", param="stream_options")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    @abstractmethod
    def top_logprobs_wanted(self) -> int | None:
        """Alternatives to tell beside the log-probability of each token; None: tell neither."""

    @property
    def tokens_wanted(self) -> int:
        return self.max_tokens or DEFAULT_TOKENS

    def params(self, prompt_ids: int, context: int, tokenizer: Tokenizer) -> SamplingParams:
        """How to sample after a prompt of so many ids: ``max_tokens`` is lowered to the room that the context leaves,
        where the answer ends with finish_reason "length". A prompt that leaves no room is refused, never cut. The model
        does not choose who speaks next."""
        if prompt_ids >= context:
            raise too_long(f"has {prompt_ids} tokens", context)
        given = {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "no_repeat_ngram": self.no_repeat_ngram, "stop": self.stop,
            "seed": self.seed,
        }  # fmt: skip
        return SamplingParams(
            max_tokens=min(self.tokens_wanted, context - prompt_ids),
            logprobs=self.top_logprobs_wanted,
            logit_bias=self._biases(tokenizer.vocab_size) | dict.fromkeys(role_ids(tokenizer), -math.inf),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def _biases(self, vocab_size: int) -> dict[int, float]:
        biases = {}
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 9 and int(key) < vocab_size):
                raise Refusal(
                    400, f"logit_bias has the key {key[:20]!r}; use token ids from 0 to {vocab_size - 1}", param="logit_bias"
                )  # fmt: skip
            biases[int(key)] = bias
        return biases


Ids = list[Annotated[int, Field(ge=0, le=1 << 20)]]


class CompletionRequest(Request):
    """POST /v1/completions. ``prompt`` is one text, or one list of token ids."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    def check(self) -> None:
        """The shared rules, best_of and echo."""
        super().check()
        if self.best_of not in (None, self.choices):
            raise Refusal(400, f"best_of = {self.best_of} is not supported here; use n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise Refusal(400, "echo with logprobs is not supported here; leave one of them out", param="echo")

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    def single_prompt(self) -> str | list[int]:
        """The one prompt, unpacked from a list of one."""
        prompt = "" if self.prompt is None else self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return prompt[0]
        return prompt  # type: ignore[return-value]


class TextPart(_Strict):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message; ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None

    def plain(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    # without effect
    response_format: ResponseFormat | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: None = None

    def check(self) -> None:
        """The shared rules, and settings that contradict each other."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs = true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Refusal(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def tokens_wanted(self) -> int:
        return self.max_completion_tokens or super().tokens_wanted

    def conversation(self) -> list[Message]:
        return [message.plain() for message in self.messages]


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """A request from the bytes of a body; Refusal with the name of the field that is wrong."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _unreadable(error) from None
    request.check()
    return request


def too_long(fact: str, context: int, param: str = "prompt") -> Refusal:
    """The prompt is beyond what the model can read."""
    return Refusal(
        400, f"the prompt {fact} and the context of this model is {context}; shorten it so that there is room to answer",
        param=param, code="context_length_exceeded",
    )  # fmt: skip


def _unreadable(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    printable = "".join(c if c.isprintable() else "?" for c in field[:100])
    message = {"json_invalid": "the body is not JSON in UTF-8", "extra_forbidden": f"there is no field {printable}"}
    told = message.get(first["type"]) or f"{printable or 'the body'}: {first['msg']}"
    return Refusal(422, told, param=printable or None, code=first["type"])


# ── answers ──


def new_id(prefix: str) -> str:
    """A name for a request or an answer, such as cmpl-5f0e..."""
    return f"{prefix}-{secrets.token_hex(12)}"


class Answer(ABC):
    """The answer to one request in OpenAI's shape, whole or as events.

    Subclasses say what a choice looks like. Tokens come as the engine made them; text is that of the tokens joined, so
    that the pieces of a stream are the text of the whole.
    """

    prefix, object, chunk_object = "", "", ""

    def __init__(self, request: Request, model: str, prompt_tokens: int, tokenizer: Tokenizer) -> None:
        self.request, self.prompt_tokens, self.tokenizer = request, prompt_tokens, tokenizer
        self.id, self.created, self.model = new_id(self.prefix), int(time.time()), model
        self.generated = 0
        options = request.stream_options
        self._usage_event = bool(options and options.include_usage)
        envelope = {"id": self.id, "object": self.chunk_object, "created": self.created, "model": model}
        self._head = b"data: " + _json(envelope)[:-1]
        self._tail = b',"usage":null}\n\n' if self._usage_event else b"}\n\n"
        self._lengths = [0] * request.choices  # characters that the logprobs of each choice have told

    # whole

    def whole(self, choices: Sequence[tuple[Sequence[Token], str]]) -> bytes:
        """The body for the tokens and the finish_reason of every choice."""
        return _json({
            "id": self.id, "object": self.object, "created": self.created, "model": self.model,
            "choices": [self._choice(index, tokens, reason) for index, (tokens, reason) in enumerate(choices)],
            "usage": self.usage(),
        })  # fmt: skip

    def count(self, tokens: int) -> None:
        """So many more tokens were generated, for ``usage``."""
        self.generated += tokens

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.generated
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.generated, "total_tokens": total}

    # events

    def opening(self) -> bytes:
        """What comes before the first token."""
        return b""

    def event(self, index: int, tokens: Sequence[Token], reason: str | None) -> bytes:
        """The next piece of a choice; nothing when it would be empty."""
        text = "".join([token.text for token in tokens])
        if not text and reason is None and not self._tells_logprobs(tokens):
            return b""
        finish = b"null" if reason is None else b'"%s"' % reason.encode()
        logprobs = _json(self._logprobs(index, tokens)) if self._tells_logprobs(tokens) else b"null"
        return b'%s,"choices":[{"index":%d,%s,"logprobs":%s,"finish_reason":%s}]%s' % (
            self._head, index, self._content(text), logprobs, finish, self._tail
        )  # fmt: skip

    def closing(self) -> bytes:
        """What comes after the last token."""
        if not self._usage_event:
            return DONE
        return b'%s,"choices":[],"usage":%s}\n\n%s' % (self._head, _json(self.usage()), DONE)

    # what a choice looks like

    def _with_text(self, tokens: Sequence[Token]) -> list[Token]:
        """Those that logprobs tell of: the end of text, for one, is no token of the text."""
        return [token for token in tokens if self.tokenizer.bytes_of(token.id)]

    def _tells_logprobs(self, tokens: Sequence[Token]) -> bool:
        return self.request.top_logprobs_wanted is not None and bool(tokens)

    @abstractmethod
    def _choice(self, index: int, tokens: Sequence[Token], reason: str) -> dict[str, Any]: ...

    @abstractmethod
    def _content(self, text: str) -> bytes: ...

    @abstractmethod
    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]: ...

    def _spelled(self, id: int) -> str:
        return self.tokenizer.decode([id])


class CompletionAnswer(Answer):
    """An answer of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, request: CompletionRequest, model: str, prompt_tokens: int, tokenizer: Tokenizer, prompt: str = ""
    ) -> None:
        super().__init__(request, model, prompt_tokens, tokenizer)
        self._echo = prompt if request.echo else ""

    def opening(self) -> bytes:
        """The prompt, where it is to be echoed."""
        if not self._echo:
            return b""
        return b"".join(
            b'%s,"choices":[{"index":%d,%s,"logprobs":null,"finish_reason":null}]%s'
            % (self._head, index, self._content(self._echo), self._tail)
            for index in range(self.request.choices)
        )

    def _choice(self, index: int, tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        text = self._echo + "".join([token.text for token in tokens])
        logprobs = self._logprobs(index, tokens) if self._tells_logprobs(tokens) else None
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, text: str) -> bytes:
        return b'"text":' + _json(text)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """``text_offset`` counts the characters of the tokens before, each spelled on its own."""
        tokens = self._with_text(tokens)
        spelled, offsets = [self._spelled(token.id) for token in tokens], []
        for piece in spelled:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(piece)
        tops = [
            {self._spelled(id): _finite(logprob) for id, logprob in reversed(token.alternatives)} for token in tokens
        ]
        return {
            "tokens": spelled, "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": tops if self.request.top_logprobs_wanted else None, "text_offset": offsets,
        }  # fmt: skip


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> bytes:
        """Who speaks, for every choice."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return b"".join(
            b'%s,"choices":[{"index":%d,%s}]%s' % (self._head, index, delta, self._tail)
            for index in range(self.request.choices)
        )

    def _choice(self, index: int, tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join([token.text for token in tokens]), "refusal": None}
        logprobs = self._logprobs(index, tokens) if self._tells_logprobs(tokens) else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, text: str) -> bytes:
        return b'"delta":{"content":%s}' % _json(text) if text else b'"delta":{}'

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            self._told(token.id, token.logprob) | {"top_logprobs": [self._told(*top) for top in token.alternatives]}
            for token in self._with_text(tokens)
        ]
        return {"content": content, "refusal": None}

    def _told(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._spelled(id), "logprob": _finite(logprob), "bytes": list(self.tokenizer.bytes_of(id))}


def models_list(names: Iterable[str], created: Callable[[str], int]) -> bytes:
    """The body of GET /v1/models."""
    data = [{"id": name, "object": "model", "created": created(name), "owned_by": "smalllm"} for name in names]
    return _json({"object": "list", "data": data})


def _finite(logprob: float | None) -> float:
    """JSON has no -infinity; OpenAI tells a token that cannot be like this."""
    return -9999.0 if logprob is None else max(logprob, -9999.0)


def _json(value: Mapping[str, Any] | str | None) -> bytes:
    """ASCII, so that no way to cut it breaks a character; never NaN, which JSON does not have."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
