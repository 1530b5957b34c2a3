"""Compiles the kernels of attention for chips that are not there.

Each kernel is compiled for each target in a process of its own, since libtpu reads its options once
and may end the process. What the compilers say is in `Result.programs`: `_tpu_schedule.Schedule`
for TPUs, `_gpu_sass.Program` for GPUs.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib import metadata
from typing import Any

from jaxformer.analysis import _gpu_sass, _tpu_schedule

TPUS = tuple(_tpu_schedule.TOPOLOGIES)
GPUS = tuple(_gpu_sass.TARGETS)
TARGETS = (*TPUS, *GPUS)
_SECONDS = 600  # after which a compiler is given up


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A function to compile.

    Attributes:
        name: `module.function`, and the variant if there are several.
        targets: What it can be compiled for.
        make: Returns the function and its arguments, or their shapes; called where it compiles.
    """

    name: str
    targets: tuple[str, ...]
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a kernel.

    Attributes:
        kernel: Its name.
        target: What it was compiled for.
        error: Why it does not compile, in a line; None if it does.
        seconds: How long it took.
        programs: What the compiler made of it, without programs that multiply no matrices.
    """

    kernel: str
    target: str
    error: str | None
    seconds: float
    programs: tuple[Any, ...] = ()


def missing(target: str) -> str | None:
    """Says in a line what has to be installed to compile for a target; None if nothing has."""
    if target in TPUS:
        installed = importlib.util.find_spec("libtpu") is not None
        return None if installed else "TPUs need libtpu: pip install 'jaxformer[tpu]'"
    version = metadata.version("jax")
    if tuple(map(int, version.split(".")[:2])) < (0, 11):
        return f"GPUs need jax 0.11 or newer, which needs Python 3.12; this is {version}"
    plugin = importlib.util.find_spec("jax_cuda13_plugin")
    if plugin is None or _gpu_sass.tool("ptxas") is None or _gpu_sass.tool("nvdisasm") is None:
        return "GPUs need jax's CUDA plugin and nvdisasm: pip install 'jaxformer[cuda]'"
    return None


def check(
    pairs: Sequence[tuple[Kernel, str]], *, workers: int | None = None
) -> Generator[Result, None, None]:
    """Compiles kernels for targets, and yields the results in the same order.

    However it ends, its processes end with it and their folders are removed; to that end SIGTERM
    and SIGHUP raise KeyboardInterrupt meanwhile, as Ctrl-C does, if this is the main thread. Close
    the iterator if an exception may come between two results, as by `contextlib.closing`.

    Args:
        pairs: Each a kernel and a target.
        workers: Processes at a time; one for each processor if None.
    """
    processes: list[subprocess.Popen] = []
    stopped = threading.Event()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            handlers[number] = signal.signal(number, signal.default_int_handler)
    pool = concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count())
    try:
        yield from pool.map(lambda pair: _checked(pair[0], pair[1], processes, stopped), pairs)
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            _kill(process)
        pool.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _kill(process: subprocess.Popen) -> None:
    """Ends a process that leads a group, and those that it started, such as an assembler."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _checked(
    kernel: Kernel, target: str, processes: list[subprocess.Popen], stopped: threading.Event
) -> Result:
    """Compiles in another process, which leaves a pickle of the result."""
    began = time.monotonic()
    module = _tpu_schedule if target in TPUS else _gpu_sass
    code = "import sys; from jaxformer.analysis import preflight; preflight.work(sys.argv[1])"
    with tempfile.TemporaryDirectory(prefix="jaxformer-preflight-") as name:
        folder = pathlib.Path(name)
        (folder / "given").write_bytes(pickle.dumps((kernel, target)))
        with open(folder / "said", "wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", code, name],
                env=os.environ | module.environment(folder),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            processes.append(process)
            if stopped.is_set():
                _kill(process)
            try:
                process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                _kill(process)
                process.wait()
        seconds = time.monotonic() - began
        if (folder / "result").exists():
            result = pickle.loads((folder / "result").read_bytes())
            return dataclasses.replace(result, seconds=seconds)
        lines = (folder / "said").read_text(errors="replace").strip().splitlines()
        error = f"the compiler ended with {process.returncode}: {lines[-1] if lines else ''}"
        return Result(kernel.name, target, error, seconds)


def work(name: str) -> None:
    """Compiles what the file `given` in a folder says, and writes the file `result` beside it."""
    folder = pathlib.Path(name)
    kernel, target = pickle.loads((folder / "given").read_bytes())
    module = _tpu_schedule if target in TPUS else _gpu_sass
    error, programs = None, ()
    try:
        function, arguments = kernel.make()
        compile_on(module.device(target), function, arguments)
        programs = tuple(module.read(folder))
    except Exception as problem:
        error = " ".join(f"{type(problem).__name__}: {problem}".split())
    result = Result(kernel.name, target, error, 0.0, programs)
    (folder / "partial").write_bytes(pickle.dumps(result))
    (folder / "partial").rename(folder / "result")


def compile_on(device: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Compiles for one device, which need not exist."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array([device]), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function = jax.jit(function, in_shardings=everywhere, out_shardings=everywhere)
        return function.lower(*arguments).compile()


def _flash(module: str, function: str, mask: str, dtype: str) -> Any:
    """A call of a kernel of `flash.attend`: 8 heads of 128 channels, 4,096 tokens.

    Args:
        module: The last word of the name of its module.
        function: "forward" or "backward".
        mask: "causal"; or "segments", which leaves all kinds of blocks open and cuts every one.
        dtype: Of queries, keys and values.
    """
    import jax
    import jax.numpy as jnp

    from jaxformer.ops import attention

    implementation = importlib.import_module(f"jaxformer.ops.attention._flash_{module}")
    x = jax.ShapeDtypeStruct((1, _LENGTH, _HEADS, _CHANNELS), dtype)
    ids = jax.ShapeDtypeStruct((1, _LENGTH), jnp.int32)
    options = {"bias": None, "scale": _CHANNELS**-0.5, "softcap": None, "sinks": None}
    lengths = (_LENGTH, _LENGTH)

    def masked(ids: Any) -> Any:
        mask_of = attention.causal() if mask == "causal" else attention.segments(ids)
        return mask_of.canonical(*lengths)

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return implementation.forward(q, k, v, masked(ids), **options)

    def backward(q: Any, k: Any, v: Any, ids: Any, out: Any, d_out: Any) -> Any:
        like_lse = jax.eval_shape(forward, q, k, v, ids)[1]
        lse = jnp.zeros(like_lse.shape)
        given = (q, k, v, masked(ids), out, lse, d_out, lse)
        return implementation.backward(*given, **options, bias_gradient=False)

    if function == "forward":
        return forward, (x, x, x, ids)
    return backward, (x, x, x, ids, x, x)


def _linear(module: str, function: str) -> Any:
    """A call of a kernel of `linear.attend`, of the same size."""
    import jax
    import jax.numpy as jnp

    from jaxformer.ops.attention import linear

    implementation = importlib.import_module(f"jaxformer.ops.attention._linear_{module}")
    x = jax.ShapeDtypeStruct((1, _LENGTH, _HEADS, _CHANNELS), jnp.bfloat16)
    state = linear.State.empty(1, _HEADS, _CHANNELS, _CHANNELS)
    lengths = jnp.full(1, _LENGTH, jnp.int32)

    def forward(q: Any, k: Any, v: Any) -> Any:
        attend = functools.partial(
            implementation.attend, feature_map=linear.elu_plus_one, chunk=None
        )
        return attend(q, k, v, lengths, *state)[0]

    def backward(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](d_out)

    return (forward, (x, x, x)) if function == "forward" else (backward, (x, x, x, x))


_LENGTH, _HEADS, _CHANNELS = 4096, 8, 128


def _kernels() -> Iterator[Kernel]:
    hopper = ("sm_90a",)
    for module, targets in (("tpu", TPUS), ("gpu", hopper), ("triton", GPUS)):
        for function in ("forward", "backward"):
            for mask, dtype in (
                ("causal", "bfloat16"),
                ("segments", "bfloat16"),
                ("causal", "float16"),
                ("causal", "float32"),
            ):
                if (module, dtype) in (("tpu", "float16"), ("gpu", "float32")):
                    continue  # widened before the kernel; refused
                make = functools.partial(_flash, module, function, mask, dtype)
                yield Kernel(f"flash_{module}.{function}.{mask}.{dtype}", targets, make)
    for module, targets in (("tpu", TPUS), ("gpu", GPUS)):
        for function in ("forward", "backward"):
            make = functools.partial(_linear, module, function)
            yield Kernel(f"linear_{module}.{function}", targets, make)


KERNELS = tuple(_kernels())
