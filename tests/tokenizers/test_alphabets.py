import gzip
import random
import time

import numpy as np
import pytest

from jaxformer.tokenizers import alphabets

ESM = (
    "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
)


def test_protein_is_esms_33_tokens_in_esms_order():
    tokenizer = alphabets.protein()
    assert tokenizer.vocab_size == 33
    assert [tokenizer.decode([token]) for token in range(33)] == ESM.split()


def test_protein_has_the_order_of_the_published_vocabulary(real_data):
    tokens = (real_data / "vocab/esm/vocab.txt").read_text().split()
    tokenizer = alphabets.protein()
    assert [tokenizer.decode([token]) for token in range(33)] == tokens


def test_protein_gives_the_ids_of_transformers(real_data):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.EsmTokenizer(str(real_data / "vocab/esm/vocab.txt"))
    ours = alphabets.protein(unknown="<unk>")
    draw = random.Random(0)
    texts = ["".join(draw.choices("LAGVSERTIDPKQNFYMHWCXBUZO.-", k=n)) for n in (1, 7, 60, 300)]
    expected = theirs(texts, padding=True)
    ids, lengths = ours.encode_framed(texts)
    assert ids.tolist() == expected["input_ids"]
    assert lengths.tolist() == [sum(row) for row in expected["attention_mask"]]
    for odd in ("MKJV", "M*V", "MkV"):
        assert ours.encode_framed([odd])[0][0].tolist() == theirs(odd)["input_ids"]
    marked = ours.encode("MK<mask>V", allow_special=["<mask>"])
    assert [0, *marked, 2] == theirs("MK<mask>V")["input_ids"]


def test_real_proteins_come_back(real_data):
    with gzip.open(real_data / "proteins/uniprot_test.fasta.gz", "rt") as file:
        sequences = [line.strip() for line in file if not line.startswith(">")]
    tokenizer = alphabets.protein()
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(sequences)] == sequences


def test_a_framed_sequence_that_is_cut_keeps_its_end():
    tokenizer = alphabets.protein()
    ids, lengths = tokenizer.encode_framed(["MKV", "", "LAGVSERT"], length=6)
    assert ids.tolist() == [
        [0, *tokenizer.encode("MKV"), 2, 1],
        [0, 2, 1, 1, 1, 1],
        [0, *tokenizer.encode("LAGV"), 2],
    ]
    assert lengths.tolist() == [5, 2, 6]
    assert ids.dtype == lengths.dtype == np.int32
    assert tokenizer.encode_framed([])[0].shape == (0, 2)


def test_framing_with_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'<cls>' is no special token; there are: <pad>"):
        alphabets.dna(special_tokens=["<pad>"]).encode_framed(["A"])
    with pytest.raises(ValueError, match="length >= 2, got 1"):
        alphabets.protein().encode_framed(["A"], length=1)


@pytest.mark.parametrize(
    ("tokenizer", "letters"),
    [
        (alphabets.protein(), "LAGVSERTIDPKQNFYMHWCXBUZO.-"),
        (alphabets.dna(), "ACGTRYSWKMBDHVN-."),
        (alphabets.rna(), "ACGURYSWKMBDHVN-."),
        (alphabets.dna(lower="keep"), "ACGTRYSWKMBDHVN-.acgtryswkmbdhvn"),
    ],
)
def test_the_alphabet_comes_back_and_nothing_else_is_taken(tokenizer, letters):
    for text in (letters, letters * 20, letters[::-1] * 7):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for code in [*range(0x250), 0x3000, 0x10FFFF]:
        if chr(code) not in letters:
            for text in ("AC" + chr(code), "AC" * 99 + chr(code)):
                with pytest.raises(ValueError, match=rf"U\+{code:04X}.* {len(text) - 1} "):
                    tokenizer.encode(text)


def test_the_error_names_character_place_and_alphabet():
    with pytest.raises(ValueError, match=r"'U' \(U\+0055\) at character 3 .*: ACGTRYSWKMBDHVN-\."):
        alphabets.dna().encode("ACGU")


def test_lower_case_is_refused_folded_or_kept():
    with pytest.raises(ValueError, match="'a'"):
        alphabets.dna().encode("Aa")
    assert alphabets.dna(lower="fold").encode("ACacNn") == alphabets.dna().encode("ACACNN")
    assert alphabets.dna(lower="fold").decode(alphabets.dna(lower="fold").encode("Aa")) == "AA"
    kept = alphabets.dna(lower="keep")
    assert kept.encode("AC") == alphabets.dna().encode("AC")
    assert kept.decode(kept.encode("AaCcNn-.")) == "AaCcNn-."
    assert alphabets.protein(fold_case=True).encode("mk") == alphabets.protein().encode("MK")
    with pytest.raises(ValueError, match="refuse, fold, keep"):
        alphabets.dna(lower="upper")


def test_folding_reads_no_letter_beyond_ascii():
    """The Kelvin sign K has k as its lower case."""
    with pytest.raises(ValueError, match=r"U\+212A"):
        alphabets.dna(lower="fold").encode("A\u212a")


def test_special_tokens_come_first_and_unknown_is_one_of_them():
    tokenizer = alphabets.rna(special_tokens=["<pad>", "<unk>"], unknown="<unk>")
    assert tokenizer.encode("AUT") == [2, 5, 1]
    assert tokenizer.decode([0, 2, 1]) == "<pad>A<unk>"
    with pytest.raises(ValueError, match="'<unk>' is no special token"):
        alphabets.rna(unknown="<unk>")
    with pytest.raises(ValueError, match="named twice"):
        alphabets.rna(special_tokens=["<x>", "<x>"])


def test_alphabets_hold_ascii_letters_that_can_occur():
    with pytest.raises(ValueError, match="token 1 is no ASCII letter: 'ä'"):
        alphabets.Alphabet(tokens=("a", "ä"))
    with pytest.raises(ValueError, match="token 0, 'a', without a use"):
        alphabets.Alphabet(tokens=("a",), fold_case=True)


def test_a_genome_is_encoded_at_a_hundred_megabytes_a_second():
    genome = "".join(random.Random(0).choices("ACGTN", k=2_000_000))
    tokenizer = alphabets.dna()
    tokenizer.encode_array("A")
    times = []
    for _ in range(5):
        start = time.process_time()
        ids = tokenizer.encode_array(genome)
        times.append(time.process_time() - start)
    assert tokenizer.decode_bytes(ids) == genome.encode()
    assert min(times) < 0.02


def test_the_other_strand_pairs_every_code():
    assert alphabets.reverse_complement("AACGTRYN-") == "-NRYACGTT"
    assert alphabets.reverse_complement("aacg", rna=True) == "cguu"
    meaning = {
        **{"A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT"},
        **{"K": "GT", "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"},
    }
    for letter, bases in meaning.items():
        other = meaning[alphabets.reverse_complement(letter)]
        assert set(other) == {"TGCA"["ACGT".index(base)] for base in bases}


def test_the_other_strand_of_the_other_strand_is_the_first():
    text = "".join(random.Random(0).choices("ACGTRYSWKMBDHVN-.acgtn", k=1000))
    assert alphabets.reverse_complement(alphabets.reverse_complement(text)) == text
    assert alphabets.reverse_complement("") == ""
    for text in ("ACU", "ACü", "AC\x00"):
        with pytest.raises(ValueError, match="at character 2 is no letter of DNA"):
            alphabets.reverse_complement(text)
    with pytest.raises(ValueError, match="'T' at character 0 is no letter of RNA"):
        alphabets.reverse_complement("T", rna=True)
