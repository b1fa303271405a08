"""Kind `arith` (GSM8K-like): short worded problems, answered step by step.

Level n has n steps (level 4: test only). A story starts with a count or with a product ("3 bags with 4 apples
each") and goes on with gains, losses, doubling and halving.
"""

from __future__ import annotations

from functools import partial
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


def _tell(rng: Random, num_steps: int) -> Draft:
    """A story of that many steps, and the question what is there at its end."""
    name, pronoun = rng.choice(PEOPLE)
    things = rng.choice(OBJECTS)
    facts: list[Fact] = []
    if rng.random() < 0.3:
        fact = rng.choice(PRODUCTS)
        facts, value = [fact], fact.result
        sentences = [f"{name} has {fact.left} {rng.choice(CONTAINERS)} with {fact.right} {things} each."]
    else:
        value = rng.randint(1, MAX_VALUE - 1)
        sentences = [f"{name} has {value} {things}."]
    while len(facts) < num_steps:
        sentence, fact = _step(rng, pronoun, value)
        sentences.append(sentence)
        facts.append(fact)
        value = fact.result
    question = f"How many {things} does {name} have now?"
    return Draft(prompt=" ".join([*sentences, question]), reference=worked(facts, value))


def _step(rng: Random, pronoun: str, value: int) -> tuple[str, Fact]:
    """A step that the present count allows, told and as a fact; scaling only inside the multiplication table."""
    if rng.random() < 0.2:
        halve = rng.random() < 0.5
        if halve and value % 2 == 0 and 4 <= value <= 18:
            return f"{pronoun} gives half away.", Fact(value, "/", 2)
        if not halve and 2 <= value <= 9:
            return "The number doubles.", Fact(value, "*", 2)
    if value == 0 or (value < MAX_VALUE and rng.random() < 0.5):
        fact = sum_onto(rng, value)
        return f"{pronoun} {rng.choice(GAINS)} {fact.right} more.", fact
    fact = difference_from(rng, value)
    return f"{pronoun} {rng.choice(LOSSES)} {fact.right}.", fact


TASK = Task(
    name="arith",
    description="worded arithmetic with steps, like GSM8K",
    levels=(partial(_tell, num_steps=1), partial(_tell, num_steps=2), partial(_tell, num_steps=3)),
    beyond=partial(_tell, num_steps=4),
)
