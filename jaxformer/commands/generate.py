"""The command `jaxformer generate`."""

import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxformer import interop
from jaxformer.generation import samplers, stream
from jaxformer.models.decoder import Decoder, DecoderCache
from jaxformer.tokenizers import formats
from jaxformer.tokenizers.tokenizer import Tokenizer

Folder = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
# Whose tokenizers put the token of the beginning before a text.
_BEGINS = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "deepseek_v3")
_EVERY = 4  # tokens a dispatch


def run(arguments: Sequence[str]) -> None:
    """Runs the command.

    Raises:
        ValueError: If the checkpoint, the tokenizer or an argument is unusable.
        OSError: If a file cannot be read.
        SystemExit: If the arguments are none, with code 2, or ask for help.
    """
    tyro.cli(
        generate,
        prog="jaxformer generate",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def generate(
    folder: Folder,
    *,
    prompt: Texts,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Texts = (),
    seed: int = 0,
    tokenizer: pathlib.Path | None = None,
    bos: Literal["auto", "yes", "no"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Continues texts with a decoder of a Hugging Face folder, and writes as it thinks.

    Without temperature, top-k, top-p and min-p it takes the likeliest token each time.

    Args:
        folder: With config.json, safetensors and a tokenizer.
        prompt: The text to continue; may be given several times, each is continued by itself.
        max_new_tokens: The most tokens of a continuation.
        temperature: Below 1 likely tokens gain, above 1 they lose.
        top_k: Draws from so many of the likeliest tokens.
        top_p: Draws from the likeliest that together have this probability.
        min_p: Draws from those at least this many times as probable as the likeliest.
        repetition_penalty: Above 1 makes tokens that were there before less likely.
        stop: A text that ends a continuation; may be given several times.
        seed: Of the draws.
        tokenizer: File or folder of the tokenizer, if not in the checkpoint's folder.
        bos: Whether the token of the beginning stands first; as the family does if "auto".
        dtype: Of the parameters; as in the files if not given.
    """
    if not prompt:
        raise ValueError("--prompt is missing.")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be positive, got {max_new_tokens}.")
    chosen = _sample(temperature, top_k, top_p, min_p, repetition_penalty)
    model, params = interop.load(folder, dtype=dtype)
    if not isinstance(model, Decoder):
        raise ValueError(f"{folder} holds no decoder; generate continues texts with one.")
    words = formats.load(folder if tokenizer is None else tokenizer)
    start, ends = _marks(folder, bos)
    if "" in stop:
        raise ValueError("--stop needs a text that is not empty.")
    write = jax.tree_util.Partial(model.apply, params)
    for number, text in enumerate(prompt):
        ids = [*start, *words.encode(text)]
        _check(ids, max_new_tokens, model, text)
        prompted, cache = _room(ids, max_new_tokens, model, _kind(params))
        chunks = stream.stream(
            write,
            cache,
            prompted,
            steps=max_new_tokens,
            sample=chosen,
            key=jax.random.fold_in(jax.random.key(seed), number)[None],
            prompt_lengths=jnp.asarray([len(ids)]),
            stop=ends or None,
            every=_EVERY,
        )
        sys.stdout.write(text)
        # What a token looks like depends on those before it: the prompt is decoded too.
        given = ids[len(start) :]
        pieces = words.decode_stream(itertools.chain(given, _tokens(chunks, words, ends)))
        for piece in _until(_after(pieces, len(words.decode(given))), stop):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


def _after(pieces: Iterable[str], count: int) -> Iterator[str]:
    """The pieces without the first `count` characters."""
    for piece in pieces:
        yield piece[count:]
        count -= min(count, len(piece))


def _until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first stop; what may be the beginning of one waits."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.find(stop) for stop in stops if stop in held]
        if found:
            yield held[: min(found)]
            return
        lengths = (n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n]))
        ready = len(held) - max(lengths, default=0)
        yield held[:ready]
        held = held[ready:]
    yield held


def _tokens(chunks: Iterator[Any], words: Tokenizer, ends: Sequence[int]) -> Iterator[int]:
    """The new tokens, without those that only say that the text ends."""
    for chunk in chunks:
        for token in chunk.tokens[0, : chunk.counts[0]].tolist():
            if token in ends or token >= words.vocab_size:
                continue
            yield token


def _sample(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float | None,
) -> Any:
    if all(x is None for x in (temperature, top_k, top_p, min_p)):
        return samplers.greedy(repetition_penalty=penalty)
    return samplers.sampler(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )


def _check(ids: list[int], steps: int, model: Decoder, text: str) -> None:
    config = model.config
    if not ids:
        raise ValueError("the prompt is empty, and nothing stands before it; see --bos.")
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer's id {max(ids)} is beyond the model's vocabulary of "
            f"{config.vocab_size}: it is another model's."
        )
    if config.max_length and len(ids) + steps > config.max_length:
        raise ValueError(
            f"the prompt {text[:30]!r} has {len(ids)} tokens; with {steps} new ones that is more "
            f"than the model's {config.max_length}."
        )


def _marks(folder: pathlib.Path, bos: str) -> tuple[list[int], list[int]]:
    """The tokens that stand before a text, and those that end one."""
    said = _said(folder)
    first, ends = said.get("bos_token_id"), said.get("eos_token_id")
    begins = bos == "yes" or (bos == "auto" and said.get("model_type") in _BEGINS)
    if begins and first is None:
        raise ValueError(f"{folder / 'config.json'}: there is no bos_token_id; use --bos no.")
    start = [int(first)] if begins and first is not None else []
    return start, ends if isinstance(ends, list) else [] if ends is None else [ends]


def _said(folder: pathlib.Path) -> dict[str, Any]:
    """What the folder says of how texts begin and end."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    more = folder / "generation_config.json"
    if more.is_file():
        found |= {
            name: value
            for name, value in json.loads(more.read_text(encoding="utf-8")).items()
            if name in ("bos_token_id", "eos_token_id") and value is not None
        }
    return found


def _room(ids: list[int], steps: int, model: Decoder, dtype: Any) -> tuple[Any, DecoderCache]:
    """The prompt in a row of a length of which there are few, so that little is compiled; a cache.

    Neither is longer than the model allows.
    """
    rounded = max(16, 1 << (len(ids) - 1).bit_length())
    bound = model.config.max_length or rounded + steps
    row = np.zeros((1, min(rounded, bound)), np.int32)
    row[0, : len(ids)] = ids
    return jnp.asarray(row), model.empty_cache(1, min(rounded + steps, bound), dtype)


def _kind(params: Any) -> Any:
    return jax.tree.leaves(params)[0].dtype
