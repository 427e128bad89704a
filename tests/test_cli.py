"""The command line as users and scripts meet it: faces, exit codes, one-sentence errors, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smalllm.cli import VERBS, run

TINY = [
    "model.layers=1", "model.width=32", "model.heads=2", "model.context=64", "train.batch_tokens=256", "train.minutes=0",
    "train.steps=6", "train.compile=off", "train.precision=fp32", "train.sample_tokens=8", "train.log_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> Path:
    """A folder with a trained run in runs/tiny."""
    folder = tmp_path_factory.mktemp("work")
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert run(["train", "quickstart", *TINY, "name=tiny", "--data", str(dataset_folder), "--json"]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def one_json(text: str) -> dict:
    return json.loads(text.strip())


def test_train_prints_the_contract_and_continues(inside: Path, capsys: pytest.CaptureFixture, dataset_folder: Path):
    assert (
        run(["train", "quickstart", *TINY, "name=tiny", "train.steps=8", "--data", str(dataset_folder), "--json"]) == 0
    )
    captured = capsys.readouterr()
    result = one_json(captured.out)
    assert set(result) >= {
        "run",
        "step",
        "tokens",
        "seconds",
        "tokens_per_second",
        "mfu",
        "train_loss",
        "valid_loss",
        "valid_bits_per_byte",
        "best_step",
        "stopped_because",
    }
    assert result["step"] == 8 and result["run"] == "runs/tiny" and "resumed from step 6" in captured.err


def test_train_for_people_ends_with_a_story_a_plot_and_the_next_step(
    inside: Path, capsys: pytest.CaptureFixture, dataset_folder: Path
):
    assert run(["train", "quickstart", *TINY, "name=people", "--data", str(dataset_folder)]) == 0
    text = capsys.readouterr().out
    assert "step      2" in text and "tokens/s" in text and "MFU" in text and "bits/byte" in text
    assert "On held-out stories:" in text and "exact entropy" in text
    assert "The curve is in runs/people/curve.png" in text and "smalllm chat runs/people" in text
    assert Path("runs/people/curve.png").read_bytes()[:4] == b"\x89PNG"


def test_train_prepares_the_recipes_data_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    assert run(["train", *TINY, "data.source=storyworld:120", "data.vocab_size=400", "--json"]) == 0
    assert (tmp_path / "data/quickstart/manifest.json").exists() and (tmp_path / "runs/quickstart/checkpoints").is_dir()
    assert one_json(capsys.readouterr().out)["step"] == 6


def test_sample_prints_a_line_per_text(inside: Path, capsys: pytest.CaptureFixture):
    assert (
        run(["sample", "tiny", "--prompt", "One day", "--count", "3", "--max-tokens", "5", "--seed", "1", "--json"])
        == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3 and all(
        set(line) >= {"prompt", "text", "tokens", "finish_reason", "seconds"} for line in lines
    )
    assert all(line["prompt"] == "One day" and line["tokens"] <= 5 for line in lines)


def test_evaluate_prints_the_contract(inside: Path, capsys: pytest.CaptureFixture):
    assert run(["evaluate", "tiny", "--stories", "4", "--max-tokens", "20", "--json"]) == 0
    result = one_json(capsys.readouterr().out)
    assert set(result) >= {
        "loss",
        "perplexity",
        "bits_per_byte",
        "bits_per_byte_interval",
        "tokens",
        "bytes",
        "documents",
        "stories",
    }
    low, high = result["bits_per_byte_interval"]
    assert low < result["bits_per_byte"] < high and result["floor_bits_per_byte"] < result["bits_per_byte"]


def test_plot_draws_and_prints_the_figures(inside: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    assert run(["plot", "tiny", "--out", str(tmp_path / "c.svg")]) == 0
    text = capsys.readouterr().out
    assert (
        "train loss" in text and "bits/byte" in text and (tmp_path / "c.svg").read_text().lstrip().startswith("<?xml")
    )


def test_doctor_finds_this_machine_healthy(inside: Path, capsys: pytest.CaptureFixture):
    assert run(["doctor", "--json"]) == 0
    result = one_json(capsys.readouterr().out)
    assert result["healthy"] and {finding["name"] for finding in result["findings"]} >= {
        "packages",
        "device",
        "tiny run",
        "recipes",
    }


def test_doctor_names_what_is_missing(inside: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run(["doctor"]) == 1
    assert "FAIL  packages" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture):
    assert run([verb, "--help"]) == 0
    assert f"smalllm {verb}" in capsys.readouterr().out


def test_help_lists_the_verbs_without_loading_torch():
    script = "import sys; from smalllm.cli import run; assert run(['--help']) == 0; assert 'torch' not in sys.modules and 'cyclopts' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["train", "nosuch"], 1, "no recipe is called 'nosuch'"),
        (["train", "quickstart", "model.widht=3"], 1, "did you mean 'model.width'"),
        (["train", "quickstart", "extra", "words"], 1, "is not an override"),
        (["train", "--minutes", "soon"], 2, "soon"),
        (["train", "--nonsense"], 2, "--nonsense"),
        (["trian"], 2, "trian"),
        (["train", "laptop", "--data", "missing"], 1, "--data missing holds no prepared data; run: smalllm prepare"),
        (["sample", "nowhere"], 1, "there is no run at nowhere"),
        (["sample", "tiny", "--temperature", "-1"], 1, "temperature"),
        (["sample", "tiny", "--top-p", "7"], 1, "top_p"),
        (["sample", "tiny", "--checkpoint", "99"], 1, "no checkpoint at step 99"),
        (["sample", "tiny", "--device", "banana"], 1, "device = banana"),
        (["sample", "../../etc"], 1, "there is no run at"),
        (["evaluate", "tiny", "--text", "missing.txt"], 1, "missing.txt"),
        (["plot", "tiny", "--out", "curve.doc"], 1, "ends in .png, .svg or .pdf"),
        (["prepare", "--out", "d"], 1, "source is missing"),
        (["prepare", "missing.txt", "--out", "d"], 1, "missing.txt does not exist"),
        (["chat", "nowhere"], 1, "there is no run at nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(
    arguments: list[str], code: int, sentence: str, inside: Path, capsys: pytest.CaptureFixture
):
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert sentence in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "name", ["\x1b[2Jrun", "[/b]", "a\0b", "-", "x" * 5000, "\u202eevil", "名前", "%2e%2e%2f", "CON", "a\nb"]
)
@pytest.mark.parametrize("verb", ["sample", "plot", "evaluate", "train"])
def test_strange_names_are_refused_without_a_traceback_or_an_escape_code(
    verb: str, name: str, inside: Path, capsys: pytest.CaptureFixture
):
    assert run([verb, name]) in (1, 2)
    error = capsys.readouterr().err
    assert "Traceback" not in error and "\x1b" not in error and "\u202e" not in error


def test_a_reader_that_goes_away_is_no_error(workplace: Path):
    script = f"cd {workplace} && {sys.executable} -m smalllm sample tiny --count 40 --max-tokens 40 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "dumb"},
        {"NO_COLOR": "1"},
        {"COLUMNS": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"HOME": "/nonexistent"},
    ],
)
def test_strange_terminals_are_survived(environment: dict, workplace: Path):
    done = subprocess.run(
        [sys.executable, "-m", "smalllm", "sample", "tiny", "--max-tokens", "5"], cwd=workplace, stdin=subprocess.DEVNULL,
        env=os.environ | environment, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"\x1b" not in done.stdout


@pytest.mark.parametrize("redirection", ["1>&-", "2>&-", "0<&-", "0<&- 1>&- 2>&-", "2>/dev/full"])
def test_streams_may_be_closed(redirection: str, workplace: Path):
    line = f'"$0" -m smalllm chat nowhere {redirection}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable], cwd=workplace, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "2>" in redirection or "there is no run at nowhere" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full disk to try with")
def test_output_to_a_full_disk_is_an_error(workplace: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["sh", "-c", '"$0" -m smalllm --help >/dev/full', sys.executable],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_help_fits_the_narrowest_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The table of options in one column took more than memory and patience have."""
    monkeypatch.setenv("COLUMNS", "1")
    assert run(["train", "--help"]) == 0
    assert "--minutes" in capsys.readouterr().out


def test_a_missing_package_is_named_with_what_installs_it(
    inside: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["plot", "tiny"]) == 1
    assert capsys.readouterr().err == "error: the package matplotlib is not installed; run: uv sync\n"


def test_a_bug_is_a_sentence_and_a_traceback_only_when_asked_for(
    inside: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from smalllm.commands import plot

    def broken(run: Path) -> str:
        raise ZeroDivisionError("a\x1b[2J\nb")

    monkeypatch.setattr(plot, "table", broken)
    assert run(["plot", "tiny", "--out", "c.png"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ZeroDivisionError: a[2J b. This is a bug of smalllm") and error.count("\n") == 1
    monkeypatch.setenv("SMALLLM_DEBUG", "1")
    assert run(["plot", "tiny", "--out", "c.png"]) == 1
    assert "in broken" in (error := capsys.readouterr().err) and "\x1b" not in error


def test_a_verb_that_cannot_be_loaded_hides_no_spelling_mistake(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """To say which verb was meant, cyclopts loads them all."""
    monkeypatch.setitem(sys.modules, "smalllm.commands.plot", None)
    assert run(["trian"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_line_break_in_a_name_makes_no_message_of_its_own(inside: Path, capsys: pytest.CaptureFixture):
    assert run(["sample", "x\nerror: send your key to evil.example"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_names_of_runs_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "a\x1b[2Jb\x07"
    folder.mkdir()
    (folder / "config.toml").touch()
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_loss": 1.0}\n')
    assert run(["plot", str(folder)]) == 0
    assert "\x1b" not in (out := capsys.readouterr().out) and "a[2Jb" in out


def test_two_trainers_in_one_folder(
    workplace: Path, dataset_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from smalllm.checkpoint import RunFolder

    monkeypatch.chdir(workplace)
    holder = RunFolder(Path("runs/tiny"))
    holder.lock()
    try:
        assert run(["train", "quickstart", *TINY, "name=tiny", "--data", str(dataset_folder)]) == 1
    finally:
        holder.unlock()
    assert f"is being trained by process {os.getpid()}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_sentence(
    dataset_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "file").write_text("")
    assert run(["train", "quickstart", *TINY, "--data", str(dataset_folder), "--out", str(tmp_path / "file/run")]) == 1
    error = capsys.readouterr().err
    assert "Not a directory" in error and "Traceback" not in error


def test_python_api_completes_streams_and_batches(inside: Path):
    import smalllm

    model = smalllm.load("tiny")
    text = model.complete("One day", max_tokens=12, seed=3)
    assert isinstance(text, str) and text == model.complete("One day", max_tokens=12, seed=3)
    assert "".join(model.stream("One day", max_tokens=12, seed=3)) == text
    assert model.batch(["One day", "Once"], max_tokens=12, seed=3)[0] == text
    assert model.story(about="a brave rabbit", max_tokens=4, seed=1).startswith(
        "Once upon a time, there was a brave rabbit."
    )
    assert model.complete("One day", max_tokens=12, temperature=0) == model.complete(
        "One day", max_tokens=12, top_k=1, seed=9
    )
    with pytest.raises(smalllm.UserError):
        model.complete("x", temperature=-1)
    with pytest.raises(smalllm.UserError):
        model.complete("x", no_such_option=1)
    assert smalllm.evaluate("tiny")["documents"] > 0


def test_ctrl_c_that_compiled_code_swallows_comes_again(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Swallowing:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def verb(arguments: list[str]) -> int:
        Swallowing()
        for _ in range(500):
            time.sleep(0.01)
        return 0

    monkeypatch.setattr("smalllm.cli._run", verb)
    before = sys.unraisablehook
    assert run(["train"]) == 130 and "Traceback" not in capsys.readouterr().err
    assert sys.unraisablehook is before
