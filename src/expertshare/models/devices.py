"""Where a model can be put."""

from __future__ import annotations

import torch

from expertshare.errors import ConfigError, nearest

DEVICES = ("cpu", "cuda")


def usable_device(device: str | torch.device) -> torch.device:
    """The device as torch knows it. Raises ConfigError for a name that is none, and for a GPU that is not there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {str(device)!r}. {nearest(str(device), DEVICES)}") from error
    if found.type not in DEVICES:
        raise ConfigError(f"expected the CPU or a GPU of NVIDIA, got the device {str(device)!r}: use cpu or cuda.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "expected a GPU, because device 'cuda' was asked for, but torch sees none (torch.cuda.is_available() is "
            "false). Use the device 'cpu', or a machine and a build of torch with CUDA."
        )
    number = found.index or 0
    if found.type == "cuda" and number >= torch.cuda.device_count():
        raise ConfigError(
            f"expected a GPU below {torch.cuda.device_count()}, as many as torch sees, got device {str(device)!r}: "
            "use another number"
        )
    return found
