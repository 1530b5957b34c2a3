import numpy as np
import pytest

from jaxformer.training import data

RECORDS, BATCH = 53, 8
GOLDEN = [[0, 3, 5, 1, 2, 6, 4], [4, 6, 1, 2, 0, 5, 3]]


def in_memory(**changes):
    settings = {"batch_size": BATCH, "seed": 11} | changes
    return data.InMemory({"x": np.arange(RECORDS), "y": np.arange(RECORDS) % 7}, **settings)


class Records:
    """Random access without a list behind it, as for data larger than memory."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        return {"x": np.int64(index), "y": np.int64(index % 7)}


def from_grain(**changes):
    return data.GrainSource(Records(), **({"batch_size": BATCH, "seed": 11} | changes))


@pytest.fixture(params=[in_memory, from_grain], ids=["numpy", "grain"])
def make(request):
    return request.param


def sequence(source, steps, name="x"):
    return np.concatenate([source.batch(step)[name] for step in range(steps)])


def test_every_epoch_holds_every_record_once_whatever_the_batch_size(make):
    for batch_size in (5, 8, 53):
        order = sequence(make(batch_size=batch_size), 3 * RECORDS // batch_size + 1)
        epochs = order[: 3 * RECORDS].reshape(3, RECORDS)
        assert (np.sort(epochs) == np.arange(RECORDS)).all()
        assert len(np.unique(epochs, axis=0)) == 3


def test_arrays_stay_together(make):
    batch = make().batch(9)
    assert batch.keys() == {"x", "y"}
    assert (batch["y"] == batch["x"] % 7).all()


def test_a_batch_depends_on_seed_and_step_only(make):
    source, other = make(), make(seed=12)
    forth = [source.batch(step)["x"] for step in range(20)]
    back = [source.batch(step)["x"] for step in reversed(range(20))][::-1]
    fresh = [make().batch(step)["x"] for step in (0, 13)]
    np.testing.assert_array_equal(forth, back)
    np.testing.assert_array_equal([forth[0], forth[13]], fresh)
    assert (forth[0] != other.batch(0)["x"]).any()


def test_any_number_of_hosts_reads_the_same_global_batch(make):
    def mark(batch, rng):
        return {**batch, "drawn": rng.integers(10**6, size=np.shape(batch["x"]))}

    for transform in (None, mark):
        whole = make(transform=transform)
        for hosts in (2, 4):
            shares = [make(host=host, hosts=hosts, transform=transform) for host in range(hosts)]
            for step in (0, 6, 31):
                expected = whole.batch(step)
                for host, share in enumerate(shares):
                    found = share.batch(step)
                    assert found.keys() == expected.keys()
                    for name, rows in found.items():
                        np.testing.assert_array_equal(rows, expected[name][host::hosts])


def test_what_a_transform_draws_depends_on_seed_and_step_only():
    def draw(batch, rng):
        return {"drawn": rng.random(len(batch["x"]))}

    source = in_memory(transform=draw)
    first, second = source.batch(4)["drawn"], source.batch(5)["drawn"]
    np.testing.assert_array_equal(source.batch(4)["drawn"], first)
    np.testing.assert_array_equal(in_memory(transform=draw).batch(5)["drawn"], second)
    assert not np.isin(first, second).any()
    assert not np.isin(first, in_memory(seed=12, transform=draw).batch(4)["drawn"]).any()


def test_the_order_of_a_seed_never_changes():
    source = data.InMemory({"x": np.arange(7)}, batch_size=7, seed=0)
    assert [source.batch(step)["x"].tolist() for step in (0, 1)] == GOLDEN


def test_the_position_is_json_and_the_same_for_all_hosts(make):
    expected = {"next_record": 56, "epoch": 1, "records": RECORDS, "seed": 11}
    assert make().position(7) == make(host=1, hosts=2).position(7) == expected


def test_other_data_than_the_checkpoint_had_are_named(make):
    data.check_position(make(), 7, make().position(7))
    with pytest.raises(ValueError, match=r"step 7|Step 7.*next_record was 56, is 28.*seed was 11"):
        data.check_position(make(seed=12, batch_size=4), 7, make().position(7))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 0}, "B=0"),
        ({"batch_size": 54}, "B=54 and 53 records"),
        ({"hosts": 3}, "B=8 is not a multiple of hosts=3"),
        ({"host": 2, "hosts": 2}, "host=2"),
        ({"host": -1}, "host=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_impossible_settings_are_named(make, changes, told):
    with pytest.raises(ValueError, match=told):
        make(**changes)


def test_arrays_of_different_lengths_or_none_are_refused():
    with pytest.raises(ValueError, match=r"'x': 3, 'y': 4"):
        data.InMemory({"x": np.zeros(3), "y": np.zeros(4)}, 1, 0)
    with pytest.raises(ValueError, match="one length"):
        data.InMemory({}, 1, 0)


def test_prefetching_changes_nothing_in_whatever_order_one_asks():
    plain = in_memory()
    with data.Prefetch(in_memory(), start=3) as ahead:
        assert isinstance(ahead, data.Source)
        assert ahead.position(5) == plain.position(5)
        for step in (3, 4, 5, 9, 2, 2, 3):
            np.testing.assert_array_equal(ahead.batch(step)["x"], plain.batch(step)["x"])


def test_an_error_in_the_background_reaches_the_batch_that_asked():
    class Broken:
        def batch(self, step):
            if step == 2:
                raise OSError(f"no record {step}")
            return {"x": np.array([step])}

        def position(self, step):
            return {}

    with data.Prefetch(Broken()) as ahead:
        assert [ahead.batch(step)["x"][0] for step in (0, 1)] == [0, 1]
        with pytest.raises(OSError, match="no record 2"):
            ahead.batch(2)
        assert ahead.batch(3)["x"][0] == 3


def test_grain_goes_on_after_a_record_that_cannot_be_read():
    class Fragile(Records):
        broken = True

        def __getitem__(self, index):
            if self.broken:
                raise OSError("disk")
            return super().__getitem__(index)

    records = Fragile()
    with data.GrainSource(records, BATCH, 11) as source:
        with pytest.raises(OSError, match="disk"):
            source.batch(0)
        records.broken = False
        np.testing.assert_array_equal(source.batch(0)["x"], from_grain().batch(0)["x"])
