"""From checkpoints to layouts whose experts can be read one at a time, and what of that fits into memory."""

from expertshare.convert.convert import Converted, convert, restore, verify
from expertshare.lab.random_checkpoint.make_checkpoint import MadeCheckpoint, default_unique, likeness, make_checkpoint

__all__ = [
    "Converted",
    "MadeCheckpoint",
    "convert",
    "default_unique",
    "likeness",
    "make_checkpoint",
    "restore",
    "verify",
]
