"""SavedModel, for TensorFlow."""

from functools import partial

from simclr_jax.export import compare, outputs
from simclr_jax.models.resnet import ResNet


def write(model, variables, folder, *, image_size: int, classes: dict) -> float:
    """Writes a SavedModel with the interface of the official ones.

    The values of `classes`, from `export.classes_of`, become functions without arguments.

    Returns:
      The difference of its outputs from JAX's, see `export.compare`.
    """
    from simclr_jax.data import tf  # keeps TensorFlow quiet, so it comes first

    # isort: split
    from orbax.export import JaxModule, constants

    any_size = isinstance(model.encoder, ResNet)  # other encoders take only the size of their training
    network = JaxModule(
        variables,
        partial(outputs, model),
        trainable=False,
        input_polymorphic_shape=f"b, {'h, w' if any_size else f'{image_size}, {image_size}'}, "
        f"{model.channels}",
        jax2tf_kwargs={"native_serialization_platforms": ("cpu", "cuda", "tpu")},
    ).export_module()
    call = network.methods[constants.DEFAULT_METHOD_KEY]
    sides = [None, None] if any_size else [image_size, image_size]
    images = tf.TensorSpec([None, *sides, model.channels], tf.float32, name="inputs")
    module = tf.Module()
    module.network = network
    # The official interface; it is traced with `trainable=False` only, so that True is refused.
    module.__call__ = tf.function(lambda inputs, trainable=False: call(inputs))
    module.__call__.get_concrete_function(images, trainable=False)
    for name, value in classes.items():
        setattr(module, name, tf.function(partial(tf.constant, value), input_signature=[]))
    signature = tf.function(lambda inputs: call(inputs), input_signature=[images])
    tf.saved_model.save(module, str(folder), signatures={"serving_default": signature, "default": signature})
    loaded = tf.saved_model.load(str(folder))
    serve = loaded.signatures["default"]
    return max(
        compare(model, variables, image_size, 2, lambda images: loaded(images, trainable=False)),
        compare(model, variables, image_size + 5 * any_size, 1, lambda images: serve(inputs=images)),
    )
