"""Prints what the implementations of `flash.attend` refuse, as the table of docs/attention.md.

    python scripts/make_attention_table.py      on jax 0.11 or newer, for the column of Mosaic GPU

Each implementation is asked, without a device, about one call for each row.
"""

import importlib

import jax
import jax.numpy as jnp

MODULES = {"tpu": "_flash_tpu", "gpu": "_flash_gpu", "triton": "_flash_triton", "xla": "_flash_xla"}
CALLS = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16},
    "float64": {"dtype": jnp.float64},
    "bfloat16 q, float16 k and v": {"dtype": jnp.bfloat16, "other": jnp.float16},
    "bfloat16, head size 7": {"dtype": jnp.bfloat16, "head_dim": 7},
    "bfloat16, head size 256": {"dtype": jnp.bfloat16, "head_dim": 256},
    "bfloat16, head size 257": {"dtype": jnp.bfloat16, "head_dim": 257},
}


def answer(name: str, call: dict) -> str | None:
    """Why an implementation refuses a call, or None."""
    module = importlib.import_module(f"jaxformer.ops.attention.{MODULES[name]}")
    dtype, head_dim = call.get("dtype", jnp.float32), call.get("head_dim", 64)
    with jax.enable_x64():
        q = jax.ShapeDtypeStruct((2, 128, 4, head_dim), dtype)
        k = jax.ShapeDtypeStruct((2, 128, 2, head_dim), call.get("other", dtype))
        return module.refuses(q, k, k, None, bias=None, scale=None, softcap=None, sinks=None)


def rows(names: tuple[str, ...] = tuple(MODULES)) -> list[str]:
    """The table in Markdown, one column for each name."""
    lines = ["| call | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, call in CALLS.items():
        cells = ["yes" if (why := answer(name, call)) is None else why for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
