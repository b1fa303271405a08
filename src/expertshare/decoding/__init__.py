"""Decoding: the block loop, the rule by which tokens are committed, and the cache of finished blocks."""

from expertshare.decoding.decoder import BlockDecoder, BlockStream, generate
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.results import BlockResult, FinishReason, Generation, RowResult
from expertshare.decoding.session import BlockSession, Joining
from expertshare.decoding.text_stream import TextStream
from expertshare.decoding.watching import Watcher

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
