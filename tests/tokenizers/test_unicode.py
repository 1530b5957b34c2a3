import numpy as np
import pytest

from jaxformer.tokenizers import unicode


def test_every_code_point_has_one_category():
    table = unicode.categories()
    assert table.shape == (0x110000,)
    assert [unicode.CATEGORIES[table[ord(c)]] for c in "aA1 ǅ日\u0301\n"] == [
        *("Ll", "Lu", "Nd", "Zs", "Lt", "Lo", "Mn", "Cc")
    ]
    assert unicode.CATEGORIES[table[0xD800]] == "Cs"
    # Unicode 16 gave these a category: Garay capital letter A, and a digit of Myanmar Extended-C.
    assert unicode.CATEGORIES[table[0x10D50]] == "Lu"
    assert unicode.CATEGORIES[table[0x116D0]] == "Nd"


def test_white_space_is_the_property_and_not_what_python_calls_space():
    space = unicode.is_space()
    assert np.flatnonzero(space[:256]).tolist() == [9, 10, 11, 12, 13, 32, 0x85, 0xA0]
    assert "\x1c".isspace()
    assert not space[0x1C]
    assert space.sum() == 25


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match="'Lx'"):
        unicode.members("Lx")


@pytest.mark.parametrize("name", ["L", "N", "M", "Lu", "Lt", "Lm", "s"])
def test_classes_are_those_of_the_rust_tools_on_every_scalar(name):
    tokenizers = pytest.importorskip("tokenizers")
    table = unicode.is_space() if name == "s" else unicode.members(name)
    expression = r"\s+" if name == "s" else rf"\p{{{name}}}+"
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "removed")
    scalars = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    inside = table.copy()
    for word, _ in split.pre_tokenize_str("".join(map(chr, scalars))):
        codes = np.frombuffer(word.encode("utf-32-le"), "<u4")
        assert not table[codes].any()
        inside[codes] = True
    inside[0xD800:0xE000] = True
    assert inside.all()
