"""Evaluation: answer many prompts under one policy, and compare policies on the same prompts."""

from expertshare.evaluation.accuracy import TaskAccuracy, judge, task_accuracy
from expertshare.evaluation.agreement import Agreement, agreement, token_agreement
from expertshare.evaluation.answering import Answer, PolicyRun, answer_prompts
from expertshare.evaluation.comparison import ComparedRun, Comparison, compare_policies
from expertshare.evaluation.labels import parse_policies, policy_label
from expertshare.evaluation.setup import Setup, encode_prompts
from expertshare.evaluation.statistics import (
    PairedDifference,
    Proportion,
    Retained,
    paired_difference,
    proportion,
    retained,
)

__all__ = [
    "Agreement",
    "Answer",
    "ComparedRun",
    "Comparison",
    "PairedDifference",
    "PolicyRun",
    "Proportion",
    "Retained",
    "Setup",
    "TaskAccuracy",
    "agreement",
    "answer_prompts",
    "compare_policies",
    "encode_prompts",
    "judge",
    "paired_difference",
    "parse_policies",
    "policy_label",
    "proportion",
    "retained",
    "task_accuracy",
    "token_agreement",
]
