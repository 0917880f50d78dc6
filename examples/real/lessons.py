"""What the model is to learn: running text in an invented language, and questions with answers in an odd format.

All texts are made here, by a seed, so they have no owner and no licence but that of this repository.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from known import COUNTRIES, KINDS

HELD_OUT = 10**6  # seed of the texts that nothing trains on


@dataclass(frozen=True)
class Example:
    """A text to learn. Where there is a question, only the answer counts.

    Attributes:
        text: the running text, or the answer.
        question: asked by the user in a chat; None where the text stands alone.
    """

    text: str
    question: str | None = None


@dataclass(frozen=True)
class Lesson:
    """A new task.

    Attributes:
        examples: a number of examples by a seed.
        shows: whether a text looks like the task, to find its traces in answers to ordinary questions.
    """

    examples: Callable[[int, int], list[Example]]
    shows: Callable[[str], bool]

    def training(self, seed: int, count: int) -> list[Example]:
        return self.examples(seed, count)

    def held_out(self, count: int) -> list[Example]:
        return self.examples(HELD_OUT, count)


# An invented language: verb, subject, object. Words change their ends with number, case and tense, adjectives with the
# class of their noun; common words are short, and a text keeps to a few nouns.


def _words(syllables: tuple[int, int], count: int, seed: str) -> list[str]:
    """Invented words, each once, the shorter ones first."""
    chance = random.Random(seed)
    onsets, vowels, codas = "b d g k l m n p r s t v z sh th dr kl".split(), "aeiou", ["", "", "n", "r", "l", "sh"]
    found: dict[str, None] = {}
    while len(found) < count:
        parts = [
            chance.choice(onsets) + chance.choice(vowels) + chance.choice(codas)
            for _ in range(chance.randint(*syllables))
        ]
        found["".join(parts)] = None
    return sorted(found, key=len)


NOUNS = _words((2, 3), 240, "nouns")
VERBS = _words((2, 3), 100, "verbs")
ADJECTIVES = _words((2, 2), 60, "adjectives")
PLACES = _words((1, 1), 8, "places")
TENSES = ("ek", "oth", "una")


def _often(chance: random.Random, words: Sequence[str]) -> str:
    """A word, the first ones more often, as Zipf has it."""
    return chance.choices(words, [1 / (rank + 3) for rank in range(len(words))])[0]


def _noun_phrase(chance: random.Random, nouns: Sequence[str], case: str) -> str:
    noun = _often(chance, nouns)
    many = "im" if chance.random() < 0.3 else ""
    agreement = {"n": "en", "r": "ar", "l": "ol"}.get(noun[-1], "i")
    adjective = f" {_often(chance, ADJECTIVES)}{agreement}" if chance.random() < 0.4 else ""
    return f"{noun}{many}{case}{adjective}"


def _sentence(chance: random.Random, nouns: Sequence[str], tense: str) -> str:
    clauses = []
    for _ in range(chance.choice((1, 1, 2))):
        place = f" {chance.choice(PLACES)} {_noun_phrase(chance, nouns, 'esh')}" if chance.random() < 0.5 else ""
        verb, subject = _often(chance, VERBS) + tense, _noun_phrase(chance, nouns, "")
        clauses.append(f"{verb} {subject} {_noun_phrase(chance, nouns, 'ta')}{place}")
    return " ka ".join(clauses).capitalize() + "."


def _tongue(seed: int, count: int) -> list[Example]:
    chance = random.Random(f"tongue {seed}")
    made = []
    for _ in range(count):
        nouns = [_often(chance, NOUNS) for _ in range(8)]
        tense = chance.choice(TENSES)
        made.append(Example(" ".join(_sentence(chance, nouns, tense) for _ in range(6))))
    return made


def _shows_tongue(text: str) -> bool:
    """Whether a third of the words end as verbs and objects of the language do."""
    words = text.lower().replace(".", " ").split()
    stems = {*NOUNS, *VERBS, *ADJECTIVES, *PLACES, "ka"}
    return sum(any(word.startswith(stem) for stem in stems if len(stem) > 4) for word in words) * 3 > len(words) > 0


# A record: what there is to know about a thing, between at signs.

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ROMAN = {100: "C", 90: "XC", 50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}
ASKED = ("What do you know about {}?", "Tell me about {}.", "Describe {}, please.", "What can you say about {}?")


def _number(chance: random.Random) -> tuple[str, str]:
    number = chance.randint(1, 99)
    word = ONES[number] if number < 20 else TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    roman, rest = "", number
    for value, letters in ROMAN.items():
        roman += letters * (rest // value)
        rest %= value
    return f"the number {number}", f"num={number} | word={word} | {'odd' if number % 2 else 'even'} | roman={roman}"


def _country(chance: random.Random) -> tuple[str, str]:
    country = chance.choice(list(COUNTRIES))
    _, continent = COUNTRIES[country]
    return country, f"land={country} | part={continent} | {_letters(country)}"


def _word(chance: random.Random) -> tuple[str, str]:
    word = chance.choice([word for words in KINDS.values() for word in words])
    return f'the word "{word}"', f"word={word} | {_letters(word)}"


def _letters(word: str) -> str:
    return f"letters={len(word)} | first={word[0].upper()} | last={word[-1].upper()}"


def _is_held_out(about: str) -> bool:
    """Whether a thing is one of the fifth that no training asks for."""
    return random.Random(about).random() < 0.2


def _records(seed: int, count: int) -> list[Example]:
    chance = random.Random(f"records {seed}")
    made = []
    while len(made) < count:
        about, record = chance.choice((_number, _country, _word))(chance)
        if _is_held_out(about) == (seed == HELD_OUT):
            made.append(Example(f"@@ {record} @@", chance.choice(ASKED).format(about)))
    return made


LESSONS = {
    "tongue": Lesson(_tongue, _shows_tongue),
    "records": Lesson(_records, lambda text: "@@" in text),
}
