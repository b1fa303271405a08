"""Generated tasks: items of five kinds, their tokenizer, scoring in a sandbox, and prompt files."""

from expertshare.lab.tasks.generation import generate_items, iterate_items, split_of
from expertshare.lab.tasks.prompts import read_prompts, write_prompts
from expertshare.lab.tasks.sandbox import Verdict, run_programs
from expertshare.lab.tasks.scoring import score, score_many
from expertshare.lab.tasks.table import TASKS
from expertshare.lab.tasks.tokenizer import build_tokenizer, save_tokenizer
from expertshare.lab.tasks.types import PromptRecord, Split, Task, TaskItem

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
