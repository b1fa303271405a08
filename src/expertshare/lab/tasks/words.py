"""The world of kind `choice`: ten categories of twelve words, and properties of the animals."""

from __future__ import annotations


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


CATEGORIES: dict[str, tuple[str, ...]] = {
    "a metal": _words("iron copper silver gold tin zinc lead nickel steel bronze brass cobalt"),
    "an animal": _words("dog cat horse cow goat eagle owl crow parrot shark whale trout"),
    "a flower": _words("tulip rose lily daisy iris poppy violet lotus orchid jasmine dahlia peony"),
    "an instrument": _words("violin piano flute drum guitar harp cello trumpet oboe banjo organ horn"),
    "a color": _words("red blue green yellow black white brown pink purple gray cyan beige"),
    "a fruit": _words("pear plum grape lemon mango peach cherry melon fig kiwi banana papaya"),
    "a tool": _words("hammer saw drill wrench pliers axe shovel rake file chisel knife ladder"),
    "a vehicle": _words("car bus train truck bike boat ship plane tram van taxi ferry"),
    "a garment": _words("shirt coat hat sock shoe glove scarf dress skirt jacket belt boot"),
    "a body part": _words("arm leg hand foot nose ear eye mouth knee elbow neck thumb"),
}

# Two hops: the word names an animal, the animal has the property.
PROPERTIES: dict[str, frozenset[str]] = {
    "can fly": frozenset(_words("eagle owl crow parrot")),
    "lives in water": frozenset(_words("shark whale trout")),
    "has four legs": frozenset(_words("dog cat horse cow goat")),
    "has feathers": frozenset(_words("eagle owl crow parrot")),
    "has fins": frozenset(_words("shark whale trout")),
}
