"""Tokenizers on one thread against `tokenizers` (Hugging Face), tiktoken, rustbpe and gigatoken.

    pip install tokenizers tiktoken rustbpe gigatoken
    python -m benchmarks.tokenizers --english en.nul.xz --mixed mixed.nul.xz

About eight minutes with 10 MB of English and 56 MB of mixed languages. The ids are compared before
anything is timed; CPU time of this process, the tools in turn, medians. A ratio says how many times
faster we are. A peer that is not installed is left out.
"""

import contextlib
import dataclasses
import gzip
import importlib
import json
import lzma
import os
import pathlib
import pickle
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

os.environ |= {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TIKTOKEN_CACHE_DIR": "",
}

import numpy as np
import tyro

from jaxformer.tokenizers import bpe, patterns, wordpiece_training
from jaxformer.tokenizers.bpe import Bpe
from jaxformer.tokenizers.byte_alphabet import write as printable
from jaxformer.tokenizers.formats import save
from jaxformer.tokenizers.tokenizer import Tokenizer

Work = Callable[[], Callable[[], Any]]  # makes ready, and returns what is timed

ENCODING = ("encode warm", "encode unseen text", "encode from cold, load included")
TIKTOKEN = {  # as tiktoken itself spells the patterns
    patterns.GPT2: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s",
    patterns.CL100K_TIKTOKEN: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    patterns.O200K: patterns.O200K.regex,
}
HELD_OUT = 7  # every such document is encoded, and not trained on


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure on.

    Attributes:
        english: Text with NUL between documents, plain, .gz or .xz.
        mixed: The same in many languages.
        rounds: How often each is timed.
        only: Rows whose name contains this.
        train_mixed: Trains one tool on `mixed` and prints seconds and megabytes; for itself.
    """

    english: pathlib.Path
    mixed: pathlib.Path
    rounds: int = 5
    only: str = ""
    train_mixed: str = ""


def documents(path: pathlib.Path) -> list[str]:
    """Reads documents with NUL between them."""
    read = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with read(path, "rb") as file:
        return file.read().decode().split("\0")


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def installed(*names: str) -> dict[str, Any]:
    found = {}
    for name in names:
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name)
    return found


def seconds(work: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, the tools in turn."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, prepare in work.items():
            run = prepare()
            began = time.process_time()
            run()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(some) for name, some in taken.items()}


@dataclasses.dataclass
class Table:
    """Times rows and prints them as they come."""

    rounds: int
    only: str
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def row(self, name: str, work: Mapping[str, Work], size: float = 0.0) -> None:
        """Times one row; with a size in MB it gives MB/s, else milliseconds."""
        if self.only not in name:
            return
        self.add(name, seconds(work, self.rounds), size)

    def add(self, name: str, taken: Mapping[str, float], size: float = 0.0) -> None:
        ours = taken["ours"]
        if size:
            cells = [f"{peer} {size / value:.1f} MB/s" for peer, value in taken.items()]
        else:
            cells = [f"{peer} {value * 1e3:.4g} ms" for peer, value in taken.items()]
        ratios = [f"{value / ours:.2f}x {peer}" for peer, value in taken.items() if peer != "ours"]
        print(f"| {name} | {', '.join(cells)} | {', '.join(ratios)} |", flush=True)
        self.results.append({"row": name, "seconds": dict(taken), "megabytes": size})


# The peers, given our tokenizer.


def in_tiktoken(tokenizer: Bpe, folder: pathlib.Path) -> Callable[[], Any]:
    """Loads the same vocabulary into tiktoken, from a file."""
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe

    path, regex = folder / "ranks.tiktoken", TIKTOKEN[tokenizer.pattern]
    save(tokenizer, path)
    return lambda: Encoding(
        "ours", pat_str=regex, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
    )


def trainers(pattern: patterns.Pattern) -> dict[str, Callable[[list[str], int], Any]]:
    """Trains with one tool: texts, vocabulary size."""
    tools = installed("tokenizers", "rustbpe")
    train: dict[str, Callable[[list[str], int], Any]] = {
        "ours": lambda texts, size: bpe.train(texts, vocab_size=size, pattern=pattern)
    }
    if hf := tools.get("tokenizers"):

        def train_hf(texts: list[str], size: int) -> Any:
            pre = hf.pre_tokenizers
            tokenizer = hf.Tokenizer(hf.models.BPE())
            split = pre.Split(hf.Regex(pattern.regex), "isolated")
            plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre.Sequence([split, plain])
            if pattern == patterns.GPT2:
                tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
            trainer = hf.trainers.BpeTrainer(
                vocab_size=size, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
            )
            tokenizer.train_from_iterator(texts, trainer)
            return tokenizer

        train["tokenizers"] = train_hf
    if rustbpe := tools.get("rustbpe"):

        def train_rust(texts: list[str], size: int) -> Any:
            tokenizer = rustbpe.Tokenizer()
            tokenizer.train_from_iterator(iter(texts), size, pattern=pattern.regex)
            return tokenizer

        train["rustbpe"] = train_rust
    return train


def timed_training(table: Table, texts: list[str], sizes: tuple[int, ...]) -> None:
    tools = trainers(patterns.GPT2)
    for size in sizes if table.only in "train 10 MB" else ():
        ours = tools["ours"](texts, size)
        if "tokenizers" in tools:
            model = json.loads(tools["tokenizers"](texts, size).to_str())["model"]
            vocab = {text: i for i, text in enumerate(printable(ours.tokens))}
            assert model["vocab"] == vocab, "the vocabularies differ"
            merges = [[vocab[a], vocab[b]] for a, b in model["merges"]]
            assert merges == ours.merges.tolist(), "the merges differ"
        work = {
            name: (lambda t=train, s=size: lambda: t(texts, s)) for name, train in tools.items()
        }
        table.row(f"train {megabytes(texts):.0f} MB, {size}, gpt2", work)


def train_mixed(cfg: Config) -> None:
    """Trains one tool in a process of its own, so that its peak memory can be seen."""
    texts = documents(cfg.mixed)
    train = trainers(patterns.CL100K)[cfg.train_mixed]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    train(texts, 1 << 15)
    took = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": took, "extra_mb": peak / 1024}))


def timed_training_of_mixed(table: Table, cfg: Config) -> None:
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(3):
        for name in trainers(patterns.CL100K):
            flags = ["--english", cfg.english, "--mixed", cfg.mixed, "--train-mixed", name]
            command = [sys.executable, "-m", "benchmarks.tokenizers", *map(str, flags)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.setdefault(name, []).append(json.loads(output))
    middle = {
        key: {name: statistics.median(run[key] for run in some) for name, some in runs.items()}
        for key in ("seconds", "extra_mb")
    }
    table.add("train 56 MB of many languages, 32768, cl100k", middle["seconds"])
    memory = ", ".join(f"{name} {value:.0f} MB" for name, value in middle["extra_mb"].items())
    print(f"| its peak memory | {memory} | |", flush=True)
    table.results.append({"row": "peak memory of that", "extra_mb": middle["extra_mb"]})


def timed_encoding(table: Table, name: str, ours: Bpe, texts: list[str], others: list[str]) -> None:
    """Lists of ids for lists of documents; `others` are what fills caches before."""
    if not any(table.only in f"{row}, {name}" for row in ENCODING):
        return
    size, tools = megabytes(texts), installed("tiktoken", "tokenizers", "gigatoken")
    expected = ours.encode_batch(texts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        ours.save(folder / "tokenizer.json")
        warm: dict[str, Work] = {"ours": lambda: lambda: ours.encode_batch(texts)}
        cold: dict[str, Work] = {
            "ours": lambda: lambda: Bpe.load(folder / "tokenizer.json").encode_batch(texts)
        }
        if "tiktoken" in tools:
            load = in_tiktoken(ours, folder)
            tiktoken = load()
            assert list(map(tiktoken.encode_ordinary, texts)) == expected
            warm["tiktoken"] = lambda: lambda: list(map(tiktoken.encode_ordinary, texts))
            cold["tiktoken"] = lambda: lambda: list(map(load().encode_ordinary, texts))
        unseen = {"ours": lambda: filled(ours, others, texts)}
        unseen |= {peer: warm[peer] for peer in ("tiktoken",) if peer in warm}
        if hf := tools.get("tokenizers"):
            loaded = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
            assert [e.ids for e in loaded.encode_batch_fast(texts)] == expected
            warm["tokenizers"] = lambda: lambda: loaded.encode_batch_fast(texts)
        if giga := tools.get("gigatoken"):
            with contextlib.suppress(RuntimeError):  # it knows some patterns only
                fast = giga.Tokenizer(str(folder / "tokenizer.json"))
                assert fast.encode_batch_list(texts, parallel=False) == expected
                warm["gigatoken"] = lambda: lambda: fast.encode_batch_list(texts, parallel=False)
        for row, work in zip(ENCODING, (warm, unseen, cold)):
            table.row(f"{row}, {name}", work, size)


def filled(ours: Tokenizer, others: list[str], texts: list[str]) -> Callable[[], Any]:
    fresh = pickle.loads(pickle.dumps(ours))
    fresh.encode_batch(others)
    return lambda: fresh.encode_batch(texts)


def timed_calls_and_decoding(table: Table, ours: Bpe, texts: list[str]) -> None:
    tools = installed("tiktoken", "tokenizers")
    calls = [text[i : i + 60] for text in texts[:20] for i in range(0, 6000, 60)]
    ids = [token for text in texts for token in ours.encode(text)]
    size = megabytes(texts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        ours.save(folder / "tokenizer.json")
        short: dict[str, Work] = {"ours": lambda: lambda: [ours.encode(call) for call in calls]}
        decode: dict[str, Work] = {"ours": lambda: lambda: ours.decode(ids)}
        if "tiktoken" in tools:
            tiktoken = in_tiktoken(ours, folder)()
            assert [tiktoken.encode(call) for call in calls] == [ours.encode(c) for c in calls]
            assert tiktoken.decode(ids) == ours.decode(ids) == "".join(texts)
            short["tiktoken"] = lambda: lambda: [tiktoken.encode(call) for call in calls]
            decode["tiktoken"] = lambda: lambda: tiktoken.decode(ids)
        if hf := tools.get("tokenizers"):
            loaded = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
            assert loaded.decode(ids) == ours.decode(ids)
            decode["tokenizers"] = lambda: lambda: loaded.decode(ids)
        table.row(f"{len(calls)} calls of 60 characters", short)
        table.row("decode a list", decode, size)
        array = np.array(ids)
        decode["ours"] = lambda: lambda: ours.decode(array)
        table.row("decode an array, the others a list", decode, size)


def timed_wordpiece(table: Table, texts: list[str], train_on: list[str]) -> None:
    ours = wordpiece_training.train(train_on, vocab_size=8000)
    work: dict[str, Work] = {"ours": lambda: lambda: ours.encode_batch(texts)}
    expected = ours.encode_batch(texts)
    if hf := installed("tokenizers").get("tokenizers"):
        loaded = hf.Tokenizer.from_str(json.dumps(ours.to_json()))
        encode = lambda: loaded.encode_batch_fast(texts, add_special_tokens=False)  # noqa: E731
        assert [encoding.ids for encoding in encode()] == expected
        work["tokenizers"] = lambda: encode
    table.row("WordPiece encode warm", work, megabytes(texts))
    unseen = {**work, "ours": lambda: filled(ours, [], texts)}
    table.row("WordPiece encode, caches empty", unseen, megabytes(texts))


def timed_long_word(table: Table, ours: Bpe) -> None:
    letters = "".join(random.Random(0).choices("etaoinshrdlucmfw", k=200_000))
    for name, unit in (("'a' repeated", "a"), ("'日本語' repeated", "日本語"), ("random", letters)):
        took = {}
        for length in (50_000, 200_000):
            word = (unit * (length // len(unit) + 1))[:length]
            taken = seconds({"ours": lambda w=word: filled(ours, [], [w])}, table.rounds)
            took[length] = taken["ours"]
        name = f"one word of 200,000 characters, {name}"
        if table.only in name:
            table.add(name, {"ours": took[200_000]})
            print(f"|   | {took[200_000] / took[50_000]:.1f} times that of 50,000 | |", flush=True)


def main(cfg: Config) -> None:
    if cfg.train_mixed:
        return train_mixed(cfg)
    english, mixed = documents(cfg.english), documents(cfg.mixed)
    table = Table(cfg.rounds, cfg.only)
    print("| what | speed | ratio |\n|---|---|---|")
    timed_training(table, english, (1 << 13, 1 << 15))
    if cfg.only in "train 56 MB":
        timed_training_of_mixed(table, cfg)
    held, rest = english[::HELD_OUT], [t for i, t in enumerate(english) if i % HELD_OUT]
    foreign = mixed[::35]
    ours = {
        "gpt2": bpe.train(rest, vocab_size=1 << 15),
        "cl100k": bpe.train(rest, vocab_size=1 << 15, pattern=patterns.CL100K_TIKTOKEN),
        "o200k": bpe.train(rest, vocab_size=1 << 15, pattern=patterns.O200K),
    }
    for name, tokenizer in ours.items():
        timed_encoding(table, f"English, {name}", tokenizer, held, rest)
    many = bpe.train(mixed[1::3], vocab_size=1 << 15, pattern=patterns.CL100K_TIKTOKEN)
    timed_encoding(table, "many languages, cl100k", many, foreign, mixed[1::35] + mixed[2::35])
    timed_calls_and_decoding(table, ours["gpt2"], held)
    timed_wordpiece(table, held, rest[:200])
    timed_long_word(table, ours["gpt2"])
    packages = installed("numpy", "tokenizers", "tiktoken", "rustbpe", "gigatoken")
    versions = {name: metadata.version(name) for name in packages}
    print(json.dumps({"benchmark": "tokenizers", "rows": table.results, **versions}))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
