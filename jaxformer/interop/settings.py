"""What `config.json` says, read so that nothing in it is passed over."""

import json
import pathlib
from typing import Any

from jaxformer.ops.rope import GridRope, Rope, yarn_gain

_REQUIRED = object()
# What says nothing of the numbers that a model computes for given weights and tokens.
_INERT = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "auto_map",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_bias",
    "classifier_dropout",
    "classifier_dropout_prob",
    "cls_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "ep_size",
    "experts_implementation",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_composition",
    "keys_to_ignore_at_inference",
    "label2id",
    "mask_token_id",
    "max_new_tokens",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "resid_pdrop",
    "return_dict",
    "sep_token_id",
    "slow_but_exact",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "suppress_tokens",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unk_token_id",
    "use_bfloat16",
    "use_cache",
}


class Settings:
    """The settings of a model, each of which must be taken before `finish`.

    Attributes:
        where: The file they are from, for errors.
    """

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self.where = where
        self._left = dict(values)

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Settings":
        """Reads `config.json` in a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is no JSON object.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a checkpoint's folder has one.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no JSON object.")
        return cls(values, str(path))

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Takes a setting; what is absent or null has the default, if there is one.

        Raises:
            ValueError: If it is absent and has none.
        """
        value = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}: {name} is missing.")
            return default
        return value

    def look(self, name: str, default: Any) -> Any:
        """What `take` gives, without taking it."""
        value = self._left.get(name)
        return default if value is None else value

    def absent(self, name: str) -> bool:
        """Whether a setting is not there at all; some mean another thing by null."""
        return name not in self._left

    def only(self, name: str, *allowed: Any) -> Any:
        """Takes a setting of which only some values are supported; the first is the default.

        Raises:
            ValueError: If it has another.
        """
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{self.where}: {name}={value!r} is not supported; {allowed} are.")
        return value

    def choice(self, name: str, meaning: dict[str, str], default: str) -> str:
        """Takes a setting by name and says what we call it.

        Raises:
            ValueError: If there is no such.
        """
        value = self.take(name, default)
        if value not in meaning:
            raise ValueError(f"{self.where}: {name}={value!r} is not supported; {[*meaning]} are.")
        return meaning[value]

    def rope(self, default_theta: float = 10_000.0) -> dict[str, Rope]:
        """Takes the rotary positions, in the form of transformers 5 or of 4.

        Returns:
            By kind of layer; under "" where there is but one.

        Raises:
            ValueError: If they are of a kind that is not supported, or the two forms disagree.
        """
        fraction = self.take("partial_rotary_factor", None)
        fraction = self.take("rotary_pct", 1.0 if fraction is None else fraction)
        theta = self.take("rope_theta", None)
        theta = self.take("rotary_emb_base", default_theta if theta is None else theta)
        length = self.take("original_max_position_embeddings", self.max_length)
        old = {"rope_theta": theta, **(self.take("rope_scaling", None) or {})}
        new = self.take("rope_parameters", None)
        by_kind = new or old
        if not any(isinstance(x, dict) for x in by_kind.values()):
            by_kind = {"": by_kind}
        return {
            kind: self._one_rope({"rope_theta": theta, **(given or {})}, fraction, length)
            for kind, given in by_kind.items()
            if isinstance(given, dict) or given is None
        }

    @property
    def max_length(self) -> int:
        """Tokens that a text may have, without taking the setting."""
        return int(self._left.get("max_position_embeddings") or 0)

    def _one_rope(self, given: dict[str, Any], fraction: float, length: int) -> Rope:
        inner = Settings(given, f"{self.where}: rope_parameters")
        kinds = {"default": "plain"} | {x: x for x in ("linear", "dynamic", "yarn", "llama3")}
        old_name = inner.take("type", "default")
        kind = inner.choice("rope_type", kinds, old_name)
        options: dict[str, Any] = {
            "theta": float(inner.take("rope_theta")),
            "fraction": float(inner.take("partial_rotary_factor", fraction)),
        }
        factor = inner.take("factor", None)
        trained = inner.take("original_max_position_embeddings", length)
        if kind != "plain":
            options |= {"kind": kind, "length": int(trained)}
            options["factor"] = float(factor or self.max_length / trained)
        if kind == "linear":
            options["length"] = 0
        if kind == "dynamic":
            options["length"] = self.max_length
        if kind == "yarn":
            options["fast"] = float(inner.take("beta_fast", 32.0))
            options["slow"] = float(inner.take("beta_slow", 1.0))
            options["gain"] = _yarn_gain(inner, options["factor"])
            options["truncate"] = bool(inner.take("truncate", True))
        if kind == "llama3":
            options["fast"] = float(inner.take("high_freq_factor"))
            options["slow"] = float(inner.take("low_freq_factor"))
        inner.finish()
        return Rope(**options)

    def finish(self) -> None:
        """Refuses what nobody took.

        Raises:
            ValueError: Naming it.
        """
        left = {name: x for name, x in self._left.items() if name not in _INERT}
        if left:
            unknown = ", ".join(f"{name}={value!r}" for name, value in sorted(left.items()))
            raise ValueError(f"{self.where}: not supported: {unknown}.")


def _yarn_gain(inner: Settings, factor: float) -> float | None:
    given = inner.take("attention_factor", None)
    one, other = inner.take("mscale", None), inner.take("mscale_all_dim", None)
    if given is not None:
        return float(given)
    if one and other:
        return yarn_gain(factor, one) / yarn_gain(factor, other)
    return None


def write_rope(rope: Rope | GridRope, max_length: int) -> dict[str, Any]:
    """The rotary positions as transformers 5 writes them.

    Raises:
        ValueError: If they are of a grid.
    """
    if isinstance(rope, GridRope):
        raise ValueError(f"positions of texts have no coordinates: {rope}.")
    names = {"plain": "default"}
    given: dict[str, Any] = {
        "rope_type": names.get(rope.kind, rope.kind),
        "rope_theta": rope.theta,
    }
    if rope.fraction != 1.0:
        given["partial_rotary_factor"] = rope.fraction
    if rope.kind != "plain":
        given["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        given["original_max_position_embeddings"] = rope.length
    if rope.kind == "yarn":
        given |= {"beta_fast": rope.fast, "beta_slow": rope.slow, "truncate": rope.truncate}
        if rope.gain is not None:
            given["attention_factor"] = rope.gain
    if rope.kind == "llama3":
        given |= {"high_freq_factor": rope.fast, "low_freq_factor": rope.slow}
    return given
