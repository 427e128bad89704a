"""Everything that docs/reliability.md promises, tried at full length, in parallel processes, with a table at the end:

uv run python tests/reliability                     all of it (about an hour on two cores)
uv run python tests/reliability T1 S5 --short       some of it, as in CI
uv run python tests/reliability T1:17               one case again, its folder kept when it fails
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402

torch.set_num_threads(1)  # before any child; bits depend on it, and so many processes share the machine

from smalllm.reliability import trials  # noqa: E402
from smalllm.reliability.trials import Outcome, Trial  # noqa: E402

GROUPS = ("training", "ranks", "data", "files", "server", "terminal")


def all_trials(groups: tuple[str, ...] = GROUPS) -> Iterator[Trial]:
    """The trials of each group, a module ``<group>_trials`` in this folder."""
    for group in groups:
        yield from __import__(f"{group}_trials").TRIALS


def main() -> int:
    options = _options()
    names = {word.partition(":")[0]: word.partition(":")[2] for word in options.trials}
    chosen = [trial for trial in all_trials(tuple(options.group or GROUPS)) if not names or trial.name in names]
    if unknown := set(names) - {trial.name for trial in chosen}:
        print(f"there is no trial {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [trial for trial in chosen if trial.short or not options.short]  # some have a shorter one of their own
    scratch = Path(tempfile.mkdtemp(prefix="smalllm-reliability-", dir=options.folder))
    outcomes = []
    for trial in chosen:
        count = options.cases or (trial.short if options.short else trial.full)
        cases = [int(names[trial.name])] if names.get(trial.name) else trials.some(trial, count)
        outcome = trials.run(trial, cases, scratch / trial.name.replace("/", "-"), options.workers)
        outcomes.append(outcome)
        print(line(outcome), file=sys.stderr, flush=True)
        for failure in outcome.failures[:5]:
            print(f"  case {failure.case}: {failure.message}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([record(outcome) for outcome in outcomes]))
    else:
        print(table(outcomes))
    if any(outcome.failures for outcome in outcomes):
        print(f"what failed is in {scratch}", file=sys.stderr)
        return 1
    shutil.rmtree(scratch, ignore_errors=True)
    return 0


def line(outcome: Outcome) -> str:
    return f"{outcome.trial.name:<8} {outcome.tries:>7} tries {len(outcome.failures):>4} failures {outcome.seconds:7.1f} s  {outcome.trial.promise}"


def record(outcome: Outcome) -> dict:
    return {
        "name": outcome.trial.name, "tries": outcome.tries, "seconds": round(outcome.seconds, 1),
        "failures": [asdict(failure) for failure in outcome.failures],
    }  # fmt: skip


def table(outcomes: list[Outcome]) -> str:
    """The table of docs/reliability.md."""
    rows = ["| | what | tries | failures | seconds |", "|---|---|---|---|---|"]
    rows += [
        f"| {outcome.trial.name} | {outcome.trial.promise} | {outcome.tries:,} | {len(outcome.failures)} | {outcome.seconds:.0f} |"
        for outcome in outcomes
    ]
    return "\n".join(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/reliability", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("trials", nargs="*", help="names, or NAME:CASE; left out, all")
    parser.add_argument("--short", action="store_true", help="as many cases as CI tries")
    parser.add_argument("--cases", type=int, default=0, help="so many cases of each")
    parser.add_argument("--group", action="append", choices=GROUPS, help="only these")
    parser.add_argument("--workers", type=int, default=0, help="processes at a time; 0: one per core")
    parser.add_argument("--folder", type=Path, help="where to try; left out, the system's temporary folder")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
