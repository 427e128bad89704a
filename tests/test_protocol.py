"""The protocol: what is understood, what is refused and how, and answers that OpenAI's own types accept."""

from __future__ import annotations

import json
import math
from typing import Any

import openai.types as shapes
import openai.types.chat as chat_shapes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.conversation import CONTROL
from smalllm.generation import Row, SamplingParams, Token
from smalllm.serve.protocol import (
    DONE,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Refusal,
    models_list,
    parse,
)
from smalllm.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat. 🙂 é\n"] * 9, 290)
HI = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps(fields).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": HI} | fields).encode())


def refused(kind: Any, body: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(kind, body)
    return caught.value


# ── requests ──


def test_defaults():
    params = completion().params(1, 256, TOKENIZER)
    assert params == SamplingParams(max_tokens=200, temperature=0.8)
    assert chat().params(1, 256, TOKENIZER) == params
    assert completion().single_prompt() == ""


def test_every_setting_arrives():
    fields = {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a", "b"], "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.1, "no_repeat_ngram": 3, "logit_bias": {"5": -100, "6": 2.5},
    }  # fmt: skip
    expected = SamplingParams(7, 0.5, 5, 0.9, 0.1, 1.1, 3, ("a", "b"), 3, logprobs=2, logit_bias={5: -100.0, 6: 2.5})
    assert completion(logprobs=2, **fields).params(1, 256, TOKENIZER) == expected
    assert chat(logprobs=True, top_logprobs=2, **fields).params(1, 256, TOKENIZER) == expected
    assert chat(max_completion_tokens=9).params(1, 256, TOKENIZER).max_tokens == 9


def test_what_clients_send_by_default_is_accepted():
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "n": 1, "stream": False, "stop": None}
    assert completion(best_of=1, suffix=None, echo=False, logprobs=None, **neutral).choices == 1
    defaults = {
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
        "store": False, "metadata": None, "service_tier": "auto", "modalities": ["text"], "logprobs": False,
    }  # fmt: skip
    assert chat(**defaults, **neutral).choices == 1


@pytest.mark.parametrize("prompt", ["once", ["once"], [1, 2, 3], [[1, 2, 3]], []])
def test_a_prompt_is_a_text_or_ids(prompt):
    single = completion(prompt=prompt).single_prompt()
    assert single == (prompt[0] if prompt and isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt)


def test_messages_come_in_parts():
    request = chat(messages=[
        {"role": "developer", "content": "be kind", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ])  # fmt: skip
    assert [(m.role, m.content) for m in request.conversation()] == [("system", "be kind"), ("user", "ab")]


UNFIT: list[tuple[str, Any]] = [
    *[("max_tokens", value) for value in (0, -1, 10**18, 2**64, 1.5, "5", True, [], {})],
    *[("temperature", value) for value in (-0.1, 101, "hot", True, [])],
    *[("top_p", value) for value in (-0.1, 1.1, "x")],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("top_k", value) for value in (-1, 10**9, 0.5)],
    *[("n", value) for value in (0, -1, 5, 10**6, 1.0)],
    *[("stop", value) for value in ("", ["a"] * 5, "x" * 65, [""], [1], 7)],
    *[("seed", value) for value in (2**63, -(2**63) - 1, 1.5, "x")],
    *[("repetition_penalty", value) for value in (0, -1, 101)],
    *[("no_repeat_ngram", value) for value in (-1, 1025)],
    *[("logit_bias", value) for value in ({"1": 101}, {"1": -101}, {"1": "x"}, {str(i): 0 for i in range(301)}, [])],
    *[("stream", value) for value in (1, "yes")],
    *[("model", value) for value in (1, "x" * 257)],
    *[("user", value) for value in (1, [])],
    *[(name, 1) for name in ("best", "chat_template", "chat_template_kwargs", "functions", "__class__", "n_discard")],
]


@pytest.mark.parametrize(("field", "value"), UNFIT)
def test_what_cannot_be_is_refused_by_name(field, value):
    for kind, base in ((CompletionRequest, {}), (ChatRequest, {"messages": HI})):
        refusal = refused(kind, json.dumps({**base, field: value}).encode())
        assert refusal.status == 422 and refusal.param is not None and refusal.param.startswith(field)
        error = json.loads(refusal.body())["error"]
        assert field in error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"temperature": NaN}',
        b'{"temperature": 1e999}', b'{"temperature": Infinity}', b"[" * 100_000, b'{"prompt":' * 50_000,
        b'{"prompt": "a\xc0\x80"}', b'{"prompt": ["a", "b"]}', b'{"prompt": [[]], "x": 1}', b'{"prompt": [-1]}',
        b'{"prompt": [1.5]}', b'{"prompt": {}}', b'{"n": ' + b"9" * 5000 + b"}", b'{"suffix": "x"}', b"{'a': 1}",
    ],
)  # fmt: skip
def test_bodies_that_are_not_requests(body):
    assert refused(CompletionRequest, body).status == 422


@pytest.mark.parametrize(
    "messages",
    [
        [], None, "hi", [{}], [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], HI * 1025,
        [{"role": "user", "content": "x", "extra": 1}], [[]], [None],
    ],
)  # fmt: skip
def test_messages_that_cannot_be_read(messages):
    assert refused(ChatRequest, json.dumps({"messages": messages}).encode()).status == 422


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"presence_penalty": 0.5}, "repetition_penalty"),
        ({"frequency_penalty": -0.5}, "repetition_penalty"),
        ({"best_of": 3}, "use n"),
        ({"echo": True, "logprobs": 0}, "leave one of them out"),
        ({"stream_options": {"include_usage": True}}, "stream = true"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_way_out(fields, word):
    with pytest.raises(Refusal, match=word) as caught:
        completion(**fields)
    assert caught.value.status == 400


def test_chat_refuses_contradictions():
    for fields in ({"top_logprobs": 2}, {"max_tokens": 1, "max_completion_tokens": 2}):
        with pytest.raises(Refusal) as caught:
            chat(**fields)
        assert caught.value.status == 400


def test_the_room_of_the_context_bounds_the_answer_and_no_prompt_is_cut():
    assert completion(max_tokens=50).params(250, 256, TOKENIZER).max_tokens == 6
    assert completion(max_tokens=3).params(250, 256, TOKENIZER).max_tokens == 3
    for ids in (256, 257, 10**6):
        with pytest.raises(Refusal) as caught:
            completion().params(ids, 256, TOKENIZER)
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("key", ["x", "-1", "290", "1e3", "٣", " 1", "", "9" * 30])
def test_biases_are_for_ids(key):
    with pytest.raises(Refusal) as caught:
        completion(logit_bias={key: 1}).params(1, 256, TOKENIZER)
    assert (caught.value.status, caught.value.param) == (400, "logit_bias")


def test_a_model_with_turns_does_not_choose_who_speaks():
    turns = Tokenizer.train(["the cat\n"] * 9, 275, control=CONTROL)
    assert sorted(chat(logit_bias={"9": 1}).params(1, 256, turns).logit_bias.values()) == [-math.inf] * 3 + [1.0]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["prompt", "messages", "n", "stop", "logit_bias", "role", "content"]), inner),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_body_is_understood_or_refused(body):
    for kind in (CompletionRequest, ChatRequest):
        try:
            parse(kind, body)
        except Refusal as refusal:
            assert refusal.status in (400, 422) and json.loads(refusal.body())["error"]["message"].isprintable()


# ── answers ──


def told(text: str, index: int = 0, logprobs: int | None = None) -> tuple[Row, list[Token]]:
    """A row that says a text, token for token, and ends."""
    row = Row([TOKENIZER.bos_id], SamplingParams(logprobs=logprobs), TOKENIZER, index)
    top = ((5, -0.5), (6, -math.inf))[: logprobs or 0]
    logprob = None if logprobs is None else -0.25
    ids = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    return row, [Token(row, id, row.push(id), logprob, top) for id in ids]


def streamed(answer: Any, tokens: list[Token]) -> list[dict[str, Any]]:
    """The events of a stream, in which every third token waits for the next."""
    pieces = [answer.opening()]
    for place in range(0, len(tokens), 3):
        some = tokens[place : place + 3]
        pieces.append(answer.event(0, some, "stop" if some[-1] is tokens[-1] else None))
    answer.count(len(tokens) - 1)
    body = b"".join([*pieces, answer.closing()])
    assert body.isascii() and body.endswith(DONE)
    return [json.loads(line.removeprefix(b"data: ")) for line in body.removesuffix(DONE).split(b"\n\n") if line]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_a_completion_has_openais_shape(logprobs):
    _, tokens = told("the cat 🙂é", logprobs=logprobs)
    answer = CompletionAnswer(completion(logprobs=logprobs), "tiny@4", 3, TOKENIZER)
    answer.count(len(tokens) - 1)
    body = shapes.Completion.model_validate_json(answer.whole([(tokens, "stop")]), strict=True)
    assert body.choices[0].text == "the cat 🙂é" and body.choices[0].finish_reason == "stop"
    assert body.usage and body.usage.total_tokens == 3 + len(tokens) - 1
    told_logprobs = body.choices[0].logprobs
    assert (told_logprobs is None) == (logprobs is None)
    if told_logprobs is not None:
        count = len(tokens) - 1  # the end of text is no token of the text
        assert len(told_logprobs.tokens or []) == len(told_logprobs.text_offset or []) == count
        assert told_logprobs.token_logprobs == [-0.25] * count
        assert (told_logprobs.top_logprobs is None) == (logprobs == 0)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_chat_answer_has_openais_shape(logprobs):
    _, tokens = told("the cat 🙂é", logprobs=logprobs)
    request = chat(**({} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}))
    answer = ChatAnswer(request, "tiny@4", 3, TOKENIZER)
    body = chat_shapes.ChatCompletion.model_validate_json(answer.whole([(tokens, "length")]), strict=True)
    assert body.choices[0].message.content == "the cat 🙂é"
    if logprobs is not None:
        content = body.choices[0].logprobs.content  # type: ignore[union-attr]
        assert bytes(byte for token in content or [] for byte in token.bytes or []).decode() == "the cat 🙂é"
        assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -9999.0]  # type: ignore[index]


def test_streams_have_openais_shape_and_the_same_text():
    text = "the 🙂 cat\n\u2028é"
    events = streamed(
        CompletionAnswer(completion(stream=True, logprobs=1), "t", 1, TOKENIZER), told(text, logprobs=1)[1]
    )
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    for event in events:
        event["choices"][0]["finish_reason"] = "stop"  # OpenAI sends null, which its own type does not know
    pieces = [shapes.Completion.model_validate(event, strict=True) for event in events]
    assert "".join(piece.choices[0].text for piece in pieces) == text
    offsets = [
        offset
        for piece in pieces
        if piece.choices[0].logprobs
        for offset in piece.choices[0].logprobs.text_offset or []
    ]
    assert offsets == sorted(offsets) and offsets[0] == 0
    events = streamed(ChatAnswer(chat(stream=True), "t", 1, TOKENIZER), told(text)[1])
    chunks = [chat_shapes.ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


def test_usage_is_told_at_the_end_of_a_stream_when_asked_for():
    request = chat(stream=True, stream_options={"include_usage": True})
    *before, last = streamed(ChatAnswer(request, "t", 5, TOKENIZER), told("the cat")[1])
    assert all(event["usage"] is None for event in before)
    count = len(TOKENIZER.encode("the cat"))
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}


def test_an_echo_comes_first():
    request = completion(echo=True, n=2, stream=True)
    answer = CompletionAnswer(request, "t", 5, TOKENIZER, "Once")
    events = [json.loads(line[6:]) for line in answer.opening().split(b"\n\n") if line]
    assert [(event["choices"][0]["index"], event["choices"][0]["text"]) for event in events] == [
        (0, "Once"),
        (1, "Once"),
    ]
    whole = json.loads(answer.whole([(told("x")[1], "stop"), (told("y", 1)[1], "stop")]))
    assert [choice["text"] for choice in whole["choices"]] == ["Oncex", "Oncey"]


def test_a_piece_without_text_is_not_sent():
    row, tokens = told("é")
    answer = CompletionAnswer(completion(stream=True), "t", 1, TOKENIZER)
    empty = Token(row, tokens[0].id, "")
    assert answer.event(0, [empty], None) == b""
    assert answer.event(0, [empty], "length") != b""


def test_the_list_of_models():
    body = models_list(["a", "a@3"], lambda name: 7)
    assert [shapes.Model.model_validate(model, strict=True).id for model in json.loads(body)["data"]] == ["a", "a@3"]
