"""`expertshare` as a model of lm-evaluation-harness, for its own commands and for simple_evaluate.

Importing this module registers it:

    python -m expertshare.evaluation.harness run --model expertshare \\
        --model_args pretrained=path/to/model,policy=des-vote:budget=28 --tasks gsm8k
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError, nearest
from expertshare.evaluation.harness.source import (
    DEFAULT_GEN_LENGTH,
    NO_LIKELIHOOD,
    check_installed,
    cut,
    render_chat,
    stops,
)
from expertshare.evaluation.items import EvalItem, sha256_text
from expertshare.evaluation.workers import Job, Solver, SolverSetup
from expertshare.kernels import AUTO
from expertshare.models import load_model
from expertshare.routing import native_policy, parse_policy

check_installed()

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402

_log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "use_cache": (True, False),
}
"""Values of a setting under which answers are as without it."""


class ExpertShareLM(LM):  # type: ignore[misc]
    """Generates under an expert-sharing policy. Likelihoods are refused: masked diffusion has none, left to right.

    policy: by default the one that the checkpoint was trained with; `;` may stand for `,` between its knobs, because
    model_args are parted by commas. dtype: float32 or bfloat16, by default the checkpoint's. decoding: fields of
    DecodingOptions. A task's own settings (gen_kwargs) win over these, the length of an answer among them.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        backend: str = AUTO,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("1", "auto"):
            raise InputError(f"this model answers one prompt at a time, got batch_size={batch_size}: leave it at 1")
        if dtype not in (None, "auto", *DTYPES):
            raise InputError(f"expected a dtype, got {dtype!r}. {nearest(str(dtype), DTYPES)}")
        loaded = load_model(pretrained, DTYPES.get(dtype or "auto"), device=_device(device))
        wanted = parse_policy(policy.replace(";", ",")) if policy else native_policy(loaded.config)
        self._length = int(decoding.pop("gen_length", DEFAULT_GEN_LENGTH))
        decoding.pop("max_batch_size", None)
        setup = SolverSetup(
            model=loaded.path,
            dtype=loaded.model.dtype,
            policies=(wanted.bind(loaded.config.router),),
            options=DecodingOptions(**decoding),
            backend=backend,
            threads=1,
        )
        self.solver = Solver.of(loaded, setup)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One answer each, cut at the task's stop texts."""
        del disable_tqdm
        seen: Counter[int] = Counter()
        answers = []
        for number, request in enumerate(requests):
            answers.append(self._answer(number, request, repeat=seen[id(request)]))
            seen[id(request)] += 1
        return answers

    def _answer(self, number: int, request: Any, *, repeat: int) -> str:
        """repeat: how often this very request was asked before; every time has a seed of its own."""
        context, solver = request.args[0], self.solver
        options, length = generation(request.args[1], solver.setup.options)
        name = str(request.doc_id if request.doc_id is not None else number)
        item = EvalItem(
            task=request.task_name or "lm-eval",
            id=f"{name}#{repeat}" if repeat else name,
            prompt=context,
            chat=False,
            gen_length=length or self._length,
            content=sha256_text(context),
        )
        solver = replace(solver, setup=replace(solver.setup, options=options))
        solver.check(item)
        return cut(solver.solve(Job(item=item, policy=0)).answer, stops(request))

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


def generation(settings: Mapping[str, Any], options: DecodingOptions) -> tuple[DecodingOptions, int | None]:
    """A request's generation settings (Hugging Face's names) as options of decoding, and its length where it has one.

    Raises InputError for settings that contradict each other, or that decoding does not have.
    """
    left = {name: value for name, value in settings.items() if name != "until" and value is not None}
    stated = [left.pop(name) for name in LENGTHS if name in left]
    if not all(isinstance(length, int) and length >= 1 for length in stated):
        raise InputError(f"expected a length of at least 1 in gen_kwargs, got {stated}: correct it")
    lengths = set(stated)
    if len(lengths) > 1:
        raise InputError(f"expected one length of answers in gen_kwargs, got {sorted(lengths)}: leave out the others")
    sampled, temperature = left.pop("do_sample", None), left.pop("temperature", options.temperature)
    if sampled and settings.get("temperature") == 0:
        raise InputError("do_sample=True in gen_kwargs contradicts temperature=0: leave one of them out")
    if sampled is not None:
        temperature = (temperature or 1.0) if sampled else 0.0
    changes = {
        "temperature": float(temperature),
        "top_k": left.pop("top_k", options.top_k),
        "top_p": left.pop("top_p", options.top_p),
        "seed": int(left.pop("seed", options.seed)),
    }
    changes = {name: None if name in NEUTRAL and value in NEUTRAL[name] else value for name, value in changes.items()}
    for name, value in left.items():
        if value not in NEUTRAL.get(name, ()):
            known = [*LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "seed"]
            raise InputError(
                f"{name}={value!r} in gen_kwargs changes answers in a way that we have not: leave it out. "
                f"{nearest(name, known)}"
            )
    return replace(options, **changes), lengths.pop() if lengths else None


def _device(asked: str | None) -> str:
    """The harness's command asks for cuda unless told otherwise, whatever the machine has."""
    if asked is not None and asked.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("no %s on this machine: computing on the CPU", asked)
        return "cpu"
    return asked or "cpu"


register_model("expertshare")(ExpertShareLM)
