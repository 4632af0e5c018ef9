"""The cost of a train step: counted in its jaxpr, compiled for any topology, compared with a chip's peaks."""

import importlib.util
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import jax
from jax.experimental.topologies import get_topology_desc

from simclr_jax import parallel, supervised, train
from simclr_jax.models import make_init, make_model
from simclr_jax.plan import gpus, topologies
from simclr_jax.process import UserError, machine
from simclr_jax.profiling.chips import find_chip
from simclr_jax.profiling.flops import inner_jaxprs, product_flops
from simclr_jax.tasks import distill, pretrain
from simclr_jax.views import batches, on_device, resident

GIB = 2**30
_COLLECTIVES = ("psum", "all_gather", "reduce_scatter")

# Training images and classes of the datasets that can be planned for before they are prepared.
_SIZES = {
    "digits": (1437, 10),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "stl10": (100_000, 0),
    "imagenet2012": (1_281_167, 1000),
}


class Examples(NamedTuple):
    """The properties of a dataset on which the train step depends; its files need not be there."""

    name: str
    num_examples: int
    num_classes: int
    class_names: tuple = ()
    label_sets: None = None
    value_range: None = None
    order: None = None
    channels: int = 3
    dtype: str = "uint8"

    @classmethod
    def from_config(cls, dataset):
        """Reads size and classes from `config.dataset`, or else from `_SIZES`."""
        size, classes = _SIZES.get(dataset.name, (None, 0))
        size, classes = dataset.num_examples or size, dataset.num_classes or classes
        if size is None:
            raise UserError(
                f"the size of '{dataset.name}' is not known here: set --config.dataset.num_examples and, "
                "where it has labels, --config.dataset.num_classes"
            )
        dtype = "uint8" if dataset.value_range is None else "float16"
        return cls(dataset.name, size, classes, channels=dataset.channels or 3, dtype=dtype)


def check_pretraining(config, subject: str) -> None:
    """Raises a UserError, which begins with `subject`, unless the config is one of pretraining."""
    if config.task != "pretrain":
        raise UserError(f"{subject} of pretraining, not of {config.task}: give the config without a task")


def measure(config, topology: str, teacher=None) -> dict:
    """Compiles the train step of a config for a topology; runs nothing.

    Args:
      config: a config of pretraining, linear_eval, finetune or distill.
      topology: a name of `topologies.Topology`, or 'local'.
      teacher: `config.model` of the network that teaches, in distill.

    Returns:
      'devices', 'hosts', 'kind'; 'parameters'; 'num_steps', of all draws and comparisons of the task; of a
      step on one device: 'flops', 'bytes' and 'collectives', see `count`; 'memory' in bytes: 'arguments',
      'temporaries' and 'code', or where XLA refuses the step 'refused' alone, the bytes that it would take.
      Where the training images lie on the device, their views are counted, too, and 'images' are among the
      memory.

    Raises:
      UserError: unknown topology or size of the dataset, or a batch that does not divide over the devices.
    """
    if topology != "local":
        jax.config.update("jax_platforms", "cpu")
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # it only compiles, and uses no TPU
    else:
        machine.use_cores(config.batch_size // train.microbatches_of(config))
    return compile_step(config, _devices(topology), teacher)[1]


def measure_in_process(config, topology: str, teacher=None) -> dict:
    """Calls `measure` in a process of its own, since the TPU compiler can crash its process."""
    if topologies.is_gpu(topology):
        gpus.check_compiler(topology)
    elif topology != "local" and not ("TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu")):
        raise UserError(f"--topology={topology} needs the TPU compiler: pip install 'jax[tpu]'")
    quiet = _silence_stderr if topology != "local" else None
    try:
        return run_in_process(measure, config, topology, teacher, initializer=quiet)
    except BrokenProcessPool:
        raise UserError(
            f"the compiler crashed on this step for {topology}: try another topology, or another "
            "--config.batch_size"
        ) from None


def run_in_process(function, *arguments, initializer=None):
    """Runs a function in a process of its own: a framework keeps most of a GPU's memory until it exits."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=initializer) as pool:
        return pool.submit(function, *arguments).result()


def _silence_stderr():
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # compilers complain at length that there is no such device


def compile_step(config, devices, teacher=None):
    """Compiles the train step of a config, see `measure`, for these devices, which need not be here.

    Returns:
      task; what `measure` returns; the compiled step(state, batch), None where XLA refuses it.
    """
    for model in (config.model, teacher):
        if devices[0].platform != "cpu" and model and model.dtype == "auto":
            model.dtype = "bfloat16"  # the devices' default; 'auto' would take the host's
    train.check_batch_size(config.batch_size, len(devices), train.microbatches_of(config))
    examples, images, repeats = Examples.from_config(config.dataset), None, 1
    config.model.channels = examples.channels
    if config.task == "pretrain":
        config.augment.dtype = examples.dtype
        model = make_model(config.model, examples.num_classes, remat=config.remat)
        task = pretrain.make_task(config, model, examples)
        images = _images_on(devices[0], config, examples)
        config.dataset.on_device = images is not None  # None depends on the devices
        batch = batches.batch_shapes(config, config.batch_size // len(devices))
    else:
        task, batch, repeats = _labelled_step(config, examples, config.batch_size // len(devices))
    parts = task.loss, task.optimizer, task.schedule, task.trained, task.after_update
    step = train.make_train_step(*parts)
    state = jax.eval_shape(lambda: train.init_state(task, config.seed))

    programs = [jax.make_jaxpr(step, axis_env=[(parallel.AXIS, len(devices))])(state, batch)]
    if teacher:
        forward = make_model(teacher, examples.num_classes, whole_projection=False)
        variables = jax.eval_shape(make_init(forward, config.image_size), jax.random.key(0))
        programs.append(jax.make_jaxpr(forward.apply)(variables, batch["image"]))
    if images:
        rows = jax.ShapeDtypeStruct(batch["label"].shape, "int32")
        make = partial(on_device.two_views, shape=batch["view1"].shape[1:3], **resident.view_settings(config))
        programs.append(jax.make_jaxpr(make)(images, rows, rows))
    flops, traffic, collectives = zip(*(count(program.jaxpr) for program in programs))
    plan = {
        "devices": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "kind": devices[0].device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        "num_steps": task.num_steps * repeats,
        "flops": sum(flops),
        "bytes": sum(traffic),
        "collectives": collectives[0],
    }
    sharded = {k: jax.ShapeDtypeStruct((len(devices), *v.shape), v.dtype) for k, v in batch.items()}
    try:
        compiled = train.mapped_step(task, devices).lower(state, sharded).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # "Used 20.1G of 15.75G hbm", or "... (416.08G) exceeds available HBM (15.75G)"
        number, unit = re.search(r"([\d.]+)([KMGT])\)? (?:of|exceeds) ", str(error)).groups()
        return task, plan | {"memory": {"refused": float(number) * 1024 ** (" KMGT".index(unit))}}, None
    used = compiled.memory_analysis()
    memory = {
        "arguments": used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "code": used.generated_code_size_in_bytes,
    }
    memory |= {"images": images.size} if images else {}
    return task, plan | {"memory": memory}, compiled


def _labelled_step(config, examples, rows):
    """Describes linear_eval, finetune or distill as the tasks do.

    Returns:
      The task, the shapes of a batch of so many rows, and how often it is trained: for each draw of labels,
      and once more for what it is compared with.
    """
    model = make_model(config.model, examples.num_classes, whole_projection=False)
    sides = (config.image_size, config.image_size)
    shapes = {"image": (rows, *sides, config.model.channels), "label": (rows,)}
    trained, repeats = train.all_parameters, 1
    if config.task == "linear_eval":
        loss, trained = supervised.make_loss(model, config, after_block=None), supervised.is_head
    elif config.task == "finetune":
        block, repeats = config.fine_tune_after_block, 1 + config.evaluate.compare
        loss = supervised.make_loss(model, config, after_block=block)
        trained = partial(supervised.is_after_block, after_block=block)
        if config.labels_per_class:
            examples = examples._replace(num_examples=config.labels_per_class * examples.num_classes)
            repeats *= config.draws
    else:
        loss, repeats = distill.make_loss(model, config), 1 + config.evaluate.compare
        shapes["teacher_logits"] = (rows, examples.num_classes)
    init = make_init(model, config.image_size)
    task = supervised.make_task(config, model, examples, init=init, loss=loss, trained=trained)
    types = {"image": "uint8", "label": "int32", "teacher_logits": "float32"}
    batch = {name: jax.ShapeDtypeStruct(shape, types[name]) for name, shape in shapes.items()}
    return task, batch, repeats


def _images_on(device, config, examples):
    """Returns the training images that lie on a device, in the size of the views; None where none do."""
    wanted, chip = config.dataset.on_device, find_chip(device.device_kind)
    size = examples.num_examples * examples.channels * config.image_size**2
    if wanted is None and chip and config.dataset.in_memory and config.dataset.name in _SIZES:
        wanted = resident.is_small(size, [config.image_size], config.image_size, chip.memory * GIB)
    shape = (examples.num_examples, size // examples.num_examples)
    return jax.ShapeDtypeStruct(shape, examples.dtype) if wanted else None


def _devices(topology):
    if topology == "local":
        return jax.devices()
    if topologies.is_gpu(topology):
        return gpus.devices(topology)
    options = {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores are one device, as on Cloud TPU
    if math.prod(map(int, re.findall(r"\d+", topology.partition(":")[2]))) == 1:  # a single chip
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology} is no shape that the compiler has ({str(error).splitlines()[0][:90]}): "
            "give one such as v3:8x8, v4:4x4x8, v5e:16x16, v5p:4x4x4, v6e:16x16"
        ) from None


def count(jaxpr) -> tuple[float, float, dict[str, tuple[int, int]]]:
    """Counts the convolutions, matrix products and collectives of a jaxpr.

    Loops count as often as they run, and recomputed operations as often as they are computed.

    Returns:
      FLOPs of the convolutions and products.
      Bytes of their operands and results, each counted once, since activations do not fit into registers.
      Collectives by name: {'psum': (how often, bytes that go in), 'all_gather': ..., ...}.
    """
    flops, traffic, collectives = 0.0, 0.0, {}
    for equation, repeats in _equations(jaxpr):
        name = equation.primitive.name
        if product := product_flops(equation):
            flops += repeats * product
            traffic += repeats * sum(map(_bytes_of, (*equation.invars, *equation.outvars)))
        if name in _COLLECTIVES:
            times, size = collectives.get(name, (0, 0))
            operands = sum(map(_bytes_of, equation.invars))
            collectives[name] = times + repeats * len(equation.invars), size + repeats * operands
    return flops, traffic, collectives


def _equations(jaxpr, repeats=1):
    """Yields each equation, those of inner jaxprs too, and how often it runs."""
    for equation in jaxpr.eqns:
        yield equation, repeats
        inner_repeats = repeats * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in inner_jaxprs(equation):
            yield from _equations(inner, inner_repeats)


def _bytes_of(variable):
    return variable.aval.size * variable.aval.dtype.itemsize


def roofline(plan: dict) -> dict[str, float]:
    """Returns the least seconds of a step for 'compute', 'memory' and 'links', at the chip's peaks.

    The dictionary is empty where the chip is unknown.
    """
    chip = find_chip(plan["kind"])
    if chip is None:
        return {}
    others = plan["devices"] - 1
    # In a ring of devices, the parts of a sum go around twice, gathered rows once.
    passes = {"psum": 2 * others / plan["devices"], "all_gather": others}
    passes["reduce_scatter"] = others / plan["devices"]
    sent = sum(passes[name] * size for name, (_, size) in plan["collectives"].items())
    return {
        "compute": plan["flops"] / (chip.flops * 1e12),
        "memory": plan["bytes"] / (chip.bandwidth * 1e9),
        "links": sent / (chip.link * 1e9),
    }
