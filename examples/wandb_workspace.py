"""A W&B workspace that arranges the probe's metrics: `pip install wandb-workspaces`, `wandb login`, then

    python examples/wandb_workspace.py ENTITY PROJECT

It prints the address of a saved view of the project. Needs an account and a network; nothing of a run is changed.
"""

from __future__ import annotations

import sys

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from rl_training.integrations.dashboards import CHARTS


def workspace(entity: str, project: str) -> ws.Workspace:
    """One section of a line plot a chart, over the trainer's step."""
    panels = [wr.LinePlot(title=chart.title, x="train/global_step", y=chart.tags) for chart in CHARTS]
    section = ws.Section(name="Entropy probe", panels=panels, is_open=True)
    return ws.Workspace(entity=entity, project=project, name="Entropy probe", sections=[section])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/wandb_workspace.py ENTITY PROJECT")
    print(workspace(*sys.argv[1:]).save().url)
