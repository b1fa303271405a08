"""Model families, one transformer behind them, and strict loading from Hugging Face layouts."""

from expertshare.kernels import LayerKeyValues
from expertshare.models.checkpoint import save_model
from expertshare.models.description import ModelFacts, describe
from expertshare.models.loading import LoadedModel, load_model
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.tokenizer import decode_answer, encode_chat, encode_prompt, load_tokenizer
from expertshare.models.transformer import MoETransformer, initialise

__all__ = [
    "ForwardInput",
    "LayerKeyValues",
    "LoadedModel",
    "MoETransformer",
    "ModelFacts",
    "Runtime",
    "decode_answer",
    "describe",
    "encode_chat",
    "encode_prompt",
    "initialise",
    "load_model",
    "load_tokenizer",
    "save_model",
]
