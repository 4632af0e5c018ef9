"""Linear evaluation: a linear classifier on the frozen encoder (SimCLR section 4, appendix B.6)."""

import time

from etils import epath

from simclr_jax import pretrained, supervised, train
from simclr_jax.models import make_model
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Trains the classifier alone; parameters and statistics of the encoder stay as they are, to the bit.

    Returns:
      The summary: `top1` and `top5` of the held-out images after the last step, or of a cross-validation, see
      `supervised.cross_validate`; `calibration_temperature`, `steps`, `seconds`.
    """
    begun = time.monotonic()
    workdir = epath.Path(workdir)
    source, held_out = supervised.load_labelled(config, workdir)
    model = make_model(config.model, source.num_classes, whole_projection=False)
    task = supervised.make_task(
        config,
        model,
        source,
        init=pretrained.make_init(config, model),
        loss=supervised.make_loss(model, config, after_block=None),
        evaluate=held_out and supervised.make_evaluate(config, model, held_out),
    )._replace(trained=supervised.is_head)
    report.print_table(train.describe(task, config, source, workdir))
    summary = {} if held_out else supervised.cross_validate(task, config, model, source, workdir)
    state = train.fit(task, config, workdir)
    if held_out:
        summary = task.evaluate(state)
        summary |= supervised.calibrated(supervised.make_logits(config, model, held_out)(state))
    return summary | {"steps": task.num_steps, "seconds": round(time.monotonic() - begun, 1)}
