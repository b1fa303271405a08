"""Generated tasks: items of five kinds, their tokenizer, scoring in a sandbox, and prompt files."""

from expertshare.tasks.generation import generate_items, iterate_items, split_of
from expertshare.tasks.prompts import read_prompts, write_prompts
from expertshare.tasks.sandbox import Verdict, run_programs
from expertshare.tasks.scoring import score, score_many
from expertshare.tasks.table import TASKS
from expertshare.tasks.tokenizer import build_tokenizer, save_tokenizer
from expertshare.tasks.types import PromptRecord, Split, Task, TaskItem

__all__ = [
    "TASKS",
    "PromptRecord",
    "Split",
    "Task",
    "TaskItem",
    "Verdict",
    "build_tokenizer",
    "generate_items",
    "iterate_items",
    "read_prompts",
    "run_programs",
    "save_tokenizer",
    "score",
    "score_many",
    "split_of",
    "write_prompts",
]
