"""The story world: it writes what it declares, scores it exactly and notices every contradiction."""

from __future__ import annotations

import hashlib
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalllm.data import storyworld as world

MANY = 20_000
PINNED = "e827e2c07fbd2f19735e79bbfc1f1466d77910528baf919740b95eb932f24007"
GOLDEN_INDEX = 41
GOLDEN = (
    "In a wooden bungalow not far from the peaceful harbour, there lived a tidy and sensible girl named "
    "Zoe. Zoe had brown eyes, a dimpled smile and a pocket full of handsome corks.\n\n"
    "One drowsy Sunday morning, Zoe took her little golden mitten to the peaceful apple orchard. Behind "
    "the damp bush, a stubborn and cheeky newt was watching five fuzzy doves. Zoe romped gaily among the "
    "lovely asters, and the golden mitten slipped away without a sound. With a heavy-hearted face, she "
    "sat down beside the mysterious tree and sobbed hoarsely.\n\n"
    "First she hunted hastily behind the shady shed, and then she rummaged among the fresh asters. Just "
    'then, a neighbourly rabbit named Ben came waddling past the sunlit gate. "What is the matter, little '
    'girl?" asked Ben patiently, and together they searched the apple orchard. "Fantastic!" cried Ben '
    "happily. Behind the leaning wheelbarrow lay the golden mitten!\n\n"
    '"Yes, you did it, Ben!" cried Zoe triumphantly and gave the rabbit a loving hug. Zoe had learned '
    "that good friends help you look."
)


@pytest.fixture(scope="module")
def told() -> list[world.Story]:
    return [world.story(7, index) for index in range(3_000)]


@pytest.fixture(scope="module")
def many() -> list[str]:
    return list(world.stories(11, 0, MANY))


# --- What is written is what is read --------------------------------------------------------------------------------


def test_every_story_is_consistent_and_scored_as_it_was_written(told: list[world.Story]) -> None:
    for story in told:
        report = world.check(story.text)
        assert report.consistent, (report, story.text)
        assert report.plot == story.plot
        assert report.log2_probability == pytest.approx(story.log2_probability, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(), index=st.integers(min_value=0))
def test_a_story_depends_on_its_seed_and_index_only(seed: int, index: int) -> None:
    story = world.story(seed, index)
    assert [story.text] == list(world.stories(seed, index, 1))
    assert list(world.stories(seed, index, 3))[0] == story.text
    assert world.log2_probability(story.text) == pytest.approx(story.log2_probability, abs=1e-9)


def test_stories_do_not_end_and_start_where_asked() -> None:
    endless = world.stories(5)
    first = [next(endless) for _ in range(12)]
    assert first[7:] == list(world.stories(5, 7, 5))
    assert len(set(first)) == 12


def test_the_stories_of_seed_42_never_change_without_a_new_version() -> None:
    digest = hashlib.sha256("\0".join(world.stories(42, 0, 100)).encode()).hexdigest()
    assert (world.WORLD_VERSION, digest) == (1, PINNED)


def test_a_story_written_out_in_full() -> None:
    assert world.story(42, GOLDEN_INDEX).text == GOLDEN


def test_the_opening_is_the_first_sentence() -> None:
    for index in range(200):
        opening = world.opening(3, index)
        assert world.story(3, index).text.startswith(opening + " ")
        assert re.fullmatch(r"[A-Z][^.!?]*\.", opening)


# --- What the stories are like --------------------------------------------------------------------------------------


def _words(element: world.Element, choose: Callable[[Iterable[int]], int]) -> int:
    """The fewest or most blanks (one for each word but the last) that the element can have."""
    if isinstance(element, world.Rule):
        return choose(sum(_words(e, choose) for e in alternative) for alternative in element.alternatives)
    if isinstance(element, world.Text):
        return len(re.findall(r"\s+", element.text))
    return choose(s.count(" ") for s in element.surfaces) if isinstance(element, world.Slot) else 0


def test_no_story_can_leave_the_word_bounds(many: list[str]) -> None:
    fewest, most = _words(world.STORY, min) + 1, _words(world.STORY, max) + 1
    assert fewest >= 60
    assert most <= 250
    assert all(fewest <= len(text.split()) <= most for text in many)


def test_vocabulary_size(many: list[str]) -> None:
    vocabulary = {word for text in many for word in re.findall(r"[a-z]+(?:[-'][a-z]+)*", text.lower())}
    assert 1_200 <= len(vocabulary) <= 1_800


def test_plots_are_many_and_equally_likely(told: list[world.Story]) -> None:
    counts = Counter(story.plot for story in told)
    assert len(world.PLOTS) == len(set(world.PLOTS)) >= 12
    assert set(counts) == set(world.PLOTS)
    expected = len(told) / len(world.PLOTS)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


def test_spelling_of_the_text(many: list[str]) -> None:
    wrong = re.compile(
        r" an? (?=an? )|\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]|  | \n|\n |\n{3}| [.,!?]|[.!?] [a-z]|\b(\w+) \1\b|[\[\]{}<>*/_=|]"
    )
    for text in many:
        assert text.isascii() and text[0].isupper() and text[-1] in '."!?'
        assert text.count('"') % 2 == 0
        found = wrong.search(text)
        assert found is None, text[max(0, found.start() - 30) : found.end() + 30]
        assert all(paragraph[0].isupper() or paragraph[0] == '"' for paragraph in text.split("\n\n"))


# --- Probability ----------------------------------------------------------------------------------------------------


def _derivations(elements: tuple[world.Element, ...], known: dict[str, world.Entry]) -> Iterator[tuple[str, float]]:
    """Every text of the sequence with the probability of its derivation, by brute force."""
    if not elements:
        yield "", 1.0
        return
    for text, p, remembered in _instances(elements[0], known):
        for rest, q in _derivations(elements[1:], remembered):
            yield text + rest, p * q


def _instances(
    element: world.Element, known: dict[str, world.Entry]
) -> Iterable[tuple[str, float, dict[str, world.Entry]]]:
    if isinstance(element, world.Text):
        return [(element.text, 1.0, known)]
    if isinstance(element, world.Pick):
        free = [e for e in element.entries if not any(e is known[other] for other in element.others)]
        return [(e[element.form], 1 / len(free), known | {element.variable: e}) for e in free]
    assert isinstance(element, world.Rule)
    share = 1 / len(element.alternatives)
    return [(t, p * share, known) for a in element.alternatives for t, p in _derivations(a, known)]


@pytest.mark.parametrize("name", ["creature", "treat", "spot", "bunch", "cuddle"])
def test_probabilities_of_all_texts_of_a_rule_add_up_to_one(name: str) -> None:
    rule = world._COMPILER.rule(name)
    derived = list(_derivations((rule,), {}))
    assert len({text for text, _ in derived}) == len(derived)
    assert math.fsum(p for _, p in derived) == pytest.approx(1, abs=1e-9)
    assert math.fsum(-p * math.log2(p) for _, p in derived) == pytest.approx(rule.bits, abs=1e-9)
    for text, p in random.Random(1).sample(derived, min(500, len(derived))):
        reader = world.Reader(text)
        assert rule.read(reader) and reader.at == len(text)
        assert reader.bits == pytest.approx(-math.log2(p), abs=1e-9)


def test_the_mean_information_is_the_entropy_of_the_grammar(told: list[world.Story]) -> None:
    bits = [-story.log2_probability for story in told]
    error = statistics.stdev(bits) / math.sqrt(len(bits))
    assert abs(statistics.fmean(bits) - world.STORY.bits) < 4 * error
    assert error < 0.01 * world.STORY.bits


def test_entropy_is_stable_between_seeds(many: list[str]) -> None:
    one, other = (world.entropy_bits_per_byte(texts) for texts in (many[:1500], world.stories(99, 0, 1500)))
    assert one == pytest.approx(other, rel=0.01)


def test_entropy_is_bits_over_bytes() -> None:
    pair = [world.story(1, 1), world.story(1, 2)]
    expected = -sum(s.log2_probability for s in pair) / sum(len(s.text) for s in pair)
    assert world.entropy_bits_per_byte(s.text for s in pair) == pytest.approx(expected, abs=1e-12)


def test_there_is_no_entropy_of_nothing_or_of_other_texts() -> None:
    with pytest.raises(ValueError, match="no stories"):
        world.entropy_bits_per_byte([])
    with pytest.raises(ValueError, match="character 0"):
        world.entropy_bits_per_byte([world.story(1, 1).text, "Call me Ishmael."])


# --- One text, one derivation ---------------------------------------------------------------------------------------


def test_the_grammar_is_unambiguous() -> None:
    assert world.defects() == []


@pytest.mark.parametrize(
    "grammar",
    [
        "story:\n- The [bug] sat.\n- The [bug] sat.",
        "story:\n- The end.\n- The end. Really.",
        "story:\n- The [bug] sat.\n- The moth flew.\n- The [critter] sat.\n- The cow sat.",
        "story:\n- [one]\n- [two]\none:\n- A [bug] came.\ntwo:\n- A moth came.",
        "story:\n- Two [bug]s came.",
        "story:\n- Two [bug][critter] came.",
        "story:\n- [x=trait] {x}\n- [trait]",
    ],
)
def test_an_ambiguous_grammar_is_noticed(grammar: str) -> None:
    assert world.defects(world._Compiler(grammar).rule("story"))


def test_a_table_whose_words_run_into_each_other_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tuple(world._entry("pair", word) for word in ("tea", "tea cosy"))
    monkeypatch.setitem(world.TABLES, "pair", pair)
    assert world.defects(world._Compiler("story:\n- A [pair] stood there.").rule("story"))


# --- Contradictions -------------------------------------------------------------------------------------------------


def _references(seed: int, index: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, world.Reference, str]]:
    """Where each reference of a story stands, and its text."""
    found = []
    tell = world.Reference.tell

    def spy(self: world.Reference, teller: world.Teller) -> None:
        at = sum(map(len, teller.text))
        tell(self, teller)
        found.append((at, self, teller.text[-1]))

    with monkeypatch.context() as patch:
        patch.setattr(world.Reference, "tell", spy)
        world.story(seed, index)
    return found


def test_every_wrong_reference_is_caught_with_its_kind_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, kinds = random.Random(3), set()
    for index in range(150):
        text = world.story(23, index).text
        for at, reference, right in _references(23, index, monkeypatch):
            wrong = draw.choice(sorted(reference.surfaces - {right}))
            report = world.check(text[:at] + wrong + text[at + len(right) :])
            assert report.parses and report.log2_probability is None
            assert [(v.kind, v.position) for v in report.violations] == [(reference.kind, at)]
            assert f'"{wrong}"' in report.violations[0].message and f'"{right}"' in report.violations[0].message
            kinds.add(reference.kind)
    assert kinds >= {"names", "pronouns", "kinds", "objects", "colours", "places", "helper", "ending", "days"}


def _story_of(plot: str, pattern: str) -> tuple[str, re.Match[str]]:
    """A story of the plot whose text matches the pattern."""
    for index in range(5_000):
        story = world.story(42, index)
        if story.plot == plot and (found := re.search(pattern, story.text, re.DOTALL)):
            return story.text, found
    raise AssertionError(f"no story matches {pattern!r}")


def _swap(text: str, found: re.Match[str], group: str, word: str) -> str:
    return text[: found.start(group)] + word + text[found.end(group) :]


@pytest.mark.parametrize(
    ("plot", "pattern", "word", "kind"),
    [
        # Each pattern marks the word `x` that is replaced.
        ("lost and found", r"there lived an? .* boy named (?P<x>\w+)\.", "Lily", "names"),
        ("lost and found", r"\n\n(?P<x>\w+) gave \w+ a \w+ hug", "Zoe", "names"),
        ("lost and found", r"(?P<x>He|She) loved", "They", "pronouns"),
        ("lost and found", r"with (?P<x>his|her) \w+ \w+ \w+\.", "its", "pronouns"),
        ("lost and found", r"was peeping .* It was the (?P<x>\w+)!", "teapot", "objects"),
        ("lost and found", r"lay the (?P<x>\w+) \w+!", "turquoise", "colours"),
        ("lost and found", r"searched the (?P<x>maple grove|herb garden|playground|old mill)", "duck pond", "places"),
        ("lost and found", r"Thank you, (?P<x>\w+)[,!]", "Zoe", "helper"),
        ("lost and found", r"little (?P<x>girl|boy)\?", "badger", "kinds"),
        ("lost and found", r"\w+ felt (?P<x>sad|worried|upset|lonely) and", "joyful", "feelings"),
        ("promise kept", r"evening (?:he|she) (?P<x>baked a honey cake) for", "sang a lullaby", "ending"),
        ("promise kept", r"First I must (?P<x>paint a picture) for", "knit a scarf", "ending"),
        ("promise kept", r"that (?P<x>true friends keep their word)\.$", "practice makes progress", "ending"),
        ("running a race", r" year, and \w+ felt (?P<x>\w+) and \w+\.$", "gloomy", "ending"),
        ("running a race", r"It was the [\w ]+ (?P<x>Monday|Friday) of", "Tuesday", "days"),
        ("learning a skill", r"one \w+ \w+, \w+ could (?P<x>swim|dance|knit) as well", "juggle", "ending"),
        ("getting lost and finding home", r"home to the (?P<x>cottage|cabin|hut|house) ", "windmill", "places"),
        ("storm and shelter", r"a rainbow \w+ over the (?P<x>[\w ]+)\.", "maple grove", "places"),
        ("storm and shelter", r"Thank you, (?P<x>\w+)!", "Zoe", "helper"),
        ("telling the truth", r"\. \"Where is my \w+ (?P<x>\w+)\?", "umbrella", "objects"),
        ("new neighbour", r"knocked on the (?P<x>\w+) door", "spotted", "colours"),
        ("sharing", r"half of the (?P<x>\w+) to", "pumpkin", "objects"),
    ],
)
def test_planted_contradictions(plot: str, pattern: str, word: str, kind: str) -> None:
    text, found = _story_of(plot, pattern)
    assert found["x"] != word
    report = world.check(_swap(text, found, "x", word))
    assert (kind, found.start("x")) in {(v.kind, v.position) for v in report.violations}, report
    assert report.parses and not report.consistent


def test_a_story_may_contradict_itself_more_than_once() -> None:
    text, found = _story_of("lost and found", r"named (?P<x>\w+)")
    others = [name for name in ("Lily", "Tom", "Emma") if name not in text]
    wrong = text[: found.end()] + text[found.end() :].replace(found["x"], others[0])
    report = world.check(wrong)
    assert report.parses and len(report.violations) >= 3
    assert {v.kind for v in report.violations} <= {"names", "helper"}


# --- Texts that are no stories --------------------------------------------------------------------------------------


def _is_grammar(report: world.Report) -> bool:
    return not report.parses and report.violations[-1].kind == "grammar" and report.log2_probability is None


def test_a_story_cut_off_anywhere_is_noticed_there() -> None:
    for index in range(8):
        text = world.story(8, index).text
        for end in range(index, len(text), 3):
            report = world.check(text[:end])
            assert _is_grammar(report)
            assert end - 40 <= report.violations[-1].position <= end


@pytest.mark.parametrize("junk", [" ", "\n", ".", " The end.", "x", "\0", " Once upon a time"])
def test_junk_behind_a_story_is_noticed_there(junk: str, told: list[world.Story]) -> None:
    for story in told[:50]:
        report = world.check(story.text + junk)
        assert _is_grammar(report)
        assert report.violations[-1].position == len(story.text)


def test_a_letter_changed_anywhere_is_noticed(told: list[world.Story]) -> None:
    for story in told[:3]:
        for at in range(len(story.text)):
            assert not world.check(story.text[:at] + "#" + story.text[at + 1 :]).consistent


def test_sentences_in_another_order_are_no_story(told: list[world.Story]) -> None:
    draw = random.Random(4)
    for story in told[:300]:
        sentences = re.split(r"(?<=[.!?\"]) ", story.text)
        one, other = sorted(draw.sample(range(len(sentences)), 2))
        sentences[one], sentences[other] = sentences[other], sentences[one]
        shuffled = " ".join(sentences)
        assert shuffled == story.text or not world.check(shuffled).consistent


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.characters(), max_size=200), cut=st.integers(0, 1500))
def test_no_text_makes_the_checker_raise(text: str, cut: int) -> None:
    begun = world.story(6, cut).text[:cut]
    for tried in (text, begun + text, text + begun):
        report = world.check(tried)
        assert report.parses or report.violations[-1].kind == "grammar"
        assert all(0 <= v.position <= len(tried) and v.message for v in report.violations)
        assert {v.kind for v in report.violations} <= set(world.KINDS)


@pytest.mark.parametrize("text", ["", "\ud800", "\0" * 1000, "Once upon a time, " * 60_000, "a" * 1_000_000])
def test_strange_and_long_texts_are_no_stories(text: str) -> None:
    assert _is_grammar(world.check(text))


def test_what_is_no_story_has_no_probability(told: list[world.Story]) -> None:
    with pytest.raises(ValueError, match=r"character \d+: grammar"):
        world.log2_probability(told[0].text[:-1])
    with pytest.raises(ValueError, match=r"character \d+: (helper|names)"):
        text, found = _story_of("lost and found", r"named (?P<x>\w+).* \w+, (?P<y>(?P=x))[!\"]")
        world.log2_probability(_swap(text, found, "y", "Lily" if found["y"] != "Lily" else "Tom"))


# --- The small world ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> list[world.Story]:
    return [world.story(7, index, small=True) for index in range(1_500)]


def test_the_small_world_has_few_plots_and_words(small: list[world.Story]) -> None:
    assert Counter(story.plot for story in small).keys() == set(world.PLOTS[: world.SMALL_PLOTS])
    girls, boys = ({entry["cap"] for entry in world.TABLES[table]} for table in ("girls", "boys"))
    named = {word for story in small for word in re.findall(r"[A-Z][a-z]+", story.text)}
    assert len(named & girls) == len(named & boys) == world.SMALL
    everywhere = {word for index in range(1_500) for word in world.story(7, index).text.split()}
    assert len({word for story in small for word in story.text.split()}) < 0.7 * len(everywhere)


def test_the_small_world_is_a_part_of_the_whole_one(small: list[world.Story]) -> None:
    for story in small[:300]:
        report = world.check(story.text)
        assert report.consistent and report.plot == story.plot
        assert report.small_log2_probability == pytest.approx(story.log2_probability, abs=1e-9)
        assert report.log2_probability is not None and report.log2_probability < story.log2_probability


def test_the_small_world_lacks_most_stories_of_the_whole_one(told: list[world.Story]) -> None:
    assert all(world.log2_probability(story.text, small=True) == -math.inf for story in told[:200])
    assert all(math.isfinite(world.log2_probability(story.text)) for story in told[:200])


def test_the_entropy_of_small_stories_is_that_of_the_small_world(
    small: list[world.Story], told: list[world.Story]
) -> None:
    texts = [story.text for story in small]
    bits = -sum(story.log2_probability for story in small)
    assert world.entropy_bits_per_byte(texts) == pytest.approx(bits / sum(map(len, texts)))
    mixed = [*texts[:10], told[0].text]
    assert world.entropy_bits_per_byte(mixed) == pytest.approx(
        -sum(map(world.log2_probability, mixed)) / sum(map(len, mixed))
    )


def test_small_stories_repeat_more_often_than_chance_allows_the_others(small: list[world.Story]) -> None:
    """Their mean information is the lower one by far, as their probabilities say."""
    mean = statistics.mean(-story.log2_probability for story in small)
    assert 100 < mean < 0.85 * world.STORY.bits
