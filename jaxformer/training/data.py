"""Batches as a pure function of seed, step and host: where the data stands is the step number.

Every source numbers its records through one endless sequence, a fresh permutation an epoch, and
batch `k` of size B is records `k B` to `k B + B - 1` of it, whoever asks and in whatever order. So
a resumed run needs no state but its step, no record is left out, and several hosts, each taking
every `hosts`-th row, read together the batch that one host would read.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Batch:
        """Returns this host's rows of the batch of `step`, the same ones at every call."""
        ...

    def position(self, step: int) -> dict[str, Any]:
        """Describes, as JSON and for all hosts alike, what has been read before `step`."""
        ...


@runtime_checkable
class Records(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def check_position(source: Source, step: int, stored: Mapping[str, Any]) -> None:
    """Refuses to resume on other data than a checkpoint was trained on.

    Raises:
        ValueError: If `source.position(step)` is not what was stored, naming what differs.
    """
    now = source.position(step)
    told = [
        f"{name} was {stored.get(name)}, is {now.get(name)}"
        for name in sorted(now.keys() | stored.keys())
        if now.get(name) != stored.get(name)
    ]
    if told:
        raise ValueError(f"Step {step} was saved with other data: {'; '.join(told)}.")


@dataclasses.dataclass(frozen=True)
class _Order:
    """The part all sources share: how many records, in which order, for which host."""

    records: int
    batch_size: int
    seed: int
    host: int
    hosts: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.records:
            raise ValueError(
                f"A batch needs 1 <= B <= records, got B={self.batch_size} and "
                f"{self.records} records."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"A seed lies in [0, 2**32), got seed={self.seed}.")
        if not 0 <= self.host < self.hosts:
            raise ValueError(f"Of hosts={self.hosts}, there is none with host={self.host}.")
        if self.batch_size % self.hosts:
            raise ValueError(f"B={self.batch_size} is not a multiple of hosts={self.hosts}.")

    def position(self, step: int) -> dict[str, int]:
        first = step * self.batch_size
        return {
            "next_record": first,
            "epoch": first // self.records,
            "records": self.records,
            "seed": self.seed,
        }


class InMemory:
    """Batches from arrays in memory.

    The order rests on raw bits of the Philox generator, which every version of NumPy gives alike.

    Args:
        arrays: Arrays of one length, rows first; kept, not copied.
        batch_size: B, of all hosts together.
        seed: Gives the order, and the draws of `transform`; in [0, 2**32).
        host: Which share of each batch to return: rows `host`, `host + hosts`, ...
        hosts: How many hosts share a batch; divides B.
        transform: Called as `transform(batch, rng)` with the batch of all hosts and a generator
            that depends on seed and step only, so that what it draws does not depend on hosts.

    Raises:
        ValueError: If arrays are missing or of different lengths, B is not in [1, records] or not a
            multiple of `hosts`, or `seed` or `host` is out of range.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        host: int = 0,
        hosts: int = 1,
        transform: Callable[[Batch, np.random.Generator], Batch] | None = None,
    ):
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"InMemory needs arrays of one length, got {lengths}.")
        self._arrays = dict(arrays)
        self._order = _Order(next(iter(lengths.values())), batch_size, seed, host, hosts)
        self._transform = transform
        # A batch touches two epochs at most; a forgotten permutation is drawn again, the same.
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def batch(self, step: int) -> Batch:
        """Returns this host's rows of the batch of `step`; see `Source`."""
        order = self._order
        mine = slice(order.host, None, order.hosts)
        index = step * order.batch_size + np.arange(order.batch_size)
        if self._transform is None:
            index = index[mine]
        epochs, places = np.divmod(index, order.records)
        rows = np.empty_like(index)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        batch = {name: array[rows] for name, array in self._arrays.items()}
        if self._transform is None:
            return batch
        whole = self._transform(batch, np.random.Generator(self._bits(1, step)))
        return {name: array[mine] for name, array in whole.items()}

    def position(self, step: int) -> dict[str, Any]:
        """Describes what has been read before `step`; see `Source`."""
        return self._order.position(step)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.argsort(self._bits(0, epoch).random_raw(self._order.records), kind="stable")

    def _bits(self, purpose: int, count: int) -> np.random.Philox:
        return np.random.Philox(np.random.SeedSequence((self._order.seed, purpose, count)))


class GrainSource:
    """Batches read through `grain` by several threads, for data larger than memory.

    Asked for consecutive steps it reads ahead; any other step is an exact jump at no cost. Close it
    to stop the threads, or use it as a context manager.

    Args:
        records: Random access to records, each a dictionary of arrays: anything with `len` and
            integer indices, such as a `tensorflow_datasets` data source.
        batch_size: B, of all hosts together.
        seed: Gives the order, and the draws of `transform`; in [0, 2**32).
        host: Which share of each batch to return: rows `host`, `host + hosts`, ...
        hosts: How many hosts share a batch; divides B.
        transform: Called as `transform(record, rng)` on each record, with a generator that depends
            on seed and place in the sequence only.
        threads: How many batches are read at once, and how many wait to be asked for.

    Raises:
        ValueError: If B is not in [1, records] or not a multiple of `hosts`, or `seed` or `host` is
            out of range.
    """

    def __init__(
        self,
        records: Records,
        batch_size: int,
        seed: int,
        host: int = 0,
        hosts: int = 1,
        transform: Callable[[Any, np.random.Generator], Any] | None = None,
        threads: int = 4,
    ):
        import grain  # takes a second, which the other sources need not wait for

        self._order = _Order(len(records), batch_size, seed, host, hosts)
        endless = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
        if transform is not None:
            endless = endless.random_map(transform)
        # Striding before batching is what makes the batch of a step independent of `hosts`.
        batches = endless[host::hosts].batch(batch_size // hosts)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        self._batches = iter(batches.to_iter_dataset(options))
        self._next = 0

    def batch(self, step: int) -> Batch:
        """Returns this host's rows of the batch of `step`; see `Source`."""
        if step != self._next:
            self._batches.set_state({"next_index": step})
        self._next = -1  # an error below leaves the iterator somewhere unknown
        batch = next(self._batches)
        self._next = step + 1
        return batch

    def position(self, step: int) -> dict[str, Any]:
        """Describes what has been read before `step`; see `Source`."""
        return self._order.position(step)

    def close(self) -> None:
        """Stops the reading threads."""
        self._batches.close()

    def __enter__(self) -> "GrainSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Prefetch:
    """Prepares the next batch of another source in a background thread; itself a source.

    Whichever step is asked for, the one after it is begun. What the source raises is raised by the
    `batch` that asks for it. Close it, or use it as a context manager, to stop the thread.

    Args:
        source: Asked by one thread at a time, in the order of the calls to `batch`.
        start: The first step that will be asked for, begun at once.
    """

    def __init__(self, source: Source, start: int = 0):
        self._source = source
        self._thread = futures.ThreadPoolExecutor(max_workers=1)
        self._step, self._ready = start, self._thread.submit(source.batch, start)

    def batch(self, step: int) -> Batch:
        """Returns this host's rows of the batch of `step`; see `Source`."""
        ready = self._ready
        if step != self._step:
            ready = self._thread.submit(self._source.batch, step)
        self._step, self._ready = step + 1, self._thread.submit(self._source.batch, step + 1)
        return ready.result()

    def position(self, step: int) -> dict[str, Any]:
        """Describes what has been read before `step`; see `Source`."""
        return self._source.position(step)

    def close(self) -> None:
        """Stops the thread; a batch under way is waited for and thrown away."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
