"""The compiled library of kernels for the CPU (csrc/): how it is found, called, and which threads it runs in."""

from expertshare.native.calls import HOW, ISA_NAMED, status_of
from expertshare.native.loading import (
    available,
    instruction_set,
    isa_number,
    library,
    unavailable_reason,
    usable_instruction_sets,
)
from expertshare.native.machine import (
    ask_for_huge_pages,
    crew,
    num_threads,
    set_num_threads,
    usable_cores,
    use_torch_threads,
)

__all__ = [
    "HOW",
    "ISA_NAMED",
    "ask_for_huge_pages",
    "available",
    "crew",
    "instruction_set",
    "isa_number",
    "library",
    "num_threads",
    "set_num_threads",
    "status_of",
    "unavailable_reason",
    "usable_cores",
    "usable_instruction_sets",
    "use_torch_threads",
]
