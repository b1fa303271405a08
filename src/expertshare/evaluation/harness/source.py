"""A benchmark as a source of evaluation items: prompts and scoring are the harness's, one item at a time."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from expertshare.errors import InputError
from expertshare.evaluation.harness.benchmarks import Benchmark, verdict
from expertshare.evaluation.items import EvalItem, Judgement, SourceOptions, judge_code, sha256_text
from expertshare.evaluation.scoring import last_number

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase


DEFAULT_GEN_LENGTH = 256
"""Where neither the user nor the task says how long an answer may be; the harness's own default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    item: EvalItem
    task: Task
    instance: Instance


@dataclass(frozen=True, kw_only=True)
class HarnessSource:
    """Items of one benchmark. Made by `load`."""

    benchmark: Benchmark
    allow_code: bool
    questions: Mapping[str, _Question]

    @property
    def task(self) -> str:
        """The benchmark's name, as users write it."""
        return self.benchmark.name

    @classmethod
    def load(
        cls, benchmark: Benchmark, options: SourceOptions, tokenizer: PreTrainedTokenizerBase | None
    ) -> HarnessSource:
        """Read the records and build every prompt. options.limit: items in all, taken from the parts in turn.

        options.chat: None renders prompts by the tokenizer's chat template where it has one. Raises InputError.
        """
        limit = options.limit
        parts = list(benchmark.parts)[:limit]
        each = None if limit is None else -(-limit // len(parts))
        render: Render | None = None
        if (
            tokenizer is not None
            and options.chat is not False
            and (options.chat or tokenizer.chat_template is not None)
        ):
            render = partial(render_chat, tokenizer)
        with TemporaryDirectory(prefix="expertshare-data-") as cache:
            by_part = [
                _questions(task, benchmark.name, part, each, options, render)
                for part in parts
                for task in [load_task(benchmark, part, options.data, Path(cache))]
            ]
        in_turn = [q for questions in zip_longest(*by_part) for q in questions if q is not None][:limit]
        return cls(benchmark=benchmark, allow_code=options.allow_code, questions={q.item.id: q for q in in_turn})

    def items(self) -> Sequence[EvalItem]:
        """In the order of the harness; several parts take turns."""
        return [question.item for question in self.questions.values()]

    def judge(self, item: EvalItem, answer: str) -> Judgement:
        """By the harness's filters and metric, numbers by their value; code by running it, if that is allowed."""
        question = self.questions[item.id]
        text = cut(answer, stops(question.instance))
        if self.benchmark.metric is None:
            run = partial(verdict, self.benchmark.name, question.instance.doc, text)
            return judge_code(run, allowed=self.allow_code)
        wanted, metric = self.benchmark.metric
        instance = question.instance
        instance.resps, instance.filtered_resps = [text], {}
        for ensemble in question.task._filters:
            ensemble.apply([instance])
        scores = question.task.process_results(instance.doc, [instance.filtered_resps[wanted]])
        verdict_there = bool(scores[metric])
        if self.benchmark.number is None:
            return Judgement(correct=verdict_there)
        value = last_number(text)
        right = value is not None and value == last_number(instance.doc[self.benchmark.number])
        return Judgement(correct=right, harness=verdict_there)


def stops(instance: Instance) -> tuple[str, ...]:
    """Texts at which an answer ends, by the task."""
    until = instance.args[1].get("until") or []
    return (until,) if isinstance(until, str) else tuple(until)


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of these texts."""
    ends = [found for stop in until if stop and (found := answer.find(stop)) >= 0]
    return answer[: min(ends)] if ends else answer


Render = Callable[..., str]


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
) -> str:
    """A conversation as the text that the model is given; without a generation prompt its last turn goes on.

    Where the template knows no system turn, its text goes before the first question.
    """

    render = partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    try:
        return str(render([dict(turn) for turn in messages]))
    except TemplateError as error:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise InputError(f"the model's chat template refuses this conversation ({error}): use --raw") from error
        system, question, *others = messages
        first = {**question, "content": system["content"] + question["content"]}
        return str(render([first, *map(dict, others)]))


def _questions(
    task: Task, name: str, part: str, count: int | None, options: SourceOptions, render: Render | None
) -> list[_Question]:
    """As simple_evaluate of the harness prepares them."""
    if options.shots is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=options.shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=options.seed)
    questions: list[_Question] = []
    for number, record in task.doc_iterator(limit=count):
        context = task.fewshot_context(
            record,
            num_fewshot=task.get_config("num_fewshot"),
            apply_chat_template=render is not None,
            fewshot_as_multiturn=render is not None,
            chat_template=render,
            gen_prefix=task.doc_to_prefix(record),
        )
        instance = task.construct_requests(doc=record, ctx=context, metadata=(task.task_name, number, 1))
        item = EvalItem(
            task=name,
            id=f"{part}/{number}" if part else str(number),
            prompt=context,
            chat=False,
            gen_length=options.gen_length or int(instance.args[1].get("max_gen_toks") or DEFAULT_GEN_LENGTH),
            content=sha256_text(json.dumps([context, record], default=str, sort_keys=True)),
        )
        questions.append(_Question(item=item, task=task, instance=instance))
    return questions


OUR_TASKS = Path(__file__).parent / "tasks"
NO_LIKELIHOOD = (
    "a masked diffusion model has no left-to-right likelihood of a given text. Choose a task that generates its answer "
    "(generate_until)"
)


def check_installed() -> None:
    """Raise InputError, with the extra's name, where lm-evaluation-harness or its part for mathematics is absent."""
    for module in ("lm_eval", "math_verify"):
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"this benchmark needs lm-evaluation-harness, and {module} is not installed: pip install "
                "'expertshare[eval]'. The generated tasks (arith, math, code, code_pro, choice) need nothing more"
            )


def load_task(benchmark: Benchmark, part: str, data: Path | None, cache: Path) -> Task:
    """One task of the harness. Its records come from files below `data`, or from the hub where that is None.

    cache: a folder for converted records, which the task reads as long as it is used. Raises InputError.
    """
    check_installed()
    with _quiet():
        from datasets.exceptions import DatasetsError
        from lm_eval import tasks

        name = benchmark.parts[part]
        folders = [str(Path(tasks.__file__).parent / folder) for folder in benchmark.folders]
        manager = tasks.TaskManager(include_defaults=False, include_path=folders or [str(OUR_TASKS)])
        # A task by itself ignores what is to be changed about it; as a member of a group it does not.
        changes: dict[str, Any] = {"task": name, **(_local(benchmark, part, data, cache) if data else {})}
        try:
            loaded = manager.load([{"group": "expertshare", "task": [changes]}])["tasks"]
        except (OSError, ValueError, KeyError, DatasetsError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"the data of {benchmark.name} could not be loaded ({reason}): check the network, or give the "
                "folder that holds its files with --data (docs/evaluation.md says which)"
            ) from error
    task: Task = loaded[name]
    if task.OUTPUT_TYPE != "generate_until":
        raise InputError(f"task {name} asks for {task.OUTPUT_TYPE}: {NO_LIKELIHOOD}")
    return task


def _local(benchmark: Benchmark, part: str, data: Path, cache: Path) -> dict[str, Any]:
    folder = cache / (part or benchmark.name)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for split, records in benchmark.read(data, part).items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        files[split] = str(path)
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "arrow")},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings about settings that are meant; datasets says where it looks in its errors."""
    import datasets

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        log.setLevel(level)
