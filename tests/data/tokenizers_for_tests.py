"""Small fast tokenizers of several kinds, and which characters each of their tokens stands for, found
without their offsets."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from tests.data.chat_templates import CASES

CORPUS = [
    "The quick brown fox says hello to the user, and the assistant answers: hello!\n\n",
    "assistant\nuser\nsystem\nYou are a helpful assistant. [INST] what is 1 + 1? [/INST] 2",
    "<think>\n let me see \n</think>\n\n  two   spaces, \t tabs, Größe, 你好, 🙂🙂 ",
] * 4

KINDS = ("byte", "bpe", "bpe-across", "metaspace", "wordpiece")
_BYTE = re.compile("<0x([0-9A-F]{2})>")


@cache
def tokenizer_for(name: str, *, kind: str = "bpe", trim_offsets: bool = True):
    """The tokenizer of a template.

    kind: `byte` (no merges), `bpe` (bytes, as GPT-2 splits words), `bpe-across` (merges across
    spaces and line breaks), `metaspace` (characters, `▁` for spaces, bytes for what is unknown, as
    in Llama 2 and Gemma), `wordpiece` (as in BERT: spaces belong to no token, unknown words are one).
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    case = CASES[name]
    core = {"metaspace": _metaspace, "wordpiece": _wordpiece}.get(kind, _bytes)(kind, trim_offsets)
    core.add_special_tokens([AddedToken(token, special=True) for token in case.tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=case.bos or None,
        eos_token=case.eos,
        pad_token=case.eos,
        chat_template=case.template,
        clean_up_tokenization_spaces=False,
    )


def _bytes(kind: str, trim_offsets: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from arctic_like.tokenizer.byte import byte_symbols

    if kind == "byte":
        vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        core = Tokenizer(models.BPE())
        # without the regex merges may cross spaces and line breaks, so tokens straddle borders
        core.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=kind == "bpe"
        )
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=byte_symbols(),
            show_progress=False,
            min_frequency=1,
        )
        core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.decoder = decoders.ByteLevel()
    return core


def _metaspace(kind: str, trim_offsets: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    scheme = {"replacement": "▁", "prepend_scheme": "first", "split": False}
    grown = Tokenizer(models.BPE())
    grown.pre_tokenizer = pre_tokenizers.Metaspace(**scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, min_frequency=1, limit_alphabet=60
    )
    grown.train_from_iterator(CORPUS, trainer)
    import json

    model = json.loads(grown.to_str())["model"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in model["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(**scheme)
    return core


def _wordpiece(kind: str, trim_offsets: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, show_progress=False, min_frequency=1, special_tokens=["[UNK]"]
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def held(tokenizer, kind: str, text: str, tokens: list[int]) -> list[np.ndarray]:
    """The characters of `text` that each token stands for, from the vocabulary alone."""
    return (_words if kind == "wordpiece" else _laid_out)(tokenizer, text, tokens)


def _laid_out(tokenizer, text: str, tokens: list[int]) -> list[np.ndarray]:
    """Tokens whose bytes make up the text; a character may lie in several."""
    characters = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
    pieces = [token_bytes(tokenizer, token) for token in tokens]
    assert b"".join(pieces) == text.encode()
    ends = np.cumsum([len(piece) for piece in pieces])
    return [characters[end - len(piece) : end] for piece, end in zip(pieces, ends, strict=True)]


def _words(tokenizer, text: str, tokens: list[int]) -> list[np.ndarray]:
    """Tokens of words one after another; white space is in none."""
    added = sorted((str(t) for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    found, waiting = [], iter(tokenizer.convert_ids_to_tokens(tokens))
    splits = re.split("(" + "|".join(map(re.escape, added)) + ")", text)
    at = 0
    for split in splits:
        if split in added:
            assert next(waiting) == split
            found.append(np.arange(at, at + len(split)))
        else:
            for word in re.finditer(r"\w+|[^\w\s]+", split):
                start = at + word.start()
                while start < at + word.end():
                    token = next(waiting)
                    size = len(word[0]) if token == "[UNK]" else len(token.removeprefix("##"))
                    found.append(np.arange(start, start + size))
                    start += size
        at += len(split)
    assert next(waiting, None) is None
    return found


def token_bytes(tokenizer, token: int) -> bytes:
    """The bytes of a token, from the vocabulary alone."""
    from arctic_like.tokenizer.byte import byte_symbols

    added = tokenizer.added_tokens_decoder
    if token in added:
        return str(added[token]).encode()
    written = tokenizer.convert_ids_to_tokens(token)
    if "<0x00>" in tokenizer.get_vocab():
        match = _BYTE.fullmatch(written)
        return bytes([int(match[1], 16)]) if match else written.replace("▁", " ").encode()
    table = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    return bytes(table[symbol] for symbol in written)
