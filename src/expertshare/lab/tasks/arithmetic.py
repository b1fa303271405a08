"""Kinds `arith` (GSM8K-like), short worded problems, and `math` (MATH-like): solve, simplify, expand, evaluate,
differentiate. Both are answered step by step, with the arithmetic written.

Level n of `arith` has n steps (level 4: test only). A story starts with a count or with a product ("3 bags with 4
apples each") and goes on with gains, losses, doubling and halving.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from expertshare.lab.tasks.types import (
    DIFFERENCES,
    MAX_OPERAND,
    MAX_VALUE,
    MULTIPLIERS,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    Draft,
    Draw,
    Fact,
    Task,
    difference_from,
    one_of,
    sum_onto,
    worked,
)

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


WORDED = Task(
    name="arith",
    levels=(partial(_tell, num_steps=1), partial(_tell, num_steps=2), partial(_tell, num_steps=3)),
    beyond=partial(_tell, num_steps=4),
)

VARIABLES = ("x", "y", "z", "n", "t", "k", "a", "b")


def _solve(equation: str, facts: Sequence[Fact]) -> Draw:
    """Equations that one of the facts solves. equation: with places for the variable and the fact's numbers."""

    def draw(rng: Random) -> Draft:
        v, fact = rng.choice(VARIABLES), rng.choice(facts)
        asked = equation.format(v=v, left=fact.left, right=fact.right)
        return Draft(prompt=f"Solve {asked}.", reference=worked([fact], fact.result))

    return draw


def _simplify(rng: Random) -> Draft:
    """Coefficients stay at 2 or more, so that "1x" is never written."""
    v, right = rng.choice(VARIABLES), rng.randint(2, MAX_OPERAND)
    if rng.random() < 0.5:
        fact = Fact(rng.randint(2, MAX_VALUE - right), "+", right)
    else:
        fact = Fact(rng.randint(right + 2, MAX_VALUE), "-", right)
    prompt = f"Simplify {fact.left}{v} {fact.symbol} {fact.right}{v}."
    return Draft(prompt=prompt, reference=worked([fact], f"{fact.result}{v}"))


def _expand(rng: Random) -> Draft:
    v, fact, sign = rng.choice(VARIABLES), rng.choice(PRODUCTS), rng.choice("+-")
    final = f"{fact.left}{v} {sign} {fact.result}"
    return Draft(prompt=f"Expand {fact.left}({v} {sign} {fact.right}).", reference=worked([fact], final))


def _evaluate(rng: Random, num_terms: int = 1) -> Draft:
    """A product and so many more terms."""
    v, facts = rng.choice(VARIABLES), [rng.choice(PRODUCTS)]
    for _ in range(num_terms):
        value = facts[-1].result
        gains = value == 0 or (value < MAX_VALUE and rng.random() < 0.5)
        facts.append(sum_onto(rng, value) if gains else difference_from(rng, value))
    product, *terms = facts
    shifts = " ".join(f"{fact.symbol} {fact.right}" for fact in terms)
    prompt = f"Evaluate {product.left}{v} {shifts} at {v} = {product.right}."
    return Draft(prompt=prompt, reference=worked(facts, facts[-1].result))


def _evaluate_three_terms(rng: Random) -> Draft:
    """Level 4: one term more than training evaluates."""
    return _evaluate(rng, num_terms=2)


def _differentiate(rng: Random) -> Draft:
    v, power, factor = rng.choice(VARIABLES), rng.choice((2, 3)), rng.choice(MULTIPLIERS)
    sign, slope = rng.choice("+-"), rng.randint(2, MAX_VALUE)
    fact = Fact(power, "*", factor)
    lead = f"{fact.result}{v}" if power == 2 else f"{fact.result}{v}^2"
    prompt = f"Differentiate {factor}{v}^{power} {sign} {slope}{v}."
    return Draft(prompt=prompt, reference=worked([fact], f"{lead} {sign} {slope}"))


def _solve_two_steps(rng: Random) -> Draft:
    v, last = rng.choice(VARIABLES), rng.choice(QUOTIENTS)
    if last.left < MAX_VALUE and rng.random() < 0.5:
        shift = rng.randint(1, min(MAX_OPERAND, MAX_VALUE - last.left))
        first, sign = Fact(last.left + shift, "-", shift), "+"
    else:
        shift = rng.randint(1, min(MAX_OPERAND, last.left))
        first, sign = Fact(last.left - shift, "+", shift), "-"
    prompt = f"Solve {last.right}{v} {sign} {shift} = {first.left}."
    return Draft(prompt=prompt, reference=worked([first, last], last.result))


def _solve_both_sides(rng: Random) -> Draft:
    """a v - c = b v + d, so (a - b) v = c + d."""
    v, last = rng.choice(VARIABLES), rng.choice(QUOTIENTS)
    b = rng.randint(2, MAX_OPERAND)
    c = rng.randint(1, min(MAX_OPERAND, last.left - 1))
    d = last.left - c
    facts = [Fact(last.right + b, "-", b), Fact(d, "+", c), last]
    prompt = f"Solve {last.right + b}{v} - {c} = {b}{v} + {d}."
    return Draft(prompt=prompt, reference=worked(facts, last.result))


def _expand_and_collect(rng: Random) -> Draft:
    v, outer = rng.choice(VARIABLES), rng.choice(MULTIPLIERS)
    inner = [k for k in MULTIPLIERS if outer * k + 2 <= MAX_VALUE]
    lead, constant = Fact(outer, "*", rng.choice(inner)), Fact(outer, "*", rng.choice(inner))
    collected = Fact(lead.result, "+", rng.randint(2, min(MAX_OPERAND, MAX_VALUE - lead.result)))
    prompt = f"Expand {outer}({lead.right}{v} + {constant.right}) + {collected.right}{v}."
    final = f"{collected.result}{v} + {constant.result}"
    return Draft(prompt=prompt, reference=worked([lead, constant, collected], final))


def _expand_and_shift(rng: Random) -> Draft:
    v, product = rng.choice(VARIABLES), rng.choice(PRODUCTS)
    if product.result < MAX_VALUE and rng.random() < 0.5:
        last = sum_onto(rng, product.result)
    else:
        last = Fact(product.result, "-", rng.randint(1, min(MAX_OPERAND, product.result - 1)))
    prompt = f"Expand {product.left}({v} + {product.right}) {last.symbol} {last.right}."
    return Draft(prompt=prompt, reference=worked([product, last], f"{product.left}{v} + {last.result}"))


EASY: tuple[Draw, ...] = (
    _solve("{v} + {right} = {left}", DIFFERENCES),
    _solve("{v} - {right} = {left}", SUMS),
    _solve("{right}{v} = {left}", QUOTIENTS),
    _simplify,
)
MEDIUM: tuple[Draw, ...] = (_expand, _evaluate, _evaluate, _differentiate)
HARD: tuple[Draw, ...] = (_solve_two_steps, _solve_both_sides, _expand_and_collect, _expand_and_shift)

SYMBOLIC = Task(
    name="math",
    levels=(one_of(EASY), one_of(MEDIUM), one_of(HARD)),
    beyond=_evaluate_three_terms,
)
