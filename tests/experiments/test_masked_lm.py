"""The experiment in small: what it leaves for each kind of data, and what it refuses."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import columns, masked_lm, sequences
from jaxformer.models.esm import ESM, ESMConfig
from jaxformer.training import checkpoint, mesh

_SMALL = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "num_layers": 1, "width": 8}
LETTERS = "LAGVSERTIDPKQNFYMHWC"


def config(folder, kind, *names, **changes):
    preset = masked_lm.KINDS[kind]
    settings = {"run": str(folder), "data": names, "context": 8, "steps": 4, "batch": 4}
    settings |= {"warmup": 2, "mesh": "data=1", "save_every": 2, "log_every": 1}
    settings["model"] = dataclasses.replace(preset.model, hidden=8, **_SMALL)
    return dataclasses.replace(preset, **settings | changes)


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A poem, proteins and an alignment with its distances."""
    folder = tmp_path_factory.mktemp("sequences")
    poem = "".join(f"{n} green bottles hanging on the wall.\n" for n in range(60))
    (folder / "poem.txt").write_text(poem)
    draw = np.random.default_rng(0)
    proteins = ["".join(draw.choice([*LETTERS], 5 + i)) for i in range(20)]
    with gzip.open(folder / "proteins.fasta.gz", "wt") as file:
        file.write("".join(f">p{i} family\n{p[:7]}\n{p[7:]}\n" for i, p in enumerate(proteins)))
    (folder / "few.fasta").write_text(">one\nMKV\n>two\nmkvla\n")
    aligned = ["".join(draw.choice([*LETTERS, "-"], 12)) for _ in range(40)]
    (folder / "family.aln").write_text("\n".join(aligned) + "\n")
    distances = np.full((12, 12), 20.0, np.float16)
    distances[0, 6:] = distances[6:, 0] = 5.0
    distances[1, 7] = distances[7, 1] = np.nan
    np.savez(folder / "truth.npz", cb_distance=distances)
    np.save(folder / "plain.npy", distances)
    return folder


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    assert masked_lm.main(config(folder, "text", str(files / "poem.txt"))) == 0
    return folder


def test_a_text_leaves_report_and_curve(whole, files):
    report = json.loads((whole / "report.json").read_text())
    assert report["data"] == str(files / "poem.txt")
    assert 0 < report["validation_nats"] < 5
    assert 0 <= report["validation_right"] <= 1
    assert 2 < report["validation_nats_by_frequency"] < np.log(40)
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    read = [(row["step"], row["validation"]) for row in rows(whole) if "validation" in row]
    assert [step for step, _ in read] == [2, 4]
    assert read[-1][1] == pytest.approx(report["validation_nats"], rel=1e-6)


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, files, tmp_path, stopped):
    cfg = config(tmp_path, "text", str(files / "poem.txt"))
    stopped(masked_lm, cfg, 3)
    assert masked_lm.main(cfg) == 0
    for name in ("metrics.jsonl", "report.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("text", "poem.txt", ("green", "brown")),
        ("proteins", "few.fasta", ("MKV", "MLV")),
        ("alignment", "family.aln", ("A", "G")),
    ],
)
def test_other_data_of_the_same_size_are_another_number(files, tmp_path, kind, name, changes):
    valid = (str(files / name),) if kind == "proteins" else ()
    other = tmp_path / name
    other.write_text((files / name).read_text().replace(*changes))
    cfgs = [config(tmp_path, kind, str(path), valid=valid) for path in (files / name, other)]
    one, two = (cfg.meaning(masked_lm.load(cfg)[0]) for cfg in cfgs)
    assert one.pop("rows") != two.pop("rows")
    assert one == two


def test_other_data_are_refused(whole, files, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text((files / "poem.txt").read_text().replace("green", "brown"))
    with pytest.raises(checkpoint.CheckpointError, match="rows: "):
        masked_lm.main(config(whole, "text", str(other)))


def test_four_devices_give_the_loss_of_one(whole, files, tmp_path):
    assert masked_lm.main(config(tmp_path, "text", str(files / "poem.txt"), mesh="data=4")) == 0
    for one, four in zip(rows(whole), rows(tmp_path), strict=True):
        assert four == pytest.approx(one, rel=1e-5)


def test_proteins_are_judged_by_each_file_that_is_given(files, tmp_path):
    names = (str(files / "few.fasta"), str(files / "proteins.fasta.gz"))
    cfg = config(tmp_path, "proteins", str(files / "proteins.fasta.gz"), valid=names)
    assert masked_lm.main(cfg) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert 1 < report["few_nats"] < 6
    assert 1 < report["proteins_nats"] < 6
    assert report["few_nats"] != report["proteins_nats"]


def test_an_alignment_leaves_contacts(files, tmp_path):
    cfg = config(tmp_path, "alignment", str(files / "family.aln"), truth=str(files / "truth.npz"))
    assert masked_lm.main(cfg) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["precision"] in [n / 12 for n in range(7)]
    assert (tmp_path / "contacts.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_becomes_windows_and_a_mask_that_is_none_of_its_tokens(files):
    found = sequences.load_text([str(files / "poem.txt")], 0, 8)
    assert found.train.shape[1] == found.valid["validation"].shape[1] == 8
    assert found.mask_token == len(found.shares) - 1 > found.train.max()
    assert found.shares.sum() == pytest.approx(1)
    assert found.shares[found.mask_token] == 0
    np.testing.assert_array_equal(found.train[1:, :-1], found.train[:-1, 1:])


def test_long_proteins_are_cut_into_pieces_and_short_ones_filled_up(files):
    name = str(files / "few.fasta")
    found = sequences.load_proteins([str(files / "proteins.fasta.gz")], [name], 5)
    np.testing.assert_array_equal(  # MKV, MKV and LA with ESM's numbers
        found.valid["few"], [[0, 20, 15, 7, 2], [0, 20, 15, 7, 2], [0, 4, 5, 2, 1]]
    )
    assert found.train.shape == (sum(-(-(5 + i) // 3) for i in range(20)), 5)


def test_lines_may_end_as_in_windows(files, tmp_path):
    plain = (files / "few.fasta").read_bytes()
    (tmp_path / "few.fasta").write_bytes(plain.replace(b"\n", b"\r\n"))
    one, two = (
        sequences.load_proteins([str(folder / "few.fasta")], [str(folder / "few.fasta")], 9)
        for folder in (files, tmp_path)
    )
    np.testing.assert_array_equal(one.train, two.train)


def test_files_of_one_name_are_refused(files, tmp_path):
    names = [str(files / "few.fasta"), str(tmp_path / "few.fasta")]
    (tmp_path / "few.fasta").write_text(">a\nMKV\n")
    with pytest.raises(sequences.SequencesError, match="two files of one name"):
        sequences.load_proteins(names, names, 9)


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("text", {"shuffle": True}, "shuffle is for alignment, not for text"),
        ("text", {"valid": ("a",)}, "valid is for proteins"),
        ("proteins", {"truth": "a"}, "truth is for alignment"),
        ("alignment", {"bpe": 300}, "bpe is for text"),
    ],
)
def test_options_of_another_kind_are_refused(kind, options, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(masked_lm.KINDS[kind], **options)


def test_every_tenth_protein_is_for_validation_if_no_file_is(files):
    found = sequences.load_proteins([str(files / "proteins.fasta.gz")], [], 40)
    sizes = {
        "train": (found.train != 1).sum(1) - 2,
        "valid": (found.valid["validation"] != 1).sum(1) - 2,
    }
    assert sizes["valid"].tolist() == [14, 24]
    assert sizes["train"].tolist() == [5 + i for i in range(20) if i not in (9, 19)]


def test_shuffling_keeps_columns_and_not_rows(files):
    name = [str(files / "family.aln")]
    plain, dealt = (sequences.load_alignment(name, shuffle=s, seed=0) for s in (False, True))
    whole = [np.concatenate([x.train, x.valid["validation"]]) for x in (plain, dealt)]
    np.testing.assert_array_equal(*(np.sort(x, axis=0) for x in whole))
    assert (whole[0] != whole[1]).any(axis=1).mean() > 0.9


def test_gaps_and_frames_are_never_hidden(files):
    found = sequences.load_alignment([str(files / "family.aln")], shuffle=False, seed=0)
    tokens = jnp.asarray(found.train)
    chosen = found.hide(jax.random.key(0), tokens, 1.0).chosen
    np.testing.assert_array_equal(chosen, (found.train >= 4) & (found.train < 24))


def test_padding_changes_no_guess(files):
    cfg = config("unused", "proteins", str(files / "proteins.fasta.gz"), context=12)
    found, model = masked_lm.load(cfg)
    tokens = jnp.asarray(found.train[:2])  # of 5 and 6 residues
    params = model.init(jax.random.key(0), tokens, method="logits")
    hidden = found.hide(jax.random.key(1), tokens, 0.5)
    short = sequences.masking.Masked(*(x[:, :8] for x in hidden))
    nats = found.guess(model, params, tokens, hidden)[0]
    np.testing.assert_allclose(
        found.guess(model, params, tokens[:, :8], short)[0], nats[:, :8], rtol=1e-5, atol=1e-6
    )
    assert float(nats.sum()) > 0


def test_who_knows_the_shares_alone_needs_their_entropy():
    train = np.array([[0, 1], [0, 2]], np.int32)
    found = sequences.Rows(train, {}, np.array([0.5, 0.25, 0.25, 0.0]), 3, (3,), None, 0)
    assert sequences.chance(found, train) == pytest.approx(1.5 * np.log(2))
    assert sequences.chance(found, np.array([[3, 1]], np.int32)) == pytest.approx(2 * np.log(2))


def test_the_judge_counts_each_row_as_often_whatever_the_batch(files):
    found, model = masked_lm.load(config("unused", "text", str(files / "poem.txt")))
    tokens = found.valid["validation"]
    params = model.init(jax.random.key(0), jnp.asarray(tokens[:1]), method="logits")
    one = sequences.make_judge(model, found, 0.15, mesh.make("data=1"))
    four = sequences.make_judge(model, found, 0.15, mesh.make("data=4"))
    assert four(params, tokens) == pytest.approx(one(params, tokens), rel=1e-5)


def test_pairs_that_attend_to_each_other_score_highest():
    """One head looks from column 1 to column 8; that all look at column 3 says nothing."""
    config = dataclasses.replace(
        ESMConfig.esm2(16, 1, 2), positions="learned", max_length=12, pad_token=None
    )
    model, tokens = ESM(config), np.full((4, 12), 5, np.int32)
    weights = np.ones(12, np.float32)
    weights[4] = 20
    maps = np.tile(np.outer(weights, weights) / 1000, (1, 1, 2, 1, 1)).astype(np.float32)
    maps[0, 0, 0, 2, 9] += 0.1
    drawn = np.tile(maps, (4, 1, 1, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "attention_maps", lambda *_: jnp.asarray(drawn))
        scores = columns.touching(model, {}, tokens)
    assert np.unravel_index(np.triu(scores, 1).argmax(), scores.shape) == (1, 8)


def test_precision_counts_known_pairs_six_columns_apart():
    distances, scores = np.full((8, 8), 20.0, np.float32), np.zeros((8, 8), np.float32)
    assert columns.precision(scores, distances) == 0
    distances[0, 7] = distances[0, 1] = 5  # the second is too near to count
    scores[0, 1] = 3
    assert columns.precision(scores, distances) == pytest.approx(1 / 3)  # of 06, 07, 17
    distances[0, 6] = np.nan
    assert columns.precision(scores, distances) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("kind", "names", "changes", "told"),
    [
        ("proteins", (), {}, "need files: --data FILE"),
        ("proteins", ("nothing.fasta",), {}, "nothing.fasta: .*No such file"),
        ("proteins", ("poem.txt",), {}, "expected FASTA"),
        ("proteins", ("few.fasta",), {}, "expected proteins, ten at least"),
        ("alignment", ("poem.txt",), {}, "20 sequences or more, of one length"),
        ("alignment", ("family.aln",), {"truth": "family.aln"}, "family.aln: "),
        ("alignment", ("family.aln",), {"truth": "none.npz"}, "none.npz: .*No such file"),
        ("alignment", ("family.aln",), {"truth": "plain.npy"}, "plain.npy: "),
    ],
)
def test_bad_data_are_named(files, tmp_path, kind, names, changes, told):
    changes = {name: str(files / value) for name, value in changes.items()}
    cfg = config(tmp_path / "run", kind, *(str(files / name) for name in names), **changes)
    with pytest.raises(sequences.SequencesError, match=told):
        masked_lm.main(cfg)
    assert not (tmp_path / "run").exists()


def test_distances_of_another_family_are_refused(files, tmp_path):
    np.savez(tmp_path / "truth.npz", cb_distance=np.zeros((5, 5)))
    with pytest.raises(sequences.SequencesError, match=r"\(5, 5\) for 12 columns"):
        columns.load_distances(str(tmp_path / "truth.npz"), 12)


@pytest.mark.parametrize("name", ["context", "steps", "batch", "save_every"])
def test_sizes_below_the_least_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        masked_lm.Config(**{name: 0})


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="rate must lie"):
        masked_lm.Config(rate=rate)


def test_the_command_line_knows_the_kinds():
    kinds = tyro.extras.subcommand_type_from_defaults(masked_lm.KINDS)
    cfg = tyro.cli(kinds, args=["alignment", "--data", "a", "--model.width", "64"])
    assert (cfg.kind, cfg.data, cfg.model.width) == ("alignment", ("a",), 64)
    assert isinstance(cfg.model, ESMConfig)
    plain = tyro.cli(kinds, args=[], default=masked_lm.KINDS["text"])
    assert plain == masked_lm.Config()
    assert not isinstance(plain.model, ESMConfig)
