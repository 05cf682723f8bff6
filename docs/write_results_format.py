"""Write docs/guides/results-format.md from the schema of a results folder's files: `make results-format`.

With --check nothing is written, and the exit status is 1 if the page is old.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from entropy_experiments.records.schema import schemas

PAGE = Path(__file__).parent / "guides" / "results-format.md"
INTRODUCTION = """# The format of a results folder

<!-- written by docs/write_results_format.py from the records; `make results-format` writes it anew -->

`entropy-experiments analyze` writes these files; `read_results_folder` reads them back, checked. \
`entropy-experiments schema` prints the JSON schema of the JSON files, `entropy-experiments schema summary.json` that of one.

| File | Holds |
| --- | --- |
| `summary.json` | the numbers of the analysis, and of each question that was asked |
| `run.json` | versions, machine, stages with their times, self-checks |
| `SHA256SUMS` | digests of the other files, compared whenever the folder is read; `sha256sum -c SHA256SUMS` does too |
| `training_history.json` | the run's log up to the checkpoint, one entry a training step |
| `sequences.parquet` | both buffers, one row a sequence: texts, tokens, rewards, weights, shares |
| `kernel.safetensors` | the kernels; rows and columns in the order of `sequences.parquet` |
| `leave_one_out.parquet` | the numbers with each evaluation prompt left out, for paired comparisons |
| `evaluation_set.json` | what draws the evaluation buffer again |
| `config.yaml` | the configuration, which makes the analysis anew |

Numbers are finite; one that could not be computed is `null`. A field that is not of this format, or a value of the wrong kind, \
is refused when the folder is read, in one line that names it; so is another `format_version`. Changes of entropy are in nats \
per token unless a field says otherwise. "?" marks a field that some analyses leave out.

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
        definitions = schema.get("$defs", {})
        below = [name for name in definitions if name not in done]
        entry = schema if "properties" in schema else definitions[_target(schema["items"])]
        parts.append(f"## {file}\n\n{_table(entry, definitions)}")
        order = _in_order(entry, definitions)
        parts += [
            f"### {name}\n\n{definitions[name].get('description', '')}\n\n{_table(definitions[name], definitions)}"
            for name in order
            if name in below and definitions[name] is not entry
        ]
        done |= set(definitions)
    return "\n".join(parts)


def _in_order(entry: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
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

    visit(entry["properties"])
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
        return f"object{by} of {_type(field.get('additionalProperties', {}))}"
    return {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(str(kind), str(kind))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
