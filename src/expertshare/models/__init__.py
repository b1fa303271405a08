"""Model families, one transformer behind them, and strict loading from Hugging Face layouts."""

from expertshare.kernels import LayerKeyValues, Past
from expertshare.models.checkpoint import save_model
from expertshare.models.description import ModelFacts, describe
from expertshare.models.family import FAMILIES, Family, Target, family_named, family_of
from expertshare.models.loading import LoadedModel, load_model
from expertshare.models.runtime import ForwardInput, ForwardOutput, RoutingTrace, Runtime
from expertshare.models.tokenizer import decode_answer, encode_chat, encode_prompt, load_tokenizer
from expertshare.models.transformer import MoETransformer, initialise

__all__ = [
    "FAMILIES",
    "Family",
    "ForwardInput",
    "ForwardOutput",
    "LayerKeyValues",
    "LoadedModel",
    "MoETransformer",
    "ModelFacts",
    "Past",
    "RoutingTrace",
    "Runtime",
    "Target",
    "decode_answer",
    "describe",
    "encode_chat",
    "encode_prompt",
    "family_named",
    "family_of",
    "initialise",
    "load_model",
    "load_tokenizer",
    "save_model",
]
