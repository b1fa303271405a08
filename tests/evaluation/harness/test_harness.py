"""Benchmarks by way of lm-evaluation-harness, offline, on made-up records. Skipped where the extra is not installed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluation.harness.conftest import HUMANEVAL, MBPP, PRO
from expertshare import api
from expertshare.errors import InputError
from expertshare.evaluation.harness.benchmarks import BENCHMARKS
from expertshare.evaluation.harness.source import HarnessSource, cut
from expertshare.evaluation.items import CODE_NOT_ALLOWED, SourceOptions
from expertshare.models import load_model

pytest.importorskip("lm_eval", reason="the extra expertshare[eval] is not installed")
pytest.importorskip("math_verify", reason="the extra expertshare[eval] is not installed")

REFERENCE = Path(__file__).parents[3] / "models" / "reference"
BOTH = PRO[0]["raw_solution"] + "\n" + PRO[0]["new_problem"] + PRO[0]["new_solution"]
ANSWERS = {
    "gsm8k": ("0 + 1 is 1.\n#### 1", "#### 2"),
    "math500": (r"We get $\boxed{2}$.", r"We get $\boxed{3}$."),
    "arc_c": (" B", " A"),
    "mmlu_math": ("C", "A"),
    "mmlu_hs_math": ("C\nbecause", "D"),
    "humaneval": (HUMANEVAL[0]["canonical_solution"], "    return x"),
    "mbpp": (MBPP[3]["code"], "add = 1"),
    "humaneval_pro": (BOTH, ""),
    "mbpp_pro": (BOTH, "    pass"),
}


def load(name: str, data: Path, **changed: Any) -> HarnessSource:
    settings = {"limit": 2, "chat": False, "allow_code": True}
    return HarnessSource.load(BENCHMARKS[name], SourceOptions(data=data, **{**settings, **changed}), None)


@pytest.mark.parametrize("name", ANSWERS)
def test_right_and_wrong_answers_are_told_apart(name: str, data: Path) -> None:
    source = load(name, data)
    item = source.items()[0]
    right, wrong = ANSWERS[name]
    assert source.judge(item, right).correct is True
    assert source.judge(item, wrong).correct is False
    assert source.judge(item, "").correct is False
    assert item.gen_length in (100, 256, 512, 1024)


def test_prompts_hold_the_question_and_as_many_examples_as_asked_for(data: Path) -> None:
    [item] = load("gsm8k", data, shots=2, limit=1).items()
    assert item.prompt.count("Question:") == 3
    assert item.prompt.endswith("Question: What is 0 plus 1?\nAnswer:")
    assert load("gsm8k", data, limit=1).items()[0].prompt.count("Question:") == 6
    assert load("humaneval", data).items()[0].prompt.endswith(HUMANEVAL[0]["prompt"])
    assert load("mbpp", data).items()[0].prompt.count("[[") == 0
    assert load("mbpp_pro", data).items()[0].prompt.endswith("def double(x):\n")


def test_parts_take_turns_and_a_limit_counts_all_of_them(data: Path) -> None:
    ids = [item.id for item in load("mmlu_math", data, limit=7).items()]
    assert ids == [
        *(f"{subject}/0" for subject in BENCHMARKS["mmlu_math"].parts),
        "abstract_algebra/1",
        "college_mathematics/1",
    ]


def test_items_are_the_same_every_time(data: Path) -> None:
    assert load("gsm8k", data).items() == load("gsm8k", data).items()
    assert load("gsm8k", data, seed=1, limit=1).items() != load("gsm8k", data, limit=1).items()


def test_code_is_not_run_unless_allowed(data: Path) -> None:
    source = load("humaneval", data, allow_code=False)
    judgement = source.judge(source.items()[0], HUMANEVAL[0]["canonical_solution"])
    assert (judgement.correct, judgement.reason) == (None, CODE_NOT_ALLOWED)


def test_a_template_without_a_system_turn_gets_its_text_before_the_question(data: Path) -> None:
    tokenizer = load_model(REFERENCE).tokenizer
    source = HarnessSource.load(
        BENCHMARKS["mmlu_hs_math"], SourceOptions(limit=1, gen_length=8, shots=0, data=data), tokenizer
    )
    [item] = source.items()
    assert tokenizer is not None
    assert item.prompt != load("mmlu_hs_math", data, limit=1, shots=0).items()[0].prompt
    assert "high school mathematics" in item.prompt
    assert item.gen_length == 8


def test_an_answer_ends_at_the_first_stop() -> None:
    assert cut("a. Q: b", ("Q:", ".")) == "a"
    assert cut("a", ()) == "a"


def test_every_benchmark_runs_end_to_end(data: Path, tmp_path: Path) -> None:
    names = [name for name in BENCHMARKS if name != "mmlu"]
    evaluation = api.evaluate(
        REFERENCE, names, ["des-vote:budget=28"],
        out=tmp_path / "run", data=data, limit=1, shots=0, gen_length=8, allow_code=True, chat=False,
    )  # fmt: skip
    assert [(x["task"], x["policy"]) for x in evaluation.lines] == [
        (name, policy) for name in names for policy in ("vanilla", "des-vote:budget=28")
    ]
    assert all(x["correct"] is not None for x in evaluation.lines)


def test_a_missing_file_is_said_before_anything_runs(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "math500")
    with pytest.raises(InputError, match=r"math500.test\.jsonl"):
        api.evaluate(REFERENCE, ["gsm8k", "math500"], ["vanilla"], out=tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


def test_the_registered_model_answers_as_the_evaluation_does(data: Path, tmp_path: Path) -> None:
    """The harness's own loop, with our model class, against our loop with the harness's prompts."""
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    import expertshare.evaluation.harness.model as ours
    from expertshare.evaluation.harness.source import OUR_TASKS

    assert get_model("expertshare") is ours.ExpertShareLM
    files = {"train": str(data / "codeeval_pro" / "mbpp_pro.json")}
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "arrow")}}
    results = lm_eval.simple_evaluate(
        model="expertshare",
        model_args={"pretrained": str(REFERENCE), "policy": "des-vote:budget=28"},
        tasks=[{"group": "g", "task": [{"task": "expertshare_mbpp_pro", **local}]}],
        task_manager=TaskManager(include_defaults=False, include_path=str(OUR_TASKS)),
        gen_kwargs={"max_gen_toks": 8},
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    assert results is not None
    theirs = [sample["resps"][0][0] for sample in results["samples"]["expertshare_mbpp_pro"]]
    evaluation = api.evaluate(
        REFERENCE, ["mbpp_pro"], ["des-vote:budget=28"],
        out=tmp_path / "run", data=data, gen_length=8, chat=False, allow_code=True,
    )  # fmt: skip
    assert theirs == [x["answer"] for x in evaluation.lines if x["policy"] != "vanilla"]
    assert results["results"]["expertshare_mbpp_pro"]["pass_at_1,none"] == 0.0


def test_likelihoods_are_refused(data: Path) -> None:
    from expertshare.evaluation.harness.model import ExpertShareLM

    model = ExpertShareLM(pretrained=str(REFERENCE), policy="des-vote:budget=28;group_limit=ignore")
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(InputError, match="no left-to-right likelihood"):
            ask([])


def test_numbers_are_judged_by_value_and_the_harness_is_told_beside(data: Path) -> None:
    source = load("gsm8k", data)
    item = source.items()[0]
    for answer, ours, theirs in (
        ("#### 1", True, True),
        ("That makes 1...", True, False),
        ("It costs $1.00", True, False),
        ("#### 2", False, False),
        ("nothing", False, False),
    ):
        judged = source.judge(item, answer)
        assert (judged.correct, judged.harness) == (ours, theirs), answer
    assert load("math500", data).judge(load("math500", data).items()[0], ANSWERS["math500"][0]).harness is None


def test_generation_settings_are_used_or_refused() -> None:
    from expertshare.decoding import DecodingOptions
    from expertshare.evaluation.harness.model import generation

    plain = DecodingOptions(temperature=0.5)
    for settings, temperature, length in (
        ({"until": ["x"], "do_sample": False, "temperature": 3}, 0.0, None),
        ({"do_sample": True, "temperature": 3, "max_tokens": 7}, 3.0, 7),
        ({"do_sample": True}, 0.5, None),
        ({"temperature": 0.0, "max_new_tokens": 9, "num_beams": 1, "repetition_penalty": 1.0}, 0.0, 9),
        ({"max_gen_toks": 5, "max_tokens": 5}, 0.5, 5),
    ):
        options, found = generation(settings, plain)
        assert (options.temperature, found) == (temperature, length), settings
    options, _ = generation({"do_sample": True, "top_k": 5, "top_p": 0.9, "seed": 3}, DecodingOptions())
    assert (options.temperature, options.top_k, options.top_p, options.seed) == (1.0, 5, 0.9, 3)
    assert generation({"top_k": 0, "top_p": 1.0}, plain)[0] == plain
    for settings, named in (({"num_beams": 4}, "num_beams=4"), ({"max_tokens": 5, "max_new_tokens": 6}, r"\[5, 6\]")):
        with pytest.raises(InputError, match=named):
            generation(settings, plain)


def test_repeats_of_a_request_are_other_samples_and_a_dtype_is_taken() -> None:
    from lm_eval.api.instance import Instance

    from expertshare.evaluation.harness.model import ExpertShareLM

    model = ExpertShareLM(pretrained=str(REFERENCE), dtype="float32")
    assert str(model.solver.loaded.model.dtype) == "torch.float32"
    settings = {"do_sample": True, "temperature": 9.0, "max_gen_toks": 32, "until": []}
    asked = model.apply_chat_template([{"role": "user", "content": "Solve x + 5 = 12."}])
    request = Instance("generate_until", {}, (asked, settings), 0, ("task", 3, 4))
    sampled = model.generate_until([request] * 4)
    assert len(set(sampled)) > 1
    assert model.generate_until([request] * 4) == sampled
    greedy = Instance("generate_until", {}, (asked, {**settings, "do_sample": False}), 0, ("task", 3, 2))
    assert len(set(model.generate_until([greedy] * 2))) == 1
    with pytest.raises(InputError, match="float64"):
        ExpertShareLM(pretrained=str(REFERENCE), dtype="float64")
