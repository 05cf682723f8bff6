"""Write docs/guides/results-format.md from the schema of a results folder's files: `make results-format`.

With --check nothing is written, and the exit status is 1 if the page is old.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from entropy_experiments.records.schema import schemas

PAGE = Path(__file__).parent / "guides" / "results-format.md"
INTRODUCTION = """# The format of results

<!-- written by docs/write_results_format.py from the records; `make results-format` writes it anew -->

`entropy-experiments schema` prints the JSON schema of the JSON files and the columns of the parquet files below, \
`entropy-experiments schema summary.json` that of one.

| File | Written by | Holds |
| --- | --- | --- |
| `summary.json` | `analyze` | the numbers of the analysis, and of each question that was asked |
| `run.json` | `analyze` | versions, machine, stages with their times, self-checks |
| `SHA256SUMS` | `analyze`, `sweep` | digests of the other files, compared on every reading (or by `sha256sum -c SHA256SUMS`) |
| `training_history.json` | `analyze` | the run's log up to the checkpoint, one entry a training step |
| `sequences.parquet` | `analyze` | both buffers, one row a sequence: texts, tokens, rewards, weights, shares |
| `kernel.safetensors` | `analyze` | the kernels; rows and columns in the order of `sequences.parquet` |
| `leave_one_out.parquet` | `analyze` | the numbers with each evaluation prompt left out, for paired comparisons |
| `evaluation_set.json` | `analyze` | what draws the evaluation buffer again |
| `config.yaml` | `analyze`, `sweep` | the configuration, which makes the results anew |
| `sweep.json` | `sweep` | what became of every checkpoint |
| `evolution.json` | `sweep` | what the checkpoints say together, an entry a run |
| `results.parquet` | `sweep` | every number of every checkpoint, one a row |
| `comparison.json` | `compare` | verdict, folders, and the differences at the last shared step |
| `comparison.parquet` | `compare` | every number and difference, one a row |

Numbers are finite; one that could not be computed is `null`. A field that is not of this format, or a value of the wrong kind, \
is refused when a file is read, in one line that names it; so is another `format_version`. Changes of entropy are in nats \
per token unless a field says otherwise. "?" marks a field that some files leave out.

```python
from entropy_experiments.records.reader import read_results_folder

folder = read_results_folder("results/analysis")
print(folder.summary.predicted["split"].total.value, "nats per token")
```
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    done: set[str] = set()
    for file, schema in schemas().items():
        if "columns" in schema:
            parts.append(f"## {file}\n\n{_columns(schema['columns'])}")
            continue
        definitions = schema.get("$defs", {})
        parts.append(f"## {file}\n\n{_held(schema, definitions)}")
        parts += [
            f"### {name}\n\n{definitions[name].get('description', '')}\n\n{_table(definitions[name], definitions)}"
            for name in _in_order(schema, definitions)
            if name not in done
        ]
        done |= set(definitions)
    return "\n".join(parts)


def _held(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a file holds: its fields, or of which record it is a list or a mapping."""
    if "properties" in schema:
        return _table(schema, definitions)
    if "items" in schema:
        return f"A list of {_type(schema['items'])}.\n"
    return f"An object that holds, under each run's name, its {_type(schema['additionalProperties'])}.\n"


def _columns(columns: list[dict[str, str]]) -> str:
    rows = [f"| `{column['name']}` | {column['type']} | {column['description']} |" for column in columns]
    return "\n".join(["| Column | Type | Meaning |", "| --- | --- | --- |", *rows]) + "\n"


def _in_order(schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """Names of definitions in the order in which fields lead to them, depth first."""
    found: dict[str, None] = {}

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node and (name := _target(node)) not in found:
                found[name] = None
                visit(definitions[name])
            for key, value in node.items():
                if key != "$ref":
                    visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit({key: value for key, value in schema.items() if key != "$defs"})
    return list(found)


def _target(node: dict[str, Any]) -> str:
    return node["$ref"].rsplit("/", 1)[-1]


def _table(definition: dict[str, Any], definitions: dict[str, Any]) -> str:
    required = definition.get("required", [])
    rows = ["| Field | Type | Meaning |", "| --- | --- | --- |"]
    for name, field in definition.get("properties", {}).items():
        mark = "" if name in required else "?"
        said = field.get("description") or definitions[_target(field)].get("description", "")
        meaning = " ".join(said.split()).replace("|", "\\|")
        rows.append(f"| `{name}`{mark} | {_type(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _type(field: dict[str, Any]) -> str:
    """A field's type in words, with links to what it holds."""
    if "$ref" in field:
        name = _target(field)
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(_type(member) for member in field[key]))
    if "const" in field:
        return f'"{field["const"]}"' if isinstance(field["const"], str) else str(field["const"])
    if "enum" in field:
        return " or ".join(f'"{value}"' for value in field["enum"])
    kind = field.get("type", "anything")
    if kind == "array":
        items = field.get("items", {})
        return (
            f"list of {_type(items)}" if items else f"[{', '.join(_type(one) for one in field.get('prefixItems', []))}]"
        )
    if kind == "object":
        keys = field.get("propertyNames", {}).get("enum")
        by = f" by {', '.join(f'`{key}`' for key in keys)}" if keys else ""
        values = field.get("additionalProperties", True)
        return f"object{by}" if values is True else f"object{by} of {_type(values)}"
    return {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(str(kind), str(kind))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
