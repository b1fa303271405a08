"""How far quantised experts are off, scheme by scheme: random weights, and a model's own on its own activations.

    python benchmarks/quantisation_error.py --model models/reference --json out.json

"weights" is the relative error (norms) of the weights; "layer" that of an expert layer's output with exact activations;
"token" and "span" with activations rounded to 8 bits, with a scale per token or per 128 features, as the kernel rounds.
Everything is float32 in torch. "outliers": tokens of which one feature in 512 is 30 times as large, as models of this
kind have them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.api import generate, load
from expertshare.kernels.quantise import CLIPS, QUANTISATIONS, Scheme, dequantise, quantise
from expertshare.measure.report import capture_environment, write_json
from expertshare.models.moe import MoE
from expertshare.routing import POLICIES, route, router_scores
from expertshare.types import ExpertBank, RoutingPlan

FORWARDS = 6  # of each prompt, prefill among them

SCHEMES = {
    "int8": (Scheme(bits=8), CLIPS),
    **{
        f"4 bit, {size}, {kind}{searched}": (Scheme(bits=4, group_size=size, symmetric=kind == "symmetric"), clips)
        for kind in ("symmetric", "minimum")
        for size in (32, 64)
        for searched, clips in (("", CLIPS), (", no search", (1.0,)))
    },
}
Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Errors of one scheme on one source of weights and tokens."""

    source: str
    scheme: str
    default: bool
    bits_per_weight: float
    weights: float
    layer: float
    token: float
    span: float


def rounded(x_TD: Tensor, size: int) -> Tensor:
    """To 8 bits with a scale for every `size` features."""
    spans = F.pad(x_TD, (0, -x_TD.shape[-1] % size)).unflatten(-1, (-1, size))
    scale = spans.abs().amax(dim=-1, keepdim=True) / 127
    codes = (spans / torch.where(scale == 0, 1.0, scale)).round()
    return (codes * scale).flatten(-2)[..., : x_TD.shape[-1]]


ROUNDINGS: dict[str, Rounding] = {
    "layer": lambda x_TD: x_TD,
    "token": lambda x_TD: rounded(x_TD, x_TD.shape[-1]),
    "span": lambda x_TD: rounded(x_TD, 128),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens, their plan, and the bank in float32 that they run through."""

    x_TD: Tensor
    plan: RoutingPlan
    bank: ExpertBank


def run(sample: Sample, bank: ExpertBank, rounding: Rounding) -> Tensor:
    """The layer's output, an expert at a time."""
    x_TD, y_TD = rounding(sample.x_TD), torch.zeros_like(sample.x_TD)
    for expert in sample.plan.active_E.nonzero().flatten().tolist():
        token, slot = (sample.plan.expert_ids_TK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], bank.gate_up_EHD[expert]).chunk(2, dim=-1)
        out = F.linear(rounding(F.silu(gate) * up), bank.down_EDF[expert])
        y_TD.index_add_(0, token, out * sample.plan.weights_TK[token, slot, None])
    return y_TD


def relative(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Root of summed squares, over all tensors."""
    wrong = sum(float((a - e).square().sum()) for a, e in zip(actual, expected, strict=True))
    return float((wrong / sum(float(e.square().sum()) for e in expected)) ** 0.5)


def random_sample(outliers: float) -> Sample:
    """mini's width, 16 experts."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, num_experts, tokens = 2048, 512, 16, 64
    x_TD = torch.randn(tokens, hidden, generator=generator)
    x_TD[:, ::512] *= outliers
    gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(num_experts, hidden, inner, generator=generator) * inner**-0.5
    ids_TK = torch.rand(tokens, num_experts, generator=generator).topk(8).indices
    plan = RoutingPlan(ids_TK, torch.full((tokens, 8), 0.125), torch.ones(num_experts, dtype=torch.bool))
    return Sample(x_TD=x_TD, plan=plan, bank=ExpertBank(gate_up, down))


def model_samples(directory: str, prompts: list[str]) -> list[Sample]:
    """Every MoE layer of the model with the tokens that reach it in the first forwards for each prompt."""
    model = load(directory)
    layers = [module for module in model.model.modules() if isinstance(module, MoE)]
    inputs: dict[MoE, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: MoE, args: tuple[Tensor, ...]) -> None:
        if len(inputs[layer]) < FORWARDS * len(prompts):
            inputs[layer].append(args[0].flatten(0, 1).clone())

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    for prompt in prompts:
        generate(model, prompt, gen_length=32)
    for hook in hooks:
        hook.remove()
    return [_sample_of(layer, torch.cat(inputs[layer])) for layer in layers]


def _sample_of(layer: MoE, x_TD: Tensor) -> Sample:
    live_GL = torch.ones(1, len(x_TD), dtype=torch.bool)
    scores = router_scores(layer.router(x_TD[None]), live_GL, layer.spec, layer.router.bias)
    _, plan = route(scores, POLICIES["vanilla"](), layer.spec)
    weights = layer.experts.bank()
    bank = ExpertBank(weights.gate_up_EHD.float(), weights.down_EDF.float())
    return Sample(x_TD=x_TD.float(), plan=plan, bank=bank)


def measure(source: str, samples: list[Sample]) -> Iterator[Row]:
    """One row per scheme; a depth that its groups do not divide leaves it out."""
    exact = [run(sample, sample.bank, ROUNDINGS["layer"]) for sample in samples]
    for name, (scheme, clips) in SCHEMES.items():
        shapes = {weight.shape[1:] for sample in samples for weight in both(sample.bank)}
        if any(depth % (scheme.group_size or 1) for _, depth in shapes):
            continue
        banks = [ExpertBank(*(dequantise(quantise(w, scheme, clips=clips)) for w in both(s.bank))) for s in samples]
        errors = {
            what: relative([run(s, bank, rounding) for s, bank in zip(samples, banks, strict=True)], exact)
            for what, rounding in ROUNDINGS.items()
        }
        weights = relative([w for bank in banks for w in both(bank)], [w for s in samples for w in both(s.bank)])
        num_bytes, num_weights = (sum(f(*shape) for shape in shapes) for f in (scheme.num_bytes, lambda a, b: a * b))
        is_default = clips == CLIPS and scheme in QUANTISATIONS.values()
        yield Row(
            source=source,
            scheme=name,
            default=is_default,
            bits_per_weight=8 * num_bytes / num_weights,
            weights=weights,
            **errors,
        )


def both(bank: ExpertBank) -> tuple[Tensor, Tensor]:
    """gate_up and down."""
    return bank.gate_up_EHD, bank.down_EDF


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint whose experts are measured too")
    parser.add_argument("--prompts", default="examples/prompts.jsonl", type=Path)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    sources = {"random": [random_sample(1.0)], "outliers": [random_sample(30.0)]}
    if options.model:
        lines = options.prompts.read_text().splitlines()[:4]
        sources[options.model] = model_samples(options.model, [json.loads(line)["prompt"] for line in lines])
    print(f"{'source':18} {'scheme':32} {'bits':>5} {'weights':>8} {'layer':>8} {'token':>8} {'span':>8}")
    rows = []
    for source, samples in sources.items():
        for row in measure(source, samples):
            rows.append(asdict(row))
            print(
                f"{row.source:18} {row.scheme + (' *' if row.default else ''):32} {row.bits_per_weight:5.2f} "
                f"{row.weights:8.2%} {row.layer:8.2%} {row.token:8.2%} {row.span:8.2%}",
                flush=True,
            )
    if options.json:
        write_json(options.json, {"environment": capture_environment().to_json(), "rows": rows})


if __name__ == "__main__":
    main()
