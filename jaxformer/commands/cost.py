"""The command `jaxformer cost`."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from jaxformer.analysis import cost as costs
from jaxformer.analysis import encoder_decoder_cost, vision_cost
from jaxformer.models import published, published_vision
from jaxformer.models.transformer import TransformerConfig, refuse_beyond
from jaxformer.models.vit import ViTConfig

Dtype = Literal["float32", "bfloat16", "float16"]
Counts = Callable[[TransformerConfig, int, int, str], dict[str, Any]]
Windows = Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS [TOKENS ...]")]
Pixels = Annotated[tuple[int, ...], tyro.conf.arg(metavar="PIXELS [PIXELS ...]")]
_CONTEXT = 1024
_OPERATIONS = {
    "forward": "forward",
    "forward_causal": "its causal part",
    "backward": "backward",
    "begin": "a source read",
    "decode": "a token more",
}
_BYTES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "moments": "AdamW's two moments",
    "activations": "activations that training keeps",
    "cache": "cache of keys and values",
}
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a decoder is like.

    Attributes:
        width: Channels of the stream, D.
        layers: Blocks.
        heads: Of queries, N.
        kv_heads: Of keys and values; by default as many as of queries.
        head_dim: Channels of a head; by default the width divided by the heads.
        hidden: Channels of the MLP; by default four times the width.
        vocab_size: Tokens, V.
        gated: Whether one half of the MLP's first map gates the other.
        untied: Whether the logits have weights of their own.
        biases: Whether maps but the head have biases.
        qk_norm: Whether queries and keys are normalised.
        norm: Kind of the norms.
        order: Where norms stand.
        learned_positions: Rows of a table of positions; 0 for positions that are not learned.
        windows: Tokens that each may look at, layer by layer and again from the first on; 0 for
            all.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    vocab_size: int = 50257
    gated: bool = False
    untied: bool = False
    biases: bool = False
    qk_norm: bool = False
    norm: Literal["rms", "layer", "layer_without_bias"] = "layer"
    order: Literal["pre", "post", "sandwich", "branch", "parallel"] = "pre"
    learned_positions: int = 0
    windows: Windows = ()


@dataclasses.dataclass(frozen=True)
class Use:
    """What it is asked to do.

    Attributes:
        context: Tokens of a text, T, and of the cache; by default 1024, or as many as the model
            has positions if these are fewer.
        size: Height and width of an image, after the frames of a clip; by default the model's.
        batch: Texts, or images.
        dtype: Of parameters, activations and cache.
        remat: Whether training computes each block again.
        json: Numbers for programs, in place of the tables.
    """

    context: int | None = None
    size: Pixels = ()
    batch: int = 1
    dtype: Dtype = "float32"
    remat: bool = False
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    """Prints what a decoder costs, or a published model if the first argument is a name.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: If the sizes do not go together, or the name is not known.
        SystemExit: If the arguments are none, with code 2, or ask for help.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    return tyro.cli(
        cost_of_published if named else cost_of_sizes,
        prog="jaxformer cost",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def cost_of_sizes(sizes: Sizes, use: Use) -> int:
    """Counts parameters, operations and memory of a decoder, without running it.

    A name in place of sizes means a published model: jaxformer cost llama3_8b. It stands first.

    Operations are those of matrix products, a multiplication and an addition each counting one, on
    all texts: of dense attention, which multiplies every pair of tokens; of its causal part, the
    pairs that see each other; and of one token more with a cache for the whole context.
    """
    width, heads, head_dim, windows = sizes.width, sizes.heads, sizes.head_dim, sizes.windows
    if heads < 1:
        raise ValueError(f"--heads must be at least 1, got {heads}.")
    if head_dim is None:
        if width % heads:
            raise ValueError(f"--width {width} is no multiple of --heads {heads}: say --head-dim.")
        head_dim = width // heads
    layers = range(sizes.layers) if windows else ()
    config = TransformerConfig(
        sizes.vocab_size,
        width,
        sizes.layers,
        heads,
        heads if sizes.kv_heads is None else sizes.kv_heads,
        head_dim,
        4 * width if sizes.hidden is None else sizes.hidden,
        qk_norm=sizes.qk_norm,
        tie_embeddings=not sizes.untied,
        norm=sizes.norm,
        order=sizes.order,
        positions="learned" if sizes.learned_positions else "none",
        max_length=sizes.learned_positions,
        windows=tuple(windows[layer % len(windows)] or None for layer in layers),
        gated=sizes.gated,
        qkv_bias=sizes.biases,
        out_bias=sizes.biases,
        mlp_bias=sizes.biases,
    )
    return show(of_decoder, config, use)


def cost_of_published(model: Annotated[str, tyro.conf.Positional], use: Use) -> int:
    """Counts parameters, operations and memory of a published model, without running it.

    Encoders are counted with logits. Encoder-decoders have sources and targets of the same length.
    Models of images are counted with the head that they have, or none; of those that predict what
    is hidden it is the encoder alone, which sees all.

    Args:
        model: A name in `jaxformer.models.published` or `published_vision`.
    """
    kinds: dict[Counts, dict[str, TransformerConfig]] = {
        of_decoder: published.DECODERS,
        of_encoder: published.ENCODERS,
        of_encoder_decoder: published.ENCODER_DECODERS,
    }
    for counts, models in kinds.items():
        if model in models:
            return show(counts, models[model], use)
    seeing = published_vision.AUTOENCODERS | published_vision.PREDICTIVE
    seeing = published_vision.ENCODERS | {name: x.encoder for name, x in seeing.items()}
    if model in seeing:
        return show_of_images(seeing[model], use)
    names = ", ".join(name for models in (*kinds.values(), seeing) for name in models)
    raise ValueError(f"there is no model {model!r}; there are {names}.")


def show(counts: Counts, config: TransformerConfig, use: Use) -> int:
    """Prints what a config costs, as counted for its kind of model."""
    context, batch = use.context, use.batch
    if use.size:
        raise ValueError("--size is of images, and this is a model of texts: say --context.")
    if context is None:
        context = min(_CONTEXT, config.max_length or _CONTEXT)
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    refuse_beyond(config, context, f"--context {context}")
    found = counts(dataclasses.replace(config, remat=use.remat), context, batch, use.dtype)
    texts = "a text" if batch == 1 else f"{batch:,} texts"
    more = ", and targets as long" if "begin" in found["operations"] else ""
    return tell(found, f"{texts} of {context:,} tokens{more}", use)


def show_of_images(config: ViTConfig, use: Use) -> int:
    """Prints what a config of a ViT costs."""
    size, batch = use.size or config.size, use.batch
    if use.context is not None:
        raise ValueError("--context is of texts, and this is a model of images: say --size.")
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}.")
    tokens = vision_cost.tokens(config, size)
    config = dataclasses.replace(config, remat=use.remat)
    kind = "image" if len(size) == 2 else "clip"
    some = f"{'an' if kind == 'image' else 'a'} {kind}" if batch == 1 else f"{batch:,} {kind}s"
    of = "×".join(map(str, size))
    return tell(of_vit(config, size, batch, use.dtype), f"{some} of {of}, {tokens:,} tokens", use)


def tell(found: dict[str, Any], given: str, use: Use) -> int:
    """Prints figures, which are those of what is `given`."""
    if use.json:
        print(json.dumps(found, indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables(found, given, use.dtype):
        console.print(table)
    if "crossover" in found:
        tokens = f"{found['crossover']:,.0f} tokens"
        print(f"Scores of attention cost as much as its projections at {tokens}.")
    return 0


def of_decoder(config: TransformerConfig, context: int, batch: int, dtype: str) -> dict[str, Any]:
    """All figures of a decoder, by part where they have parts, with their total."""
    found, text = of_encoder(config, context, batch, dtype), (config, context, batch)
    operations, cache = found["operations"], costs.cache_bytes(*text, dtype=dtype)
    return found | {
        "operations": {
            "forward": operations["forward"],
            "forward_causal": named(costs.forward(*text, causal=True)),
            "backward": operations["backward"],
            "decode": named(costs.decode(*text)),
        },
        "bytes": found["bytes"] | {"cache": cache},
    }


def of_encoder(config: TransformerConfig, context: int, batch: int, dtype: str) -> dict[str, Any]:
    """Those of an encoder with logits."""
    text, parameters = (config, context, batch), costs.parameters(config)
    activations = costs.activation_bytes(*text, dtype=dtype).total
    return {
        "parameters": named(parameters),
        "operations": {
            "forward": named(costs.forward(*text)),
            "backward": named(costs.backward(*text)),
        },
        "bytes": costs.adamw_bytes(parameters.total, dtype=dtype) | {"activations": activations},
        "crossover": costs.crossover(config),
    }


def of_encoder_decoder(
    config: TransformerConfig, context: int, batch: int, dtype: str
) -> dict[str, Any]:
    """Those of an encoder-decoder, of which each text has `context` tokens."""
    texts, parameters = (config, context, context, batch), encoder_decoder_cost.parameters(config)
    activations = encoder_decoder_cost.activation_bytes(*texts, dtype=dtype).total
    cache = encoder_decoder_cost.cache_bytes(*texts, dtype=dtype)
    return {
        "parameters": named(parameters),
        "operations": {
            "forward": named(encoder_decoder_cost.forward(*texts)),
            "backward": named(encoder_decoder_cost.backward(*texts)),
            "begin": named(encoder_decoder_cost.begin(config, context, batch)),
            "decode": named(encoder_decoder_cost.step(*texts)),
        },
        "bytes": costs.adamw_bytes(parameters.total, dtype=dtype)
        | {"activations": activations, "cache": cache},
    }


def of_vit(config: ViTConfig, size: tuple[int, ...], batch: int, dtype: str) -> dict[str, Any]:
    """Those of a ViT."""
    parameters = vision_cost.parameters(config)
    activations = vision_cost.activation_bytes(config, batch, size=size, dtype=dtype).total
    return {
        "parameters": named(parameters),
        "operations": {
            "forward": named(vision_cost.forward(config, batch, size=size)),
            "backward": named(vision_cost.backward(config, batch, size=size)),
        },
        "bytes": costs.adamw_bytes(parameters.total, dtype=dtype) | {"activations": activations},
        "crossover": costs.crossover(config.trunk()),
    }


def named(parts: costs.Parts) -> dict[str, int]:
    """Parts by name, and their total."""
    return {**vars(parts), "total": parts.total}


def tables(found: dict[str, Any], given: str, dtype: str) -> list[Table]:
    """Draws parameters and operations by part, and bytes."""
    operations = found["operations"]
    parts = Table(title=f"Operations on {given}")
    parts.add_column("")
    parts.add_column("parameters", justify="right")
    for each in operations:
        parts.add_column(_OPERATIONS[each], justify="right")
    for name in found["parameters"]:
        shown = [f"{found['parameters'][name]:,}"]
        shown += [short(each[name]) for each in operations.values()]
        parts.add_row(name, *shown, end_section=name == "head")
    memory = Table("", "bytes", title=f"Memory, {dtype}")
    memory.columns[1].justify = "right"
    for name, size in found["bytes"].items():
        memory.add_row(_BYTES[name], short(size) + "B")
    return [parts, memory]


def short(number: int) -> str:
    """Writes a number with four digits and a unit of thousands."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:#.4g} {unit}"
    return f"{number} "
