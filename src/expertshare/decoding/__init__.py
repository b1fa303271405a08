"""Decoding: the block loop, the rule by which tokens are committed, and the cache of finished blocks."""

from expertshare.decoding.decoder import BlockDecoder, BlockStream, generate
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.results import BlockResult, FinishReason, Generation, RowResult

__all__ = [
    "BlockDecoder",
    "BlockResult",
    "BlockStream",
    "DecodingOptions",
    "FinishReason",
    "Generation",
    "RowResult",
    "generate",
]
