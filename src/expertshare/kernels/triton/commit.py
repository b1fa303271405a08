"""The commit rule of a denoising step on the GPU: two kernels, and one report for the host."""

from __future__ import annotations

from torch import Tensor

from expertshare.errors import ConfigError
from expertshare.kernels.triton import check_devices, power_of_two

FLAGS = 4
"""Numbers of a row in a report before its tokens: finite, has masks, changed, eos."""
POSITIONS_AT_A_TIME = 16


def commit_triton(
    canvas: tuple[Tensor, Tensor, Tensor, Tensor],
    control_R4: Tensor,
    thresholds_R2: Tensor,
    edited_R1: Tensor,
    proposed: tuple[Tensor, Tensor],
    eos_ids: Tensor,
    report_RX: Tensor,
) -> None:
    """Write the proposals that decoding's commit rule and editing rule choose, in place, and report on every row.

    canvas: tokens int64 and masked, frozen, answer bool, [R, C] each; the first two are written. control: int64, per
    row where its block starts, the least number of tokens to write, whether it takes part, and a number that is not
    read. thresholds: float32, of commits and of edits, infinity for none. edited: bool. proposed: tokens int64 [R, L]
    and their probabilities float32. report: int64 [R, FLAGS + L]: whether what was asked for is finite, whether masks
    are left, whether something was written, whether the answer surely ends here; then the block's tokens. Nothing is
    written where a row has a 0 in the first. Raises ConfigError where Triton cannot run, or for what is not contiguous.
    """
    (tokens_RC, masked_RC, frozen_RC, _), (best_RL, sure_RL) = canvas, proposed
    everything = (*canvas, control_R4, thresholds_R2, edited_R1, *proposed, eos_ids, report_RX)
    check_devices(*everything)
    if not all(tensor.is_contiguous() for tensor in everything):
        raise ConfigError("the commit rule expects contiguous tensors: make them so when they are allocated.")
    from expertshare.kernels.triton.device.commit import commit_kernel, finite_kernel

    (num_rows, capacity), length = tokens_RC.shape, best_RL.shape[1]
    block = {"LENGTH": length, "LP": power_of_two(length)}
    finite_kernel[(num_rows,)](
        masked_RC, frozen_RC, control_R4, edited_R1, sure_RL, report_RX, capacity, **block, num_warps=1
    )
    eos_or_any = eos_ids if len(eos_ids) else control_R4  # the second is never read
    given = (*canvas, control_R4, thresholds_R2, edited_R1, *proposed, eos_or_any, report_RX, capacity, num_rows)
    sizes = {"NUM_EOS": len(eos_ids), "RP": power_of_two(num_rows), "AT_A_TIME": min(POSITIONS_AT_A_TIME, block["LP"])}
    commit_kernel[(num_rows,)](*given, **block, **sizes, num_warps=4)
