"""The scorecard of stories: do they end, loop, close their quotes, keep their people, copy; beside the same of the data.

Everything is counted offline. Shares of stories come with Wilson's interval, means with a bootstrap over stories, figures
of all stories together with a jackknife over stories; all are 95 %. The module knows nothing about terminals.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from smalllm.checkpoint import LoadedRun
from smalllm.config import UserError
from smalllm.data import storyworld
from smalllm.data.shards import TokenDataset, TokenSplit, within
from smalllm.evaluation import bootstrap_interval, trained_on_storyworld, validation_texts
from smalllm.generation import Completion, Generator, SamplingParams
from smalllm.judging.characters import changed_pronoun, lost_name, names
from smalllm.judging.novelty import Copy, TrainingText
from smalllm.tokenizer import Tokenizer
from smalllm.untrusted import content

STORY_SAMPLING = SamplingParams(max_tokens=1000, seed=0)
DATA_STORIES = 500  # of the data, that are measured beside those of the model
LOOP_WORDS = 15  # a span of so many words said twice is a loop: 0.2 % of genuine stories have one
COPIED_TOKENS = 50
KNOWN_TOKENS = 5_000_000  # of training text, whose words are known: some 20 MB, seconds
LARGEST_PROMPTS = 1 << 24  # bytes of a file
NORMAL_95 = 1.959964
KOLMOGOROV_95 = 1.358  # of the distance between two samples of one distribution, times sqrt(n m / (n + m))

QUOTES = (("“", "”"), ("«", "»"))
FINISHED = re.compile(r"""[.!?…]["'”’»)*]*\s*$""")
WORD = re.compile(r"[\w']+")
_FUNCTION_WORDS = """
    a about after again all also an and any are as at be because been but by came can could day did do for from
    get go got had has have he her him his how i if in into is it its just like little lived made make many me
    more my named no not now of on once one or our out over play said saw she so some story tell that the their
    them then there they thing this time to too up upon very was we went were what when where which who will with
    would write you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

# ── one story ──


@dataclass(frozen=True)
class Measures:
    """What is counted in one story; booleans become shares, the rest means."""

    mean_words: int
    repeated_4grams: float
    longest_repeat: int
    looping: bool
    quotes_balanced: bool
    sentences_finished: bool
    names_kept: bool
    pronouns_kept: bool
    known_words: float | None = None
    ended: bool | None = None
    prompt_followed: float | None = None
    copied_tokens: int | None = None
    copied_words: int | None = None
    copied_over_50: bool | None = None


@dataclass(frozen=True)
class Story:
    """A story to be judged: ``prompt`` is the part of ``text`` that was given, ``ended`` unknown for a text of the data."""

    text: str
    prompt: str = ""
    ended: bool | None = None
    words: list[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", WORD.findall(self.text.lower()))

    @classmethod
    def told(cls, completion: Completion) -> Story:
        return cls(completion.prompt + completion.text, completion.prompt, completion.finish_reason == "stop")

    def measures(self, copy: Copy | None = None, known: Set[str] = frozenset()) -> Measures:
        """All figures of this story; with the training data at hand ``copy`` is its longest copied span, and ``known`` are the
        words that it has."""
        repeat = longest_repeat(self.words)
        measured = Measures(
            mean_words=len(self.words),
            repeated_4grams=repeated(self.words, 4),
            longest_repeat=repeat,
            looping=repeat >= LOOP_WORDS,
            quotes_balanced=quotes_balanced(self.text),
            sentences_finished=FINISHED.search(self.text) is not None,
            names_kept=lost_name(self.text) is None,
            pronouns_kept=changed_pronoun(self.text) is None,
            known_words=share_known(WORD.findall(self.text[len(self.prompt) :].lower()), known) if known else None,
            ended=self.ended,
            prompt_followed=prompt_followed(self.prompt, self.text[len(self.prompt) :]),
        )
        if copy is None:
            return measured
        over = copy.tokens > COPIED_TOKENS
        return dataclasses.replace(measured, copied_tokens=copy.tokens, copied_words=copy.words, copied_over_50=over)


def repeated(words: Sequence[str], n: int) -> float:
    """Share of the n-grams of a text that stood in it before."""
    ngrams = _ngrams(words, n)
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def longest_repeat(words: Sequence[str]) -> int:
    """Words of the longest span that begins at two places of a text; the two may overlap.

    >>> longest_repeat("the cat sat and the cat ran".split()), longest_repeat("no no no no".split())
    (2, 3)
    """
    low, high = 0, max(0, len(words) - 1)
    while low < high:  # a text that repeats n words repeats n - 1
        middle = (low + high + 1) // 2
        ngrams = _ngrams(words, middle)
        low, high = (middle, high) if len(set(ngrams)) < len(ngrams) else (low, middle - 1)
    return low


def share_known(words: Sequence[str], known: Set[str]) -> float | None:
    """Share of the words that are known; None of no words. Young models invent some.

    >>> share_known(["a", "happiledly", "dog"], {"a", "dog", "cat"}) == 2 / 3
    True
    """
    return sum(word in known for word in words) / len(words) if words else None


def quotes_balanced(text: str) -> bool:
    """Whether every speech is closed: straight quotes come in pairs within a paragraph, or the next one opens with another
    (a speech of several paragraphs); the others are as many to the left as to the right."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n") if paragraph.strip()]
    for paragraph, following in zip(paragraphs, [*paragraphs[1:], ""], strict=False):
        if paragraph.count('"') % 2 and not following.startswith('"'):
            return False
    return all(text.count(left) == text.count(right) for left, right in QUOTES)


def prompt_followed(prompt: str, continuation: str) -> float | None:
    """Share of the prompt's content words that return in what follows, as they are or with an ending of one or two letters;
    None when it has none.

    >>> prompt_followed("Write a story with a dragon and a kite.", "Two dragons slept.")
    0.5
    """
    wanted = {word for word in WORD.findall(prompt.lower()) if len(word) > 2} - FUNCTION_WORDS
    said = set(WORD.findall(continuation.lower()))
    stems = said | {word[:-cut] for word in said for cut in (1, 2) if len(word) > cut + 2}
    return len(wanted & stems) / len(wanted) if wanted else None


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[offset:] for offset in range(n)), strict=False))


# ── many stories ──


def scorecard(
    stories: Sequence[Story],
    *,
    of_storyworld: bool = False,
    data: Sequence[Story] = (),
    copies: Callable[[Story], Copy] | None = None,
    known: Set[str] = frozenset(),
) -> dict[str, Any]:
    """The object under ``stories`` of `smalllm evaluate --json`; docs/evaluation.md tells every key.

    ``data`` are stories of the data that the same is measured on, for the key ``data``; ``copies`` finds what a story has
    copied from the training data, and ``known`` are the words that it has.
    """
    told = [copies(story) for story in stories] if copies else []
    card, intervals = _figures(stories, told, known)
    if data:
        card |= _lengths(stories, data)
        name, shares = _commonest_name(stories, data)
        card |= {"commonest_name": name, "commonest_name_share": shares[0]}
        intervals["commonest_name_share"] = share_interval(shares[0], len(stories))
        beside, spread = _figures(data, [copies(story) for story in data] if copies else [], known)
        for figures, of_data in zip((beside, spread), _variety(data[: len(stories)]), strict=True):
            figures |= of_data  # variety depends on how much there is, so of as many stories
        card["data"] = {**beside, "commonest_name_share": shares[1], "intervals": spread}
    return {**card, **(_consistency(stories, intervals) if of_storyworld else {}), "intervals": intervals}


def _figures(
    stories: Sequence[Story], copies: Sequence[Copy], known: Set[str]
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Figures and their intervals, by name."""
    copied = itertools.chain(copies, itertools.repeat(None))
    measured = [story.measures(copy, known) for story, copy in zip(stories, copied, strict=False)]
    card: dict[str, Any] = {"count": len(stories)}
    intervals: dict[str, tuple[float, float]] = {}
    for name in (entry.name for entry in dataclasses.fields(Measures)):
        values = [value for story in measured if (value := getattr(story, name)) is not None]
        if values:
            card[name] = sum(values) / len(values)
            intervals[name] = _interval(values)
    card["median_words"] = median([story.mean_words for story in measured]) if measured else 0
    for figures, of_all in zip((card, intervals), _variety(stories), strict=True):
        figures |= of_all
    if copies:
        longest = max(copies, key=lambda copy: copy.tokens)
        card |= {"longest_copied_tokens": longest.tokens, "longest_copied_text": longest.text}
        card["longest_copied_words"] = max(copy.words for copy in copies)
    return card, intervals


def _variety(stories: Sequence[Story]) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """How different the words of all stories together are, and the intervals."""
    found = {f"distinct_{n}": distinct(stories, n) for n in (1, 2, 3)}
    words = len({word for story in stories for word in story.words})
    shares = {name: share for name, (share, _) in found.items()}
    return {**shares, "distinct_words": words}, {name: interval for name, (_, interval) in found.items()}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if isinstance(values[0], bool):
        return share_interval(sum(values) / len(values), len(values))
    return bootstrap_interval(np.array(values, dtype=float), np.ones(len(values)))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``count`` (Journal of the American Statistical Association 22, 1927). A bootstrap
    of 200 stories that all ended would claim that every story ends.

    >>> [round(bound, 3) for bound in share_interval(1.0, 200)]
    [0.981, 1.0]
    """
    if not count:
        return 0.0, 1.0
    z = NORMAL_95
    middle, weight = share + z * z / (2 * count), 1 + z * z / count
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = (middle - reach) / weight, (middle + reach) / weight
    return low if share > 0 else 0.0, high if share < 1 else 1.0  # there they are only almost so, by rounding


def distinct(stories: Sequence[Story], n: int) -> tuple[float, tuple[float, float]]:
    """Different n-grams of all stories by their number (J. Li et al. 2016, arXiv 1510.03055), and its interval by the
    jackknife: a bootstrap draws stories twice, and so finds less variety than there is. It falls with the number of words."""
    ngrams = [Counter(_ngrams(story.words, n)) for story in stories]
    everywhere = Counter[tuple[str, ...]]()
    for counts in ngrams:
        everywhere.update(counts)
    total = everywhere.total()
    share = len(everywhere) / total if total else 0.0
    without = []
    for counts in ngrams:
        own = sum(everywhere[ngram] == count for ngram, count in counts.items())
        rest = total - counts.total()
        without.append((len(everywhere) - own) / rest if rest else share)
    error = math.sqrt((len(without) - 1) * float(np.var(without))) if without else 0.0
    return share, (max(0.0, share - NORMAL_95 * error), min(1.0, share + NORMAL_95 * error))


def _lengths(stories: Sequence[Story], data: Sequence[Story]) -> dict[str, float]:
    """The distance of the two distributions of lengths, and what chance alone exceeds once in 20 times."""
    ours, theirs = ([len(story.words) for story in some] for some in (stories, data))
    chance = KOLMOGOROV_95 * math.sqrt((len(ours) + len(theirs)) / (len(ours) * len(theirs)))
    return {"length_distance": length_distance(ours, theirs), "length_distance_by_chance": min(1.0, chance)}


def length_distance(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The largest difference between the shares of two samples that are at most so long (Kolmogorov & Smirnov).

    >>> length_distance([1, 2, 3, 4], [3, 4, 5, 6])
    0.5
    """
    points = np.unique([*ours, *theirs])
    one, other = (np.searchsorted(np.sort(some), points, side="right") / len(some) for some in (ours, theirs))
    return float(np.abs(one - other).max())


def _commonest_name(stories: Sequence[Story], data: Sequence[Story]) -> tuple[str | None, tuple[float, float]]:
    """The name that most stories of the data have, and the share of the stories that say it, the model's and the data's."""
    counted = Counter(name for story in data for name in sorted(names(story.text)))
    if not counted:
        return None, (0.0, 0.0)
    name = counted.most_common(1)[0][0]
    spoken = re.compile(rf"\b{re.escape(name)}\b")
    ours, theirs = ([spoken.search(story.text) is not None for story in some] for some in (stories, data))
    return name, (sum(ours) / len(ours), sum(theirs) / len(theirs))


def _consistency(stories: Sequence[Story], intervals: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """What the checker of the story world says."""
    reports = [storyworld.check(story.text) for story in stories]
    kinds = Counter(violation.kind for report in reports for violation in report.violations)
    card: dict[str, Any] = {}
    for name, values in (("consistent", [r.consistent for r in reports]), ("parsed", [r.parses for r in reports])):
        card[name] = sum(values) / len(values) if values else 0.0
        intervals[name] = share_interval(card[name], len(values))
    return {**card, "violations": dict(kinds.most_common())}


# ── a run ──


def tell(run: LoadedRun, count: int, sampling: SamplingParams, prompts: Sequence[str] = ("",)) -> list[Completion]:
    """So many stories, the prompts in turn; the same seed tells the same ones."""
    asked = [prompts[index % len(prompts)] for index in range(count)]
    return Generator(run.model, run.tokenizer).batch(asked, sampling)


def score_run(
    run: LoadedRun, told: Sequence[Completion], *, novelty: bool = True, of_storyworld: bool = False
) -> dict[str, Any]:
    """The scorecard of stories that a run has told, beside the first validation documents of its data. When the data is gone
    it lacks what needs it; without ``novelty`` it lacks what was copied. The checker of the story world is asked when the
    data, or the caller, is of that world."""
    stories = [Story.told(completion) for completion in told]
    try:
        dataset = TokenDataset.open(run.folder.data(), verify=False)
        data = [Story(text) for text in validation_texts(run, DATA_STORIES)]
    except UserError:
        return scorecard(stories, of_storyworld=of_storyworld)
    of_storyworld = of_storyworld or trained_on_storyworld(run)
    tokenizer = dataset.tokenizer()
    known = training_words(dataset.train, tokenizer)
    if not novelty:
        return scorecard(stories, of_storyworld=of_storyworld, data=data, known=known)
    training = TrainingText.of(dataset.train, dataset.manifest.vocab_size)
    copies = partial(_copy, training=training, tokenizer=tokenizer)
    card = scorecard(stories, of_storyworld=of_storyworld, data=data, copies=copies, known=known)
    return card | {"searched_tokens": training.tokens, "searched_share": training.covered}


def training_words(split: TokenSplit, tokenizer: Tokenizer) -> frozenset[str]:
    """The words of the first documents of training, ``KNOWN_TOKENS`` at most."""
    texts = (tokenizer.decode(ids.tolist()) for ids in within(split.iterate_documents(), KNOWN_TOKENS))
    return frozenset(word for text in texts for word in WORD.findall(text.lower()))


def _copy(story: Story, training: TrainingText, tokenizer: Tokenizer) -> Copy:
    """The longest copied span of what the model wrote. It is cut into tokens together with its prompt, as training text is."""
    given = len(tokenizer.encode(story.prompt)) if story.prompt else 0
    return training.longest_copy(tokenizer.encode(story.text)[given:], tokenizer)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line, empty lines left out; UserError when there is none."""
    try:
        lines = content(path, LARGEST_PROMPTS).decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"prompts = {path} cannot be read ({error.strerror}); give a file with one prompt a line"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"prompts = {path} is not UTF-8; save it as UTF-8") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts = {path} has no line with text; write one prompt a line")
    return prompts
