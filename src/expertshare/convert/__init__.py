"""From checkpoints to layouts whose experts can be read one at a time, and what of that fits into memory."""

from expertshare.convert.convert import Converted, convert, restore, verify

__all__ = ["Converted", "convert", "restore", "verify"]
