"""The shipped byte-level tokenizer: reproducible, exact on any text, with the BOS rule of its post-processor."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from scripts.make_tokenizer import ASSET, SPECIAL, byte_names, files, main


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


def test_the_script_makes_exactly_the_shipped_files(tmp_path):
    main(tmp_path)
    assert sorted(p.name for p in ASSET.iterdir()) == sorted(files())
    for name in files():
        made, shipped = (tmp_path / name).read_text("utf-8"), (ASSET / name).read_text("utf-8")
        # compared as JSON: another version of the library may write other white space
        assert json.loads(made) == json.loads(shipped) if name.endswith(".json") else made == shipped


def test_ids_are_the_bytes_then_the_special_tokens(tokenizer):
    assert len(tokenizer) == 264
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL] == list(range(256, 264))
    assert len(set(byte_names())) == 256
    text = "A\u00e9\u6f22\x00"
    assert tokenizer.encode(text, add_special_tokens=False) == list(text.encode())


def test_decode_inverts_encode_on_any_unicode(tokenizer):
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
    @settings(max_examples=150, deadline=None)
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    check()


def test_bos_is_added_by_the_tokenizers_own_rule_and_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, again):
        assert each.encode("a") == [each.bos_token_id, ord("a")]
        assert each.encode("a", add_special_tokens=False) == [ord("a")]
        assert (each.bos_token, each.eos_token, each.pad_token) == ("<bos>", "<eos>", "<pad>")


def test_chat_template_ends_assistant_turns_with_eos_and_prompts_are_prefixes(tokenizer):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "yo"}], tokenize=False)
    assert asked == "<bos><|system|>s<|user|>hi<|assistant|>"
    assert whole == asked + "yo<eos>"
