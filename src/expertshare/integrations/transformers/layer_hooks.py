"""The hooks of one model: they note each call of a stack, and put the policy's choice in the place of the router's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expertshare.errors import InputError
from expertshare.integrations.transformers.calls import Call, read_call
from expertshare.integrations.transformers.sharing import (
    SharedChoice,
    filled,
    restricted_logits,
    share,
    share_of_mass,
)
from expertshare.integrations.transformers.sites import RouterSite
from expertshare.types import RoutingPolicy

Recorder = Callable[[int, Call, SharedChoice], None]


class StackWatch:
    """Remembers how the tokens of the last call of one stack lie. It is kept after the call: gradient checkpointing
    runs layers again."""

    def __init__(self, stack: nn.Module, block_length: int | None) -> None:
        self.call: Call | None = None
        self._block_length = block_length
        self.removal = stack.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = read_call(stack, args, kwargs, self._block_length)


class RouterHook:
    """Replaces the output of one router. index: of its site; policy: bound to its rule."""

    def __init__(
        self, index: int, site: RouterSite, policy: RoutingPolicy, watch: StackWatch, record: Recorder
    ) -> None:
        self._index, self._site, self._policy = index, site, policy
        self._watch, self._record = watch, record
        self._mass_T: Tensor | None = None
        hook = self._on_logits if site.rule.output == "logits" else self._on_triple
        self.removals = [site.router.register_forward_hook(hook)]
        if site.rule.output == "logits":
            self.removals.append(site.block.register_forward_hook(self._on_block))

    def _on_triple(self, _router: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        rule = self._site.rule
        logits_TE, weights_TK, own_ids_TK = rule.parted(output)
        choice = self._share(logits_TE, own_ids_TK)
        ids_TK = filled(choice, rule.spec.num_experts, distinct=self._site.separate_experts)
        own_T1 = choice.own_T.unsqueeze(-1)
        shared_TK = torch.where(own_T1, weights_TK, choice.weights_TK.to(weights_TK.dtype))
        return rule.joined(logits_TE, shared_TK, ids_TK)

    def _on_logits(self, _router: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        rule = self._site.rule
        logits_TE = output.reshape(-1, output.shape[-1])
        own_ids_TK = logits_TE.float().softmax(dim=-1).topk(rule.spec.top_k, dim=-1).indices
        choice = self._share(logits_TE, own_ids_TK)
        self._mass_T = share_of_mass(rule, choice)
        return restricted_logits(choice, logits_TE).reshape(output.shape)

    def _on_block(self, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Back from the softmax over the restricted logits to the model's own weights."""
        assert self._mass_T is not None
        hidden = output[0] if isinstance(output, tuple) else output
        scaled = hidden * self._mass_T.to(hidden.dtype).reshape(*hidden.shape[:-1], 1)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    def _share(self, logits_TE: Tensor, own_ids_TK: Tensor) -> SharedChoice:
        call = self._watch.call
        if call is None or call.live_BS.numel() != len(logits_TE):
            known = "no call" if call is None else f"a call with {tuple(call.live_BS.shape)} positions"
            raise InputError(
                f"expected the router {self._site.name} to be called by its model with every position, got "
                f"{len(logits_TE)} tokens after {known}: call the whole model, or remove the policy first."
            )
        choice = share(self._site.rule, self._site.router, self._policy, call, logits_TE, own_ids_TK)
        self._record(self._index, call, choice)
        return choice
