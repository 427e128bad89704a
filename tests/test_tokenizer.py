"""The tokenizer: no text is lost, no control piece comes from text, training is repeatable."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm import tokenizer as module
from smalllm.config import UserError
from smalllm.native import words as words_module
from smalllm.native.build import Unavailable
from smalllm.native.words import Words
from smalllm.tokenizer import BOS, EOS, LONGEST_PART, StreamDecoder, Tokenizer, _merges_only, _parts, _WordEncoder

CORPUS = [
    "Once upon a time, there was a girl named Lily.\nShe had 12 apples and a big red ball.\n\n",
    '"Can I play?" asked Tom.  "Yes," said Lily, "we can play <s> all day!"\n',
    "Der Bär aß süße Äpfel — und 日本 ist schön. 🙂\r\n\tif x:\n\t    return 1\n",
] * 30
ODD = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\ttabs\t\tand\r\nlines\r",
    "\0nul\0",
    "\ufeffmark",
    "a\u2581b\u2581\u2581 c \u2581",
    "\u2585 block \u2585",
    "<s></s><unk><pad><0x0A><|endoftext|>",
    "e\u0301 \u00e9 \ufb01 \u2460 \u3000 \u00a0",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u202eright to left",
    "\u2028 and \u2029",
    "0123456789",
    "a" + "\u0301" * 5000,
]
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=" \n\t\r\0ab\u2581\u2585\ufeff<s>/|é日🙂0123456789.,", max_size=60),
    st.lists(st.sampled_from([*ODD[:-1], "Lily", " apple", "\n"]), max_size=8).map("".join),
)


def trained_raw(corpus: list[str] = CORPUS, **changes: object) -> bytes:
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    names = {"normalization_rule_name": "identity", "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, **{**options, **names, **changes}
    )
    return model.getvalue()


MODEL = Tokenizer.train(CORPUS, 480)
RAW = sentencepiece.SentencePieceProcessor(model_proto=MODEL.model_bytes)


@pytest.fixture
def tokenizer():
    return MODEL


# -- round trips


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(TEXTS)
@settings(max_examples=600, deadline=None)
def test_every_text_comes_back_whole_and_as_a_stream(text):
    ids = MODEL.encode(text)
    assert MODEL.decode(ids) == text
    assert BOS not in ids and EOS not in ids and 0 not in ids
    assert stream(MODEL, ids) == text


@given(st.lists(st.integers(0, 479), max_size=40))
@settings(max_examples=400, deadline=None)
def test_stream_equals_decode_for_any_ids(ids):
    assert stream(MODEL, ids) == MODEL.decode(ids)


@given(st.lists(TEXTS, max_size=6), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_batch_equals_single(texts, threads):
    assert MODEL.encode_batch(texts, threads) == [MODEL.encode(text) for text in texts]


def test_stream_gives_whole_characters_only(tokenizer):
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(id) for id in tokenizer.encode("\U0001f680")]
    assert parts == ["", "", "", "\U0001f680"] and decoder.finish() == ""
    assert decoder.push(tokenizer.encode("\U0001f680")[0]) == "" and decoder.finish() == "\ufffd"


# -- equality with the reference


@given(TEXTS.filter(lambda text: "\u2581" not in text))
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_sentencepiece(text):
    assert MODEL.encode(text) == RAW.encode(text)


@given(st.text(alphabet="ab \n.", max_size=80), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_cutting_before_spaces_changes_no_id(text, limit):
    parts = list(_parts(text, limit))
    assert "".join(parts) == text
    if all(len(word) <= limit for word in re.findall(" *[^ ]*", text)):
        assert [id for part in parts for id in RAW.encode(part)] == RAW.encode(text)


def test_long_text_has_the_ids_of_sentencepiece_and_a_long_word_comes_back(tokenizer):
    long = " ".join(CORPUS) * 25
    assert len(long) > 2 * LONGEST_PART and tokenizer.encode(long) == RAW.encode(long)
    word = "ab" * LONGEST_PART
    assert tokenizer.decode(tokenizer.encode(word)) == word


# -- whole documents, from a memory of words

NUMBERS = [f"{number * 7919 % 10007} + {number}\t= {number**3}\r\n" for number in range(300)]
NEWLINES = ["\n\n\tif a:\n\t\tb(c)\n\n\n    return\n\n" * 9, "a\n\nb\n \n  c\n"] * 20
JAPANESE = [
    "日本語の文章です。猫が好きです、犬も好きです。",
    "これはペンです　はい。\n",
    "東京に行きました。とても楽しかったです。",
] * 20
CUTTABLE = {
    "ours": MODEL,
    "bytes and letters": Tokenizer.train(["hello"] * 4, 265),
    "numbers": Tokenizer(trained_raw(NUMBERS, vocab_size=500)),
    "newlines": Tokenizer.train(NEWLINES, 300),
    "japanese": Tokenizer.train(JAPANESE, 340),
    "across words": Tokenizer(trained_raw(vocab_size=600, split_by_whitespace=False, max_sentencepiece_length=40)),
    "across scripts": Tokenizer(trained_raw(vocab_size=500, split_by_unicode_script=False, split_by_number=False)),
    "space last": Tokenizer(trained_raw(vocab_size=450, treat_whitespace_as_suffix=True)),
    "user's symbols": Tokenizer(
        trained_raw(vocab_size=450, user_defined_symbols=["a b", "<sep>", " l", "\n\n", "本 ", "</s>s", "é"])
    ),
}
WHOLE = {
    "unigram": Tokenizer(trained_raw(model_type="unigram", vocab_size=330)),
    "characters": Tokenizer(trained_raw(model_type="char")),
}
MODELS = {**CUTTABLE, **WHOLE}
PHRASES = st.lists(
    st.sampled_from([
        " ", "  ", "\n", "\n\n", "\t", "\r\n", "\0", "\u00a0", "\u3000", "\u2581", "\u2585", "\ufeff", "\u0301", "🙂", "é", "日本", "です。",
        "</s>", "<s>", "<0x41>", "<sep>", "<unk>", "a b", " l", "ll", "Lily", " Lily", " had", " a big", "apple", ".", ".\n", '"', ",",
        "1", "27", "if a:", "return", "x" * 70, "elephantine" * 9, "\u2584", "\u2501", "ǁ",
    ]),
    max_size=12,
).map("".join)  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
needs_words = pytest.mark.usefixtures("native")


def documents(tokenizer: Tokenizer, texts: list[str], threads: int = 2) -> list[list[int]]:
    ids, counts = tokenizer.encode_documents([text.encode() for text in texts], threads)
    assert (ids.dtype, counts.dtype, len(ids)) == (np.int32, np.int64, counts.sum())
    return [part.tolist() for part in np.split(ids, np.cumsum(counts))[:-1]]


@needs_words
@every_model
def test_only_texts_that_may_be_cut_are_cut(name):
    assert (MODELS[name]._word_encoder is not None) == (name in CUTTABLE)


@every_model
@given(st.lists(st.one_of(PHRASES, TEXTS), max_size=8), st.integers(1, 3), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_documents_have_the_ids_of_sentencepiece(name, texts, threads, task):
    tokenizer = MODELS[name]
    with patch.object(module, "TASK_BYTES", task):
        found = documents(tokenizer, texts, threads)
    assert found == [tokenizer.encode_document(text) for text in texts]
    for text, ids in zip(texts, found, strict=True):
        if "\u2581" not in text:
            assert ids == [BOS, *tokenizer._processor.encode(text), EOS]


@needs_words
@given(st.lists(PHRASES, min_size=1, max_size=8), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_forgetting_changes_no_id(texts, most):
    encoder = _WordEncoder(MODEL.encode_batch, Words(MODEL._bytes, most=most))
    expected = [id for text in texts for id in MODEL.encode_document(text)]
    for _ in range(2):
        assert encoder.encode([text.encode() for text in texts], 2)[0].tolist() == expected
    assert len(encoder._words) <= most


@every_model
def test_long_documents_are_cut_as_ever(name):
    long = "".join(CORPUS + NUMBERS + NEWLINES + JAPANESE)
    texts = [long * 7, "ab" * LONGEST_PART + " c d", " " * (LONGEST_PART + 3) + "a \u2581 b" * 5, "日本" * LONGEST_PART]
    assert len(texts[0]) > 2 * LONGEST_PART
    assert documents(MODELS[name], texts) == [MODELS[name].encode_document(text) for text in texts]


def test_documents_do_not_depend_on_threads_or_on_what_came_before():
    texts = [*ODD, *CORPUS, "", "  "]
    for threads in (1, 2, 7):
        tokenizer = Tokenizer(MODEL.model_bytes)
        for _ in range(2):
            assert documents(tokenizer, texts, threads) == [MODEL.encode_document(text) for text in texts]
    assert documents(MODEL, []) == [] and documents(MODEL, ["", ""]) == [[BOS, EOS]] * 2


def test_documents_without_a_compiler(monkeypatch):
    def unavailable(name: str) -> None:
        raise Unavailable("there is no C++ compiler here (g++)")

    monkeypatch.setattr(words_module, "load", unavailable)
    words_module._library.cache_clear()
    tokenizer = Tokenizer(MODEL.model_bytes)
    assert documents(tokenizer, ODD + CORPUS) == [MODEL.encode_document(text) for text in ODD + CORPUS]
    assert tokenizer._word_encoder is None


@pytest.mark.parametrize("text", [b"a\xff", b"\xe2\x96", b"\x80", b"ok \xc3\xa9\xa9", b"\xed\xa0\x80"])
def test_documents_that_are_not_utf8_are_refused(text):
    with pytest.raises(UnicodeDecodeError):
        MODEL.encode_documents([b"a good one", text], 2)


@needs_words
def test_a_memory_that_does_not_pay_is_given_up():
    tokenizer, spoken = Tokenizer.train(["abab baba aabb bbaa aa bb"] * 9, 270), "ab ba aa bb " * 100
    random = np.random.default_rng(5)
    noise = [" ".join("".join(random.choice(["a", "b"], 50)) for _ in range(40)) for _ in range(3)]
    with patch.object(module, "TRIAL_BYTES", 1000):
        for texts, pays in (([spoken] * 3, True), (noise[:1], True), (noise[1:], False), (noise, False)):
            assert documents(tokenizer, texts) == [tokenizer.encode_document(text) for text in texts]
            assert tokenizer._word_encoder.pays == pays
        with patch.object(_WordEncoder, "encode", side_effect=AssertionError):
            documents(tokenizer, noise)


def test_models_that_may_not_be_cut_are_recognised():
    model = MODEL.model_bytes
    assert _merges_only(model) and not any(_merges_only(WHOLE[name].model_bytes) for name in WHOLE)
    for change in (b"\x12\x02\x18\x01", b"\x12\x03\x98\x02\x00", b"\x1a\x05\x12\x03abc", b"\x7b\x7c"):
        # model_type = unigram; byte_fallback = false; a table of normalization; a group, which is not read here
        assert not _merges_only(model + change), change
    assert _merges_only(model + b"\x1a\x05\x12\x03abc" + b"\x1a\x02\x12\x00")  # the last value counts
    assert Tokenizer(with_unused(model, "Li"))._word_encoder is None


def with_unused(model: bytes, piece: str) -> bytes:
    """The model with the type of a piece set to UNUSED: SentencePiece takes it apart again, as it was put together."""
    start = model.index(b"\x0a" + bytes([len(piece)]) + piece.encode())
    size = model[start - 1]
    return model[: start - 1] + bytes([size + 2]) + model[start : start + size] + b"\x18\x05" + model[start + size :]


# -- known answers


def test_special_pieces_and_bytes(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 480)
    assert [tokenizer.piece(id) for id in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert [tokenizer.bytes_of(id) for id in (1, 2, 3, 258)] == [b"", b"", b"\x00", b"\xff"]
    assert tokenizer.decode([1, 3 + 0xC3, 3 + 0xA9, 2]) == "é"
    assert tokenizer.decode([3 + 0xC3]) == "\ufffd"
    assert tokenizer.encode_document("") == [1, 2]


def test_space_mark_is_three_byte_pieces(tokenizer):
    assert tokenizer.encode("\u2581") == [3 + 0xE2, 3 + 0x96, 3 + 0x81]


def test_digits_stay_single_and_newlines_are_no_bytes(tokenizer):
    assert [tokenizer.piece(id) for id in tokenizer.encode("12")] == ["1", "2"]
    assert all(id > 258 for id in tokenizer.encode("a\nb\n\nc"))


def test_merges_worked_by_hand():
    # 259 fixed pieces, the characters a, b, newline and space, and two merges: a+b first, then ab+ab.
    tokenizer = Tokenizer.train(["abab"] * 4, 259 + 4 + 2)
    assert {tokenizer.piece(id) for id in range(259, 265)} == {"ab", "abab", "a", "b", "\n", "\u2581"}
    assert [tokenizer.piece(id) for id in tokenizer.encode("ababab ba")] == ["abab", "ab", "\u2581", "b", "a"]


def test_ids_outside_the_vocabulary(tokenizer):
    for id in (-1, 480):
        with pytest.raises(UserError, match=f"token id {id} is outside the vocabulary of 480"):
            tokenizer.decode([id])


def test_numpy_ids_are_ids(tokenizer):
    assert tokenizer.decode(np.array(tokenizer.encode("Lily 12"), dtype=np.uint16)) == "Lily 12"


def test_lone_surrogates_are_refused(tokenizer):
    for call in (
        tokenizer.encode,
        lambda text: tokenizer.encode_batch([text], 1),
        lambda text: Tokenizer.train([text], 300),
    ):
        with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 1"):
            call("a\ud800")


# -- training


def test_training_is_repeatable():
    assert Tokenizer.train(iter(CORPUS), 400).fingerprint == Tokenizer.train(CORPUS, 400).fingerprint


def test_no_training_text_is_dropped():
    """Long documents, tabs, NUL and the marks that SentencePiece reserves do not hide the words around them."""
    for spoiler in ("\t", "\0", "\u2581", "\u2585", "elephant" * 10_000, " elephant" * 8_000):
        tokenizer = Tokenizer.train([f"elephant{spoiler} elephant elephant\n"] * 3, 275)
        assert len(tokenizer.encode(" elephant")) <= 3, spoiler[:9]


def test_rare_ascii_has_pieces_and_rare_characters_of_other_scripts_have_bytes():
    """All of them together are 0.05 % of the text, which SentencePiece alone would leave to bytes."""
    text = "the cat sat on the mat\n" * 3000 + "Can J. Zoë ask 7 cats, #1-9? 日é\n"
    tokenizer = Tokenizer.train([text], 300)
    for character in "CJZ7#19-?.,":
        assert len(tokenizer.encode(character)) == 1 and not is_byte(tokenizer, character), character
    assert all(is_byte(tokenizer, character) for character in "ëé日B!")


def test_training_on_many_scripts_needs_no_piece_for_every_character():
    hanzi = "".join(map(chr, range(0x4E00, 0x5200)))
    tokenizer = Tokenizer.train(["the cat sat on the mat\n"] * 200_000 + ["is it?\n"] * 100 + [hanzi], 290)
    assert not is_byte(tokenizer, "?") and is_byte(tokenizer, hanzi[-1])
    assert tokenizer.decode(tokenizer.encode(hanzi)) == hanzi


def is_byte(tokenizer: Tokenizer, character: str) -> bool:
    return tokenizer.piece(tokenizer.encode(character)[0]).startswith("<0x")


def test_training_is_silent():
    code = "from smalllm.tokenizer import Tokenizer; Tokenizer.train(['hello there'] * 9, 270)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"" and done.stderr == b""


def test_sizes_that_the_text_does_not_allow_name_the_nearest_that_it_does():
    with pytest.raises(
        UserError, match="vocab_size=5000 is larger than this text allows: the largest possible value is 273"
    ):
        Tokenizer.train(["hello"] * 4, 5000)
    assert Tokenizer.train(["hello"] * 4, 273).vocab_size == 273
    with pytest.raises(UserError, match="vocab_size=260 is too small .* the smallest possible value is 265"):
        Tokenizer.train(["hello"] * 4, 260)
    assert Tokenizer.train(["hello"] * 4, 265).vocab_size == 265
    with pytest.raises(UserError, match="vocab_size=259 is not possible: choose from 260"):
        Tokenizer.train(["hello"], 259)
    with pytest.raises(UserError, match="there is no text"):
        Tokenizer.train([], 300)


# -- files


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    again = Tokenizer.load(tmp_path / "tokenizer.model")
    assert again.fingerprint == tokenizer.fingerprint and again.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"byte_fallback": False, "vocab_size": 280}, "lacks 256 of the 256 byte pieces"),
        ({"bos_id": 2, "eos_id": 1}, "special ids"),
        ({"normalization_rule_name": "nfkc"}, "it changes text"),
    ],
)
def test_foreign_tokenizers_that_would_lose_text_are_refused(changes, words):
    with pytest.raises(UserError, match=f"bad tokenizer x: .*{words}"):
        Tokenizer(trained_raw(**changes), "x")


def test_foreign_tokenizer_with_a_dummy_prefix_keeps_text():
    tokenizer = Tokenizer(trained_raw(vocab_size=400))  # SentencePiece's default: " " before the text, spaces squeezed
    assert tokenizer.decode(tokenizer.encode("a  b ")) == "a  b "


def test_files_that_are_no_tokenizers(tmp_path):
    (tmp_path / "text").write_text("hello")
    for name in ("text", "missing", "."):
        with pytest.raises(UserError, match="bad tokenizer"):
            Tokenizer.load(tmp_path / name)


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.push(id) for id in ids]) + decoder.finish()
