"""Which proposals a denoising step writes, and their writing: decoding.commit_rule on the device."""

from __future__ import annotations

import triton
import triton.language as tl

FLAGS = tl.constexpr(4)
"""Numbers of a row in a report before its tokens: finite, has masks, changed, eos."""


@triton.jit
def _block(masked_ptr, frozen_ptr, control_ptr, edited_ptr, row, place, capacity, LENGTH: tl.constexpr):
    """Of positions `place` of a row's block: where they are, which are undecided, open to change, and asked about."""
    on = tl.load(control_ptr + row * 4 + 2) > 0
    inside = (place < LENGTH) & on
    at = row * capacity + tl.load(control_ptr + row * 4) + place
    masked = (tl.load(masked_ptr + at, mask=inside, other=0) != 0) & inside
    is_open = (tl.load(frozen_ptr + at, mask=inside, other=1) == 0) & inside
    edited = tl.load(edited_ptr + row) != 0
    return at, masked, is_open, (edited & is_open) | ((edited == 0) & masked)


@triton.jit
def finite_kernel(
    masked_ptr,
    frozen_ptr,
    control_ptr,
    edited_ptr,
    sure_ptr,
    report_ptr,
    capacity,
    LENGTH: tl.constexpr,
    LP: tl.constexpr,
):
    """One program per row: whether all probabilities that the step asked for are finite, into the row's report."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, LP)
    _, _, _, wanted = _block(masked_ptr, frozen_ptr, control_ptr, edited_ptr, row, place, capacity, LENGTH)
    sure = tl.load(sure_ptr + row * LENGTH + place, mask=wanted, other=0.0)
    wrong = (sure != sure) | (tl.abs(sure) == float("inf"))
    finite = tl.sum(wrong.to(tl.int32), axis=0) == 0
    tl.store(report_ptr + row * (FLAGS + LENGTH), finite.to(tl.int64))


@triton.jit
def commit_kernel(
    tokens_ptr,
    masked_ptr,
    frozen_ptr,
    answer_ptr,
    control_ptr,
    thresholds_ptr,
    edited_ptr,
    proposed_ptr,
    sure_ptr,
    eos_ptr,
    report_ptr,
    capacity,
    num_rows,
    NUM_EOS: tl.constexpr,
    LENGTH: tl.constexpr,
    LP: tl.constexpr,
    RP: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):
    """One program per row, after finite_kernel: writes tokens and masks of the row's block where the rule says so, and
    the rest of its report. Nothing is written in any row if a probability of any row is not finite.

    tokens int64, masked, frozen, answer bool: [R, capacity]. control int64 [R, 4]: start, least, on, not read.
    thresholds float32 [R, 2]: of commits and of edits. edited bool [R]. proposed int64, sure float32: [R, LENGTH].
    report int64 [R, FLAGS + LENGTH]. AT_A_TIME divides LP: every position is compared with so many others together.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, LP)
    at, masked, is_open, wanted = _block(masked_ptr, frozen_ptr, control_ptr, edited_ptr, row, place, capacity, LENGTH)
    there = place < LENGTH
    token = tl.load(tokens_ptr + at, mask=there, other=0)
    proposed = tl.load(proposed_ptr + row * LENGTH + place, mask=there, other=0)
    sure = tl.load(sure_ptr + row * LENGTH + place, mask=wanted, other=-float("inf"))
    confidence = tl.where(masked, sure, -float("inf"))
    rank = tl.zeros((LP,), tl.int32)
    for begin in range(0, LP, AT_A_TIME):
        other = begin + tl.arange(0, AT_A_TIME)
        _, other_masked, _, _ = _block(masked_ptr, frozen_ptr, control_ptr, edited_ptr, row, other, capacity, LENGTH)
        theirs = tl.load(sure_ptr + row * LENGTH + other, mask=other_masked, other=-float("inf"))
        ahead = theirs[None, :] > confidence[:, None]
        ahead = ahead | ((theirs[None, :] == confidence[:, None]) & (other[None, :] < place[:, None]))
        rank += tl.sum(ahead.to(tl.int32), axis=1)
    least = tl.load(control_ptr + row * 4 + 1)
    sure_ones = masked & (confidence > tl.load(thresholds_ptr + row * 2))
    enough = tl.sum(sure_ones.to(tl.int32), axis=0) >= least
    write = (enough & sure_ones) | ((enough == 0) & masked & (rank < least))
    edit = is_open & (masked == 0) & (proposed != token) & (sure > tl.load(thresholds_ptr + row * 2 + 1))
    rows = tl.arange(0, RP).to(tl.int64)
    finite = tl.load(report_ptr + rows * (FLAGS + LENGTH), mask=rows < num_rows, other=1)
    write = (write | edit) & (tl.min(finite, axis=0) > 0)
    left = masked & (write == 0)
    token = tl.where(write, proposed, token)
    tl.debug_barrier()  # above, every thread reads what is written below
    tl.store(tokens_ptr + at, token, mask=write)
    tl.store(masked_ptr + at, left, mask=write)
    first_left = tl.min(tl.where(left, place, LP), axis=0)
    ends = there & (tl.load(answer_ptr + at, mask=there, other=0) != 0) & (place < first_left)
    is_eos = place < 0
    for number in tl.static_range(NUM_EOS):
        is_eos = is_eos | (token == tl.load(eos_ptr + number))
    report = report_ptr + row * (FLAGS + LENGTH)
    tl.store(report + 1, (first_left < LP).to(tl.int64))
    tl.store(report + 2, (tl.sum(write.to(tl.int32), axis=0) > 0).to(tl.int64))
    tl.store(report + 3, (tl.sum((ends & is_eos).to(tl.int32), axis=0) > 0).to(tl.int64))
    tl.store(report + FLAGS + place, token, mask=there)
