"""The people of a story: who is named, and whether a story keeps their names and their pronouns.

Offline heuristics for English children's stories, made to be silent when in doubt: they see some of the mistakes, and what
they report nearly always is one (docs/evaluation.md has the rates, measured on genuine stories). The module knows nothing
about models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

Pronoun = Literal["he", "she"]

FEMALE = frozenset(
    [
        "girl",
        "woman",
        "lady",
        "princess",
        "queen",
        "mother",
        "mom",
        "mommy",
        "mum",
        "mummy",
        "mama",
        "sister",
        "daughter",
        "grandma",
        "grandmother",
        "granny",
        "aunt",
        "niece",
        "wife",
        "fairy",
        "mermaid",
        "ballerina",
    ]
)
MALE = frozenset(
    [
        "boy",
        "man",
        "king",
        "prince",
        "father",
        "dad",
        "daddy",
        "papa",
        "brother",
        "son",
        "grandpa",
        "grandfather",
        "uncle",
        "nephew",
        "husband",
        "wizard",
        "knight",
        "gentleman",
    ]
)
ANYBODY = FEMALE | MALE | frozenset(
    ["adult", "angel", "animal", "animals", "ant", "baby", "baker", "bear", "bee", "bird", "boys", "bug", "bunny", "butterfly", "captain", "cat", "chef", "chicken", "child", "children", "clown", "cop", "cow", "crab", "crocodile", "deer", "doctor", "dog", "doll", "dolphin", "dragon", "driver", "duck", "elephant", "everyone", "farmer", "fireman", "fish", "fox", "friend", "friends", "frog", "ghost", "giant", "giraffe", "girls", "goat", "grandparents", "guard", "hen", "hippo", "horse", "judge", "kid", "kids", "kitten", "lion", "lizard", "mayor", "men", "monkey", "monster", "mouse", "neighbor", "neighbour", "nurse", "octopus", "owl", "owner", "parent", "parents", "people", "person", "pig", "pilot", "pirate", "police", "policeman", "puppy", "rabbit", "robot", "shark", "sheep", "shopkeeper", "snake", "somebody", "someone", "spider", "squirrel", "stranger", "teacher", "toddler", "turtle", "twin", "vet", "whale", "witch", "wolf", "women", "worm", "zebra"]
)  # fmt: skip
"""Nouns that a he or a she may stand for; a sentence with one of them is no evidence about the name in it."""
PRONOUNS: dict[str, Pronoun] = {
    "he": "he", "him": "he", "his": "he", "himself": "he", "she": "she", "her": "she", "hers": "she", "herself": "she",
}  # fmt: skip
NO_NAMES = frozenset(
    [
        "I",
        "Mom",
        "Mommy",
        "Mum",
        "Mummy",
        "Mama",
        "Mother",
        "Dad",
        "Daddy",
        "Papa",
        "Father",
        "Grandma",
        "Granny",
        "Grandmother",
        "Grandpa",
        "Grandfather",
        "Aunt",
        "Uncle",
        "God",
        "Christmas",
        "Halloween",
        "Easter",
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
        "Mr",
        "Mrs",
        "Miss",
        "Ms",
        "Dr",
        "Sir",
        "King",
        "Queen",
        "Prince",
        "Princess",
        "Santa",
        "English",
        "TV",
        "OK",
        "The",
        "A",
        "An",
        "He",
        "She",
        "It",
        "They",
        "We",
        "You",
        "His",
        "Her",
        "Its",
        "Their",
        "My",
        "Your",
        "Our",
        "This",
        "That",
        "There",
        "Then",
    ]
)

SPEECH = re.compile(r'"[^"\n]*"?|“[^”\n]*”?|«[^»\n]*»?')
SENTENCE_END = re.compile(r"""(?<=[.!?])["'”’»]*\s+|\n+""")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
LOWER_WORD = re.compile(r"\b[a-z][a-z'’]*")
WITHIN_SENTENCE = re.compile(r"(?<=[a-z,] )([A-Z][a-z]+)\b")
NAMING = re.compile(r"\b(?:named|called|name was|name is)\s+([A-Z][a-z]+)")
_PERSON = rf"\b(?:{'|'.join(sorted(FEMALE | MALE))})\b"
NAMING_NOUN = re.compile(
    rf"({_PERSON})(?:(?!{_PERSON})[^.!?,;]){{0,25}}?\b(?:named|called|name was|name is)\s+([A-Z][a-z]+)"
)


def without_speech(text: str) -> str:
    """The text of the teller alone: who "he" is in a speech, the speaker knows.

    >>> without_speech('Tom said, "She is here." He smiled.')
    'Tom said,   He smiled.'
    """
    return SPEECH.sub(" ", text)


def names(text: str) -> set[str]:
    """Names of the story: written with a capital inside a sentence of the teller, or given with "named" or "called", and
    never without capital.

    >>> sorted(names("One day, Tim and a Dog met a cat named Moss. The dog ran. Rain fell."))
    ['Moss', 'Tim']
    """
    told = without_speech(text)
    lower = set(LOWER_WORD.findall(told))
    found = {*WITHIN_SENTENCE.findall(told), *NAMING.findall(told)}
    return {name for name in found if name not in NO_NAMES and name.lower() not in lower}


# ── names ──


def lost_name(text: str) -> tuple[str, str] | None:
    """The name of the character that is named first, and the name that takes its place, if one does: the first is never said
    again from where the second begins, which is said at least twice and was never introduced by "named" or "called".

    >>> lost_name("There was a girl named Mia. Mia ran. Then Zoe fell. The tree saw Zoe cry.")
    ('Mia', 'Zoe')
    >>> lost_name("There was a girl named Mia. Mia ran. She saw Zoe. Mia waved to Zoe.") is None
    True
    """
    told, known = without_speech(text), names(text)
    introduced = [match[1] for match in NAMING.finditer(told) if match[1] in known]
    if not introduced:
        return None
    end = _places(text, introduced[0])[-1]
    for other in sorted(known - set(introduced)):
        places = _places(text, other)
        if len(places) >= 2 and places[0] > end:
            return introduced[0], other
    return None


def _places(text: str, name: str) -> list[int]:
    """Where a name stands, speech included: a character that is talked to is still there."""
    return [match.start() for match in re.finditer(rf"\b{name}\b", text)]


# ── pronouns ──


def changed_pronoun(text: str) -> str | None:
    """The name that is a he in one place and a she in another, if there is one. Evidence is, outside speech, in a paragraph:

    - "a girl named Mia";
    - a sentence that begins with the name, names nobody else, and goes on with "he" or "she";
    - such a sentence, when the next one begins with "He" or "She".

    >>> changed_pronoun("A girl named Mia lived here. Mia ran home. He was tired.")
    'Mia'
    >>> changed_pronoun("A girl named Mia lived here. Mia met a boy. He was tired.") is None
    True
    """
    seen: dict[str, set[Pronoun]] = defaultdict(set)
    for name, pronoun in evidence(text):
        seen[name].add(pronoun)
    return next((name for name, pronouns in seen.items() if len(pronouns) > 1), None)


def evidence(text: str) -> Iterator[tuple[str, Pronoun]]:
    """Names and the pronouns that belong to them, as far as it is certain."""
    told, known = without_speech(text), names(text)
    given: dict[str, Pronoun] = {name: _of_noun(noun) for noun, name in NAMING_NOUN.findall(told) if name in known}
    yield from given.items()
    for paragraph in told.split("\n"):
        yield from _evidence_of(NAMING_NOUN.sub(r"\2", paragraph), known, given)


def _evidence_of(paragraph: str, known: set[str], given: dict[str, Pronoun]) -> Iterator[tuple[str, Pronoun]]:
    """A pronoun is evidence only when nobody else of whom the paragraph has spoken can be meant."""
    subject, people = None, set[str]()
    for sentence in filter(WORD.search, SENTENCE_END.split(paragraph)):
        words = [re.sub(r"['’]s$", "", word) for word in WORD.findall(sentence)]
        if subject and words[0] in ("He", "She") and _alone(subject, people, PRONOUNS[words[0].lower()], given):
            yield subject, PRONOUNS[words[0].lower()]
        people |= {word for word in words if word in known or word.lower() in ANYBODY}
        said = {PRONOUNS[word.lower()] for word in words if word.lower() in PRONOUNS}
        object_too = len(said) > 1 or not {"him", "her"}.isdisjoint(words)  # the next "he" may be who was seen or met
        subject = None if object_too or words[0] not in known else words[0]
        if subject and {"he", "she"} & set(words) and _alone(subject, people, pronoun := said.pop(), given):
            yield subject, pronoun


def _alone(name: str, people: set[str], pronoun: Pronoun, given: dict[str, Pronoun]) -> bool:
    """Whether the pronoun can stand for nobody of these people but the name."""
    other = MALE if pronoun == "she" else FEMALE
    return not any(
        person != name and person.lower() not in other and given.get(person, pronoun) == pronoun for person in people
    )


def _of_noun(noun: str) -> Pronoun:
    return "she" if noun in FEMALE else "he"
