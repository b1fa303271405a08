"""`expertshare` as a model of lm-evaluation-harness, for its own commands and for simple_evaluate.

Importing this module registers it:

    python -m expertshare.evaluation.harness run --model expertshare \\
        --model_args pretrained=path/to/model,policy=des-vote:budget=28 --tasks gsm8k
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError
from expertshare.evaluation.harness.source import (
    DEFAULT_GEN_LENGTH,
    NO_LIKELIHOOD,
    check_installed,
    cut,
    render_chat,
    stops,
)
from expertshare.evaluation.items import EvalItem, sha256_text
from expertshare.evaluation.workers import Job, Solver, SolverSetup, store_of
from expertshare.kernels import AUTO
from expertshare.models import load_model
from expertshare.routing import native_policy, parse_policy

check_installed()

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402

_log = logging.getLogger(__name__)


class ExpertShareLM(LM):  # type: ignore[misc]
    """Generates under an expert-sharing policy. Likelihoods are refused: masked diffusion has none, left to right.

    policy: by default the one that the checkpoint was trained with; `;` may stand for `,` between its knobs, because
    model_args are parted by commas. decoding: fields of DecodingOptions. max_gen_toks of a task wins over gen_length.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        backend: str = AUTO,
        batch_size: int | str = 1,
        device: str | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("1", "auto"):
            raise InputError(f"this model answers one prompt at a time, got batch_size={batch_size}: leave it at 1")
        loaded = load_model(pretrained, device=_device(device))
        wanted = parse_policy(policy.replace(";", ",")) if policy else native_policy(loaded.config)
        self._length = int(decoding.pop("gen_length", DEFAULT_GEN_LENGTH))
        decoding.pop("max_batch_size", None)
        setup = SolverSetup(
            model=loaded.path,
            dtype=None,
            policies=(wanted.bind(loaded.config.router),),
            options=DecodingOptions(**decoding),
            backend=backend,
            threads=1,
        )
        self.solver = Solver(loaded=loaded, setup=setup, store=store_of(loaded, None))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One answer each, cut at the task's stop texts."""
        del disable_tqdm
        return [self._answer(number, request) for number, request in enumerate(requests)]

    def _answer(self, number: int, request: Any) -> str:
        context, settings = request.args[0], request.args[1]
        item = EvalItem(
            task=request.task_name or "lm-eval",
            id=str(request.doc_id if request.doc_id is not None else number),
            prompt=context,
            chat=False,
            gen_length=int(settings.get("max_gen_toks") or self._length),
            content=sha256_text(context),
        )
        self.solver.check(item)
        return cut(self.solver.solve(Job(item=item, policy=0)).answer, stops(request))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Refused: a diffusion model has no left-to-right likelihood."""
        del requests, disable_tqdm
        raise InputError(f"loglikelihood was asked for: {NO_LIKELIHOOD}")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: a diffusion model has no left-to-right likelihood."""
        del requests, disable_tqdm
        raise InputError(f"loglikelihood_rolling was asked for: {NO_LIKELIHOOD}")

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the checkpoint's template."""
        tokenizer = self.solver.loaded.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise InputError("this model's tokenizer has no chat template: leave out --apply_chat_template")
        return render_chat(tokenizer, chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its cache of prompts by."""
        return str(self.solver.loaded.path).replace("/", "__")


def _device(asked: str | None) -> str:
    """The harness's command asks for cuda unless told otherwise, whatever the machine has."""
    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("no %s on this machine: computing on the CPU", asked)
        return "cpu"
    return asked or "cpu"


register_model("expertshare")(ExpertShareLM)
