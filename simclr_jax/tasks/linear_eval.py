"""Linear evaluation: a linear classifier on the frozen encoder (SimCLR section 4, appendix B.6)."""

from simclr_jax import pretrained, supervised, train
from simclr_jax.models import make_model
from simclr_jax.workdir import report


def run(config, workdir) -> dict:
    """Trains the classifier alone; parameters and statistics of the encoder stay as they are, to the bit.

    Returns:
      The summary: `top1` and `top5` of the held-out images after the last step, or of a cross-validation, see
      `supervised.cross_validate`; `balanced_accuracy`, `per_class`, `confusion`, see
      `supervised.class_scores`; `calibration_temperature`, `steps`.
    """
    source, held_out = supervised.load_labelled(config, workdir)
    model = make_model(config.model, source.num_classes, whole_projection=False)
    weights = supervised.class_weights(config, source)
    options = {"class_weights": weights, "label_sets": source.label_sets}
    task = supervised.make_task(
        config,
        model,
        source,
        init=pretrained.make_init(config, model),
        loss=supervised.make_loss(model, config, after_block=None, **options),
        evaluate=held_out and supervised.make_evaluate(config, model, held_out),
        trained=supervised.is_head,
    )
    report.announce(train.describe(task, config, source, workdir), task.batches)
    scores = supervised.train_and_score(task, config, model, source, held_out, workdir, calibrate=True)
    return scores | {"steps": task.num_steps}
