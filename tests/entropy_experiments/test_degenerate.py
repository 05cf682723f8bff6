"""Checkpoints and buffers with too little in them: stated degenerate results or one clear error, never a NaN."""

import json
import re

import pytest

from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.records.record import Result, json_of
from entropy_experiments.report.findings import FINDINGS
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoint_edits import SIDECAR, edit_json
from tests.entropy_experiments.small_analysis import whole_config
from tests.tiny_policy import character_tokenizer

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("drawn_figures")]  # figures of what is degenerate too


def analyse(run, folder, *overrides):
    """Every analysis; afterwards nothing in the folder is NaN, and no gap is unnamed."""
    result = run_fisher_analysis(run, whole_config(*overrides), folder=folder)
    for name in ("summary.json", "run.json"):
        json.loads((folder / name).read_text(), parse_constant=pytest.fail)
    page = re.sub(r"(?s)<script>.*?</script>", "", (folder / "report.html").read_text())  # programs, not data
    page = re.sub(r'base64,[A-Za-z0-9+/=]+|"[A-Za-z0-9+/]{8,}=*"|>None\.<', "", page)
    assert not re.search(r"\b(nan|None|inf)\b", page), re.findall(r".{40}\b(?:nan|None|inf)\b.{20}", page)
    assert not result.failed_analyses and not result.failed_checks
    records = result.summary.analyses
    sentences = {name: FINDINGS[name](entry) for name, entry in records.entries() if isinstance(entry, Result)}
    return {name: entry | {"sentence": sentences.get(name)} for name, entry in json_of(records).items()}


def columns(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return f"entropy_analysis.sampling.train_sequences_path={path}"


def test_one_prompt_only(tiny_run, tmp_path):
    found = analyse(tiny_run, tmp_path / "one", "entropy_analysis.train_batch_size=4")
    assert "a single prompt has no spread" in found["buffers"]["sentence"]
    assert "one prompt only" in found["prompt_structure"]["sentence"]
    assert found["intervention"]["count"] == 6, "as many halves as there are"
    both = [
        "entropy_analysis.train_batch_size=4",
        "entropy_analysis.eval_batch_size=2",
        "entropy_analysis.sampling.eval_completions_per_prompt=2",
    ]
    found = analyse(tiny_run, tmp_path / "both", *both)
    assert "(no interval)" in found["entropy_prediction"]["sentence"]


def test_one_completion_each(tiny_run, tmp_path):
    lines = [{"prompt": f"{k} + 1 =", "completion": f"{k}"} for k in range(8)]
    weights = [{**line, "weight": 0.01 * (k - 3.5)} for k, line in enumerate(lines)]
    found = analyse(tiny_run, tmp_path / "weights", columns(tmp_path / "w.jsonl", *weights))
    assert "no prompt has two distinct sequences" in found["prompt_structure"]["sentence"]
    assert "rewards" in next(row for row in found["weighting_schemes"]["rows"] if row["name"] == "grpo")["reason"]
    rewards = [{**line, "reward": k % 2} for k, line in enumerate(lines)]
    with pytest.raises(UserError, match="rewards of each prompt are all equal"):
        analyse(tiny_run, tmp_path / "no", columns(tmp_path / "r.jsonl", *rewards))


def test_one_sequence_eight_times(tiny_run, tmp_path):
    lines = [{"prompt": "1 + 1 =", "completion": "2", "weight": 0.05}] * 8
    found = analyse(tiny_run, tmp_path / "same", columns(tmp_path / "w.jsonl", *lines))
    assert found["sequence_clustering"]["n_clusters"] == 1
    assert found["intervention"]["scores"]["split"]["spearman"] is None
    assert "equal" in found["intervention"]["scores"]["split"]["reason"]


def test_all_entropies_equal(checkpoint_copy, tmp_path):
    """A base model without embeddings says every token with the same probability, and no adapter moves it."""
    from transformers import AutoModelForCausalLM

    name = json.loads((checkpoint_copy / "entropy_experiments.json").read_text())["model_name"]
    model = AutoModelForCausalLM.from_pretrained(name)
    model.model.embed_tokens.weight.data.zero_()
    model.save_pretrained(tmp_path / "uniform")
    character_tokenizer().save_pretrained(tmp_path / "uniform")
    # The record's witness is of the run's own policy, which this one is not.
    edit_json(checkpoint_copy / SIDECAR, lambda record: record.update(witness=None))
    found = analyse(checkpoint_copy, tmp_path / "equal", f"checkpoint.model={tmp_path / 'uniform'}")
    assert found["buffers"]["quantities"]["entropy"]["p_value"] is None
    assert "every product is 0" in found["attribution"]["sentence"]
    assert "need" in found["sequence_clustering"]["sentence"]


def test_a_single_evaluation_sequence_is_refused(tiny_run, tmp_path):
    with pytest.raises(UserError, match="eval_batch_size"):
        analyse(tiny_run, tmp_path / "no", "entropy_analysis.eval_batch_size=1")
