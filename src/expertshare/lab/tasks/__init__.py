"""Generated tasks: items of five kinds, and the tokenizer of the models that are trained on them."""

from expertshare.lab.tasks.generation import TASKS, generate_items, iterate_items, split_of
from expertshare.lab.tasks.tokenizer import build_tokenizer, save_tokenizer
from expertshare.lab.tasks.types import Split, Task, TaskItem

__all__ = [
    "TASKS",
    "Split",
    "Task",
    "TaskItem",
    "build_tokenizer",
    "generate_items",
    "iterate_items",
    "save_tokenizer",
    "split_of",
]
