"""Kind `arith` (GSM8K-like): short worded problems, answered step by step.

Level n has n steps (level 4: test only). A story starts with a count or with a product ("3 bags with 4 apples
each") and goes on with gains, losses, doubling and halving.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from expertshare.lab.tasks.facts import MAX_VALUE, PRODUCTS, Fact, difference_from, sum_onto, worked
from expertshare.lab.tasks.types import Draft, Task

PEOPLE = (
    ("Tom", "He"), ("Sam", "He"), ("Ben", "He"), ("Max", "He"),
    ("Ann", "She"), ("Mia", "She"), ("Eva", "She"), ("Zoe", "She"),
)  # fmt: skip
OBJECTS = ("apples", "pens", "books", "coins", "cards", "shells", "stamps", "eggs", "cups", "stones")
CONTAINERS = ("bags", "boxes", "rows", "jars")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("loses", "sells", "drops", "breaks")


@dataclass(slots=True)
class _Story:
    """A story that is being told: sentences so far, facts so far, and the present count."""

    pronoun: str
    value: int
    sentences: list[str]
    facts: list[Fact] = field(default_factory=list)

    def tell(self, sentence: str, fact: Fact) -> None:
        """Add one step."""
        self.sentences.append(sentence)
        self.facts.append(fact)
        self.value = fact.result


def _gain(rng: Random, story: _Story) -> None:
    fact = sum_onto(rng, story.value)
    story.tell(f"{story.pronoun} {rng.choice(GAINS)} {fact.right} more.", fact)


def _loss(rng: Random, story: _Story) -> None:
    fact = difference_from(rng, story.value)
    story.tell(f"{story.pronoun} {rng.choice(LOSSES)} {fact.right}.", fact)


def _scale(story: _Story, *, halve: bool) -> None:
    if halve:
        fact = Fact(left=story.value, symbol="/", right=2, result=story.value // 2)
        story.tell(f"{story.pronoun} gives half away.", fact)
    else:
        fact = Fact(left=story.value, symbol="*", right=2, result=story.value * 2)
        story.tell("The number doubles.", fact)


def _step(rng: Random, story: _Story) -> None:
    """Continue with a step that the present count allows; scaling only inside the multiplication table."""
    if rng.random() < 0.2:
        halve = rng.random() < 0.5
        if halve and story.value % 2 == 0 and 4 <= story.value <= 18:
            return _scale(story, halve=True)
        if not halve and 2 <= story.value <= 9:
            return _scale(story, halve=False)
    gains = story.value == 0 or (story.value < MAX_VALUE and rng.random() < 0.5)
    return _gain(rng, story) if gains else _loss(rng, story)


def _tell(rng: Random, num_steps: int) -> Draft:
    name, pronoun = rng.choice(PEOPLE)
    things = rng.choice(OBJECTS)
    if rng.random() < 0.3:
        fact = rng.choice(PRODUCTS)
        opening = f"{name} has {fact.left} {rng.choice(CONTAINERS)} with {fact.right} {things} each."
        story = _Story(pronoun=pronoun, value=fact.result, sentences=[opening], facts=[fact])
    else:
        count = rng.randint(1, MAX_VALUE - 1)
        story = _Story(pronoun=pronoun, value=count, sentences=[f"{name} has {count} {things}."])
    while len(story.facts) < num_steps:
        _step(rng, story)
    question = f"How many {things} does {name} have now?"
    return Draft(prompt=" ".join([*story.sentences, question]), reference=worked(story.facts, str(story.value)))


def _one_step(rng: Random) -> Draft:
    return _tell(rng, 1)


def _two_steps(rng: Random) -> Draft:
    return _tell(rng, 2)


def _three_steps(rng: Random) -> Draft:
    return _tell(rng, 3)


def _four_steps(rng: Random) -> Draft:
    return _tell(rng, 4)


TASK = Task(
    name="arith",
    description="worded arithmetic with steps, like GSM8K",
    levels=(_one_step, _two_steps, _three_steps),
    beyond=_four_steps,
)
