"""The compiled library of kernels for the CPU (csrc/), how it is found, and in which threads it runs."""

from expertshare.native.cores import usable_cores
from expertshare.native.loading import (
    available,
    instruction_set,
    isa_number,
    library,
    unavailable_reason,
    usable_instruction_sets,
)
from expertshare.native.pages import ask_for_huge_pages
from expertshare.native.threads import crew, num_threads, set_num_threads, team, use_torch_threads

__all__ = [
    "ask_for_huge_pages",
    "available",
    "crew",
    "instruction_set",
    "isa_number",
    "library",
    "num_threads",
    "set_num_threads",
    "team",
    "unavailable_reason",
    "usable_cores",
    "usable_instruction_sets",
    "use_torch_threads",
]
