"""Decoding: the block loop, the rule by which tokens are committed, and the cache of finished blocks."""

from expertshare.decoding.decoder import BlockDecoder, BlockSession, BlockStream, Joining, generate
from expertshare.decoding.forwards import Watcher
from expertshare.decoding.options import (
    BlockResult,
    DecodingOptions,
    FinishReason,
    Generation,
    RowResult,
    TextStream,
)

__all__ = [
    "BlockDecoder",
    "BlockResult",
    "BlockSession",
    "BlockStream",
    "DecodingOptions",
    "FinishReason",
    "Generation",
    "Joining",
    "RowResult",
    "TextStream",
    "Watcher",
    "generate",
]
