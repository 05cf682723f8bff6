"""A notebook on the results folder of one analysis: `entropy-experiments explore FOLDER` opens it.

It is a plain Python file. As a script it prints the verdict: python fisher_visualization.py -- --results FOLDER
"""

import marimo

app = marimo.App(width="medium", app_title="Fisher analysis")


@app.cell
def _():
    import sys

    import marimo as mo

    from entropy_experiments.notebooks import views
    from entropy_experiments.records.reader import read_results_folder
    from rl_training.errors import UserError

    return UserError, mo, read_results_folder, sys, views


@app.cell
def _(mo):
    folder = mo.ui.text(
        value=str(mo.cli_args().get("results") or ""),
        label="Results folder (the one that `entropy-experiments analyze` wrote)",
        full_width=True,
    )
    mo.vstack([mo.md("# What moved entropy?"), folder])
    return (folder,)


@app.cell
def _(UserError, folder, mo, read_results_folder, sys, views):
    script = mo.app_meta().mode == "script"
    problem = None if folder.value.strip() else "Name a results folder above, or start with `--results FOLDER`."
    results = None
    if problem is None:
        try:
            results = read_results_folder(folder.value.strip())
        except UserError as error:
            problem = str(error)
    if script and problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    if script:
        print("\n".join(sentence.text for sentence in views.verdict_of(results)))
    mo.stop(problem is not None, mo.callout(mo.plain_text(problem or ""), kind="warn"))
    mo.vstack([mo.md("## Verdict"), mo.Html(views.verdict_html(results))])
    return (results,)


@app.cell
def _(mo, results, views):
    kernel = mo.ui.dropdown(list(views.KERNELS), value=list(views.KERNELS)[0], label="Kernel")
    order = mo.ui.dropdown(list(views.ORDERS), value="by prompt", label="Sequences")
    column_prompt = mo.ui.dropdown(
        views.prompt_choices(results, "training"), value="all prompts", label="Training prompt"
    )
    mo.vstack([mo.md("## Kernel"), mo.hstack([kernel, order, column_prompt], justify="start", wrap=True)])
    return column_prompt, kernel, order


@app.cell
def _(column_prompt, kernel, mo, order, results, views):
    heat_map, heat_map_words = views.kernel_picture(results, kernel.value, order.value, column_prompt.value)
    mo.vstack([mo.image(heat_map, alt=heat_map_words)])
    return


@app.cell
def _(mo):
    buffer = mo.ui.radio(["training", "evaluation"], value="training", label="Buffer", inline=True)
    mo.vstack(
        [
            mo.md(
                "## Sequences\nMost lowering first. Sort and search the table, then choose a row to read the sequence "
                "token by token."
            ),
            buffer,
        ]
    )
    return (buffer,)


@app.cell
def _(buffer, mo, results, views):
    prompt = mo.ui.dropdown(views.prompt_choices(results, buffer.value), value="all prompts", label="Prompt")
    prompt
    return (prompt,)


@app.cell
def _(buffer, mo, prompt, results, views):
    sequences = mo.ui.table(
        views.sequence_records(results, buffer.value, prompt.value),
        selection="single",
        initial_selection=[0],
        page_size=8,
        label=f"Sequences of the {buffer.value} buffer",
    )
    sequences
    return (sequences,)


@app.cell
def _(buffer, mo, results, sequences, views):
    mo.stop(not sequences.value, mo.plain_text("Choose a sequence in the table."))
    mo.Html(views.sequence_html(results, buffer.value, sequences.value[0]["sequence"]))
    return


@app.cell
def _(mo, results, views):
    names = views.picture_names(results)
    figure = mo.ui.dropdown(names, value="Predicted and measured change", label="Figure")
    mo.vstack([mo.md("## Predicted against measured, and the questions of the analysis"), figure])
    return (figure,)


@app.cell
def _(figure, mo, results, views):
    shown, shown_words = views.picture(results, figure.value)
    mo.image(shown, alt=shown_words)
    return


@app.cell
def _(column_prompt, mo, results, views):
    mo.vstack(
        [
            mo.md("## Numbers\nThe training column follows the training prompt chosen above the kernel."),
            mo.Html(views.summaries_html(results, column_prompt.value)),
        ]
    )
    return


if __name__ == "__main__":
    app.run()
