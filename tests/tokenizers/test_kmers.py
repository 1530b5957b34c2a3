import gzip
import itertools
import random
import re

import numpy as np
import pytest

from jaxformer.tokenizers import alphabets, kmers

DNA = alphabets.dna(special_tokens=["<pad>", "<mask>"])


def make(k, overlap=False):
    return kmers.kmers(DNA, k, letters="ACGT", overlap=overlap)


def side_by_side(text, k):
    """The tokens' letters, stretch by stretch."""
    tokens = []
    for stretch in re.findall("[ACGT]+|[^ACGT]", text):
        whole = len(stretch) // k * k
        tokens += [stretch[i : i + k] for i in range(0, whole, k)] + list(stretch[whole:])
    return tokens


def overlapping(text, k):
    """The tokens' letters, letter by letter."""
    words = [text[max(i - k + 1, 0) : i + 1] for i in range(len(text))]
    return [word if len(word) == k and set(word) <= set("ACGT") else word[-1] for word in words]


def names(tokenizer):
    words = ["".join(word) for word in itertools.product("ACGT", repeat=tokenizer.k)]
    ids = {letter: token for token, letter in enumerate(DNA.tokens) if letter}
    return ids | {word: DNA.vocab_size + i for i, word in enumerate(words)}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("k", [2, 3, 5, 6])
def test_ids_are_those_found_letter_by_letter(k, overlap):
    tokenizer = make(k, overlap)
    ids = names(tokenizer)
    assert tokenizer.vocab_size == DNA.vocab_size + 4**k
    draw = random.Random(k)
    for length in range(60):
        for letters in ("ACGT", "ACGTN", "ACGTACGTACGTACGTACGTR-"):
            text = "".join(draw.choices(letters, k=length))
            expected = (overlapping if overlap else side_by_side)(text, k)
            assert tokenizer.encode(text) == [ids[token] for token in expected]
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_rest_of_a_stretch_is_single_letters():
    tokenizer = make(3)
    ids = names(tokenizer)
    expected = [ids[token] for token in ("ACG", "T", "A", "N", "C", "C", "-", "GGG")]
    assert tokenizer.encode("ACGTANCC-GGG") == expected


def test_overlapping_tokens_are_at_the_places_of_their_letters():
    tokenizer = make(3, overlap=True)
    ids = names(tokenizer)
    expected = [ids[token] for token in ("A", "C", "ACG", "CGT", "N", "A", "C", "ACG")]
    assert tokenizer.encode("ACGTNACG") == expected
    genome = "".join(random.Random(0).choices("ACGTN-", k=1000))
    assert len(tokenizer.encode(genome)) == len(genome)


def test_special_tokens_part_the_stretches_and_come_back():
    for overlap in (False, True):
        tokenizer = make(3, overlap)
        ids = tokenizer.encode("ACGTA<mask>CG", allow_special=["<mask>"])
        left, right = tokenizer.encode("ACGTA"), tokenizer.encode("CG")
        assert ids == [*left, DNA.special_tokens["<mask>"], *right]
        assert tokenizer.decode(ids) == "ACGTA<mask>CG"


def test_decoding_a_batch_of_ids_is_decoding_each():
    for overlap in (False, True):
        tokenizer = make(4, overlap)
        ids = np.random.default_rng(0).integers(2, tokenizer.vocab_size, 500)
        each = b"".join(tokenizer.token_bytes(token) for token in ids)
        assert tokenizer.decode_bytes(ids) == each


def test_protein_and_rna_have_words_too():
    rna = kmers.kmers(alphabets.rna(), 3, letters="ACGU")
    assert rna.decode(rna.encode("AUGGCCUAA")) == "AUGGCCUAA"
    assert len(rna.encode("AUGGCCUAA")) == 3
    protein = kmers.kmers(alphabets.protein(), 2, letters="ACDEFGHIKLMNPQRSTVWY")
    assert protein.vocab_size == 33 + 400
    assert protein.decode(protein.encode("MKXVLA")) == "MKXVLA"


def test_masked_letters_are_single_where_the_alphabet_keeps_them():
    tokenizer = kmers.kmers(alphabets.dna(lower="keep"), 3, letters="ACGT")
    assert tokenizer.decode(tokenizer.encode("ACGacgACG")) == "ACGacgACG"
    assert len(tokenizer.encode("ACGacgACG")) == 5


def test_a_real_chromosome_comes_back(real_data):
    with gzip.open(real_data / "dna/yeast_chrI.fa.gz", "rt") as file:
        sequence = "".join(line.strip() for line in file if not line.startswith(">")).upper()
    for overlap in (False, True):
        tokenizer = make(6, overlap)
        assert tokenizer.decode_bytes(tokenizer.encode_array(sequence)) == sequence.encode()


def test_letters_off_the_alphabet_are_named_with_their_place():
    with pytest.raises(ValueError, match=r"'U' .* at character 4"):
        make(3).encode("ACGTU")


def test_words_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="k=1"):
        make(1)
    with pytest.raises(ValueError, match="k=16 needs 4294967315 ids"):
        make(16)
    with pytest.raises(ValueError, match="'U' of words is not in the alphabet"):
        kmers.kmers(DNA, 3, letters="ACGU")
    with pytest.raises(ValueError, match="'ACGA'"):
        kmers.kmers(DNA, 3, letters="ACGA")
    with pytest.raises(ValueError, match="id 30 of the special token '<x>' is a word's"):
        kmers.Kmers(alphabet=DNA, k=3, letters="ACGT", special_tokens={"<x>": 30})
