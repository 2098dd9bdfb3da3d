"""Small fast tokenizers, and which bytes each of their tokens stands for, without their offsets."""

from __future__ import annotations

from functools import cache

from tests.data.chat_templates import CASES

CORPUS = [
    "The quick brown fox says hello to the user, and the assistant answers: hello!\n\n",
    "assistant\nuser\nsystem\nYou are a helpful assistant. [INST] what is 1 + 1? [/INST] 2",
    "<think>\n let me see \n</think>\n\n  two   spaces, \t tabs, Größe, 你好, 🙂🙂 ",
] * 4


@cache
def tokenizer_for(name: str, *, kind: str = "bpe", trim_offsets: bool = True):
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    from arctic_like.tokenizer.byte import byte_symbols

    case = CASES[name]
    special = [AddedToken(token, special=True) for token in case.tokens]
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
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=case.bos or None,
        eos_token=case.eos,
        pad_token=case.eos,
        chat_template=case.template,
        clean_up_tokenization_spaces=False,
    )


def token_bytes(tokenizer, token: int) -> bytes:
    """The bytes of a token, from the vocabulary alone."""
    from arctic_like.tokenizer.byte import byte_symbols

    added = tokenizer.added_tokens_decoder
    if token in added:
        return str(added[token]).encode()
    table = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    return bytes(table[symbol] for symbol in tokenizer.convert_ids_to_tokens(token))
