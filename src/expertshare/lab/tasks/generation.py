"""Draw task items, for training without end or for evaluation by the count.

The split is a property of the prompt text alone: an item belongs to `test` when blake2b(prompt) is a multiple
of 16, else to `train`. Train and test are therefore disjoint whatever the seeds and however many are drawn.
Levels 1 to 3 follow the same distribution in both; level 4, a fifth of the test items, is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from random import Random

from expertshare.errors import InputError, nearest
from expertshare.lab.tasks import arithmetic, code, multiple_choice
from expertshare.lab.tasks.types import Split, Task, TaskItem

_KINDS = (arithmetic.WORDED, arithmetic.SYMBOLIC, code.TASK, code.SELF_INVOKING, multiple_choice.TASK)
TASKS: dict[str, Task] = {task.name: task for task in _KINDS}
"""The kinds by name. A new kind is a Task and its entry here."""
TEST_SHARE_INVERSE = 16
LEVEL_SHARES = (0.30, 0.35, 0.35)
BEYOND_SHARE = 0.20
# Consecutive draws that bring nothing new before the space of prompts counts as used up.
MAX_BARREN_DRAWS = 2_000


def split_of(prompt: str) -> Split:
    """The split that owns this prompt."""
    digest = blake2b(prompt.encode("utf-8"), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE_INVERSE == 0 else "train"


def iterate_items(task: str, *, split: Split, seed: int) -> Iterator[TaskItem]:
    """An endless stream of items of one kind; prompts may repeat. Raises InputError for an unknown name."""
    if task not in TASKS:
        raise InputError(f"expected the name of a task, got {task!r}. {nearest(task, TASKS)}")
    if split not in ("train", "test"):
        raise InputError(f"expected split 'train' or 'test', got {split!r}")
    return _stream(TASKS[task], split, Random(f"{task}/{split}/{seed}"))


def _stream(task: Task, split: Split, rng: Random) -> Iterator[TaskItem]:
    draws, (easy, medium, _) = (*task.levels, task.beyond), LEVEL_SHARES
    while True:
        beyond = split == "test" and rng.random() < BEYOND_SHARE
        if beyond:
            level = 4
        else:
            toss = rng.random()
            level = 1 if toss < easy else 2 if toss < easy + medium else 3
        draft = draws[level - 1](rng)
        if split_of(draft.prompt) == split:
            yield TaskItem(
                task=task.name, prompt=draft.prompt, reference=draft.reference, tests=draft.tests, level=level
            )


def generate_items(task: str, *, split: Split, count: int, seed: int) -> list[TaskItem]:
    """`count` items with distinct prompts, the same for the same arguments.

    Raises InputError for a negative count or one beyond the number of prompts that the kind has.
    """
    if count < 0:
        raise InputError(f"expected a count of 0 or more, got {count}")
    found: dict[str, TaskItem] = {}
    stream = iterate_items(task, split=split, seed=seed)
    barren = 0
    while len(found) < count:
        item = next(stream)
        barren = barren + 1 if item.prompt in found else 0
        if barren > MAX_BARREN_DRAWS:
            raise InputError(
                f"expected at most about {len(found)} distinct {split} prompts of {task!r}, got {count}; ask for fewer"
            )
        found.setdefault(item.prompt, item)
    return list(found.values())
