"""Devices: naming their axes, simulating several on a CPU, and keeping a CPU's memory warm."""

import ctypes
import math
import os

import jax
from jax.sharding import AxisType, Mesh


def parse(spec: str) -> dict[str, int]:
    """Reads `data=4` or `data=4,model=2` into sizes of named axes.

    Raises:
        ValueError: If it is anything else.
    """
    axes = {}
    for part in spec.split(","):
        name, _, size = part.strip().partition("=")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            raise ValueError(f"a mesh is written like 'data=4' or 'data=4,model=2', got {spec!r}.")
        axes[name] = int(size)
    if "data" not in axes:
        raise ValueError(f"a mesh needs an axis named data, got {spec!r}.")
    return axes


def make(spec: str | None = None, *, batch: int | None = None) -> Mesh:
    """Makes a mesh as `spec` says, or if None of all devices along one axis named `data`.

    On a CPU each device is simulated by one thread, of which there are as many as `spec` wants, or
    as the process may use cores: two devices of one thread each train faster than one of two. Their
    number is settled when JAX first touches a device, so this comes before everything else.

    Args:
        spec: Sizes of named axes, as `parse` reads them.
        batch: Rows that are to be split: without a `spec`, a single process leaves out as many
            devices as it takes to divide them.

    Raises:
        ValueError: If `spec` cannot be read, wants more devices than there are, or leaves some out
            although several processes share them.
    """
    axes = None if spec is None else parse(spec)
    _simulate(usable_cores() if axes is None else math.prod(axes.values()))
    devices = jax.devices()
    if axes is None:
        count = len(devices)
        if batch is not None and jax.process_count() == 1:
            count = max(n for n in range(1, count + 1) if batch % n == 0)
        axes = {"data": count}
    count = math.prod(axes.values())
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise ValueError(f"the mesh {spec} is of {count} devices, there are {len(devices)}.")
    auto = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=auto, devices=devices[:count]
    )


def usable_cores() -> int:
    """Counts the cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def keep_host_memory() -> bool:
    """Tells the allocator to keep freed memory for the next step rather than to return it.

    XLA on CPU allocates all of a step's buffers anew. glibc asks the kernel for large ones each
    time and each page of them is zeroed again, which is a quarter of a small model's training
    step. Applies to the whole process, so it is for programs to call and not for libraries; keeps
    the peak memory until the process ends.

    Returns:
        Whether there is a glibc that took the settings.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    try:
        libc = ctypes.CDLL("libc.so.6")
        settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1))
        return all(libc.mallopt(name, value) == 1 for name, value in settings)
    except (OSError, AttributeError):
        return False


def _simulate(count: int) -> None:
    """Asks for `count` CPU devices, where nobody has settled their number yet."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags or os.environ.get("JAX_NUM_CPU_DEVICES"):
        return
    if jax.config.jax_num_cpu_devices > 0:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the devices are there already, and `make` compares their number
        return
