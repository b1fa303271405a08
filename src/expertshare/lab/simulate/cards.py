"""What accelerators can do, by their makers' data sheets: limits, not measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from expertshare.convert.rates import Rates
from expertshare.errors import ConfigError, InputError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One accelerator. bytes_per_s: its memory; flops_per_s: bfloat16 products without sparsity, two for each
    multiply-accumulate. link_bytes_per_s: to others of its node, network_bytes_per_s: to other nodes, both in one
    direction. source: where the figures are from."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int
    source: str

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float | int) and value <= 0:
                raise InputError(f"{name} of a card must be above 0, got {value}")

    def rates(self, efficiency: float) -> Rates:
        """What kernels reach that get `efficiency` (a share) of both limits."""
        return Rates(memory_bytes_per_s=efficiency * self.bytes_per_s, macs_per_s=efficiency * self.flops_per_s / 2)

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return asdict(self)


def find_card(name: str) -> Card:
    """The card called `name`; ConfigError suggests the nearest."""
    if name not in CARDS:
        raise ConfigError(f"unknown card {name!r}. {nearest(name, CARDS)}")
    return CARDS[name]


def _card(
    name: str, gigabytes: float, tb_per_s: float, tflops: float, link: float, network: float, source: str
) -> Card:
    """A card of a node of eight. link, network: GB/s."""
    return Card(
        name=name,
        memory_bytes=gigabytes * 1e9,
        bytes_per_s=tb_per_s * 1e12,
        flops_per_s=tflops * 1e12,
        link_bytes_per_s=link * 1e9,
        network_bytes_per_s=network * 1e9,
        gpus_per_node=8,
        source=source,
    )


_A100 = "NVIDIA A100 data sheet (80 GB, SXM; NVLink 600 GB/s both ways); DGX A100: 200 Gb/s for each GPU"
_H100 = "NVIDIA H100 data sheet (SXM; NVLink 900 GB/s both ways); DGX H100: 400 Gb/s for each GPU"
_H200 = "NVIDIA H200 data sheet (SXM; NVLink 900 GB/s both ways); DGX H200: 400 Gb/s for each GPU"
_B200 = (
    "NVIDIA DGX B200 data sheet and user guide, an eighth of each (1,440 GB, 64 TB/s, NVLink 14.4 TB/s both ways, 8 x "
    "400 Gb/s); HGX B200: 2.25 PFLOP/s without sparsity"
)
_MI300X = (
    "AMD Instinct MI300X data sheet (7 Infinity Fabric links of 128 GB/s both ways); network: 400 Gb/s for each GPU "
    "assumed"
)
_L40S = "NVIDIA L40S data sheet (PCIe 4.0 x16, 64 GB/s both ways); network: 200 Gb/s for each GPU assumed"
CARDS = {
    card.name: card
    for card in (
        _card("a100", 80, 2.039, 312, 300, 25, _A100),
        _card("h100", 80, 3.35, 989, 450, 50, _H100),
        _card("h200", 141, 4.8, 989, 450, 50, _H200),
        _card("b200", 180, 8, 2250, 900, 50, _B200),
        _card("mi300x", 192, 5.3, 1307, 448, 50, _MI300X),
        _card("l40s", 48, 0.864, 362, 32, 25, _L40S),
    )
}
