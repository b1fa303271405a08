"""The compiled library of kernels for the CPU (csrc/): how it is found, called, and which threads it runs in."""

from expertshare.native.loading import (
    ask_for_huge_pages,
    available,
    choose_threads,
    instruction_set,
    keep_to_quota,
    library,
    num_threads,
    set_num_threads,
    unavailable_reason,
    usable_cores,
    usable_instruction_sets,
    use_torch_threads,
)

__all__ = [
    "ask_for_huge_pages",
    "available",
    "choose_threads",
    "instruction_set",
    "keep_to_quota",
    "library",
    "num_threads",
    "set_num_threads",
    "unavailable_reason",
    "usable_cores",
    "usable_instruction_sets",
    "use_torch_threads",
]
