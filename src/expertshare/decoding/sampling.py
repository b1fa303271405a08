"""From hidden states to a proposed token and its confidence, for every position that may change.

R rows, L positions of a block, C candidates (positions to predict, row by row), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from expertshare.decoding.commit_rules import Proposals
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.row import Row, Window
from expertshare.errors import NumericsError
from expertshare.kernels.torch_backend import LOGIT_ROWS
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer

SAMPLING = attrgetter("temperature", "top_k", "top_p", "filtered_confidence")
"""Of DecodingOptions: what has to be equal for rows to be sampled in one go."""


def propose_blocks(
    model: MoETransformer, runtime: Runtime, rows: Sequence[Row], window: Window, hidden_RLD: Tensor
) -> Proposals:
    """Proposals for each row's current block, by its own options. Raises NumericsError where logits are not finite."""
    tokens_RL = window.tokens_RL.clone()
    confidence_RL = torch.full(tokens_RL.shape, float("-inf"), device=tokens_RL.device)
    open_RL = torch.where(_column([row.rule.edits for row in rows], window), ~window.frozen_RL, window.masked_RL)
    for best in sorted({row.options.takes_the_best for row in rows}):
        part = [row.options.takes_the_best == best for row in rows]
        part_RL = open_RL if all(part) else open_RL & _column(part, window)
        with runtime.timed("head"):
            tokens_C, confidence_C = (_best if best else _sampled)(model, runtime, rows, part_RL, hidden_RLD[part_RL])
        tokens_RL.masked_scatter_(part_RL, tokens_C)
        confidence_RL.masked_scatter_(part_RL, confidence_C)
    random = [row.options.remasking == "random" for row in rows]
    if any(random):
        random_RL = open_RL & _column(random, window)
        noise_C = draw([row.generator for row in rows], random_RL.sum(dim=1).tolist())
        confidence_RL.masked_scatter_(random_RL, noise_C.float())
    return Proposals(tokens_RL, confidence_RL, window.tokens_RL, window.masked_RL, window.frozen_RL)


def not_finite(row: Row) -> NumericsError:
    """What is raised where a row's step has logits that are NaN or infinite."""
    return NumericsError(
        f"expected finite logits, got NaN or infinity for row {row.number}, block {row.answer_block}, "
        f"step {row.steps}. Check the checkpoint, or run in float32.",
        row=row.number,
    )


def _best(
    model: MoETransformer, runtime: Runtime, rows: Sequence[Row], part_RL: Tensor, hidden_CD: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the candidates where `part_RL`, without their logits."""
    tokens_C, confidence_C = model.best_tokens(hidden_CD, [model.config.mask_id], backend=runtime.backend)
    _check_finite(rows, part_RL, confidence_C.isfinite())
    return tokens_C, confidence_C


def _sampled(
    model: MoETransformer, runtime: Runtime, rows: Sequence[Row], part_RL: Tensor, hidden_CD: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the candidates where `part_RL`, each by the options and the generator of its row."""
    logits_CV = model.logits(hidden_CD, backend=runtime.backend)
    _check_finite(rows, part_RL, logits_CV.isfinite().all(dim=1))
    proposed, first = [], 0
    by_row = zip(rows, part_RL.sum(dim=1).tolist(), strict=True)
    for _, alike in groupby(by_row, key=lambda pair: SAMPLING(pair[0].options)):
        members = list(alike)
        options, counts = members[0][0].options, [count for _, count in members]
        last = first + sum(counts)
        generators = [row.generator for row, _ in members]
        uniform_CV = draw(generators, counts, logits_CV.shape[1]) if options.temperature else None
        proposed.append(propose(logits_CV[first:last], options, mask_id=model.config.mask_id, uniform_CV=uniform_CV))
        first = last
    tokens, confidences = zip(*proposed, strict=True)
    return torch.cat(tokens), torch.cat(confidences)


def _check_finite(rows: Sequence[Row], part_RL: Tensor, finite_C: Tensor) -> None:
    if not finite_C.all():
        raise not_finite(rows[int(part_RL.nonzero()[int((~finite_C).nonzero()[0]), 0])])


def _column(values: Sequence[bool], window: Window) -> Tensor:
    return torch.tensor(values, device=window.tokens_RL.device).unsqueeze(1)


def propose(
    logits_CV: Tensor, options: DecodingOptions, *, mask_id: int, uniform_CV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A token for each candidate, int64 [C], and its probability, float32 [C]. The mask id is never proposed.

    uniform_CV: float64 in [0, 1), the randomness; None is argmax (ties to the lower id). Sampling adds Gumbel noise in
    float64 to the tempered, restricted logits. The probability is that of the model's own distribution without the mask
    (float32 softmax, no noise, temperature or restriction), because restricting inflates it, unless the options ask for
    `filtered_confidence`.
    """
    slices = torch.split(logits_CV, LOGIT_ROWS)
    noises = [None] * len(slices) if uniform_CV is None else torch.split(uniform_CV, LOGIT_ROWS)
    proposed = [_propose(*pair, options, mask_id) for pair in zip(slices, noises, strict=True)]
    tokens, confidences = zip(*proposed, strict=True)
    return torch.cat(tokens), torch.cat(confidences)


def _propose(
    logits_CV: Tensor, uniform_CV: Tensor | None, options: DecodingOptions, mask_id: int
) -> tuple[Tensor, Tensor]:
    clean_CV = logits_CV.float()
    clean_CV = clean_CV.index_fill(1, torch.tensor([mask_id], device=clean_CV.device), float("-inf"))
    restricted_CV = restrict(temper(clean_CV, options.temperature), options.top_k, options.top_p)
    noised_CV = restricted_CV if uniform_CV is None else restricted_CV.double() + gumbel(uniform_CV)
    tokens_C = noised_CV.argmax(dim=1)
    judged_CV = restricted_CV if options.filtered_confidence else clean_CV
    confidence_C = judged_CV.softmax(dim=1).gather(1, tokens_C.unsqueeze(1)).squeeze(1)
    return tokens_C, confidence_C.float()


def temper(logits_CV: Tensor, temperature: float) -> Tensor:
    """Logits over a temperature, float64, the best of each row at 0; at 0, argmax, they stay as they are.

    Shifting them changes no probability, and keeps those of the best finite at the smallest temperature.
    """
    if temperature == 0.0:
        return logits_CV
    shifted_CV = logits_CV.double() - logits_CV.amax(dim=1, keepdim=True).double()
    return shifted_CV / temperature


def restrict(logits_CV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set to -inf what sampling must not choose: all but the `top_k` best, then all but the fewest best of those that
    hold `top_p` of their probability (the one that passes it included). Ties go to the lower id."""
    if top_k is None and top_p is None:
        return logits_CV
    sorted_CV, order_CV = logits_CV.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        sorted_CV[:, top_k:] = float("-inf")
    if top_p is not None and top_p < 1.0:
        share_CV = sorted_CV.softmax(dim=1)
        before_CV = share_CV.cumsum(dim=1) - share_CV
        before_CV[:, 0] = 0.0  # rounding must not put the best token out of reach
        sorted_CV = sorted_CV.masked_fill(before_CV >= top_p, float("-inf"))
    return torch.empty_like(sorted_CV).scatter_(1, order_CV, sorted_CV)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1), float64: argmax(logits + noise) samples their softmax."""
    return -(-uniform.log()).log()


def draw(generators: Sequence[torch.Generator], counts: Sequence[int], *size: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [sum of counts, *size]: each row draws its own from its own generator, so that
    they do not depend on the batch."""
    return torch.cat(
        [
            torch.rand(count, *size, generator=generator, dtype=torch.float64, device=generator.device)
            for generator, count in zip(generators, counts, strict=True)
        ]
    )
