"""How runs are, from their workdirs: `python -m simclr_jax.workdir.status WORKDIR [WORKDIR ...]`

Workdirs are local or gs://. Nothing there is changed.
"""

import time
from datetime import timedelta

from etils import epath

from simclr_jax.process import UserError, errors, escape, files, say
from simclr_jax.workdir import lock, report

_SCORES = ("linear_accuracy", "knn_accuracy", "top1", "probe_accuracy", "accuracy")


def status(workdir) -> dict[str, str]:
    """Returns how the run in a workdir is, in words by name.

    Raises:
      UserError: no run has begun there, or its storage does not answer.
    """
    workdir = epath.Path(workdir)
    files.check_reachable(workdir)
    owner, alive = lock.holder(workdir)
    if not owner and not files.exists(workdir / "config.json"):
        raise UserError(f"{escape(workdir)} holds no run: give the workdir of one")
    config, facts, summary = (
        files.read_if_whole(workdir / name) for name in ("config.json", "run.json", "summary.json")
    )
    path, values = workdir / "metrics.jsonl", {}
    for line in report.read(path) if files.exists(path) else ():
        values |= line  # the newest value of each
    total = facts.get("steps") or summary.get("steps")
    scores = values | summary | summary.get("trained", {})
    if alive:
        state = f"runs as process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
    elif summary:
        state = "over"
    elif owner:
        state = f"its process {owner.get('pid')} on {owner.get('host')} was killed: the same command goes on"
    else:
        state = f"ended: {facts.get('ended') or 'for an unknown reason'}; the same command goes on"
    places = (path, workdir / "lock.json", workdir / "summary.json")
    written = [place.stat().mtime for place in places if files.exists(place)]
    return {
        "workdir": str(workdir),
        "task": str(config.get("task")),
        "step": f"{values.get('step', 0):,} of {total:,}" if total else f"{values.get('step', 0):,}",
        "images/s": f"{values['images_per_second']:,.0f}" if "images_per_second" in values else "",
        "loss": f"{values['loss']:.4g}" if "loss" in values else "",
        "scores": ", ".join(f"{name} {scores[name]:.3f}" for name in _SCORES if name in scores),
        "wrote": f"{timedelta(seconds=int(time.time() - max(written)))} ago" if written else "never",
        "state": state,
    }


def main(argv: list[str]) -> None:
    parser = errors.command_parser(__doc__)
    parser.add_argument("workdir", nargs="+", help="folder of a run; several make a table")
    runs = [status(workdir) for workdir in parser.parse_args(argv).workdir]
    if len(runs) == 1:
        return report.print_table(runs[0])
    rows = [dict(zip(runs[0], runs[0])), *runs]
    widths = {name: max(len(escape(row[name])) for row in rows) for name in runs[0]}
    for row in rows:
        say("  ".join(f"{escape(text):<{widths[name]}}" for name, text in row.items()).rstrip())


if __name__ == "__main__":
    errors.run(main)
