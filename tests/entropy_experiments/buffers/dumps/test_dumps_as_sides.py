"""An analysis whose two sides are dumps is the analysis of the same sequences as the run stored them, whatever the format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from entropy_experiments.buffers.custom import PromptNumbers
from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.double_sampling import custom_training, draw_buffers
from entropy_experiments.entropy_runner import FisherAnalysis, run_fisher_analysis
from entropy_experiments.kernel.unfinished_work import UnfinishedWork
from rl_training.errors import UserError
from tests.entropy_experiments.buffers.dumps.conftest import STORED, Recorded
from tests.entropy_experiments.buffers.dumps.files_of_trainers import WRITERS, Sequence, lines, ours
from tests.entropy_experiments.small_analysis import config

pytestmark = pytest.mark.long

SAMPLING = "entropy_analysis.sampling"
BOTH = "entropy_analysis.eval_batch_size=24"


def sides(train: Path, evaluation: Path | None, *more: str, drawn: bool = True):
    given = [f"{SAMPLING}.train_sequences_path={train}"]
    if evaluation is None:
        more = (*more, "entropy_analysis.eval_batch_size=2")
    else:
        given += [
            f"{SAMPLING}.eval_sequences_path={evaluation}",
            f"{SAMPLING}.eval_sequences_drawn={str(drawn).lower()}",
        ]
    return config(*given, BOTH, *more)


def assert_same(found: FisherAnalysis, wanted: FisherAnalysis) -> None:
    assert found.training.rollouts.completion_ids == wanted.training.rollouts.completion_ids
    assert found.training.rollouts.prompt_ids == wanted.training.rollouts.prompt_ids
    assert found.evaluation.completion_ids == wanted.evaluation.completion_ids
    torch.testing.assert_close(found.training.weights, wanted.training.weights, rtol=1e-6, atol=0)
    assert set(found.summary.predicted) == set(wanted.summary.predicted) and "rao_blackwell" in found.summary.predicted
    for name, parts in wanted.summary.predicted.items():
        for part in ("total", "batch", "momentum"):
            value, again = (getattr(p, part) for p in (parts, found.summary.predicted[name]))
            assert again.value == pytest.approx(value.value, rel=2e-5, abs=1e-9), (name, part)
            assert again.standard_error == pytest.approx(value.standard_error, rel=1e-4), (name, part)
    kernels, again = (load_file(a.folder / "kernel.safetensors") for a in (wanted, found))
    for name, values in kernels.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-4, atol=1e-5 * np.abs(values).max(), err_msg=name)
    assert found.summary.actual.snis.value == pytest.approx(wanted.summary.actual.snis.value, rel=1e-4, abs=1e-7)


@pytest.fixture(scope="module")
def stored(recorded: Recorded, tmp_path_factory) -> FisherAnalysis:
    return run_fisher_analysis(recorded.path, config(*STORED, BOTH), folder=tmp_path_factory.mktemp("s") / "stored")


@pytest.mark.parametrize(
    "trainer",
    [pytest.param("open_instruct", marks=pytest.mark.long), "prime_rl", pytest.param("ours", marks=pytest.mark.long)],
)
def test_token_dumps_give_the_numbers_of_stored_rollouts(
    trainer: str, recorded: Recorded, stored, tmp_path: Path
) -> None:
    write = WRITERS[trainer]
    train = write(tmp_path / "train", 2, recorded.sequences("train"), recorded.checkpoint.tokenizer)
    evaluation = write(tmp_path / "eval", 3, recorded.sequences("eval"), recorded.checkpoint.tokenizer)
    found = run_fisher_analysis(recorded.path, sides(train, evaluation), folder=tmp_path / "found")
    assert not found.failed_checks
    assert_same(found, stored)
    notes = found.summary.sampling.notes
    assert any("are the policy's to" in note for note in notes) and any(
        "surprisal and entropy agree" in n for n in notes
    )
    page = (found.folder / "report.html").read_text()
    assert "Sequences were recorded, not drawn here" in page


def test_several_drawn_runs_equal_plain_autograd(recorded: Recorded, tmp_path: Path) -> None:
    """float64, P = 1: kernel, and the first-order change along the step, from a loop over drawn tokens alone."""
    rng = np.random.default_rng(3)
    rows: dict[str, list[dict]] = {"train": [], "eval": []}
    for found in rows.values():
        for k in range(5):
            length = int(rng.integers(3, 12))
            mask = (rng.random(length) < 0.5).tolist()
            mask[int(rng.integers(length))] = True
            found.append({"prompt_ids": rng.integers(3, 90, 4).tolist(), "completion_ids": rng.integers(3, 90, length).tolist(),
                          "completion_mask": mask, "advantage": float(rng.normal()), "group": k // 2})  # fmt: skip
        assert sum("True, False" in str(r["completion_mask"]) for r in found) > 1, "several runs"
    paths = [lines(tmp_path / f"{side}.jsonl", found) for side, found in rows.items()]
    plain = ("checkpoint.dtype=float64", "entropy_analysis.fisher_kernel.preconditioning=none")
    result = run_fisher_analysis(recorded.path, sides(*paths, *plain, drawn=False), folder=tmp_path / "masked")
    assert not result.failed_checks

    checkpoint = load_checkpoint(recorded.path, device="cpu", dtype="float64")
    model = checkpoint.model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def terms(row: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
        ids, start = [*row["prompt_ids"], *row["completion_ids"]], len(row["prompt_ids"])
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        drawn = [start + k for k, own in enumerate(row["completion_mask"]) if own]
        score = torch.stack([logs[at - 1, ids[at]] for at in drawn]).sum()
        entropy = torch.stack([-(logs[at - 1].exp() * logs[at - 1]).sum() for at in drawn]).sum()
        return flat_of(score), flat_of(entropy), len(drawn)

    def flat_of(scalar: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, parameters, retain_graph=True)])

    train, evaluation = ([terms(row) for row in rows[side]] for side in ("train", "eval"))
    scores = torch.stack([score for score, _, _ in train])
    wanted = torch.stack([score for score, _, _ in evaluation]) @ scores.T
    torch.testing.assert_close(
        result.numbers.kernels.fisher.double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())
    )
    gradient_of_h = sum(h for _, h, _ in evaluation) / sum(t for _, _, t in evaluation)
    weights = torch.tensor([row["advantage"] for row in rows["train"]], dtype=torch.float64) / (5 * 8)
    gradient = weights @ scores
    clip = min(1.0, 1.0 / float(gradient.norm()))
    change = checkpoint.record.learning_rates[0] * clip * float(gradient_of_h @ gradient)
    assert result.summary.predicted["fixed_prefix"].total.value == pytest.approx(change, rel=1e-5)


def whole_texts(sequences: list[Sequence], tokenizer, longest: int) -> list[Sequence]:
    """Those that their text gives back: no special token inside."""
    kept = []
    for s in sequences:
        text = tokenizer.decode(s.completion_ids, skip_special_tokens=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ended = s.completion_ids[-1] == tokenizer.eos_token_id
        if [*ids, tokenizer.eos_token_id][: longest if not ended else None] == s.completion_ids:
            kept.append(s)
    return kept


@pytest.mark.parametrize("trainer", ["verl", "trl"])
def test_text_dumps_give_the_numbers_of_the_same_tokens(trainer: str, recorded: Recorded, tmp_path: Path) -> None:
    tokenizer, longest = recorded.checkpoint.tokenizer, recorded.plan.sampling_config.max_completion_length
    found = {}
    for kind in (trainer, "ours"):
        paths = []
        for side, step in (("train", 2), ("eval", 3)):
            kept = whole_texts(recorded.sequences(side), tokenizer, longest)
            assert len(kept) >= 12
            if trainer == "verl":  # without advantages: rewards of what is kept
                kept = [replace(s, advantage=None, logprobs=None) for s in kept]
            paths.append(WRITERS[kind](tmp_path / kind / side, step, kept, tokenizer))
        found[kind] = run_fisher_analysis(recorded.path, sides(*paths), folder=tmp_path / f"{kind}-found")
    assert_same(found[trainer], found["ours"])
    notes = "; ".join(found[trainer].summary.sampling.notes)
    assert "tokenised anew" in notes and "end-of-sequence token was added" in notes and "no log-probabilities" in notes
    assert ("advantages are Dr-GRPO's" in notes) == (trainer == "verl")
    assert ("recorded advantages over N L" in notes) == (trainer == "trl")


def drawn_buffers(recorded: Recorded, settings):
    """Both sides; with columns alone in a file these alone, which saves the drawing of the rows."""
    plan = plan_sampling(recorded.checkpoint, settings)
    if settings.entropy_analysis.sampling.eval_sequences_path is None:
        numbers = PromptNumbers([*plan.task.train, *plan.task.heldout])
        return None, custom_training(recorded.checkpoint, plan, settings, numbers)
    return draw_buffers(recorded.checkpoint, plan, settings)


def test_rewards_and_weights_of_a_dump(recorded: Recorded, tmp_path: Path) -> None:
    base = recorded.sequences("train")
    prompts = [s.prompt_ids for s in base]
    rewards = np.random.default_rng(0).normal(size=len(base))
    groups = [f"g{k % 5}" if k < 10 else f"h{k // 3}" for k in range(len(base))]  # not the prompts': the file's
    rows = [{"prompt_ids": prompts[0], "completion_ids": s.completion_ids, "reward": r, "group": g}
            for s, r, g in zip(base, rewards, groups, strict=True)]  # fmt: skip
    _, training = drawn_buffers(recorded, sides(lines(tmp_path / "a.jsonl", rows), None))
    wanted = np.array([r - np.mean([q for q, h in zip(rewards, groups, strict=True) if h == g])
                       for r, g in zip(rewards, groups, strict=True)])  # fmt: skip
    np.testing.assert_allclose(training.advantages, wanted, atol=1e-12)
    np.testing.assert_allclose(training.weights, wanted / (len(base) * 8), atol=1e-14)
    weighed = [{**row, "weight": 0.1 * k} for k, row in enumerate(rows)]
    _, training = drawn_buffers(recorded, sides(lines(tmp_path / "b.jsonl", weighed), None))
    np.testing.assert_allclose(training.weights, 0.1 * np.arange(len(rows)))
    two = [{**row, "prompt_ids": ids, "group": "one"} for row, ids in zip(rows, prompts, strict=True)]
    with pytest.raises(UserError, match="group one has another prompt here than in line 1"):
        drawn_buffers(recorded, sides(lines(tmp_path / "c.jsonl", two), None))
    alone = [{**row, "group": k} for k, row in enumerate(rows)]
    with pytest.raises(UserError, match="no two sequences of one group"):
        drawn_buffers(recorded, sides(lines(tmp_path / "d.jsonl", alone), None))
    off = [{**row, "advantage": 1.0 + r} for row, r in zip(rows, rewards, strict=True)]
    _, training = drawn_buffers(recorded, sides(lines(tmp_path / "e.jsonl", off), None))
    assert any("do not add up to 0" in note for note in training.notes)
    mixed = [{**row, "advantage": -a} for row, a in zip(rows, wanted, strict=True)]
    _, training = drawn_buffers(recorded, sides(lines(tmp_path / "f.jsonl", mixed), None))
    assert any("do not rise with the reward" in note for note in training.notes)


def schema(path: Path, base: list[Sequence], **changes) -> Path:
    rows = []
    for s in base:
        row = {"prompt_ids": s.prompt_ids, "completion_ids": s.completion_ids, "sampler_logprobs": s.logprobs,
               "advantage": s.advantage, "reward": s.reward}  # fmt: skip
        rows.append(row | {k: change(row) for k, change in changes.items()})
    return lines(path, rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler_logprobs": lambda r: [*r["sampler_logprobs"][1:], -1.0]}, "off by one"),
        ({"sampler_logprobs": lambda r: [-1.0, *r["sampler_logprobs"][:-1]]}, "off by one"),
        (
            {"completion_ids": lambda r: [(t + 41) % 90 + 3 for t in r["completion_ids"]]},
            "another model or another tokenizer",
        ),
        ({"completion_ids": lambda r: [200 + t for t in r["completion_ids"]]}, "of another model's tokenizer"),
        ({"completion_ids": lambda r: r["completion_ids"] * 9, "sampler_logprobs": lambda r: None}, "at most 8"),
        ({"temperature": lambda r: 0.7}, "drawn at temperature 0.7"),
        ({"completion_ids": lambda r: [7, 1, 0, 0], "sampler_logprobs": lambda r: None}, "2 padding tokens"),
    ],
)
def test_what_is_not_this_policys_is_refused(changes, words: str, recorded: Recorded, tmp_path: Path) -> None:
    base = recorded.sequences("train")
    path = schema(tmp_path / "x.jsonl", base, **changes)
    with pytest.raises(UserError, match=words):
        drawn_buffers(recorded, sides(path, None))


def test_the_size_of_a_difference_decides(recorded: Recorded, tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    train, rows = recorded.sequences("train"), recorded.sequences("eval")
    fine = schema(tmp_path / "t.jsonl", train)

    def noisy(scale):
        return lambda r: [min(0.0, q + scale * noise.normal()) for q in r["sampler_logprobs"]]

    engine = schema(tmp_path / "engine.jsonl", rows, sampler_logprobs=noisy(0.02))
    _, training = drawn_buffers(recorded, sides(fine, engine))
    assert any("another engine" in note for note in training.notes)
    far = schema(tmp_path / "far.jsonl", rows, sampler_logprobs=noisy(0.6))
    with pytest.raises(UserError, match="another checkpoint than this"):
        drawn_buffers(recorded, sides(fine, far))
    _, training = drawn_buffers(recorded, sides(fine, far, drawn=False))
    assert any("another checkpoint than this" in note for note in training.notes)


def test_tokens_of_tools_that_no_mask_marks_are_told(recorded: Recorded, tmp_path: Path) -> None:
    """Dumps fill in 0 where a tool wrote; a token that the policy gave with certainty has it too, and is no tool's."""
    train = recorded.sequences("train")

    def with_tool(row: dict) -> list[int]:
        return [*row["completion_ids"][:2], *row["prompt_ids"][:2], *row["completion_ids"][2:]][:8]

    def zeros(row: dict) -> list[float]:
        return [*row["sampler_logprobs"][:2], 0.0, 0.0, *row["sampler_logprobs"][2:]][:8]

    long = [s for s in train if len(s.completion_ids) > 3][:6]
    path = schema(tmp_path / "t.jsonl", long, sampler_logprobs=zeros, completion_ids=with_tool)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    own = logprobs_of(recorded, rows)
    for row, values in zip(rows, own, strict=True):
        row["sampler_logprobs"] = [0.0 if k in (2, 3) else v for k, v in enumerate(values)]
    with pytest.raises(UserError, match=r"recorded log-probability 0, and .* give completion_mask"):
        drawn_buffers(recorded, sides(lines(path, rows), None))
    for row in rows:
        row["completion_mask"] = [k not in (2, 3) for k in range(len(row["completion_ids"]))]
    _, training = drawn_buffers(recorded, sides(lines(path, rows), None))
    assert any("are the policy's to" in note for note in training.notes)


def logprobs_of(recorded: Recorded, rows: list[dict]) -> list[list[float]]:
    found = []
    for row in rows:
        ids, start = [*row["prompt_ids"], *row["completion_ids"]], len(row["prompt_ids"])
        with torch.no_grad():
            logs = recorded.checkpoint.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([min(0.0, float(logs[k - 1, ids[k]])) for k in range(start, len(ids))])
    return found


def test_another_temperature_is_told(recorded: Recorded, tmp_path: Path) -> None:
    from entropy_core.scores import token_statistics

    train = recorded.sequences("train")
    batch = replace(recorded.training.rollouts.to_batch(recorded.plan.sampling_config), temperature=0.6)
    cold = token_statistics(recorded.checkpoint.model, batch).logprobs
    own = [row[m].tolist() for row, m in zip(cold, batch.completion_mask, strict=True)]
    path = schema(tmp_path / "cold.jsonl", [replace(s, logprobs=q) for s, q in zip(train, own, strict=True)])
    with pytest.raises(UserError, match=r"agree at temperature 0\.6.*temperature to the run's"):
        drawn_buffers(recorded, sides(path, None))


def test_rows_that_the_policy_cannot_have_drawn_are_refused(recorded: Recorded, tmp_path: Path) -> None:
    model, law = recorded.checkpoint.model, recorded.plan.sampling_config
    train = recorded.sequences("train")
    rows = []
    for s in recorded.sequences("eval"):  # greedy, as verl validates by default
        ids = list(s.prompt_ids)
        with torch.no_grad():
            for _ in range(law.max_completion_length):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in law.eos_token_ids:
                    break
        rows.append(replace(s, completion_ids=ids[len(s.prompt_ids) :]))
    fine = schema(tmp_path / "t.jsonl", train)
    greedy = schema(tmp_path / "g.jsonl", rows, sampler_logprobs=lambda r: None)
    with pytest.raises(UserError, match=r"eval_sequences_drawn=true, but completions are likelier"):
        drawn_buffers(recorded, sides(fine, greedy))
    drawn_buffers(recorded, sides(fine, greedy, drawn=False))
    with pytest.raises(UserError, match="sequences of .* are in the training buffer too"):
        drawn_buffers(recorded, sides(fine, fine, f"{SAMPLING}.same_prompts=true"))
    with pytest.raises(
        UserError, match="which the evaluation buffer has too|in the training buffer too, token by token"
    ):
        drawn_buffers(recorded, sides(fine, fine))


def test_steps_of_a_folder_are_the_sides_own(recorded: Recorded, tmp_path: Path) -> None:
    tokenizer = recorded.checkpoint.tokenizer
    for step, side in ((2, "train"), (3, "eval")):
        WRITERS["prime_rl"](tmp_path, step, recorded.sequences(side), tokenizer)
    source = tmp_path / "rollouts"
    (source / "step_3/train/effective").rename(source / "step_3/train/all")  # rows: before anything was rejected
    evaluation, training = drawn_buffers(recorded, sides(tmp_path, tmp_path))
    assert training.rollouts.completion_ids == recorded.training.rollouts.completion_ids
    assert evaluation.completion_ids == recorded.evaluation.completion_ids
    with pytest.raises(UserError, match="no rollouts of step 7"):
        drawn_buffers(recorded, sides(tmp_path, None, f"{SAMPLING}.train_sequences_step=7"))
    both = tmp_path / "both.jsonl"
    a, b = (ours(tmp_path / s, n, recorded.sequences(s), tokenizer) for s, n in (("train", 2), ("eval", 9)))
    both.write_text(a.read_text() + b.read_text())
    _, training = drawn_buffers(recorded, sides(both, None))
    assert training.rollouts.completion_ids == recorded.training.rollouts.completion_ids
    with pytest.raises(UserError, match=r"steps 2 to 9, none of step 3.*eval_sequences_step"):
        drawn_buffers(recorded, sides(both, both))


def test_texts_of_prompts_in_every_form(recorded: Recorded, tmp_path: Path) -> None:
    tokenizer = recorded.checkpoint.tokenizer
    base = recorded.sequences("train")[:4]
    templated = [tokenizer.decode(s.prompt_ids, skip_special_tokens=False) for s in base]
    common = [{"completion": "7", "weight": 1.0 + k} for k in range(4)]
    forms = {
        "templated": [{**c, "prompt": t, "already_templated": True} for c, t in zip(common, templated, strict=True)],
        "messages": [{**c, "prompt": s.prompt, "truncated": False} for c, s in zip(common, base, strict=True)],
        "user": [
            {**c, "prompt": s.prompt[-1]["content"], "truncated": False} for c, s in zip(common, base, strict=True)
        ],
    }
    assert all(len(s.prompt) == 1 for s in base), "the task has no system prompt"
    for name, rows in forms.items():
        _, training = drawn_buffers(recorded, sides(lines(tmp_path / f"{name}.jsonl", rows), None))
        assert training.rollouts.prompt_ids == [s.prompt_ids for s in base], name
        assert training.rollouts.prompt_index == [s.group for s in base], "they are the task's own prompts"
        assert all(ids == [*tokenizer("7")["input_ids"], 1] for ids in training.rollouts.completion_ids)
    cut = [{**row, "truncated": True} for row in forms["user"]]
    _, training = drawn_buffers(recorded, sides(lines(tmp_path / "cut.jsonl", cut), None))
    assert all(ids == tokenizer("7")["input_ids"] for ids in training.rollouts.completion_ids)
    assert any("4 of 4 sequences were cut" in note for note in training.notes)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("9 - 1 =>", [{"role": "user", "content": "9 - 1 ="}]),
        ("<|user|>>", None),
        ("no template>at all", None),
    ],
)
def test_special_tokens_that_verl_removed_are_put_back_or_missed(
    text, messages, recorded: Recorded, tmp_path: Path
) -> None:
    tokenizer = recorded.checkpoint.tokenizer
    rows = [{"input": text, "output": str(k), "gts": "", "score": float(k), "step": 2} for k in range(2)]
    path = lines(tmp_path / "2.jsonl", rows)
    if messages is None:
        with pytest.raises(UserError, match=r"line 1: the special tokens of its prompt.*checkpoint\.task"):
            drawn_buffers(recorded, sides(path, None))
        return
    _, training = drawn_buffers(recorded, sides(path, None))
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert training.rollouts.prompt_ids == [wanted, wanted]


def test_recorded_notes_survive_a_resumed_run(recorded: Recorded, tmp_path: Path) -> None:
    paths = [schema(tmp_path / f"{side}.jsonl", recorded.sequences(side)) for side in ("train", "eval")]
    evaluation, training = drawn_buffers(recorded, sides(*paths))
    work = UnfinishedWork(tmp_path)
    work.keep_buffers(evaluation, training)
    kept = work.kept_buffers()
    assert kept is not None and kept[1].notes == training.notes != ()
