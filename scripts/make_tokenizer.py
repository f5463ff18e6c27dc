"""Make the project's own tokenizer, ``assets/tokenizer``: one token per UTF-8 byte, no merges, nothing to download.

Ids 0..255 are the bytes themselves, then ``<pad> <bos> <eos>``, four chat markers and a reserved token: 264 in all, a
multiple of 8. Text is any Unicode; ``decode(encode(x)) == x``. ``<bos>`` is added by the tokenizer's own rule
(``add_special_tokens=True``), as Gemma and Llama do, so the BOS logic is exercised by every test that uses it.

    python scripts/make_tokenizer.py [folder]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

ASSET = Path(__file__).resolve().parents[1] / "assets" / "tokenizer"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = (PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES), "<|reserved|>")

# A turn is its role's marker and its text; an assistant's turn ends with EOS, so generation stops where training did.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role ' + message['role']) }}
{%- endif %}
{{- '<|' + message['role'] + '|>' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


def byte_names() -> list[str]:
    """The 256 characters by which byte-level tokenizers write the bytes 0..255 in a vocabulary.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order (the table of GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def build() -> Tokenizer:
    """The tokenizer as the ``tokenizers`` library's object."""
    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(byte_names())}, merges=[]))
    # The regex changes nothing without merges but lets the library cache words: 5.8 against 3.0 million tokens/s.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def files() -> dict[str, str]:
    """File name -> text of the Hugging Face folder."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    return {
        "tokenizer.json": json.dumps(json.loads(build().to_str()), indent=1, sort_keys=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def main(folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ASSET)
    main(parser.parse_args().folder)
