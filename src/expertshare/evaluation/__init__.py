"""Evaluation: answer many prompts under one policy, and compare policies on the same prompts."""

from expertshare.evaluation.answering import Answer, PolicyRun, answer_prompts
from expertshare.evaluation.comparison import ComparedRun, Comparison, compare_policies
from expertshare.evaluation.evaluating import Evaluation, EvaluationSettings, evaluate_sources
from expertshare.evaluation.presets import PRESETS, find_preset
from expertshare.evaluation.prompts import PromptRecord, read_prompts, write_prompts
from expertshare.evaluation.sandbox import Verdict, run_programs
from expertshare.evaluation.scoring import ANSWER_RULES, judge, score, score_many
from expertshare.evaluation.setup import Setup, encode_prompts
from expertshare.evaluation.sources import SourceOptions, check_task_names, harness_version, make_sources
from expertshare.evaluation.statistics import (
    Agreement,
    PairedDifference,
    Proportion,
    Retained,
    TaskAccuracy,
    agreement,
    paired_difference,
    proportion,
    retained,
    task_accuracy,
    token_agreement,
)
from expertshare.routing import parse_policies, policy_label

__all__ = [
    "ANSWER_RULES",
    "PRESETS",
    "Agreement",
    "Answer",
    "ComparedRun",
    "Comparison",
    "Evaluation",
    "EvaluationSettings",
    "PairedDifference",
    "PolicyRun",
    "PromptRecord",
    "Proportion",
    "Retained",
    "Setup",
    "SourceOptions",
    "TaskAccuracy",
    "Verdict",
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
    "read_prompts",
    "retained",
    "run_programs",
    "score",
    "score_many",
    "task_accuracy",
    "token_agreement",
    "write_prompts",
]
