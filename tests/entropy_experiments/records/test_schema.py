"""The schema, the page and the records say the same; what the schema refuses the reader refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from entropy_experiments.cli import app
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.schema import schema, schemas
from rl_training.errors import UserError
from rl_training.probe.history import DEVIATIONS, KEPT

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_of_these_records():
    command = [sys.executable, "docs/write_results_format.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"make results-format: docs/guides/results-format.md is old\n{done.stderr}"


def test_every_field_is_in_the_schema_and_on_the_page_with_its_meaning():
    page = (ROOT / "docs" / "guides" / "results-format.md").read_text(encoding="utf-8")
    counted = 0
    for content in schemas().values():
        for column in content.get("columns", ()):
            assert column["description"] and f"| `{column['name']}`" in page, column
        for definition in [content, *content.get("$defs", {}).values()]:
            for name, field in definition.get("properties", {}).items():
                said = field.get("description") or "$ref" in field
                assert said and f"| `{name}`" in page, (definition.get("title"), name)
                counted += 1
            assert definition.get("additionalProperties") is not True
    assert counted > 300


def test_the_command_prints_the_schema():
    every = CliRunner().invoke(app, ["schema"])
    assert every.exit_code == 0 and json.loads(every.output) == schemas()
    one = CliRunner().invoke(app, ["schema", "run.json"])
    assert json.loads(one.output)["properties"]["created"]["type"] == "string"
    with pytest.raises(UserError, match=r"choose from summary\.json"):
        schema("kernel.safetensors")
    columns = json.loads(CliRunner().invoke(app, ["schema", "results.parquet"]).output)["columns"]
    assert [column["name"] for column in columns][:2] == ["run", "step"]


def test_the_history_has_a_field_for_everything_that_the_probe_keeps():
    names = {field.alias for field in HistoryRow.model_fields.values()}
    assert {f"probe/{name}" for name in (*KEPT, DEVIATIONS)} <= names


def test_records_load_no_torch():
    code = "import sys, entropy_experiments.records.reader, entropy_experiments.records.schema; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "False"
