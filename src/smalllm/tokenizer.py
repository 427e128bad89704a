"""SentencePiece BPE with byte fallback: text to ids and back, without loss.

It knows nothing of conversations, datasets or models. It is the only module that imports SentencePiece.

SentencePiece writes a space as U+2581, drops sentences with U+2585 when it trains and takes much memory for one very
long text. So a text is cut at U+2581, whose three bytes are emitted as byte pieces, and long texts are cut before a
space, where no piece can reach across. Decoding never asks SentencePiece: every id stands for fixed bytes.

A corpus is encoded from a memory of words. BPE joins two neighbouring symbols only if together they are a piece, so
nothing crosses a place between two characters that stand side by side in no piece: cut there, a text has the ids of its
parts. SentencePiece encodes every such part once; C++ cuts, remembers and looks up.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain, compress, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from smalllm.config import UserError
from smalllm.files import FileSystem
from smalllm.native.build import Unavailable
from smalllm.native.words import Found, Words, bounds_of, fill, flattened
from smalllm.untrusted import content

UNK, BOS, EOS = 0, 1, 2
SPACE_MARK = "\u2581"
REPLACEMENT = "\ufffd".encode()
FIXED_PIECES = 3 + 256  # <unk>, <s>, </s> and one piece for each byte
MAX_PIECES = 1 << 20
LARGEST_MODEL = 1 << 26  # bytes of a .model file
LONGEST_PART = 1 << 16  # characters given to SentencePiece at once: bounds its memory on a 100 MB line
LONGEST_SENTENCE = 1 << 13  # characters; SentencePiece fails on words beyond 65,535 characters
TRAINING_THREADS = 4  # a constant, because SentencePiece writes it into the model
BPE = 2  # in sentencepiece_model.proto
TASK_BYTES = 1 << 20  # of text that a thread looks up at once
TRIAL_BYTES = 1 << 22  # of text, after which a memory of words must pay

# A second normalizer_spec, merged over the first by protobuf: add_dummy_prefix = 0, remove_extra_whitespaces = 0.
KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"


class Tokenizer:
    """A vocabulary. `decode(encode(text)) == text` for every text that UTF-8 can express.

    >>> tokenizer = Tokenizer.train(["the cat sat on the mat\\n"] * 9, vocab_size=280)
    >>> tokenizer.decode(tokenizer.encode_document("a  cat\\n<s>"))
    'a  cat\\n<s>'
    """

    bos_id = BOS
    eos_id = EOS

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """Read a serialized SentencePiece model; `name` stands in the UserError for one that cannot serve."""
        self.model_bytes = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._lock = threading.Lock()  # of the memory of words
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model + KEEP_SPACES)
            self.vocab_size: int = self._processor.vocab_size()
            _check_special(self._processor)
            self._bytes = _byte_table(self._processor)
            self._longest = max(map(len, self._bytes))
            self._byte_ids = _byte_ids(self._processor)
            self._check_lossless()
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error) if isinstance(error, ValueError) else "it is not a SentencePiece model"
            raise UserError(f"bad tokenizer {name}: {reason}; train one with `smalllm prepare`") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, control: Sequence[str] = ()) -> Tokenizer:
        """Learn a vocabulary of exactly `vocab_size` pieces; the same texts give the same bytes.

        `control` names pieces, such as turn markers, that no text can produce and that add nothing to a text; their ids
        follow those of unknown, begin and end. UserError when the texts need more pieces or cannot fill so many, naming
        the nearest possible size.
        """
        if not (fixed := FIXED_PIECES + len(control)) < vocab_size <= MAX_PIECES:
            raise UserError(
                f"vocab_size={vocab_size} is not possible: choose from {fixed + 1} to {MAX_PIECES} "
                "(256 bytes, 3 special pieces and the characters of the text)"
            )
        texts, model = list(texts), io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,  # the real size is checked below
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                required_chars=f"\n{SPACE_MARK}{_rare_ascii(texts)}",  # without its piece, a space would come back as U+2581
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                pad_id=-1,
                control_symbols=list(control),
                max_sentence_length=8 * LONGEST_SENTENCE,  # bytes; longer sentences would be dropped in silence
                num_threads=TRAINING_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(_training_failure(str(error), vocab_size)) from None
        tokenizer = cls(model.getvalue())
        if tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"vocab_size={vocab_size} is larger than this text allows: "
                f"the largest possible value is {tokenizer.vocab_size}, so lower it or give more text"
            )
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a SentencePiece .model file; UserError when it is missing, damaged or would lose text."""
        try:
            return cls(content(Path(path), LARGEST_MODEL), str(path))
        except OSError as error:
            raise UserError(f"bad tokenizer {path}: {error.strerror}; give a SentencePiece .model file") from None

    def save(self, path: Path) -> None:
        """Write the model atomically: the file is whole or absent."""
        FileSystem().replace(Path(path), [self.model_bytes])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin and end; special words such as "</s>" in the text stay text."""
        _check_unicode(text)
        ids: list[int] = []
        for part in _parts(text):
            if part[0] == SPACE_MARK:
                ids.extend(self._byte_ids[byte] for byte in part.encode())
            else:
                ids.extend(self._processor.encode(part))
        return ids

    def encode_document(self, text: str) -> list[int]:
        """The ids of a whole document: begin, text, end."""
        return [BOS, *self.encode(text), EOS]

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """`[encode(text) for text in texts]` on several threads; the result does not depend on their number."""
        simple = list(map(_is_plain, texts))
        plain = list(compress(texts, simple))
        for text in plain:
            _check_unicode(text)
        encoded = iter(self._processor.encode(plain, num_threads=threads)) if plain else iter(())
        return [next(encoded) if easy else self.encode(text) for text, easy in zip(texts, simple, strict=True)]

    def encode_documents(self, texts: Sequence[bytes], threads: int) -> tuple[np.ndarray, np.ndarray]:
        """`encode_document` of many UTF-8 texts: their ids one after another, (ids,) int32, and how many each has,
        (texts,) int64. UnicodeDecodeError for bytes that are not UTF-8.

        Faster than `encode_batch` where C++ can be compiled (8.4 MB of English: 9 times, and 19 times once its words are
        known; docs/log.md). Neither that nor `threads` changes an id.
        """
        with self._lock:
            if texts and self._word_encoder and self._word_encoder.pays:
                return self._word_encoder.encode(texts, threads)
        batch = self.encode_batch([text.decode() for text in texts], threads)
        ids, bounds = flattened([[BOS, *document, EOS] for document in batch])
        return ids, np.diff(bounds)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Begin and end give nothing, bytes that are not UTF-8 give U+FFFD."""
        return b"".join([self.bytes_of(id) for id in ids]).decode("utf-8", "replace")

    def bytes_of(self, id: int) -> bytes:
        """The bytes that one token adds to the text; UserError for an id outside the vocabulary."""
        if not 0 <= id < self.vocab_size:
            raise UserError(
                f"token id {id} is outside the vocabulary of {self.vocab_size}; use the run's own tokenizer"
            )
        return self._bytes[id]

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece such as "<|user|>"; None where the vocabulary has no such one."""
        id = self._processor.piece_to_id(piece)
        return id if self._processor.is_control(id) else None

    def fewest_ids(self, text: str) -> int:
        """How many ids a text has at least; known at once, where `encode` takes a second for a megabyte."""
        return -(-len(text.encode("utf-8", "replace")) // self._longest)

    def piece(self, id: int) -> str:
        """SentencePiece's spelling of a token, such as "▁the" or "<0x0A>"."""
        self.bytes_of(id)
        return str(self._processor.id_to_piece(int(id)))

    @cached_property
    def _word_encoder(self) -> _WordEncoder | None:
        """None where a cut might change ids, or where there is no C++."""
        unused = any(self._processor.is_unused(id) for id in range(self.vocab_size))
        if unused or not _merges_only(self.model_bytes):
            return None
        try:
            return _WordEncoder(self.encode_batch, Words(self._bytes))
        except Unavailable:
            return None

    def _check_lossless(self) -> None:
        probe = " A  \u00e9 e\u0301\t\u2460\r\n\ufb01 \u3000 \x00 0 "
        if self.decode(self._processor.encode(probe)) != probe:
            raise ValueError("it changes text (normalization), so text would not come back as it was")


class StreamDecoder:
    """Text from ids as they come, in whole UTF-8 characters: the pieces joined equal `decode` of all ids.

    >>> tokenizer = Tokenizer.train(["the cat sat on the mat\\n"] * 9, vocab_size=280)
    >>> decoder = StreamDecoder(tokenizer)
    >>> [decoder.push(id) for id in tokenizer.encode("é")] + [decoder.finish()]
    ['', 'é', '']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that this token completes, often none or several."""
        return self._decoder.decode(self._tokenizer.bytes_of(id))

    def finish(self) -> str:
        """What an unfinished character leaves behind: "" or U+FFFD."""
        return self._decoder.decode(b"", final=True)


class _WordEncoder:
    """`Tokenizer.encode_documents` from a memory of words; one call at a time."""

    def __init__(self, encode_batch: Callable[[list[str], int], list[list[int]]], words: Words) -> None:
        self._encode_batch, self._words = encode_batch, words
        self._seen = self._unknown = 0  # bytes of text

    @property
    def pays(self) -> bool:
        """Is it faster than SentencePiece? Not where words hardly ever come again: in random letters, say."""
        return self._seen < TRIAL_BYTES or self._unknown < self._seen / 2

    def encode(self, texts: Sequence[bytes], threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Every thread looks up a task, SentencePiece encodes the words that they did not find, and so on."""
        text, bounds, frames, text_bounds = _laid_out(texts)
        array, tasks = np.frombuffer(text, np.uint8), _tasks(bounds, threads)
        filled: list[tuple[np.ndarray, np.ndarray]] = []

        def look_up(task: tuple[int, int]) -> Found:
            return self._words.look_up(array, bounds[task[0] : task[1] + 1], frames[task[0] : task[1]])

        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(tasks), threads):
                found = list(pool.map(look_up, tasks[start : start + threads]))
                unknown = [[text[first:last] for first, last in part.missing.tolist()] for part in found]
                filled += pool.map(fill, found, self._learn(unknown, threads))
        self._seen += len(text)
        ids, counts = (np.concatenate(arrays) for arrays in zip(*filled, strict=True))
        return ids, np.add.reduceat(counts, text_bounds[:-1])

    def _learn(self, unknown: list[list[bytes]], threads: int) -> list[list[list[int]]]:
        """The ids of the unknown words of each task; they are remembered."""
        words = list(dict.fromkeys(chain.from_iterable(unknown)))
        ids = self._encode_batch([word.decode() for word in words], threads)
        self._words.add(words, ids)
        self._unknown += sum(map(len, words))
        known = dict(zip(words, ids, strict=True))
        return [[known[word] for word in part] for part in unknown]


def _check_special(processor: sentencepiece.SentencePieceProcessor) -> None:
    special = (processor.unk_id(), processor.bos_id(), processor.eos_id())
    if special != (UNK, BOS, EOS):
        raise ValueError(f"its special ids (unk, bos, eos) are {special} and must be {(UNK, BOS, EOS)}")
    if not FIXED_PIECES <= processor.vocab_size() <= MAX_PIECES:
        raise ValueError(f"it has {processor.vocab_size()} pieces and must have {FIXED_PIECES} to {MAX_PIECES}")


def _byte_table(processor: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """The bytes of every id."""
    return [_piece_bytes(processor, id) for id in range(processor.vocab_size())]


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    piece: str = processor.id_to_piece(id)
    if processor.is_byte(id):
        return bytes([int(piece[3:5], 16)])
    if processor.is_control(id):
        return b""
    return REPLACEMENT if processor.is_unknown(id) else piece.replace(SPACE_MARK, " ").encode()


def _byte_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    """The id of each of the 256 byte pieces."""
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    missing = [byte for byte, id in enumerate(ids) if not processor.is_byte(id)]
    if missing:
        raise ValueError(f"it lacks {len(missing)} of the 256 byte pieces (first: <0x{missing[0]:02X}>)")
    return ids


def _merges_only(model: bytes) -> bool:
    """Does this model only merge symbols and spell the rest in bytes? The numbers are those of sentencepiece_model.proto."""
    try:
        fields = list(protobuf_fields(model))
        trainer, normalizer = (
            dict(protobuf_fields(b"".join(value for number, value in fields if number == wanted))) for wanted in (2, 3)
        )
    except (ValueError, IndexError, TypeError):  # some other wire format that SentencePiece can read
        return False
    model_type, byte_fallback, charsmap = trainer.get(3), trainer.get(35), normalizer.get(2)
    return model_type == BPE and byte_fallback == 1 and not charsmap


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a serialized message, an int or bytes; ValueError or IndexError when it is cut off."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7 == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        size, place = _varint(message, place) if key & 7 == 2 else ({1: 8, 5: 4}.get(key & 7, -1), place)
        if not 0 <= size <= len(message) - place:
            raise ValueError("a field is longer than its message")
        yield key >> 3, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The number that begins at `place`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + shift // 7 + 1
    raise ValueError("a number is too long")


def _laid_out(texts: Sequence[bytes]) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """The parts of texts one after another, (parts + 1,) int64 their bounds in bytes, (parts, 2) int32 the ids around each
    (begin and end, -1 within a text) and (texts + 1,) int64 the bounds of the texts in parts."""
    parts, firsts = [], [0]
    for text in texts:
        parts += [text] if len(text) <= LONGEST_PART else [part.encode() for part in _parts(text.decode())]
        firsts.append(len(parts))
    text_bounds, frames = np.array(firsts), np.full((len(parts), 2), -1, np.int32)
    frames[text_bounds[:-1], 0], frames[text_bounds[1:] - 1, 1] = BOS, EOS
    return b"".join(parts), bounds_of(parts), frames, text_bounds


def _tasks(bounds: np.ndarray, threads: int) -> list[tuple[int, int]]:
    """Cut parts into runs of about TASK_BYTES, or less so that every thread gets one: (first, last + 1) of each."""
    size = min(TASK_BYTES, int(bounds[-1]) // threads + 1)
    cuts = np.searchsorted(bounds, np.arange(size, bounds[-1], size))
    return list(pairwise(np.unique([0, *cuts, len(bounds) - 1]).tolist()))


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"text has the lone surrogate U+{code:04X} at character {error.start}, not valid Unicode; remove it"
        ) from None


def _is_plain(text: str) -> bool:
    """Can SentencePiece take this text as it is?"""
    return len(text) <= LONGEST_PART and SPACE_MARK not in text


def _parts(text: str, limit: int = LONGEST_PART) -> Iterator[str]:
    """The text in non-empty parts, runs of U+2581 on their own; the ids of the parts are the ids of the text."""
    for run in re.split(f"({SPACE_MARK}+)", text):
        if run:
            yield from _cut_before_spaces(run, limit)


def _cut_before_spaces(text: str, limit: int) -> Iterator[str]:
    """Parts of at most `limit` characters, cut where a word ends and a space begins; in a longer word, anywhere.

    Pieces hold spaces only at their start, so no piece crosses such a cut.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind(" ", start + 1, start + limit)
        while end > start and text[end - 1] == " ":
            end -= 1
        end = end if end > start else start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _rare_ascii(texts: Iterable[str]) -> str:
    """The visible ASCII characters that are each 0.001 % to 0.1 % of the texts, such as "?" and "J" in stories.

    SentencePiece spells the rarest 0.05 % of a text's characters in bytes, which suits thousands of rare Chinese ones. What
    it is told to keep counts towards the other 99.95 %, so that frequent characters must not be among it."""
    counts = np.zeros(256, np.int64)
    for text in texts:
        counts += np.bincount(np.frombuffer(text.encode("utf-8", "replace"), np.uint8), minlength=256)
    characters = counts.sum() - counts[0x80:0xC0].sum()  # bytes that continue a character begin none
    return "".join(chr(code) for code in range(0x21, 0x7F) if characters < 1e5 * counts[code] < 100 * characters)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Training sentences, cut so that SentencePiece drops none: U+2585 and NUL would, and so would great length."""
    for text in texts:
        _check_unicode(text)
        spoilt = any(spoiler in text for spoiler in "\u2581\u2585\0")  # faster than the pattern, and rare
        for run in re.split("[\u2581\u2585\0]", text) if spoilt else [text]:
            if run:
                yield from _cut_before_spaces(run, LONGEST_SENTENCE)


def _training_failure(message: str, vocab_size: int) -> str:
    """Turn SentencePiece's words into ours."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for the characters of this text: "
            f"the smallest possible value is {needed[1]}, so raise it"
        )
    if "sentences_.empty()" in message:
        return f"vocab_size={vocab_size} cannot be learned because there is no text; give a source with text"
    return f"vocab_size={vocab_size} cannot be learned from this text ({message[:200]}); change it or give other text"
