"""Drawn cases: the blocked loops agree with dense attention on whatever comes."""

import functools

import numpy as np
import pytest

from jaxformer import testing
from jaxformer.ops.attention import _xla_tiles, flash

MADE = 96
ALL = 2000


def check(seed, monkeypatch):
    random = np.random.default_rng(seed)
    monkeypatch.setattr(_xla_tiles, "BLOCK", int(random.choice([8, 32, 512])))
    monkeypatch.setattr(_xla_tiles, "TILE", int(random.choice([0, 256, 1 << 19])))
    attend = functools.partial(flash.attend, implementation="xla")
    case = testing.draw_attention_case(seed)
    testing.assert_attention(case, attend, forward_mode=seed % 4 == 0)


@pytest.mark.parametrize("seed", range(MADE))
def test_a_drawn_case_agrees_with_dense_attention(seed, monkeypatch):
    check(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(MADE, ALL))
def test_one_of_many_drawn_cases_agrees_with_dense_attention(seed, monkeypatch):
    check(seed, monkeypatch)


@pytest.mark.parametrize("case", testing.attention_length_cases(), ids=lambda case: case.name)
def test_lengths_around_the_blocks_agree_with_dense_attention(case):
    testing.assert_attention(case, flash.attend, forward_mode=False)


def test_the_drawn_cases_are_of_all_kinds():
    cases = [testing.draw_attention_case(seed) for seed in range(MADE)]
    names = " ".join(case.name for case in cases)
    for word in ("causal", "window", "past", "ahead", "lengths", "segments", "strided", "|", "&"):
        assert word in names
    for option in ("bias", "scale", "softcap", "sinks", "dtype", "batch", "num_kv_heads"):
        assert len({str(getattr(case, option)) for case in cases}) > 1
    assert any(case.num_heads > case.num_kv_heads for case in cases)
