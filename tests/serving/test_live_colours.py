"""The page's colours: readable in both themes, and ramps that lightness alone tells apart."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

STYLE = Path(__file__).parents[2] / "src" / "expertshare" / "serving" / "live" / "static" / "style.css"
BLOCKS = [
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for block in re.findall(r":root[^{]*\{([^}]*)\}", STYLE.read_text(encoding="utf-8"))
]
THEMES = dict(zip(("light", "dark, by the system", "dark, by the toggle"), BLOCKS, strict=True))
RAMP = [f"c{level}" for level in range(6)]


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio by WCAG 2."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_stands_out(theme: str) -> None:
    colours = THEMES[theme]
    pairs = [(f"on-{level}", level) for level in RAMP]
    pairs += [(text, ground) for text in ("ink", "soft") for ground in ("page", "card", "well")]
    pairs += [("a", "card"), ("b", "card"), ("on-accent", "a"), ("bad", "bad-card")]
    poor = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in poor.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("theme", THEMES)
def test_confidence_is_told_by_lightness_alone(theme: str) -> None:
    steps = [luminance(THEMES[theme][level]) for level in RAMP]
    assert steps == sorted(steps, reverse=theme == "light")
    assert all(contrast(THEMES[theme][low], THEMES[theme][high]) > 1.15 for low, high in pairwise(RAMP))


@pytest.mark.parametrize("theme", THEMES)
def test_a_lit_expert_stands_out_from_one_that_is_not(theme: str) -> None:
    colours = THEMES[theme]
    assert all(contrast(colours[side], colours["off"]) >= 3 for side in "ab")


def test_both_ways_to_the_dark_theme_lead_to_the_same_one() -> None:
    assert THEMES["dark, by the system"] == THEMES["dark, by the toggle"]
