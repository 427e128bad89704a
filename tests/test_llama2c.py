"""llama2.c's files: the bytes worked by hand, run.c's arithmetic done again, the way back, and files that lie."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from export_runs import SHAPES, VOCABULARY, random_model, random_run

from smalllm.checkpoint import LoadedRun, model_weights
from smalllm.config import ModelConfig, UserError
from smalllm.conversation import CONTROL
from smalllm.export import llama2c
from smalllm.export.pieces import pieces_of
from smalllm.model import GPT
from smalllm.tokenizer import Tokenizer

TEXTS = ["", "Once upon a time", " two  spaces\n\nlines\t", "é 日本 🙂 ❤", "<s></s><unk><0x0A> ▁", "1234 567"]
LLAMAS = ["llama", "llama-untied"]


@pytest.fixture(scope="module", params=LLAMAS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """A run with grouped heads and a tied head, then one with neither."""
    return random_run(tmp_path_factory.mktemp("runs") / "run", request.param)


@pytest.fixture(scope="module")
def exported(run: LoadedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in float32."""
    out = tmp_path_factory.mktemp("exports") / "out"
    llama2c.write(run, out, "f32")
    return out


# ── worked by hand ──


def test_the_order_of_version_0_by_hand(tmp_path: Path):
    """Every row of a matrix holds its own number: 2 layers, 2 heads of 4, one of keys and values, an MLP of 3."""
    shape = {"layers": 2, "width": 8, "heads": 2, "kv_heads": 1, "mlp_width": 3, "vocab_size": 5, "context": 2}
    model = GPT(ModelConfig(**shape, tie_embeddings=False))
    starts = {"embedding": 500, "norm": 600, "head": 700}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            block, start = f"{name}.".split("."), starts.get(name.split(".")[0], 0)
            if block[0] == "blocks":
                inner = {"attention_norm": 90, "qkv": 0, "out": 20, "mlp_norm": 95, "up": 30, "down": 40}
                start = 100 * int(block[1]) + next(number for key, number in inner.items() if f".{key}." in name)
            rows = torch.arange(tensor.shape[0] if tensor.dim() == 2 else 1) + start
            tensor.copy_(rows[:, None].expand(-1, tensor.shape[1]) if tensor.dim() == 2 else rows.expand(8))
    llama2c.write_model(tmp_path / "model.bin", model, "f32")
    data = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack("<7i", data[:28]) == (8, 3, 2, 2, 1, -5, 2)
    found = [(value, len(list(same))) for value, same in groupby(np.frombuffer(data[28:], "<f4").tolist())]

    def rows(*starts: int, count: int, width: int) -> list[tuple[float, int]]:
        return [(start + row, width) for start in starts for row in range(count)]

    query = [0, 2, 1, 3, 4, 6, 5, 7]  # pairs that RoPE rotates stand side by side
    key = [8, 10, 9, 11]
    tables = [(1.0, 2), (math.cos(1), 1), (math.cos(0.01), 1), (0.0, 2), (math.sin(1), 1), (math.sin(0.01), 1)]
    wanted = [
        *rows(500, count=5, width=8),
        (90, 8), (190, 8),
        *((row + layer, 8) for layer in (0, 100) for row in query),
        *((row + layer, 8) for layer in (0, 100) for row in key),
        *rows(12, 112, count=4, width=8),  # values
        *rows(20, 120, count=8, width=8),  # output
        (95, 8), (195, 8),
        *rows(30, 130, count=3, width=8),  # w1: the gate
        *rows(40, 140, count=8, width=3),  # w2: down
        *rows(33, 133, count=3, width=8),  # w3: up
        (600, 8),
        *tables,
        *rows(700, count=5, width=8),
    ]  # fmt: skip
    assert [count for _, count in found] == [count for _, count in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted])


def test_a_group_of_weights_by_hand():
    weights = torch.tensor([127.0, -63.4, 63.5, 0.4, -254.0, 1.0, 0.0, 3.1, 0.0, 0.0, 0.0, 0.0])
    values, scales = llama2c.quantize(weights, 4)
    assert values.tolist() == [[127, -63, 64, 0], [-127, 0, 0, 2], [0, 0, 0, 0]]
    assert scales.tolist() == [1.0, 2.0, 0.0]


def test_the_header_of_version_2_by_hand(run: LoadedRun, tmp_path: Path):
    llama2c.write(run, tmp_path / "out", "q8_0")
    data, shape = (tmp_path / "out" / "model.bin").read_bytes(), run.model.config
    assert data[:4] == b"24ka" and struct.unpack("<i", data[4:8]) == (2,)
    assert struct.unpack("<7i", data[8:36]) == (64, 192, 2, 4, shape.key_value_heads, VOCABULARY, 64)
    assert data[36] == shape.tie_embeddings and struct.unpack("<i", data[37:41]) == (64,) and not any(data[41:256])


def test_tokenizer_bin_by_hand(run: LoadedRun, exported: Path):
    data = (exported / "tokenizer.bin").read_bytes()
    records = list(records_of(data))
    assert len(records) == VOCABULARY and struct.unpack("<i", data[:4])[0] == max(len(text) for _, text in records)
    texts = [text for _, text in records]
    assert texts[:5] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>", b"<0x01>"] and texts[258] == b"<0xFF>"
    assert b" " in texts and "▁".encode() not in b"".join(texts) and "日".encode() not in texts[:259]
    assert [score for score, _ in records] == [piece.score for piece in pieces_of(run.tokenizer.model_bytes)]


def records_of(data: bytes) -> Iterator[tuple[float, bytes]]:
    """(score, text) of every piece of a tokenizer.bin."""
    place = 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        yield score, data[place + 8 : place + 8 + length]
        place += 8 + length


# ── run.c once more ──


class Weights:
    """The tensors of a model.bin, taken off its front one after another."""

    def __init__(self, data: bytes) -> None:
        self.quantized = data[:4] == b"24ka"
        numbers = struct.unpack_from("<7i", data, 8 if self.quantized else 0)
        self.width, self.hidden, self.layers, self.heads, self.kv_heads, vocabulary, self.context = numbers
        self.vocabulary = abs(vocabulary)
        self.tied = bool(data[36]) if self.quantized else vocabulary > 0
        self.group = struct.unpack_from("<i", data, 37)[0]
        self.data, self.place = data, 256 if self.quantized else 28

    def floats(self, *shape: int) -> np.ndarray:
        found = np.frombuffer(self.data, "<f4", math.prod(shape), self.place).reshape(shape).astype(np.float64)
        self.place += 4 * found.size
        return found

    def matrices(self, count: int, rows: int, columns: int) -> np.ndarray:
        if not self.quantized:
            return self.floats(count, rows, columns)
        found = []
        for _ in range(count):
            values = np.frombuffer(self.data, "i1", rows * columns, self.place).reshape(-1, self.group)
            self.place += rows * columns
            found.append((values * self.floats(len(values), 1)).reshape(rows, columns))
        return np.stack(found)


def run_c(data: bytes, ids: list[int]) -> np.ndarray:
    """Logits [T, V] as run.c computes them: token by token, RoPE on neighbours, keys of a group shared."""
    w = Weights(data)
    width, hidden, layers, size = w.width, w.hidden, w.layers, w.width // w.heads
    kept = size * w.kv_heads
    if w.quantized:
        norms = [w.floats(layers, width), w.floats(layers, width), w.floats(width)]
        embedding = w.matrices(1, w.vocabulary, width)[0]
        wq, wk, wv, wo = (w.matrices(layers, rows, width) for rows in (width, kept, kept, width))
    else:
        embedding, norms = w.floats(w.vocabulary, width), [w.floats(layers, width)]
        wq, wk, wv, wo = (w.matrices(layers, rows, width) for rows in (width, kept, kept, width))
        norms.append(w.floats(layers, width))
    w1, w2, w3 = w.matrices(layers, hidden, width), w.matrices(layers, width, hidden), w.matrices(layers, hidden, width)
    if not w.quantized:
        norms.append(w.floats(width))
        w.place += 4 * w.context * size
    head = embedding if w.tied else w.matrices(1, w.vocabulary, width)[0]
    assert w.place == len(data)

    def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        angle = position / 10_000 ** (np.arange(0, len(x), 2) % size / size)
        even, odd, found = x[0::2], x[1::2], np.empty_like(x)
        found[0::2] = even * np.cos(angle) - odd * np.sin(angle)
        found[1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return found

    keys, values, logits = np.zeros((2, layers, len(ids), kept))[0], np.zeros((layers, len(ids), kept)), []
    for position, id in enumerate(ids):
        x = embedding[id]
        for layer in range(layers):
            y = normed(x, norms[0][layer])
            query = rotated(wq[layer] @ y, position)
            keys[layer, position], values[layer, position] = rotated(wk[layer] @ y, position), wv[layer] @ y
            seen = []
            for one in range(w.heads):
                own, group = slice(one * size, one * size + size), one // (w.heads // w.kv_heads) * size
                scores = keys[layer, : position + 1, group : group + size] @ query[own] / np.sqrt(size)
                share = np.exp(scores - scores.max())
                seen.append(share / share.sum() @ values[layer, : position + 1, group : group + size])
            x = x + wo[layer] @ np.concatenate(seen)
            y = normed(x, norms[1][layer])
            gate = w1[layer] @ y
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ y))
        logits.append(head @ normed(x, norms[2]))
    return np.stack(logits)


def logits_of(model: GPT, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].numpy()


def some_ids(count: int = 48) -> list[int]:
    return [1, *np.random.default_rng(0).integers(3, VOCABULARY, count - 1).tolist()]


def test_run_c_computes_our_logits(run: LoadedRun, exported: Path):
    found = run_c((exported / "model.bin").read_bytes(), some_ids())
    assert np.abs(found - logits_of(run.model, some_ids())).max() < 1e-4


def test_runq_c_computes_nearly_our_logits(run: LoadedRun, tmp_path: Path):
    llama2c.write(run, tmp_path / "out", "q8_0")
    found, ours = run_c((tmp_path / "out" / "model.bin").read_bytes(), some_ids()), logits_of(run.model, some_ids())
    assert 1e-4 < np.abs(found - ours).max() < 0.05 * np.abs(ours).max()
    model, _ = llama2c.read(tmp_path / "out")
    assert np.abs(found - logits_of(model, some_ids())).max() < 1e-4


@pytest.mark.parametrize("hidden, group", [(96, 32), (80, 16), (72, 8), (128, 64)])
def test_a_quantized_weight_is_within_half_a_step(hidden: int, group: int, tmp_path: Path):
    shape = SHAPES["llama"] | {"mlp_width": hidden}
    model = random_model(ModelConfig(**shape))
    llama2c.write_model(tmp_path / "model.bin", model, "q8_0")
    read = model_weights(llama2c.read_model(tmp_path / "model.bin"))
    for name, tensor in model_weights(model).items():
        difference = (read[name] - tensor).abs()
        if tensor.dim() == 1:
            assert torch.equal(read[name], tensor), name
        else:  # no group's greatest is above the tensor's
            assert 0 < difference.max() <= tensor.abs().max() / 254 * 1.001, name
            groups = tensor.reshape(-1, group).abs().amax(dim=1)
            if "qkv" not in name:  # whose rows are in another order: groups lie within rows, which any group divides
                assert (difference.reshape(-1, group).amax(dim=1) <= groups / 254 * 1.001).all(), name
    assert struct.unpack_from("<i", (tmp_path / "model.bin").read_bytes(), 37) == (group,)


def run_c_encode(data: bytes, text: str) -> list[int]:
    """What run.c makes of a prompt: begin, a space, then characters that merge, the best pair first."""
    records = list(records_of(data))
    known, scores = {piece: id for id, (_, piece) in enumerate(records)}, [score for score, _ in records]
    ids = [1] + ([known[b" "]] if text else [])
    for character in text:
        id = known.get(character.encode())
        ids += [id] if id is not None else [byte + 3 for byte in character.encode()]
    while True:
        pairs = [known.get(records[a][1] + records[b][1]) for a, b in zip(ids, ids[1:], strict=False)]
        best = max(
            (place for place, id in enumerate(pairs) if id is not None), key=lambda p: scores[pairs[p]], default=-1
        )
        if best < 0:
            return ids
        ids[best : best + 2] = [pairs[best]]


@pytest.mark.parametrize("text", TEXTS[:-2] + ["1234 567", "Tom had  a ball. \n\nThe"])
def test_run_c_encodes_as_we_do_after_a_space(run: LoadedRun, exported: Path, text: str):
    found = run_c_encode((exported / "tokenizer.bin").read_bytes(), text)
    assert found == [1, *run.tokenizer.encode(f" {text}" if text else "")]


# ── the way back ──


def test_what_comes_back_is_what_went_out(run: LoadedRun, exported: Path):
    model, tokenizer = llama2c.read(exported)
    weights = model_weights(model)
    assert weights.keys() == model_weights(run.model).keys() and not model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model_weights(run.model).items())
    assert model.config.tie_embeddings == run.model.config.tie_embeddings
    assert model.config.key_value_heads == run.model.config.key_value_heads
    assert pieces_of(tokenizer.model_bytes) == pieces_of(run.tokenizer.model_bytes)
    assert [tokenizer.encode(text) for text in TEXTS] == [run.tokenizer.encode(text) for text in TEXTS]
    assert np.array_equal(logits_of(model, some_ids()), logits_of(run.model, some_ids()))


def test_the_files_come_back_too(run: LoadedRun, exported: Path, tmp_path: Path):
    model, tokenizer = llama2c.read(exported)
    llama2c.write(LoadedRun(run.folder, run.checkpoint, model, tokenizer), tmp_path / "again", "f32")
    for name in ("model.bin", "tokenizer.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["model.bin", "tokenizer.bin"]


def test_the_vocabulary_may_be_a_sentencepiece_model(run: LoadedRun, exported: Path):
    _, tokenizer = llama2c.read(exported / "model.bin", run.folder.tokenizer_file)
    assert tokenizer.model_bytes == run.tokenizer.model_bytes


def test_specials_may_be_spelled_without_line_ends(exported: Path, tmp_path: Path):
    records = [
        (score, text.strip() if id in (1, 2) else text) for id, (score, text) in enumerate(all_records(exported))
    ]
    write_records(tmp_path / "tokenizer.bin", records)
    assert llama2c.read(exported / "model.bin", tmp_path / "tokenizer.bin")[1].piece(1) == "<s>"


def all_records(exported: Path) -> list[tuple[float, bytes]]:
    return list(records_of((exported / "tokenizer.bin").read_bytes()))


def write_records(path: Path, records: list[tuple[float, bytes]]) -> None:
    path.write_bytes(struct.pack("<i", 99) + b"".join(struct.pack("<fi", s, len(text)) + text for s, text in records))


# ── what cannot be exported ──


@pytest.mark.parametrize(
    "shape, dtype, told",
    [
        ({"qk_norm": True}, "f32", "model.qk_norm = true .* train with model.qk_norm=false"),
        ({"norm": "layernorm", "activation": "gelu"}, "f32", "starcoder2 .* model.norm=rmsnorm"),
        ({"positions": "learned", "norm": "layernorm", "activation": "gelu"}, "f32", "gpt2 .* model.positions=rope"),
        ({"rope_theta": 500.0}, "f32", "model.rope_theta = 500 .* train with model.rope_theta=10000"),
        ({}, "f16", "--dtype f16 .* use f32 or q8_0"),
        ({"mlp_width": 100}, "q8_0", "model.width = 64 and an MLP of 100 .* 8 must divide both"),
    ],
)
def test_other_models_are_refused(shape: dict, dtype: str, told: str):
    config = ModelConfig(**{"layers": 1, "width": 64, "heads": 4, "vocab_size": 300} | shape)
    with pytest.raises(UserError, match=told):
        llama2c.check_exportable(config, dtype)


def test_turn_markers_are_refused(tmp_path: Path):
    run = random_run(tmp_path / "run", control=CONTROL)
    with pytest.raises(UserError, match=r"piece 3, '<\|system\|>', is a piece of kind control, where .* this byte"):
        llama2c.write(run, tmp_path / "out", "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_a_damaged_model_leaves_nothing_behind(dtype: str, tmp_path: Path):
    run = random_run(tmp_path / "run")
    with torch.no_grad():
        run.model.blocks[1].mlp.down.weight[3, 5] = math.nan
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down\.weight holds NaN"):
        llama2c.write(run, tmp_path / "out", dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# ── files that lie ──


def number(place: int, value: int, start: int = 0) -> Callable[[bytes], bytes]:
    """Another number in a header."""
    return lambda data: data[: start + 4 * place] + struct.pack("<i", value) + data[start + 4 * place + 4 :]


BIG = 2**31 - 1


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda data: b"", "first numbers .*0 is among them"),
        (lambda data: data[:20], "first numbers .*0 is among them"),
        (lambda data: data[:-1], "must have .* by its header; copy it again"),
        (lambda data: data + b"\0" * 4, "must have .* by its header; copy it again"),
        (number(0, -64), "-64 is among them"),
        (number(0, BIG), "first numbers"),
        (number(1, BIG), "first numbers"),
        (number(2, BIG), "first numbers"),
        (number(2, 1024), "must have"),
        (number(3, 0), "0 is among them"),
        (number(3, 7), "must be divisible"),
        (number(4, 3), "must be divisible"),
        (number(5, -(2**31)), "first numbers"),
        (number(6, BIG), "first numbers"),
        (lambda data: struct.pack("<7i", *[BIG] * 7) + data[28:], "first numbers"),
        (lambda data: b"24ka\x01\0\0\0" + data, "version 1 of llama2.c's formats; export it again as version 0"),
        (lambda data: b"PK\x03\x04" + data[4:], "pickle files are refused"),
    ],
)
def test_a_damaged_model_file_is_one_sentence(exported: Path, tmp_path: Path, damage: Callable, told: str):
    (tmp_path / "model.bin").write_bytes(damage((exported / "model.bin").read_bytes()))
    with pytest.raises(UserError, match=told) as caught:
        llama2c.read(tmp_path / "model.bin", exported / "tokenizer.bin")
    assert "model.bin" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage, told",
    [
        (number(0, 3, 37), "groups of 3 weights"),
        (number(0, 0, 37), "groups of 0 weights"),
        (number(1, 100, 8), "do not divide its rows"),
        (number(0, 32, 37), "must have"),
        (number(6, 2**30, 8), "first numbers"),
        (lambda data: number(6, 2**20, 8)(number(3, 1, 8)(number(4, 1, 8)(number(0, 2048, 8)(data)))), "a context of"),
        (lambda data: data[:36] + b"\x01" + data[37:] if not data[36] else data[:-1], "must have"),
    ],
)
def test_a_damaged_quantized_file_is_one_sentence(run: LoadedRun, tmp_path: Path, damage: Callable, told: str):
    llama2c.write_model(tmp_path / "model.bin", run.model, "q8_0")
    (tmp_path / "model.bin").write_bytes(damage((tmp_path / "model.bin").read_bytes()))
    with pytest.raises(UserError, match=told):
        llama2c.read_model(tmp_path / "model.bin")


def piece(id: int, score: float, text: bytes) -> Callable[[list[tuple[float, bytes]]], None]:
    """Another record in the place of one."""
    return lambda records: records.__setitem__(id, (score, text))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda records: records.pop(), "fewer pieces than the 512"),
        (lambda records: records.append((0.0, b"more")), "more pieces than the 512"),
        (piece(0, 0.0, b"<pad>"), "piece 0 is '<pad>' and must be '<unk>'"),
        (piece(1, 0.0, b"<bos>"), "piece 1 is '<bos>' and must be '<s>'"),
        (piece(13, 0.0, b"\n"), r"piece 13 is '\\n' and must be '<0x0A>'"),
        (piece(300, 0.0, b"\xff"), "piece 300 is not UTF-8"),
        (piece(300, 0.0, b""), "piece 300 has length 0"),
        (piece(300, math.nan, b"a"), "piece 300 has length 1 and score nan"),
        (piece(300, 0.0, b"<s>"), "bad tokenizer"),
    ],
)
def test_a_damaged_vocabulary_is_one_sentence(exported: Path, tmp_path: Path, damage: Callable, told: str):
    records = all_records(exported)
    damage(records)
    write_records(tmp_path / "tokenizer.bin", records)
    with pytest.raises(UserError, match=told) as caught:
        llama2c.read(exported / "model.bin", tmp_path / "tokenizer.bin")
    assert "tokenizer.bin" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [BIG, -1, -(2**31), 10_000])
def test_a_length_is_not_believed(exported: Path, tmp_path: Path, length: int):
    data = (exported / "tokenizer.bin").read_bytes()
    (tmp_path / "tokenizer.bin").write_bytes(number(0, length, 8)(data))
    with pytest.raises(UserError, match=f"piece 0 has length {length}"):
        llama2c.read(exported / "model.bin", tmp_path / "tokenizer.bin")


@pytest.mark.parametrize("size", [0, 3, 5, 1000])
def test_a_vocabulary_that_ends_early(exported: Path, tmp_path: Path, size: int):
    (tmp_path / "tokenizer.bin").write_bytes((exported / "tokenizer.bin").read_bytes()[:size])
    with pytest.raises(UserError, match=r"fewer pieces|has length"):
        llama2c.read(exported / "model.bin", tmp_path / "tokenizer.bin")


def test_what_is_no_file_is_one_sentence(exported: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)  # takes no room
    for path, tokenizer, told in [
        (tmp_path / "none.bin", exported / "tokenizer.bin", "none.bin: No such file"),
        (exported / "model.bin", tmp_path / "none.bin", "none.bin: No such file"),
        (tmp_path / "pipe", exported / "tokenizer.bin", "pipe: it is not a regular file"),
        (exported / "model.bin", tmp_path / "pipe", "pipe: it is not a regular file"),
        (exported / "model.bin", tmp_path, "Is a directory"),
        (exported / "model.bin", tmp_path / "large", "more than the [0-9,]* of any such file"),
        (exported / "model.bin", None, "give --tokenizer FILE"),
        (tmp_path, None, "model.bin: No such file"),
    ]:
        with pytest.raises(UserError, match=told):
            llama2c.read(path, tokenizer)


def test_the_vocabulary_of_another_model_is_refused(exported: Path, tmp_path: Path):
    small = Tokenizer.train(["the cat sat on the mat\n"] * 9, 280)
    small.save(tmp_path / "small.model")
    with pytest.raises(UserError, match="small.model has 280 pieces but .*model.bin 512"):
        llama2c.read(exported / "model.bin", tmp_path / "small.model")
