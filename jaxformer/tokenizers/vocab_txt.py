"""`vocab.txt`: a token on each line, whose id is the number of lines before it."""

import dataclasses

from jaxformer.tokenizers import alphabets
from jaxformer.tokenizers.alphabets import Alphabet
from jaxformer.tokenizers.bert_text import BertText
from jaxformer.tokenizers.tokenizer import Tokenizer, utf8
from jaxformer.tokenizers.wordpiece import WordPiece


def parse(data: bytes, *, text: BertText | None = None) -> WordPiece | Alphabet:
    """Reads BERT's vocabulary, or ESM's, which is told by its 33 tokens.

    Args:
        data: The file.
        text: How a WordPiece normalises text, which the file does not say; as uncased BERT if None.

    Raises:
        ValueError: If it is no UTF-8, holds a token twice, or has no `[UNK]` and is not ESM's.
    """
    lines = utf8(data, "the file").split("\n")
    if not lines[-1]:
        lines.pop()
    esm = alphabets.protein(unknown="<unk>")
    if [line.rstrip("\r") for line in lines] == _lines(esm):
        return esm
    tokenizer = WordPiece.from_tokens(lines, text=BertText() if text is None else text)
    if tokenizer.unknown is None:
        raise ValueError("there is no line [UNK], as in every vocabulary of BERT")
    return tokenizer


def serialize(tokenizer: Tokenizer) -> bytes:
    """Writes a vocabulary; how text is normalised is lost and has to be kept elsewhere.

    Raises:
        ValueError: If the tokenizer is another than WordPiece as BERT's or ESM's alphabet.
    """
    if isinstance(tokenizer, WordPiece):
        usual = {field.name: field.default for field in dataclasses.fields(WordPiece)}
        for name in ("unknown", "prefix", "max_characters"):
            if (value := getattr(tokenizer, name)) != usual[name]:
                raise ValueError(f"vocab.txt cannot hold {name}={value!r}.")
        return tokenizer.to_vocab_txt()
    esm = _lines(alphabets.protein(unknown="<unk>"))
    if isinstance(tokenizer, Alphabet) and _lines(tokenizer) == esm and not tokenizer.fold_case:
        return "".join(f"{line}\n" for line in esm).encode()
    raise ValueError(f"vocab.txt cannot hold a {type(tokenizer).__name__}.")


def _lines(tokenizer: Alphabet) -> list[str]:
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    return [token or names.get(i, "") for i, token in enumerate(tokenizer.tokens)]
