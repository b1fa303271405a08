"""PRESETS: the settings under which the papers measured accuracy, as far as they are known, and where that was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from expertshare.errors import InputError, nearest

DecodingValue = int | float | str | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """decoding: fields of DecodingOptions. shots: examples before a benchmark's question (None: the harness's number).

    source: where these were read. unknown: what was not found, and what stands in for it here.
    """

    name: str
    source: str
    decoding: Mapping[str, DecodingValue]
    shots: int | None
    chat: bool | None
    unknown: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The settings as plain values for JSON."""
        return {**asdict(self), "unknown": list(self.unknown)}


_BLOCKS_OF_32 = {"block_length": 32, "steps_per_block": 32, "threshold": 0.95, "temperature": 0.0}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="dmoe",
            source="github.com/fscdc/dMoE at a5b7679, evaluations/scripts_moe (length, block, steps, temperature), "
            "generate() of its model (threshold), evaluations/evaluation/*/prompt.py (no examples, chat template)",
            decoding={"gen_length": 2048, **_BLOCKS_OF_32},
            shots=0,
            chat=None,
            unknown=(
                "its prompts are its own (step by step, answer in \\boxed{}); here they are the harness's, and ARC-C "
                "and MMLU answer with a letter at once",
                "its MMLU is high_school_mathematics only: task mmlu_hs_math",
            ),
        ),
        Preset(
            name="des",
            source="arXiv 2602.00879 as summarised in this project's notes: LLaDA2.0-mini and LLaDA-MoE, blocks of 32; "
            "threshold, steps and temperature are those that LLaDA2.0 was released with",
            decoding={"gen_length": 512, **_BLOCKS_OF_32},
            shots=None,
            chat=None,
            unknown=(
                "its answer length was not found; 512 is ours",
                "its number of examples was not found; the harness's own number is used",
                "its threshold, steps and prompts were not found",
            ),
        ),
    )
}


def find_preset(name: str) -> Preset:
    """The preset called `name`; InputError with the nearest known name."""
    if name not in PRESETS:
        raise InputError(f"expected the name of a preset, got {name!r}. {nearest(name, PRESETS)}")
    return PRESETS[name]
