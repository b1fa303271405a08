"""How a run was set up: what goes into a report beside its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError
from expertshare.experts import SlabStore, StoreOptions
from expertshare.experts.recording import RoutingRecorder
from expertshare.kernels import AUTO, choose_backend
from expertshare.models import LoadedModel, Runtime, describe, encode_prompt
from expertshare.types import RoutingPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What all runs of one command share. chat: whether prompts went through the chat template (None: if there is one).

    batch_size: prompts decoded together; a coreset is still per block and prompt. backend: a name of
    expertshare.kernels.BACKENDS, or "auto" for the fastest on the model's device. store: for a converted model, and how
    it was opened. recorder: is told which experts every token of a forward runs. graphs: a GPU may replay
    captured steps.
    """

    batch_size: int = 1
    backend: str = AUTO
    chat: bool | None = None
    store: SlabStore | None = None
    store_options: StoreOptions | None = None
    recorder: RoutingRecorder | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, got {self.batch_size!r}")

    def runtime(self, loaded: LoadedModel, policy: RoutingPolicy) -> Runtime:
        """How to run the model under a policy. Raises ConfigError for a backend that does not exist or cannot run."""
        return Runtime(
            policy=policy,
            backend=choose_backend(self.backend, loaded.model.device),
            store=self.store,
            bytes_per_expert=loaded.layout.format.expert_bytes if loaded.layout else None,
            on_plan=self.recorder.hear if self.recorder else None,
            graphs=self.graphs,
        )

    def to_json(self, loaded: LoadedModel, options: DecodingOptions) -> dict[str, Any]:
        """The resolved configuration: model, decoding and these."""
        has_template = loaded.tokenizer is not None and loaded.tokenizer.chat_template is not None
        return {
            "model": str(loaded.path),
            "model_facts": asdict(describe(loaded)),
            "decoding": asdict(options.resolve(loaded.config)),
            "batch_size": self.batch_size,
            "backend": choose_backend(self.backend, loaded.model.device).name,
            "chat": has_template if self.chat is None else self.chat,
            "expert_store": self.store_options.to_json() if self.store_options else None,
        }


def encode_prompts(loaded: LoadedModel, texts: Sequence[str], chat: bool | None) -> list[list[int]]:
    """Token ids of every prompt. Raises InputError for none, an empty one, or a model without a tokenizer."""
    if not texts:
        raise InputError("expected at least one prompt, got none; give some text")
    if loaded.tokenizer is None:
        raise InputError(f"{loaded.path} has no tokenizer: put the model's tokenizer.json there")
    prompts: list[list[int]] = []
    for number, text in enumerate(texts, 1):
        try:
            prompts.append(encode_prompt(loaded.tokenizer, _well_formed(text), chat=chat))
        except InputError as error:
            raise error if len(texts) == 1 else InputError(f"prompt {number}: {error}") from error
    return prompts


def _well_formed(text: str) -> str:
    """As the command line gives bytes that are no UTF-8, and JSON half of a pair, no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected UTF-8 text, got something else at character {error.start} of a prompt: re-encode it"
        ) from error
    return text
