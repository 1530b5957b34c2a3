"""What a tokenizer of images keeps of them: the second half of `experiments/vqvae.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.captions import light
from jaxformer.ops import codebook, patches
from jaxformer.tokenizers.image import ImageTokenizer
from jaxformer.tokenizers.patch_kmeans import PatchKMeans
from jaxformer.training import images, pictures, records, run
from jaxformer.typing import Float

_ROUNDS = 30  # of k-means; twenty more lower its error by 2 %
_LEARNED_FROM = 10_000  # images, by k-means


def figures(
    tokenizer: ImageTokenizer, images: Float[np.ndarray, "n height width C"]
) -> dict[str, float]:
    """Rate, distortion, and how evenly the codes are used on these images."""
    counts = codebook.usage(jnp.asarray(tokenizer.encode(images)), tokenizer.vocab_size)
    perplexity = float(codebook.perplexity(counts))
    return {
        "bits_per_image": tokenizer.bits_per_image,
        "distortion": tokenizer.distortion(images),
        "codes_in_use": int((counts > 0).sum()),
        "perplexity": perplexity,
        "perplexity_share": perplexity / tokenizer.vocab_size,
    }


def write(
    record: run.Run,
    settings: dict[str, Any],
    tokenizer: ImageTokenizer,
    seen: images.Images,
    patch: tuple[int, int],
    seed: int,
) -> None:
    """Trains k-means at the same rate, and writes report and pictures into a run's folder.

    `images.png` has originals, what the tokenizer makes of them, and what k-means does; `codes.png`
    what each code in use stands for on average, the most used first; `loss.png` the error.
    """
    test, codes = light(seen.test_images), tokenizer.vocab_size
    known, key = light(seen.train_images[:_LEARNED_FROM]), jax.random.key(seed)
    means = PatchKMeans.train(known, patch, codes, key, rounds=_ROUNDS)
    found, other = figures(tokenizer, test), figures(means, test)
    report = settings | {"test_images": len(test), "codes": codes} | found
    report |= {f"kmeans_{name}": value for name, value in other.items()}
    report["distortion_over_kmeans"] = found["distortion"] / other["distortion"]
    record.report(report)

    by_label = np.argsort(seen.test_labels, kind="stable")
    chosen = by_label[:: max(1, len(by_label) // 10)][:10]
    rows = [test[chosen], *(t.decode(t.encode(test[chosen])) for t in (tokenizer, means))]
    names, folder = ["image", "from its codes", "k-means, the same bits"], record.folder
    pictures.image_grid(np.stack(rows), folder / "images.png", names)
    title = "what the codes stand for, the most used first"
    pictures.image_grid(codes_drawn(tokenizer, test, patch), folder / "codes.png", title=title)
    log = records.read_metrics(folder / "metrics.jsonl")
    curve = {"train": "distortion", "evaluations": ["test_distortion"]}
    pictures.loss_curve(log, folder / "loss.png", **curve, unit="square error of a pixel")
    print(records.table(report))
    print(f"tokenizer, pictures and report: {folder}")


def codes_drawn(
    tokenizer: ImageTokenizer, images: Float[np.ndarray, "n height width C"], patch: tuple[int, int]
) -> Float[np.ndarray, "rows 16 height width C"]:
    """The mean of what each code is decoded to where these images use it, the most used first."""
    ids = tokenizer.encode(images)
    cut = patches.patchify(jnp.asarray(tokenizer.decode(ids)), patch)
    cut = np.asarray(cut).reshape(ids.size, -1)
    counts = np.bincount(ids.ravel(), minlength=tokenizer.vocab_size)
    sums = np.zeros((tokenizer.vocab_size, cut.shape[1]))
    np.add.at(sums, ids.ravel(), cut)
    used = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    drawn = sums[used] / counts[used, None]
    drawn = np.pad(drawn, [(0, -len(drawn) % 16), (0, 0)], constant_values=1)  # white, as paper
    return drawn.reshape(-1, 16, *patch, images.shape[-1])
