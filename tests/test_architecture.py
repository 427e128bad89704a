"""The shape of the code: imports point down, every outside thing has one owner, nothing unsafe, everything explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "smalllm"

# A module imports only what stands before it. docs/architecture.md shows the same list.
ORDER = [
    "terminal", "untrusted", "files", "locks", "config", "hardware", "native.build", "native.words", "native.suffixes", "model", "native.kernels", "native.decode", "tokenizer", "conversation", "metrics", "ranks", "runtime", "checkpoint",
    "data.shards", "data.duplicates", "data.storyworld", "data.sources", "data.spool", "data.parts", "data.prepare", "data.batches", "ngrams",
    "decoder", "generation", "evaluation",
    "judging.comparison", "judging.sides", "judging.contest", "judging.novelty", "judging.characters", "judging.scorecard", "judging.judge", "judging.minimal_pairs", "judging.harness",
    "preflight",
    "training.schedule", "training.state", "training.optimizer", "training.objectives", "training.guards", "training.alarm", "training.saver", "training.validation", "training.verify", "training.setting_out", "training.past", "training.trainer",
    "cards", "planner", "forecast",
    "export.destination", "export.card", "export.names", "export.pieces", "export.huggingface_config", "export.fast_tokenizer", "export.huggingface", "export.gguf", "export.llamacpp", "export.certificate", "export.hub", "export.llama2c", "export.html",
    "reliability.trials", "reliability.disks", "reliability.promises",
    "plots", "reporting.dossier", "reporting.wording", "reporting.markup", "reporting.chart", "reporting.html", "reporting.markdown", "api", "deploy",
    "serve.protocol", "serve.meters", "serve.models", "serve.engine", "serve.report", "serve.guard", "serve.server",
    "speed.training", "speed.decoding", "speed.preparing", "speed.serving",
    "commands.train", "commands.prepare", "commands.sample", "commands.chat", "commands.serve", "commands.evaluate", "commands.export", "commands.import_", "commands.compare", "commands.report", "commands.plot", "commands.bench", "commands.plan", "commands.doctor", "commands.deploy",
    "cli", "__main__",
]  # fmt: skip
OWNERS = {
    "torch.distributed": {"ranks"},
    "wandb": {"metrics"},
    "tensorboard": {"metrics"},
    "torch.utils.tensorboard": {"metrics"},
    "sentencepiece": {"tokenizer"},
    "huggingface_hub": {"data.sources", "export.hub"},
    "gguf": {"export.gguf"},
    "xllamacpp": {"export.llamacpp"},
    "transformers": {"export.certificate"},
    "lm_eval": {"judging.harness"},
    "httpx2": {"judging.judge"},
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
    "dill": set(),
    "joblib": set(),
}
MIXED_BAGS = {"utils", "util", "common", "helpers", "misc", "base", "core", "manager"}
OVERRIDES = {"forward", "backward", "step", "render"}  # of torch and rich, documented there


def _name(path: Path) -> str:
    """src/smalllm/data/shards.py -> data.shards; an __init__ is its package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
PACKAGES = {_name(path) for path in SOURCE.rglob("__init__.py")}  # the root one ("") resolves its names lazily
MODULES = {name: tree for name, tree in TREES.items() if name not in PACKAGES}
every_module = pytest.mark.parametrize("name", TREES)


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a module; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where things come from"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _own_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module of smalllm) that is imported; "" for a name of the package itself."""
    for line, dotted in _imports(tree):
        first, _, rest = dotted.partition(".")
        if first == "smalllm":
            yield line, next((known for known in (rest, rest.rpartition(".")[0]) if known in MODULES), "")


def _calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every call whose function is a plain or dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


# ── the tree ──


def test_every_module_is_in_the_list():
    assert sorted(MODULES) == sorted(ORDER)


def test_documentation_shows_the_same_list():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Import order")[2]
    fenced = re.search(r"```text\n(.*?)```", section, re.DOTALL)
    assert fenced is not None and fenced[1].split() == ORDER


def test_layout_is_two_levels_deep():
    assert [name for name in TREES if name.count(".") > 1] == []


def test_no_module_is_a_mixed_bag():
    assert [name for name in TREES if MIXED_BAGS & set(name.split("."))] == []


def test_a_verb_is_a_module_with_a_function_of_its_name():
    from smalllm.cli import VERBS, function_name

    verbs = {function_name(verb) for verb in VERBS}
    assert {f"commands.{verb}" for verb in verbs} == {name for name in MODULES if name.startswith("commands.")}
    for verb in verbs:
        functions = {node.name for node in MODULES[f"commands.{verb}"].body if isinstance(node, ast.FunctionDef)}
        assert verb in functions


# ── imports ──


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name):
    allowed = {*ORDER[: ORDER.index(name)], ""}
    wrong = [f"line {line}: {other}" for line, other in _own_imports(TREES[name]) if other not in allowed]
    assert wrong == [], f"{name} imports what stands after it"


@pytest.mark.parametrize("name", sorted(PACKAGES - {""}))
def test_packages_import_nothing(name):
    assert list(_imports(TREES[name])) == []


def test_the_model_needs_only_torch_and_config():
    foreign = [
        dotted
        for _, dotted in _imports(TREES["model"])
        if dotted.split(".")[0] not in sys.stdlib_module_names | {"torch"}
    ]
    assert foreign == ["smalllm.config.ModelConfig"]


@every_module
def test_one_owner_for_each_outside_thing(name):
    wrong = [
        f"line {line}: {dotted}"
        for line, dotted in _imports(TREES[name])
        for thing, owners in OWNERS.items()
        if f"{dotted}.".startswith(f"{thing}.") and name not in owners
    ]
    assert wrong == []


def test_importing_costs_nothing():
    assert _loaded("import smalllm") == ""
    assert _loaded("import smalllm.cli; smalllm.cli.run(['--help'])") == ""


def _loaded(code: str) -> str:
    """The heavy packages that a fresh Python has loaded after this code."""
    heavy = ("torch", "numpy", "matplotlib", "pyarrow", "huggingface_hub", "sentencepiece")
    probe = f"{code}\nimport sys; print(*(m for m in {heavy} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    return done.stderr.strip()


def test_public_names_exist():
    import smalllm

    for name in smalllm.__all__:
        assert getattr(smalllm, name) is not None
    with pytest.raises(AttributeError):
        _ = smalllm.no_such_name


# ── nothing unsafe ──


@every_module
def test_nothing_is_executed_from_data(name):
    forbidden = {"exec", "eval", "compile", "__import__", "torch.load", "torch.save", "os.system"}
    wrong = [f"line {line}: {call}" for line, call in _calls(TREES[name]) if call in forbidden]
    assert wrong == []
    assert [line for line, dotted in _imports(TREES[name]) if dotted in ("torch.load", "torch.save")] == []


@every_module
def test_only_deploy_runs_ssh(name):
    programs = {"ssh", "scp", "sftp", "rsync"}
    texts = [node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant) and node.value in programs]
    assert texts == [] or name == "deploy"


@every_module
def test_only_faces_print_and_exit(name):
    if name == "cli" or name.startswith(("commands.", "serve.")):
        return
    wrong = [
        f"line {line}: {call}" for line, call in _calls(TREES[name]) if call in ("print", "sys.exit", "exit", "quit")
    ]
    assert wrong == []


@every_module
def test_modules_keep_their_names(name):
    """Compiled and wrapped models are not renamed, so no prefix is ever cut off."""
    documentation = {id(node.value) for node in ast.walk(TREES[name]) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]
    assert [text for text in texts if "_orig_mod" in text or text == "module."] == []


# ── everything is explained ──


def _protocol_methods() -> set[str]:
    """Methods declared by the Protocols of the program: documented there, exempt where they are implemented."""
    classes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    protocols = [node for node in classes if "Protocol" in map(ast.unparse, node.bases)]
    return {item.name for node in protocols for item in node.body if isinstance(item, ast.FunctionDef)}


def _undocumented(tree: ast.Module) -> Iterator[str]:
    """Public modules, classes and functions without a docstring, and methods of more than three lines."""
    exempt = _protocol_methods() | OVERRIDES
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"line {node.lineno}: {node.name}"
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(item, ast.FunctionDef) or item.name.startswith("_") or item.name in exempt:
                continue
            lines = (item.end_lineno or item.lineno) - item.body[0].lineno + 1
            if lines > 3 and not ast.get_docstring(item):
                yield f"line {item.lineno}: {node.name}.{item.name}"


@every_module
def test_everything_public_has_a_docstring(name):
    assert list(_undocumented(TREES[name])) == []


def test_the_rules_see_what_they_forbid():
    code = ast.parse("""
import pickle, torch.distributed as dist
from torch import load
from smalllm.data import shards
def act(): print(eval("1"))
class Thing:
    def work(self):
        a = 1
        b = 2
        c = 3
        return a + b + c
    def small(self): ...
""")
    assert [name for _, name in _imports(code)] == ["pickle", "torch.distributed", "torch.load", "smalllm.data.shards"]
    assert [name for _, name in _own_imports(code)] == ["data.shards"]
    assert {name for _, name in _calls(code)} == {"print", "eval"}
    assert list(_undocumented(code)) == ["the module", "line 5: act", "line 6: Thing", "line 7: Thing.work"]
