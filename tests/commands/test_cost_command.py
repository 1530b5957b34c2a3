import json
import pathlib
import re

import pytest

from jaxformer import cli
from jaxformer.models import published, published_vision

MODELS = pathlib.Path(__file__).parents[1] / "models"
NUMBERS = (MODELS / "published.txt").read_text(encoding="utf-8")
GPT2 = ("--biases", "--learned-positions", "1024")


@pytest.fixture
def cost(capsys):
    """Runs the command: exit code, standard output and error."""

    def run(*arguments):
        code = cli.main(["cost", *arguments])
        return code, *capsys.readouterr()

    return run


def test_the_tables_hold_gpt2s_parameters_operations_and_bytes(cost):
    code, out, err = cost(*GPT2)
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if "total" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "total",
        "124,439,808",
        "291.6 G",
        "272.3 G",
        "583.3 G",
        "284.8 M",
    ]
    assert "497.8 MB" in out
    assert "at 1,536 tokens" in out


def test_json_holds_the_same_numbers(cost):
    code, out, _ = cost(*GPT2, "--json", "--batch", "3", "--dtype", "bfloat16")
    found = json.loads(out)
    assert code == 0
    assert found["parameters"]["total"] == 124_439_808
    assert sum(found["parameters"].values()) == 2 * 124_439_808
    assert found["operations"]["backward"]["total"] == 2 * found["operations"]["forward"]["total"]
    assert found["bytes"]["cache"] == 2 * 12 * 768 * 3 * 1024 * 2


def test_windows_repeat_over_the_layers(cost):
    def cache(*arguments):
        return json.loads(cost(*arguments, "--layers", "4", "--json")[1])["bytes"]["cache"]

    assert cache("--windows", "0", "113") == cache() * (1024 + 113 + 15) // (2 * 1024)


def test_a_published_decoder_is_called_by_its_name(cost):
    code, out, _ = cost("llama3_8b", "--json", "--context", "8192", "--dtype", "bfloat16")
    found = json.loads(out)
    assert code == 0
    assert found["parameters"]["total"] == 8_030_261_248
    assert found["bytes"]["cache"] == 2**30


def test_latents_make_a_small_cache(cost):
    found = json.loads(cost("deepseek_v3", "--json", "--dtype", "bfloat16")[1])
    assert found["parameters"]["total"] == 671_026_419_200
    assert found["bytes"]["cache"] == 2 * 61 * (512 + 64) * 1024


def test_encoders_and_encoder_decoders_are_called_by_their_names(cost):
    encoder = json.loads(cost("bert_base", "--json")[1])
    assert encoder["parameters"]["total"] == 109_514_298
    assert list(encoder["operations"]) == ["forward", "backward"]
    both = json.loads(cost("t5_small", "--json", "--context", "512", "--batch", "3")[1])
    assert both["parameters"]["total"] == 60_506_624
    assert list(both["operations"]) == ["forward", "backward", "begin", "decode"]
    assert both["bytes"]["cache"] == 4 * 2 * 6 * 512 * 3 * (512 + 512)
    heading = "Operations on a text of 512 tokens"
    assert heading in cost("bert_base")[1]  # as many as it has positions
    assert f"{heading}, and targets as long" in cost("t5_small", "--context", "512")[1]


@pytest.mark.parametrize(
    "name", [*published.DECODERS, *published.ENCODERS, *published.ENCODER_DECODERS]
)
def test_every_published_model_is_counted(cost, name):
    code, out, err = cost(name, "--context", "7")
    assert (code, err) == (0, "")
    (number,) = re.search(r"total *│ *([\d,]+) ", out).groups()
    assert f"{name}: {number}" in NUMBERS.splitlines()


@pytest.mark.parametrize("name", published_vision.ENCODERS)
def test_every_published_encoder_of_images_is_counted(cost, name):
    code, out, err = cost(name)
    assert (code, err) == (0, "")
    (number,) = re.search(r"total *│ *([\d,]+) ", out).groups()
    assert f"{name}: {number}" in NUMBERS.splitlines()


def test_images_of_other_sizes_and_clips_are_told_of(cost):
    assert "Operations on an image of 518×518, 1,370 tokens" in cost("dinov2_b14")[1]
    _, out, _ = cost("dinov2_b14", "--size", "28", "42", "--batch", "3")
    assert "Operations on 3 images of 28×42, 7 tokens" in out
    whole, four = (
        json.loads(cost("vit_b16", "--json", *x)[1]) for x in ((), ("--batch", "4", "--remat"))
    )
    assert four["operations"]["forward"]["total"] == 4 * whole["operations"]["forward"]["total"]
    assert four["bytes"]["activations"] < 4 * whole["bytes"]["activations"]
    assert "Operations on a clip of 64×256×256, 8,192 tokens" in cost("v_jepa_2_l16")[1]
    encoder = json.loads(cost("mae_b16", "--json")[1])["parameters"]["total"]
    assert encoder == json.loads(cost("vit_b16", "--json")[1])["parameters"]["total"] - (
        197 * 768 + 769 * 1000  # its positions are not learned, and it has no head
    )


def test_remat_keeps_less_of_a_published_decoder(cost):
    kept = [json.loads(cost("gpt2_124m", "--json", *x)[1])["bytes"] for x in ([], ["--remat"])]
    assert kept[1]["activations"] < kept[0]["activations"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--width", "100", "--heads", "7"), "--width 100 is no multiple of --heads 7"),
        (("--heads", "0"), "--heads must be at least 1, got 0"),
        (("--heads", "12", "--kv-heads", "5"), "N=12 is not a multiple of K=5"),
        (("--layers", "0"), "num_layers must be positive, got 0"),
        (("--context", "9", "--learned-positions", "8"), "--context 9 exceeds"),
        (("--windows", "-1"), "windows must be positive"),
        (("gpt2_124m", "--context", "1025"), "--context 1025 exceeds the 1024 learned positions"),
        (("llama3_8b", "--context", "8193"), "--context 8193 exceeds the 8192 positions"),
        (("gpt2_124m", "--size", "224", "224"), "--size is of images"),
        (("vit_b16", "--context", "8"), "--context is of texts"),
        (("vit_b16", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("vit_b16", "--size", "224", "225"), "225"),
        (("vit_b16", "--size", "224"), "224"),
        (("gpt2", "--json"), "there is no model 'gpt2'; there are gpt2_124m, gpt2_355m, "),
    ],
)
def test_sizes_that_do_not_go_together_are_one_line(cost, arguments, told):
    code, out, err = cost(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("jaxformer: ")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [("--depth", "3"), ("gpt2_124m", "--width", "768")])
def test_a_word_that_is_no_flag_gives_2(cost, words):
    with pytest.raises(SystemExit) as stopped:
        cost(*words)
    assert stopped.value.code == 2
