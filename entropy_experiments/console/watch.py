"""A page on this machine that grows with a run: entropy and reward, and each step's predicted and measured change.

The page asks once in two seconds for what the run's `metrics.jsonl` (or, in a run of plain TRL, its newest checkpoint) holds by
now. The server answers this machine alone, to the two addresses that the page needs, and reads nothing but that log.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.folder import existing_folder, resolve_checkpoint
from entropy_experiments.records.history import training_history
from entropy_experiments.report.figures.style import COLOURS
from entropy_experiments.report.interactive import history as figures
from rl_training.errors import UserError

_LOG = "metrics.jsonl"
_HOSTS = ("127.0.0.1", "localhost")

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Watching a run</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{color-scheme:only light;background:#fff;color:#222}
body{font-family:system-ui,sans-serif;margin:1.5rem auto;max-width:60rem;padding:0 1rem}#said{color:#555}</style>
<script src="/plotly.js"></script></head>
<body><h1>Entropy of a run in training</h1><p id="said" role="status">waiting for the first step</p><div id="figure"></div>
<p>Bars are 95% intervals. A negative change is a loss of entropy.</p>
<script>
async function draw() {
  const said = document.getElementById("said");
  try {
    const found = await (await fetch("/history.json")).json();
    said.textContent = found.words;
    const layout = {height: 640, ...found.plot?.layout, legend: {orientation: "h", y: 1.03, yanchor: "bottom"}};
    if (found.plot) Plotly.react("figure", found.plot.data, layout, {responsive: true, displaylogo: false});
  } catch (error) { said.textContent = "the run is no longer watched: start the command again"; }
}
draw(); setInterval(draw, 2000);
</script></body></html>"""


def history_of(run: Path) -> dict[str, Any]:
    """What the page shows by now: {"words", "plot"}, plot plotly's data and layout, None before the first step."""
    entries = list(_entries(run))
    rows = training_history(entries)
    if not rows:
        return {"words": f"{run.name}: waiting for the first step", "plot": None}
    return {"words": f"{run.name}: step {rows[-1].step:g}", "plot": _coloured(figures.training_history(rows))}


def _coloured(plot: Any) -> Any:
    """Names of the theme's colours, "$predicted", as the colours themselves: this page has one theme."""
    if isinstance(plot, Mapping):
        return {key: _coloured(value) for key, value in plot.items()}
    if isinstance(plot, list | tuple):
        return [_coloured(value) for value in plot]
    return COLOURS.get(plot[1:], "#555555") if isinstance(plot, str) and plot.startswith("$") else plot


def _entries(run: Path) -> Iterator[dict[str, Any]]:
    """The run's log so far; a line that is being written is left for the next time."""
    log = run / _LOG
    if log.is_file():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and "step" in entry:
                yield entry
        return
    try:
        state = json.loads((resolve_checkpoint(run) / "trainer_state.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError, RecursionError):  # none yet: the page waits
        return
    rows = state.get("log_history") if isinstance(state, dict) else None
    yield from (entry for entry in (rows if isinstance(rows, list) else ()) if isinstance(entry, dict))


@contextmanager
def watched(run: Path, port: int = 0) -> Iterator[str]:
    """Serves the page while open; gives its address.

    Args:
        run: the run's folder, which may not be there yet.
        port: 0 takes a free one.

    Raises:
        UserError: where the port is taken.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(lambda: history_of(run)))
    except OSError as error:
        raise UserError(f"port {port} cannot be opened ({error.strerror}): give another --port") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def watch(run: Path, port: int, told: Callable[[str], None]) -> None:
    """Serves the page until it is interrupted. Raises UserError where there is no such folder, or the port is taken."""
    with watched(existing_folder(run), port) as address:
        told(address)
        threading.Event().wait()


def _handler(history: Callable[[], dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name is http.server's
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if host not in _HOSTS:  # another site's name that was made to point here
                self.send_error(403)
            elif self.path == "/":
                self._answer("text/html; charset=utf-8", _PAGE)
            elif self.path == "/history.json":
                self._answer("application/json", json.dumps(history(), allow_nan=False))
            elif self.path == "/plotly.js":
                from plotly.offline import get_plotlyjs

                self._answer("text/javascript; charset=utf-8", get_plotlyjs())
            else:
                self.send_error(404)

        def _answer(self, kind: str, text: str) -> None:
            body = text.encode("utf-8")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the page was closed meanwhile
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not worth a line."""

    return Handler
