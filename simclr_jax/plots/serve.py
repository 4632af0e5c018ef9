"""The page of a run on 127.0.0.1: labels go straight into their CSV file, and a button trains from them.

A random token is the first part of its address. Without it, with another host or origin, or for any other
path, a request is refused: nothing but the page can be read, and nothing but the labels written.
"""

import html
import http.server
import json
import secrets
import subprocess
import sys
import threading
from http import HTTPStatus
from pathlib import Path

from simclr_jax.plots import page
from simclr_jax.process import RunError, UserError, escape, files, say

_MAX_BYTES = 10_000_000  # of a request


def serve(run: Path, labels: str, names: list[str], where: str, several: bool = False) -> None:
    """Serves `run`/plots/index.html until Ctrl-C.

    Args:
      run: the workdir of a run.
      labels: the CSV file of labels, which is made where needed.
      names, where: the names of all images, and their folder.
      several: whether an image may have several labels.
    """
    from simclr_jax.data import labels as label_files

    if several and files.exists(labels):
        label_files.read(labels, names, where, classes=0)  # Labels are written into a column `label` alone.
    writing, training = threading.Lock(), {"runs": False, "line": "", "failed": False}

    def read_page(_):
        text = (run / "plots" / "index.html").read_text("utf-8")
        return text.replace("<html ", f'<html data-labels="{html.escape(escape(labels))}" ', 1)

    def read_labels(_):
        with writing:
            if not files.exists(labels):
                return {}
            return label_files.read(labels, names, where, classes=0, several=several)

    def write_labels(changes):
        if not all(isinstance(text, str) for pair in changes.items() for text in pair):
            raise ValueError
        with writing:
            label_files.update(labels, changes, names, where)
        return {}

    def train(_):
        with writing:
            if not training["runs"]:
                training.update(runs=True, line="starting", failed=False)
                threading.Thread(target=run_round, daemon=True).start()
        return training

    def run_round():
        command = [sys.executable, "-m", *page.train_command(run, labels, several)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                training["line"] = line.strip() or training["line"]
        training.update(runs=False, failed=process.returncode != 0)

    answers = {
        ("GET", ""): read_page,
        ("GET", "labels"): read_labels,
        ("POST", "labels"): write_labels,
        ("GET", "training"): lambda _: training,
        ("POST", "training"): train,
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            size = self.headers["Content-Length"] or "0"
            place, answer = self.path[len(root) :], answers.get((self.command, self.path[len(root) :]))
            has_token = secrets.compare_digest(self.path[: len(root)].encode(), root.encode())
            if not has_token or self.headers["Host"] != host:
                return self.send_error(HTTPStatus.FORBIDDEN)
            if self.headers["Origin"] not in (None, f"http://{host}"):
                return self.send_error(HTTPStatus.FORBIDDEN)
            if answer is None:
                return self.send_error(HTTPStatus.NOT_FOUND)
            if not size.isdecimal() or int(size) > _MAX_BYTES:
                return self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            try:
                status, value = HTTPStatus.OK, answer(json.loads(self.rfile.read(int(size)) or "{}"))
            except (UserError, RunError) as error:
                status, value = HTTPStatus.CONFLICT, {"error": str(error)}
            except (ValueError, AttributeError):
                return self.send_error(HTTPStatus.BAD_REQUEST)
            body = (json.dumps(value) if place else value).encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{'application/json' if place else 'text/html'}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            """Prints no line for each request."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        host, root = f"127.0.0.1:{server.server_port}", f"/{secrets.token_urlsafe(16)}/"
        say(f"http://{host}{root}: the page, until Ctrl-C; its labels go into {escape(labels)}")
        server.serve_forever()
