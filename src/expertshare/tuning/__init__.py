"""Tuning: the cheapest policy that keeps a promised share of vanilla's quality, with the evidence for it."""

from expertshare.tuning.certificate import PairedCounts, least_solved, lower_bound, needed_prompts, p_value
from expertshare.tuning.options import TuningOptions
from expertshare.tuning.policy_file import PolicyFile, check_model, read_policy_file
from expertshare.tuning.results import Tuned
from expertshare.tuning.tuner import tune

__all__ = [
    "PairedCounts",
    "PolicyFile",
    "Tuned",
    "TuningOptions",
    "check_model",
    "least_solved",
    "lower_bound",
    "needed_prompts",
    "p_value",
    "read_policy_file",
    "tune",
]
