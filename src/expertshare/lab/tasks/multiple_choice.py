"""Kind `choice` (ARC-like): four options, one right. The answer names the option.

Level 1 asks for a category, level 2 for the odd one out, level 3 compares numbers, needs a sum, or asks for
a property of an animal (two hops). Its world: ten categories of twelve words, and properties of the animals.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from expertshare.lab.tasks.types import DIFFERENCES, MAX_VALUE, SUMS, Draft, Task, one_of

_CATEGORIES = {
    "a metal": "iron copper silver gold tin zinc lead nickel steel bronze brass cobalt",
    "an animal": "dog cat horse cow goat eagle owl crow parrot shark whale trout",
    "a flower": "tulip rose lily daisy iris poppy violet lotus orchid jasmine dahlia peony",
    "an instrument": "violin piano flute drum guitar harp cello trumpet oboe banjo organ horn",
    "a color": "red blue green yellow black white brown pink purple gray cyan beige",
    "a fruit": "pear plum grape lemon mango peach cherry melon fig kiwi banana papaya",
    "a tool": "hammer saw drill wrench pliers axe shovel rake file chisel knife ladder",
    "a vehicle": "car bus train truck bike boat ship plane tram van taxi ferry",
    "a garment": "shirt coat hat sock shoe glove scarf dress skirt jacket belt boot",
    "a body part": "arm leg hand foot nose ear eye mouth knee elbow neck thumb",
}
# Two hops: the word names an animal, the animal has the property.
_PROPERTIES = {
    "can fly": "eagle owl crow parrot",
    "lives in water": "shark whale trout",
    "has four legs": "dog cat horse cow goat",
    "has feathers": "eagle owl crow parrot",
    "has fins": "shark whale trout",
}
CATEGORIES, PROPERTIES = (
    {name: tuple(words.split()) for name, words in table.items()} for table in (_CATEGORIES, _PROPERTIES)
)
_CATEGORY_NAMES = tuple(CATEGORIES)
_ANIMALS = CATEGORIES["an animal"]


def _pose(rng: Random, question: str, right: str, wrong: Sequence[str], steps: str | None = None) -> Draft:
    """Shuffle the options; the answer is the right one, after the steps that lead to it if there are any."""
    options = [right, *wrong]
    rng.shuffle(options)
    prompt = f"{question}: {', '.join(options[:-1])} or {options[-1]}?"
    return Draft(prompt=prompt, reference=f"{steps}\n#### {right}" if steps else f"#### {right}")


def _category(rng: Random) -> Draft:
    asked, *others = rng.sample(_CATEGORY_NAMES, 4)
    wrong = [rng.choice(CATEGORIES[name]) for name in others]
    return _pose(rng, f"Which of these is {asked}", rng.choice(CATEGORIES[asked]), wrong)


def _odd_one_out(rng: Random) -> Draft:
    asked, other = rng.sample(_CATEGORY_NAMES, 2)
    question = f"Which of these is not {asked}"
    return _pose(rng, question, rng.choice(CATEGORIES[other]), rng.sample(CATEGORIES[asked], 3))


def _extreme(rng: Random) -> Draft:
    numbers = sorted(rng.sample(range(MAX_VALUE + 1), 4))
    largest = rng.random() < 0.5
    right = numbers.pop(-1 if largest else 0)
    question = f"Which of these is the {'largest' if largest else 'smallest'}"
    return _pose(rng, question, str(right), [str(n) for n in numbers])


def _equals(rng: Random) -> Draft:
    """Wrong options lie near the right one, so that a guess of the size does not help."""
    fact = rng.choice(SUMS if rng.random() < 0.5 else DIFFERENCES)
    near = [n for n in range(fact.result - 5, fact.result + 6) if n != fact.result and 0 <= n <= MAX_VALUE]
    wrong = [str(n) for n in rng.sample(near, 3)]
    question = f"Which of these equals {fact.left} {fact.symbol} {fact.right}"
    return _pose(rng, question, str(fact.result), wrong, steps=fact.text)


def _property(rng: Random) -> Draft:
    asked = rng.choice(tuple(PROPERTIES))
    has, lacks = ([a for a in _ANIMALS if (a in PROPERTIES[asked]) == owned] for owned in (True, False))
    return _pose(rng, f"Which of these {asked}", rng.choice(has), rng.sample(lacks, 3))


def _neither(rng: Random) -> Draft:
    """Level 4: two exclusions, where training has one."""
    first, second, other = rng.sample(_CATEGORY_NAMES, 3)
    wrong = [*rng.sample(CATEGORIES[first], 2), rng.choice(CATEGORIES[second])]
    question = f"Which of these is not {first} and not {second}"
    return _pose(rng, question, rng.choice(CATEGORIES[other]), wrong)


TASK = Task(
    name="choice",
    levels=(_category, _odd_one_out, one_of((_extreme, _equals, _property))),
    beyond=_neither,
)
