"""What is deployed and what is asked of it: the settings of a simulation. What accelerators can do is by their makers'
data sheets: limits, not measurements."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from expertshare.convert.rates import Rates
from expertshare.convert.sizes import ModelSizes
from expertshare.errors import ConfigError, InputError, nearest

ASSUMPTIONS = (
    "Attention, dense layers and head are data-parallel: every GPU has a copy and its own sequences. Routed experts "
    "are expert-parallel over the GPUs of a replica.",
    "Every sequence always has one block at work (all of its blocks under full attention). Blocks of a step are drawn "
    "at random from the record, each by itself. A layer without a record takes the recorded ones in rotation.",
    "A part takes the time of its limit: weights read once over memory bandwidth, or multiply-accumulates over the "
    "peak, whichever is longer (with --overlap 0: their sum), divided by --efficiency.",
    "A layer waits for its slowest GPU. Layers, and the exchanges before and after their experts, follow one another: "
    "no traffic hides behind arithmetic.",
    "A token is sent once to every other GPU that has any of its experts, in bfloat16, and as much comes back. An "
    "exchange takes as long as its busiest port and has no latency of its own.",
    "Attention reads the keys and values of the prompt and half of the answer. Norms, router, sampling and kernel "
    "launches cost nothing.",
    "A block of the prompt costs as much as one step of a block. Requests arrive evenly and find a place at once; "
    "--load is the share of the capacity that is used.",
)


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


def find_card(name: str) -> Card:
    """The card called `name`; ConfigError suggests the nearest."""
    if name not in CARDS:
        raise ConfigError(f"unknown card {name!r}. {nearest(name, CARDS)}")
    return CARDS[name]


_SHEETS: dict[str, tuple[float, float, float, float, float, str]] = {  # GB, TB/s, TFLOP/s, GB/s of link and network
    "a100": (
        *(80, 2.039, 312, 300, 25),
        "NVIDIA A100 data sheet (80 GB, SXM; NVLink 600 GB/s both ways); DGX A100: 200 Gb/s for each GPU",
    ),
    "h100": (
        *(80, 3.35, 989, 450, 50),
        "NVIDIA H100 data sheet (SXM; NVLink 900 GB/s both ways); DGX H100: 400 Gb/s for each GPU",
    ),
    "h200": (
        *(141, 4.8, 989, 450, 50),
        "NVIDIA H200 data sheet (SXM; NVLink 900 GB/s both ways); DGX H200: 400 Gb/s for each GPU",
    ),
    "b200": (
        *(180, 8, 2250, 900, 50),
        "NVIDIA DGX B200 data sheet and user guide, an eighth of each (1,440 GB, 64 TB/s, NVLink 14.4 TB/s both ways, "
        "8 x 400 Gb/s); HGX B200: 2.25 PFLOP/s without sparsity",
    ),
    "mi300x": (
        *(192, 5.3, 1307, 448, 50),
        "AMD Instinct MI300X data sheet (7 Infinity Fabric links of 128 GB/s both ways); network: 400 Gb/s for each "
        "GPU assumed",
    ),
    "l40s": (
        *(48, 0.864, 362, 32, 25),
        "NVIDIA L40S data sheet (PCIe 4.0 x16, 64 GB/s both ways); network: 200 Gb/s for each GPU assumed",
    ),
}
CARDS = {
    name: Card(
        name=name,
        memory_bytes=memory * 1e9,
        bytes_per_s=bandwidth * 1e12,
        flops_per_s=products * 1e12,
        link_bytes_per_s=link * 1e9,
        network_bytes_per_s=network * 1e9,
        gpus_per_node=8,
        source=source,
    )
    for name, (memory, bandwidth, products, link, network, source) in _SHEETS.items()
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """One kind of GPU and how experts lie on it. sequences: at work on each GPU. copies: additional ones of busy
    experts in every layer. scheme: how experts are stored. efficiency: share of the card's limits that kernels reach;
    overlap: 1 where reading hides behind computing or the reverse, 0 where one follows the other."""

    card: Card
    placement: str = "balanced"
    copies: int = 0
    sequences: int = 8
    scheme: str = "none"
    efficiency: float = 1.0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise InputError(f"sequences of a GPU must be at least 1, got {self.sequences}")
        if not 0.0 < self.efficiency <= 1.0:
            raise InputError(f"the efficiency must lie above 0 and not above 1, got {self.efficiency}")
        if not 0.0 <= self.overlap <= 1.0:
            raise InputError(f"the overlap must lie in 0..1, got {self.overlap}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is asked. requests_per_s: None where only capacity is wanted. steps_per_block: denoising steps. load: share
    of a replica's capacity that may be used."""

    requests_per_s: float | None = None
    prompt_length: int = 256
    gen_length: int = 256
    steps_per_block: float = 32.0
    load: float = 1.0

    def __post_init__(self) -> None:
        least = {"prompt_length": 0, "gen_length": 1, "steps_per_block": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name.replace('_', ' ')} must be at least {bound}, got {getattr(self, name)}")
        if self.requests_per_s is not None and self.requests_per_s <= 0:
            raise InputError(f"the request rate must be above 0, got {self.requests_per_s}")
        if not 0.0 < self.load <= 1.0:
            raise InputError(f"the load must lie above 0 and not above 1, got {self.load}")

    def blocks_at_work(self, sizes: ModelSizes) -> int:
        """Blocks that one sequence has in a forward: all of them under full attention."""
        config = sizes.config
        if config.attention != "full":
            return 1
        return math.ceil((self.prompt_length + self.gen_length) / config.block_length)

    def steps_per_request(self, sizes: ModelSizes) -> float:
        """Forwards of its own blocks that a request takes part in: denoising, and, with a cache, one to commit each
        block and one for each block of the prompt."""
        config = sizes.config
        blocks = math.ceil(self.gen_length / config.block_length)
        if config.attention == "full":
            return blocks * self.steps_per_block
        return blocks * (self.steps_per_block + 1) + self.prompt_length / config.block_length
