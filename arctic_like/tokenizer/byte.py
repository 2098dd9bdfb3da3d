"""A tokenizer of bytes: no file, no training, any text, and exports that need no code of ours.

Token i < 256 is the byte i; the special tokens follow. It is a plain fast tokenizer of the
`tokenizers` library (byte-level BPE without merges), so `AutoTokenizer.from_pretrained` reads what
was saved. Beside a model of a few types (`qwen2` among them) transformers 5.23 puts that type's
class in place of the saved one; `TokenizersBackend.from_pretrained` keeps to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_like.tokenizer.base import TokenizerConfig, TokenizerFactory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (PAD, END, *(f"<|{role}|>" for role in ROLES))
"""In the order of their ids, from 256 on."""

# Each turn is `<|role|>content<|end|>`. Only what the assistant has to write is marked.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('the byte tokenizer has no role ' ~ message['role']) -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] ~ '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] ~ '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


class ByteTokenizerConfig(TokenizerConfig):
    """The byte-level tokenizer; it has no files, so `name_or_path` stays empty."""

    type: str = "byte"


class ByteTokenizerFactory(TokenizerFactory):
    """`type: byte`: 256 bytes, padding, end of turn, and one marker for each role."""

    name = "byte"
    config_type = ByteTokenizerConfig

    def create(self, model_name_or_path: str | None = None) -> PreTrainedTokenizerBase:
        return byte_tokenizer()


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, by byte value.

    Bytes that print keep their Latin-1 character, the other 68 take the characters from U+0100
    on, in order (GPT-2, Radford et al. 2019, `bytes_to_unicode`).
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(spare)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A fast tokenizer of 262 tokens. `<|end|>` ends turns and documents; it adds no token itself.

    The name of a special token inside a text becomes that token, as in every chat tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer
