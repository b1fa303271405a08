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
        """Plain values."""
        return asdict(self)


def find_card(name: str) -> Card:
    """The card called `name`; ConfigError suggests the nearest."""
    if name not in CARDS:
        raise ConfigError(f"unknown card {name!r}. {nearest(name, CARDS)}")
    return CARDS[name]


_ALL = (
    Card(
        name="a100",
        memory_bytes=80e9,
        bytes_per_s=2.039e12,
        flops_per_s=312e12,
        link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
        gpus_per_node=8,
        source="NVIDIA A100 data sheet (80 GB, SXM; NVLink 600 GB/s both ways); DGX A100: 200 Gb/s for each GPU",
    ),
    Card(
        name="h100",
        memory_bytes=80e9,
        bytes_per_s=3.35e12,
        flops_per_s=989e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        gpus_per_node=8,
        source="NVIDIA H100 data sheet (SXM; NVLink 900 GB/s both ways); DGX H100: 400 Gb/s for each GPU",
    ),
    Card(
        name="h200",
        memory_bytes=141e9,
        bytes_per_s=4.8e12,
        flops_per_s=989e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
        gpus_per_node=8,
        source="NVIDIA H200 data sheet (SXM; NVLink 900 GB/s both ways); DGX H200: 400 Gb/s for each GPU",
    ),
    Card(
        name="b200",
        memory_bytes=180e9,
        bytes_per_s=8e12,
        flops_per_s=2.25e15,
        link_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
        gpus_per_node=8,
        source="NVIDIA DGX B200 data sheet and user guide, an eighth of each (1,440 GB, 64 TB/s, NVLink 14.4 TB/s both "
        "ways, 8 x 400 Gb/s); HGX B200: 2.25 PFLOP/s without sparsity",
    ),
    Card(
        name="mi300x",
        memory_bytes=192e9,
        bytes_per_s=5.3e12,
        flops_per_s=1307e12,
        link_bytes_per_s=448e9,
        network_bytes_per_s=50e9,
        gpus_per_node=8,
        source="AMD Instinct MI300X data sheet (7 Infinity Fabric links of 128 GB/s both ways); network: 400 Gb/s for "
        "each GPU assumed",
    ),
    Card(
        name="l40s",
        memory_bytes=48e9,
        bytes_per_s=864e9,
        flops_per_s=362e12,
        link_bytes_per_s=32e9,
        network_bytes_per_s=25e9,
        gpus_per_node=8,
        source="NVIDIA L40S data sheet (PCIe 4.0 x16, 64 GB/s both ways); network: 200 Gb/s for each GPU assumed",
    ),
)
CARDS = {card.name: card for card in _ALL}
