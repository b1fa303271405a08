"""The model card of a distilled model: what it was trained for, from what, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: expertshare
tags: [diffusion language model, mixture of experts, self-distillation]
---

# {base_model}, distilled for `{policy}`

Trained to give its own answers while the tokens of a block share experts. Run it under the policy it was trained for:
nothing chooses that policy by itself.

```sh
expertshare generate . --policy '{policy}' --prompt '...'
```

| | |
|---|---|
{rows}
"""


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown from the content of distillation.json."""
    training = record["training"]
    facts = {
        "policy": f"`{record['policy']}`",
        "knobs": ", ".join(f"{name}={value}" for name, value in record["knobs"].items()),
        "started from": record["base_model"],
        "start policy": training["start_policy"] or "the same",
        "trained weights": "routers only" if training["router_only"] else "all",
        "answers": f"{record['answers']} of its own, of which {record['unfinished']} were unfinished and left out",
        "steps": f"{training['steps']} of {training['samples_per_step']} answers",
        "optimiser": f"{training['optimiser']}, peak learning rate {record['peak_lr']:g}",
        "seed": training["seed"],
        "commit": record["commit"] or "not from a checkout",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return _CARD.format(base_model=record["base_model"], policy=record["policy"], rows=rows)
