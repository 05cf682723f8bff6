"""Sequences of one's own on either side of the kernel: what is read, what is refused, and what can then be computed."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from entropy_core import compute_kernels, fixed_prefix_entropy_change, token_statistics
from entropy_core.adamw import adam_preconditioner
from entropy_core.directional import weights_moved
from entropy_core.gradients import trainable_parameters
from entropy_experiments import entropy_runner
from entropy_experiments.buffers.custom import PromptNumbers, as_sampled, read_custom_sequences
from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.double_sampling import custom_evaluation, draw_buffers, score_for_the_reader
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.records.record import json_of
from rl_training.errors import UserError
from rl_training.sampling import SamplingConfig
from rl_training.tasks.task import Task
from tests.entropy_experiments.small_analysis import config
from tests.tiny_policy import character_tokenizer

SAMPLING = SamplingConfig(1.0, 8, (1,), 0)


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def own(side, path, *more):
    return config(f"entropy_analysis.sampling.{side}_sequences_path={path}", *more)


@pytest.fixture
def texts(tmp_path):
    """Twelve lines over four prompts that the task does not have."""
    lines = [{"prompt": f"{k}0 + {k}0 =", "completion": f"{k + j}"} for k in range(4) for j in range(3)]
    return write(tmp_path / "own.jsonl", *lines)


def test_every_bad_line_is_named_by_its_number(tmp_path):
    good = {"prompt": "1 + 1 =", "completion": "2"}
    path = write(
        tmp_path / "bad.jsonl",
        good,
        "{not json",
        [1],
        {"prompt": "1 + 1 ="},
        "",
        {"prompt": "   ", "completion": "2"},
        {"prompt": "1 + 1 =", "completion": 2},
        {**good, "weigth": 1.0},
        {**good, "prompt_index": -1},
        {**good, "prompt_index": True},
        {"prompt": [{"role": "user"}], "completion": "2"},
        '{"prompt": "a", "completion": "b", "prompt_index": 1.5}',
        {**good, "note": "keys of one's own are allowed"},
    )
    with pytest.raises(UserError) as caught:
        read_custom_sequences(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for words in (
        "line 2: not JSON",
        "line 3: not a JSON object",
        "line 4: no 'completion'",
        "line 6: 'prompt' is empty",
        "line 7: 'completion' must be text",
        "and 5 more bad lines: 8, 9, 10, 11, 12",
    ):
        assert words in message, message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "completion": "b", "reward": NaN}', "'reward' must be a finite number"),
        ('{"prompt": "a", "completion": "b", "weight": 1e999}', "'weight' must be a finite number"),
        ('{"prompt": "a", "completion": "b", "weight": ' + "9" * 400 + "}", "'weight' must be a finite number"),
        ('{"prompt": "a", "completion": "b", "reward": true}', "'reward' must be a finite number"),
        ({"prompt": "a", "completion": "b", "weigth": 1}, "did you mean 'weight'"),
        ({"prompt": [], "completion": "b"}, "messages"),
        ("[" * 100_000, "not JSON|nested too deeply"),
        ('{"prompt": "half \\ud800", "completion": "b"}', "lone surrogate"),
        ('{"prompt": "a", "completion": "\\u0000"}', "NUL"),
    ],
)
def test_one_bad_line(tmp_path, line, words):
    with pytest.raises(UserError, match=rf"line 1: .*({words})"):
        read_custom_sequences(write(tmp_path / "x.jsonl", line))


def test_rewards_and_weights_stand_on_all_lines_or_on_none(tmp_path):
    bare = {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match="line 2: no 'reward', which other lines have"):
        read_custom_sequences(write(tmp_path / "x.jsonl", {**bare, "reward": 1}, bare, {**bare, "reward": 0}))


def test_files_that_hold_nothing(tmp_path):
    for path, words in (
        (tmp_path / "absent.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
        (write(tmp_path / "empty.jsonl", "", ""), "holds no sequences"),
    ):
        with pytest.raises(UserError, match=words):
            read_custom_sequences(path)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_custom_sequences(tmp_path / "binary.jsonl")


def test_the_same_prompt_has_the_same_number_in_both_files_and_in_the_task(tmp_path):
    task = [{"prompt": [{"role": "user", "content": "known"}], "prompt_index": 7, "answer": "x"}]
    numbers = PromptNumbers(task)

    def rows(name, *lines):
        path = write(tmp_path / name, *lines)
        return numbers.rows(path, read_custom_sequences(path))

    first = rows("a", *({"prompt": p, "completion": ""} for p in ("known", "new", "other", "new")))
    assert [row["prompt_index"] for row in first] == [7, 8, 9, 8] and first[0]["answer"] == "x"
    second = rows(
        "b",
        {"prompt": "other", "completion": ""},
        {"prompt": "third", "completion": "", "prompt_index": 40},
        {"prompt": "fourth", "completion": "", "prompt_index": 40},
        {"prompt": "fifth", "completion": ""},
    )
    assert [row["prompt_index"] for row in second] == [9, 40, 40, 41], "one number, one unit"
    for lines, words in (
        ([{"prompt": "sixth", "completion": "", "prompt_index": 7}], "line 1: prompt_index 7 is another prompt's"),
        ([{"prompt": "sixth", "completion": "", "prompt_index": 9}], "line 1: prompt_index 9 is another prompt's"),
        ([{"prompt": "known", "completion": "", "prompt_index": 3}], "line 1: this prompt has prompt_index 7"),
        (
            [{"prompt": "seventh", "completion": "", "prompt_index": i} for i in (50, 51)],
            "line 2: this prompt has prompt_index 50",
        ),
    ):
        with pytest.raises(UserError, match=words):
            rows("c", *lines)


def test_completions_end_as_the_sampler_would_end_them():
    tokenizer = character_tokenizer()
    digits = tokenizer("1234567890")["input_ids"]
    assert as_sampled(tokenizer, "12", SAMPLING) == [*digits[:2], 1]
    assert as_sampled(tokenizer, "", SAMPLING) == [1]
    assert as_sampled(tokenizer, "1234567", SAMPLING) == [*digits[:7], 1], "eight tokens with the end: just fits"
    assert as_sampled(tokenizer, "1234567890", SAMPLING) == digits[:8], "cut, without an end of sequence"
    assert as_sampled(tokenizer, "12<eos>34", SAMPLING) == [*digits[:2], 1], "nothing comes after the end"


def test_given_rows_are_held_against_the_kernel_of_the_core(tiny_run, texts, tmp_path):
    """K1 and the fixed-prefix K_H of given texts, from entropy_core's own functions; no entropy of the policy is claimed."""
    result = run_fisher_analysis(tiny_run, own("eval", texts), folder=tmp_path / "rows")
    assert not result.failed_checks
    assert {c.name for c in result.numbers.checks}.isdisjoint({"sampler: surprisal = entropy"})
    assert result.evaluation.completion[:3] == ["0", "1", "2"] and len(result.evaluation) == 12
    assert len(set(result.evaluation.prompt_index)) == 4
    checkpoint = load_checkpoint(tiny_run)
    sampling_config = plan_sampling(checkpoint, config()).sampling_config
    rows, columns = result.evaluation.to_batch(sampling_config), result.training.rollouts.to_batch(sampling_config)
    p = adam_preconditioner(checkpoint.optimizer, trainable_parameters(checkpoint.model))
    expected = compute_kernels(checkpoint.model, rows, columns, p, "fixed_prefix")
    stored = load_file(result.folder / "kernel.safetensors")
    torch.testing.assert_close(stored["fisher"], expected.fisher, rtol=1e-3, atol=1e-3 * expected.fisher.abs().max())
    entropy = expected.entropy_fisher
    torch.testing.assert_close(stored["entropy_fisher"], entropy, rtol=1e-3, atol=1e-3 * entropy.abs().max())
    summary = json_of(result.summary)
    assert set(summary["predicted"]) == {"fixed_prefix"} and summary["rows_drawn"] is False
    assert summary["actual"]["snis"] is None and summary["actual"]["fixed_prefix"]["value"]
    assert sum(result.numbers.step.attribution.shares) == pytest.approx(
        summary["predicted"]["fixed_prefix"]["batch"]["value"], rel=1e-3
    ), "shares of given rows are shares of the fixed-prefix change"
    page = re.sub(r"(?s)<script>.*?</script>", "", (result.folder / "report.html").read_text())  # programs, not data
    page = re.sub(r'base64,[A-Za-z0-9+/=]+|"[A-Za-z0-9+/]{8,}=*"', "", page)
    assert "given texts, not drawn from the policy" in page and not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_the_fixed_prefix_prediction_of_given_rows_is_what_the_step_does_to_them(tiny_run, texts):
    """Half a step forward and half a step back, the entropies recomputed here: of a twentieth float32 leaves too few digits."""
    checkpoint, settings = load_checkpoint(tiny_run), own("eval", texts)
    plan = plan_sampling(checkpoint, settings)
    buffers = draw_buffers(checkpoint, plan, settings)
    found = entropy_runner.analyze_buffers(checkpoint, plan, settings, buffers)
    rows = buffers.evaluation.to_batch(plan.sampling_config)
    before = token_statistics(checkpoint.model, rows)
    changes = []
    for scale in (0.5, -0.5):
        with weights_moved(checkpoint.model, found.side.known_step.parameter_delta, scale):
            changes.append(fixed_prefix_entropy_change(before, token_statistics(checkpoint.model, rows), rows).change)
    assert changes[0] - changes[1] == pytest.approx(
        found.numbers.step.predictions.per_token["fixed_prefix"]["total"].value, rel=0.01
    )


def test_columns_without_weights_have_a_kernel_and_no_step(tiny_run, texts, tmp_path):
    result = run_fisher_analysis(tiny_run, own("train", texts), folder=tmp_path / "columns")
    assert not result.failed_checks and result.numbers.step is None
    assert result.summary.predicted == {} and result.summary.scaling == ()
    kernels = load_file(result.folder / "kernel.safetensors")
    assert kernels["fisher"].shape == (16, 12) and kernels["train_fisher"].shape == (12, 12)
    rows = pq.read_table(result.folder / "sequences.parquet").to_pylist()
    trained = [row for row in rows if row["buffer"] == "training"]
    assert {row["weight"] for row in trained} == {row["delta_h"] for row in trained} == {None}
    with pytest.raises(UserError, match="preconditioning=checkpoint"):
        step_p = "entropy_analysis.fisher_kernel.preconditioning=step"
        run_fisher_analysis(tiny_run, own("train", texts, step_p), folder=tmp_path / "no")
    with pytest.raises(UserError, match="compute_full=true"):
        no_kernel = "entropy_analysis.fisher_kernel.compute_full=false"
        run_fisher_analysis(tiny_run, own("train", texts, no_kernel), folder=tmp_path / "no")


def test_weights_of_ones_own_make_the_step(tiny_run, tmp_path):
    lines = [{"prompt": f"{k} + 1 =", "completion": f"{k}", "weight": 0.01 * (k - 1.5)} for k in range(4)]
    path = write(tmp_path / "weighted.jsonl", *lines)
    result = run_fisher_analysis(tiny_run, own("train", path), folder=tmp_path / "weighted")
    assert not result.failed_checks
    np.testing.assert_allclose(result.training.weights, [line["weight"] for line in lines])
    assert sum(result.numbers.step.attribution.shares) == pytest.approx(
        result.numbers.step.attribution.batch_change, rel=1e-4
    )


def test_rewards_of_ones_own_become_dr_grpo_weights(tiny_run, tmp_path):
    rewards = [1.0, 0.0, 0.0, 0.5, 0.5, 2.0]
    lines = [{"prompt": f"{k // 3} + 1 =", "completion": f"{k}", "reward": r} for k, r in enumerate(rewards)]
    path = write(tmp_path / "rewarded.jsonl", *lines)
    result = run_fisher_analysis(tiny_run, own("train", path), folder=tmp_path / "rewarded")
    advantages = np.array([2 / 3, -1 / 3, -1 / 3, -0.5, -0.5, 1.0])
    np.testing.assert_allclose(result.training.advantages, advantages)
    np.testing.assert_allclose(result.training.weights, advantages / (6 * 8))
    constant = write(tmp_path / "constant.jsonl", *({**line, "reward": 1.0} for line in lines))
    with pytest.raises(UserError, match="rewards of each prompt are all equal"):
        run_fisher_analysis(tiny_run, own("train", constant), folder=tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_reference_completions_on_either_side(tiny_run, tmp_path):
    gold = run_fisher_analysis(
        tiny_run, config("entropy_analysis.sampling.eval_completions=reference"), folder=tmp_path / "rows"
    )
    assert not gold.failed_checks
    assert gold.evaluation.completion == [row["answer"] for row in gold.evaluation.prompt_row]
    assert all(ids[-1] == 1 for ids in gold.evaluation.completion_ids)
    more = config("entropy_analysis.sampling.train_completions=reference", "entropy_analysis.train_batch_size=10")
    columns = run_fisher_analysis(tiny_run, more, folder=tmp_path / "columns")
    assert columns.training.weights is None and len(set(columns.training.rollouts.prompt_index)) == 10
    assert columns.training.rollouts.completion == [row["answer"] for row in columns.training.rollouts.prompt_row]


def test_a_task_without_answers_has_no_references(tiny_run):
    checkpoint = load_checkpoint(tiny_run)
    settings = config("entropy_analysis.sampling.eval_completions=reference")
    plan = plan_sampling(checkpoint, settings)
    for row in plan.task.heldout:
        row["answer"] = ""
    with pytest.raises(UserError, match=r"has no reference completion \(16 of 16"):
        draw_buffers(checkpoint, plan, settings)


def test_prompts_of_a_file_are_kept_out_of_the_other_buffer(tiny_run, tmp_path):
    checkpoint = load_checkpoint(tiny_run)
    task: Task = plan_sampling(checkpoint, config()).task
    lines = [{"prompt": row["prompt"][-1]["content"], "completion": "1"} for row in task.heldout[:5] + task.train[:7]]
    path = write(tmp_path / "known.jsonl", *lines)
    numbers = {row["prompt_index"] for row in task.heldout[:5] + task.train[:7]}
    for side in ("eval", "train"):
        settings = own(side, path)
        evaluation, training = draw_buffers(checkpoint, plan_sampling(checkpoint, settings), settings)
        given, other = evaluation, training.rollouts
        if side == "train":
            given, other = other, given
        assert set(given.prompt_index) == numbers and not numbers & set(other.prompt_index)
    both = own("eval", path, f"entropy_analysis.sampling.train_sequences_path={path}")
    with pytest.raises(UserError, match=r"12 such prompts.*known\.jsonl.*same_prompts=true"):
        draw_buffers(checkpoint, plan_sampling(checkpoint, both), both)
    shared = own("train", path, "entropy_analysis.sampling.same_prompts=true")
    evaluation, training = draw_buffers(checkpoint, plan_sampling(checkpoint, shared), shared)
    assert set(evaluation.prompt_index) == numbers and set(evaluation.status) == {"evaluation"}


def test_rewards_for_the_reader_are_the_files_else_the_tasks_own(tiny_run, tmp_path):
    checkpoint = load_checkpoint(tiny_run)
    plan = plan_sampling(checkpoint, config())
    known = plan.task.heldout[0]["prompt"][-1]["content"]
    scored = write(tmp_path / "a", *({"prompt": known, "completion": text, "reward": 0.25} for text in ("0", "1")))
    bare = write(tmp_path / "b", *({"prompt": p, "completion": c} for p in (known, "?") for c in ("0", "1")))
    found = []
    for path in (scored, bare):
        evaluation, _ = custom_evaluation(checkpoint, plan, own("eval", path), PromptNumbers(plan.task.heldout))
        found.append(score_for_the_reader(evaluation, plan).reward)
    assert found[0] == [0.25, 0.25]
    assert found[1] == [1.0, 0.0, None, None], "the task rewards even characters; of other prompts it knows nothing"


def test_two_files_need_no_task(checkpoint_copy, texts, tmp_path):
    record = checkpoint_copy / "entropy_experiments.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "task": None}))
    settings = own(
        "eval",
        texts,
        f"entropy_analysis.sampling.train_sequences_path={texts}",
        "entropy_analysis.sampling.same_prompts=true",
    )
    with pytest.raises(UserError, match=r"checkpoint\.task"):
        run_fisher_analysis(checkpoint_copy, own("eval", texts), folder=tmp_path / "no")
    result = run_fisher_analysis(checkpoint_copy, settings, folder=tmp_path / "both")
    assert not result.failed_checks and result.numbers.kernels.fisher.shape == (12, 12)
    torch.testing.assert_close(result.numbers.kernels.fisher, result.numbers.kernels.train_fisher, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval_sequences_path=x.jsonl", "eval_completions=reference"], "take one of them"),
        (["train_sequences_path=x.jsonl", "train_completions=reference"], "take one of them"),
        (["train_sequences_path=x.jsonl", "train_prompts=from_run"], "from_run takes the sequences"),
        (["train_completions=reference", "train_prompts=from_run"], "from_run takes the sequences"),
        (["eval_completions=reference", "eval_completions_per_prompt=2"], "one reference"),
    ],
)
def test_contradictions_are_refused_at_once(overrides, words):
    with pytest.raises(UserError, match=words):
        config(*(f"entropy_analysis.sampling.{override}" for override in overrides))
