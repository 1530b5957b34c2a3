import dataclasses
import io
import json
import os
import pathlib
import pty
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxformer import cli
from jaxformer.tokenizers import bpe, formats, patterns, plain, wordpiece

TEXT = "The cat sat on the mat.\nThe dog, naïve as ever, sat on 1234 logs.\n\n" * 20
CLOSED = "standard output is closed"
UNKNOWN = ("--special", "<u>", "--unknown", "<u>")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a text and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("text.txt").write_text(TEXT)
    bpe.train([TEXT], vocab_size=280, special_tokens=["<end>"]).save("bpe.json")
    return tmp_path


@pytest.fixture
def jaxformer(capfdbinary, monkeypatch):
    """Runs the command line in this process: exit code, standard output and error."""

    def run(*arguments, given=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        capfdbinary.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return lambda *arguments, **options: run("tokenizer", *arguments, **options)


# Training.


def test_training_writes_the_tokenizer_of_the_function(folder, jaxformer):
    code, out, err = jaxformer(
        *("train", "text.txt", "--vocab-size", 285, "--special", "<a>", "--special", "<b>"),
        *("--min-frequency", 3, "--out", "new.json", "--pattern", "o200k", "--digits", "single"),
    )
    assert (code, out) == (0, b"")
    assert err.startswith("new.json: 285 tokens in ")
    assert formats.load("new.json") == bpe.train(
        [TEXT],
        vocab_size=285,
        special_tokens=["<a>", "<b>"],
        min_frequency=3,
        pattern=patterns.o200k("single"),
    )


def test_every_kind_is_trained(folder, jaxformer):
    for kind, size in [("wordpiece", 90), ("char-bpe", 90), ("characters", 40), ("words", 30)]:
        unknown = ("--unknown", "[UNK]") if kind != "char-bpe" else ()
        arguments = ("--kind", kind, "--vocab-size", size, "--out", f"{kind}.json", *unknown)
        code, _, err = jaxformer("train", "text.txt", *arguments)
        assert code == 0, err
        assert formats.load(f"{kind}.json").vocab_size <= size
    assert isinstance(formats.load("wordpiece.json"), wordpiece.WordPiece)
    assert isinstance(formats.load("words.json"), plain.Words)


def test_standard_input_is_read_and_documents_are_parted_at_nul(folder, jaxformer):
    arguments = ("train", "--kind", "words", "--out", "w.json")
    code, _, _ = jaxformer(*arguments, "--null", given=b"one\0two\0")
    assert code == 0
    assert formats.load("w.json") == plain.Words.train(["one", "two", ""])
    jaxformer(*arguments, "text.txt", "-", given=b"one\0two")
    assert formats.load("w.json") == plain.Words.train([TEXT, "one\0two"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", r"\w+"], "\\w"),
        (["--pattern", "^a"], "which libraries read differently"),
        (["--special", "a"], "special token 'a': the ordinary token"),
        (["--special", "a", "--kind", "char-bpe"], "special token 'a': the ordinary token"),
        (["--special", ""], "empty name"),
        (["--special", "<s>", "--special", "<s>"], "Special tokens repeat: '<s>'"),
        (["--kind", "wordpiece", "--out", "vocab.txt", *UNKNOWN], "cannot hold unknown='<u>'"),
        (["--out", "x.model"], "'sentencepiece' cannot hold a Bpe"),
        (["--out", "text"], "need a folder"),
        (["--out", "none/x.json"], "there is no folder none"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_text_is_read(
    folder, jaxformer, arguments, message
):
    pathlib.Path("text").write_text("kept")
    out = () if "--out" in arguments else ("--out", "x.json")
    code, _, err = jaxformer("train", "not there", "--vocab-size", 300, *out, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert "not there" not in err


# Encoding and decoding.


def test_ids_are_a_line_for_each_file(folder, jaxformer):
    expected = bpe.Bpe.load("bpe.json").encode(TEXT)
    code, out, err = jaxformer("encode", "bpe.json", "text.txt", "-", given="é".encode())
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert [int(word) for word in first.split()] == expected
    assert second.split() == [str(x).encode() for x in bpe.Bpe.load("bpe.json").encode("é")]
    assert json.loads(jaxformer("encode", "bpe.json", "text.txt", "--json")[1]) == expected


@pytest.mark.parametrize("options", [(), ("--json",), ("--lines",), ("--lines", "--json")])
def test_decoding_undoes_encoding_byte_for_byte(folder, jaxformer, options):
    data = TEXT.encode() + random.Random(0).randbytes(500) + b"\r\n"
    pathlib.Path("bytes").write_bytes(data)
    ids = jaxformer("encode", "bpe.json", "bytes", *options)[1]
    lines = [option for option in options if option == "--lines"]
    assert jaxformer("decode", "bpe.json", *lines, given=ids) == (0, data, "")


def test_ids_in_an_array_file_come_back(folder, jaxformer):
    code, out, _ = jaxformer("encode", "bpe.json", "text.txt", "--lines", "--out", "ids.npy")
    assert (code, out) == (0, b"")
    assert np.load("ids.npy").dtype == np.int32
    without_ends = TEXT.replace("\n", "").encode()
    assert jaxformer("decode", "bpe.json", "ids.npy") == (0, without_ends, "")
    assert jaxformer("encode", "bpe.json", "--out", "none.npy", "--lines")[0] == 0
    assert np.load("none.npy").size == 0


def test_special_tokens_are_read_where_allowed(folder, jaxformer):
    assert (
        b" 0 " in jaxformer("encode", "bpe.json", "--allow-special", "<end>", given=b"a<end>b")[1]
    )
    assert b" 0 " not in jaxformer("encode", "bpe.json", given=b"a<end>b")[1]
    code, _, err = jaxformer("encode", "bpe.json", "--allow-special", "<x>", given=b"a")
    assert (code, err) == (2, "jaxformer: '<x>' is no special token; there are: <end>.\n")


# Errors.


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ("train bad --out x.json --vocab-size 300", b"", "bad is no UTF-8: line 3, byte 4"),
        ("train none --out x.json --vocab-size 300", b"", "none: No such file"),
        ("train . --out x.json --vocab-size 300", b"", ".: Is a directory"),
        ("train text.txt --out x.json", b"", "--kind bpe needs --vocab-size"),
        ("train text.txt --out x.json --vocab-size 9", b"", "vocab_size=9"),
        ("train text.txt --out a/x.json --vocab-size 300", b"", "a/x.json: there is no folder a"),
        ("train text.txt --out x.json --vocab-size 300 --unknown u", b"", "no --unknown"),
        ("train text.txt --out x --vocab-size 300 --pattern (", b"", "'(' is malformed"),
        ("train text.txt --out x --vocab-size 300 --pattern . --digits free", b"", "--digits goes"),
        ("train --kind words --out x.tiktoken", b"a", "'tiktoken' cannot hold a Words"),
        ("train --kind words --out x.json --pattern gpt2", b"a", "go with --kind bpe, not with"),
        ("train --kind words --out x.json --digits free", b"a", "go with --kind bpe, not with"),
        ("encode bpe.json --json --out ids.npy", b"a", "--json is for standard output"),
        ("convert bpe.json x.json --digits single", b"", "--digits goes with --pattern"),
        ("encode ascii.json", b"abc\nabd\n", "standard input: line 2: 'd' (U+0064) at character 2"),
        ("encode ascii.json --lines", b"abc\nabd\n", "standard input: line 2: 'd'"),
        ("encode ascii.json bad", b"", "bad: line 3: no UTF-8: invalid start byte"),
        ("encode ascii.json --lines bad", b"", "bad: line 3: no UTF-8"),
        ("encode bpe.json bad --allow-special <end>", b"", "bad: line 3: no UTF-8"),
        ("encode ascii.json line", b"", "line: line 1: '\\n' (U+000A) at character 2"),
        ("encode none.json", b"", "none.json: No such file"),
        ("encode bad", b"", "bad: "),
        ("encode bpe.json --out ids.txt", b"", "--out ids.txt does not end in .npy"),
        ("encode bpe.json --out a/ids.npy", b"", "a/ids.npy: there is no folder a"),
        ("decode bpe.json", b"1 2\n3 x\n", "standard input: line 2: 'x' is no id"),
        ("decode bpe.json", b"1 2\n3 1_0\n", "standard input: line 2: '1_0' is no id"),
        (
            "decode bpe.json",
            b"1\n280\n",
            "line 2: No token has the id 280: the vocabulary has size",
        ),
        ("decode bpe.json", b"1\n-1\n", "line 2: No token has the id -1"),
        ("decode bpe.json", b"[1, 2\n", "line 1: malformed JSON"),
        ("decode bpe.json", b'["1"]\n', "line 1: '1' is no id"),
        ("decode bpe.json", b"[" * 100_000, "line 1: malformed JSON"),
        ("decode bpe.json float.npy", b"", "float.npy: an array of float64 with 1 axes"),
        ("decode bpe.json cut.npy", b"", "cut.npy: "),
        ("card bpe.json", b"", "bpe: There is no text"),
        ("card bpe.json bpe.json", b"a", "named twice"),
        ("card", b"a", "card needs a tokenizer"),
        ("card ascii.json --text text.txt", b"", "ascii: 'T' (U+0054) at character 0"),
        ("convert ascii.json x.json --truncate 5", b"", "a Characters cannot be truncated"),
        ("card bpe.json --text text.txt --edits 0", b"", "bpe: edits is at least 1, got 0"),
        ("convert words.json x.json --drop-special", b"", "words.json: --drop-special is not"),
        ("convert high.json x.json --truncate 256", b"", "'<end>' has the id 258, which 256"),
        ("convert bpe.json x.json --format tar", b"", "got 'tar'"),
        ("convert bpe.tiktoken x.json", b"", "takes --pattern and --special"),
        ("convert bpe.tiktoken x.json --special x", b"", "--special x is not NAME=ID"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_line(
    folder, jaxformer, arguments, given, message
):
    pathlib.Path("bad").write_bytes(b"a\nb\n\xff\n")
    plain.Characters.train(["abc"]).save("ascii.json")
    plain.Words.train(["abc"]).save("words.json")
    high = bpe.train(["abab"], vocab_size=258)
    dataclasses.replace(high, special_tokens={"<end>": 258}).save("high.json")
    pathlib.Path("line").write_text("ab\n")
    np.save("float.npy", np.ones(3))
    pathlib.Path("cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    formats.save(formats.load("bpe.json"), "bpe.tiktoken")
    code, _, err = jaxformer(*arguments.split(" "), given=given)
    assert err.startswith("jaxformer: ")
    assert message in err
    assert err.count("\n") == 1
    assert code == 2


def test_wrong_arguments_end_with_two_and_help_with_nothing(folder, jaxformer):
    assert jaxformer("train", "--frobnicate")[0] == 2
    assert jaxformer("encode")[0] == 2
    for command in ("train", "encode", "decode", "card", "convert"):
        code, out, _ = jaxformer(command, "--help")
        assert not code
        assert b"usage: jaxformer tokenizer " + command.encode() in out


def test_the_program_says_what_it_is(capsys):
    assert cli.main(["--version"]) == 0
    assert cli.main(["--help"]) == 0
    assert "jaxformer tokenizer {train" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert cli.main(["frobnicate"]) == 2
    assert "there is no command 'frobnicate'" in capsys.readouterr().err


# Cards and formats.


def test_cards_are_printed_side_by_side_or_as_json(folder, jaxformer):
    plain.Bytes().save("bytes.json")
    quick = ("--edits", 5, "--strings", 10, "--every", 9999, "--text", "text.txt")
    code, out, err = jaxformer("card", "bpe.json", "bytes.json", *quick)
    assert (code, err) == (0, "")
    assert all(word in out.decode() for word in ("bpe", "bytes", "bits per byte", "256", "280"))
    cards = json.loads(jaxformer("card", "bpe.json", "bytes.json", *quick, "--json")[1])
    assert list(cards) == ["bpe", "bytes"]
    assert cards["bytes"]["bytes_per_token"] == 1
    code, out, _ = jaxformer("card", "bpe.json", *quick, "--training", "text.txt", "--json")
    assert json.loads(out)["bpe"]["bits_per_byte"] < cards["bpe"]["bits_per_byte"]


def test_tokenizers_of_one_name_are_told_apart_by_folder(folder, jaxformer):
    for name in ("a", "b"):
        pathlib.Path(name).mkdir()
        plain.Bytes().save(f"{name}/bytes.json")
    quick = ("--edits", 5, "--strings", 10, "--every", 9999, "--json")
    out = jaxformer("card", "a/bytes.json", "b/bytes.json", *quick, given=b"some text")[1]
    assert list(json.loads(out)) == ["a/bytes.json", "b/bytes.json"]


def test_formats_are_converted_there_and_back(folder, jaxformer):
    original = formats.load("bpe.json")
    code, _, err = jaxformer("convert", "bpe.json", "bpe.tiktoken")
    assert code == 0
    assert err.startswith("bpe.tiktoken: this format does not hold all")
    arguments = ("--pattern", "gpt2", "--special", "<end>=0")
    assert jaxformer("convert", "bpe.tiktoken", "back.json", *arguments) == (0, b"", "")
    assert formats.load("back.json") == original
    assert jaxformer("convert", "bpe.json", "files", "--format", "gpt2")[0] == 0
    assert formats.load("files").encode(TEXT) == original.encode(TEXT)


def test_a_smaller_vocabulary_is_cut_from_a_larger(folder, jaxformer):
    assert jaxformer("convert", "bpe.json", "small.json", "--truncate", 270)[0] == 0
    assert formats.load("small.json") == bpe.train([TEXT], vocab_size=270, special_tokens=["<end>"])


def test_special_tokens_with_high_ids_are_dropped_to_truncate(folder, jaxformer):
    plain_one = bpe.train([TEXT], vocab_size=300)
    dataclasses.replace(plain_one, special_tokens={"<end>": 300}).save("high.json")
    assert jaxformer("convert", "high.json", "all.json", "--drop-special") == (0, b"", "")
    assert formats.load("all.json") == plain_one
    arguments = ("high.json", "small.json", "--truncate", 270, "--drop-special")
    assert jaxformer("convert", *arguments) == (0, b"", "")
    assert formats.load("small.json") == bpe.train([TEXT], vocab_size=270)


# The process.


def test_a_closed_pipe_is_quiet(folder):
    pathlib.Path("long.txt").write_text(TEXT * 500)
    program = [sys.executable, "-m", "jaxformer", "tokenizer", "encode", "bpe.json", "long.txt"]
    with subprocess.Popen(
        [*program, "--lines"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("encode bpe.json <&-", "standard input is closed"),
        ("encode bpe.json text.txt >&-", CLOSED),
        ("decode bpe.json >&-", CLOSED),
        ("card bpe.json --text text.txt --edits 1 --strings 1 --every 9999 >&-", CLOSED),
        ("train --help >&-", CLOSED),
        ("train --frobnicate 2>&-", ""),
        ("train text.txt --vocab-size 260 --out x.json >&-", None),
        ("train text.txt --vocab-size 260 --out x.json 2>&-", ""),
        ("encode none.json 2>&-", ""),
    ],
)
def test_a_closed_stream_is_one_line_or_not_needed(folder, command, message):
    line = f'"{sys.executable}" -m jaxformer tokenizer {command}'
    done = subprocess.run(["sh", "-c", line], input=b"", capture_output=True)
    error = done.stderr.decode()
    assert done.stdout == b""
    if "260" in command:
        assert done.returncode == 0
        assert error.startswith("x.json: 260 tokens") or message == error == ""
        return
    assert done.returncode == 2
    assert error == (f"jaxformer: {message}.\n" if message else "")


def test_an_interrupt_has_no_traceback(folder):
    program = (  # a job in the background would ignore SIGINT
        "import signal, sys\n"
        "from jaxformer import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('ready', flush=True)\n"
        "sys.exit(cli.main(['tokenizer', 'encode', 'bpe.json']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.2)  # it now loads modules, or waits for text
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")


def test_long_training_shows_a_bar_on_a_terminal_only(folder):
    words = random.Random(0)
    text = " ".join("".join(words.choices("abcdefghij", k=6)) for _ in range(30_000))
    pathlib.Path("many.txt").write_text(text)
    terminal, end = pty.openpty()
    program = [sys.executable, "-m", "jaxformer", "tokenizer", "train", "many.txt"]
    program += ["--vocab-size", "3000", "--out", "many.json"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        shown += data
    os.close(terminal)
    assert process.wait() == 0
    assert process.stdout.read() == b""
    process.stdout.close()
    assert b"counting words" in shown or b"merging" in shown
    assert b"many.json: 3,000 tokens" in shown


def test_the_command_line_starts_without_jax_or_a_parser():
    program = (
        "import sys\n"
        "from jaxformer import cli\n"
        "assert not {'tyro', 'rich', 'numpy', 'jax'} & set(sys.modules)\n"
        "cli.main(['tokenizer', 'encode', 'no such file'])\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
