"""Evaluation: answer many prompts under one policy, and compare policies on the same prompts."""

from expertshare.evaluation.accuracy import TaskAccuracy, judge, task_accuracy
from expertshare.evaluation.agreement import Agreement, agreement, token_agreement
from expertshare.evaluation.answering import Answer, PolicyRun, answer_prompts
from expertshare.evaluation.comparison import ComparedRun, Comparison, compare_policies
from expertshare.evaluation.evaluating import Evaluation, EvaluationSettings, evaluate_sources
from expertshare.evaluation.presets import PRESETS, find_preset
from expertshare.evaluation.setup import Setup, encode_prompts
from expertshare.evaluation.sources import SourceOptions, check_task_names, harness_version, make_sources
from expertshare.evaluation.statistics import (
    PairedDifference,
    Proportion,
    Retained,
    paired_difference,
    proportion,
    retained,
)
from expertshare.routing.labels import parse_policies, policy_label

__all__ = [
    "PRESETS",
    "Agreement",
    "Answer",
    "ComparedRun",
    "Comparison",
    "Evaluation",
    "EvaluationSettings",
    "PairedDifference",
    "PolicyRun",
    "Proportion",
    "Retained",
    "Setup",
    "SourceOptions",
    "TaskAccuracy",
    "agreement",
    "answer_prompts",
    "check_task_names",
    "compare_policies",
    "encode_prompts",
    "evaluate_sources",
    "find_preset",
    "harness_version",
    "judge",
    "make_sources",
    "paired_difference",
    "parse_policies",
    "policy_label",
    "proportion",
    "retained",
    "task_accuracy",
    "token_agreement",
]
