"""Text -> ids: BOS and EOS exactly once, exact boundaries, no text taken for a special token, nothing lost silently.

Four small tokenizers stand for the families in use; they are trained here, on a few sentences, with the library itself.
"""

from __future__ import annotations

import json
import logging
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.schema import Example
from preference_datasets import (
    Counts,
    Plan,
    Tokenization,
    cut_prompt,
    cut_response,
    get_batch_iterator,
    get_dataset,
    render_prompts,
    sft_examples,
    tokenize,
)
from scripts.make_tokenizer import ASSET
from utils import UserError

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "\n\nHuman: What is the answer to the question?\n\nAssistant: The answer is forty-two, I think.",
    "User: hello there. Assistant: hello to you, too! Is there anything that I can help with?",
]
UNICODE = "NUL\x00 bidi\u202e line\u2028 family \U0001f468\u200d\U0001f469\u200d\U0001f467 combining e\u0301 \u6f22\u5b57 tab\t."

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _wrap(backend: Tokenizer, special: list[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    if "bos_token" in named and named.pop("rule", None):
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def gpt2_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a BOS rule; ChatML, whose turns end with the EOS and a line feed (Qwen)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _wrap(backend, special, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _sentencepiece(special: list[str], prepend: bool) -> Tokenizer:
    """SentencePiece BPE with byte fallback as transformers converts it: specials first, in the vocabulary itself."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(state["vocab"], key=state["vocab"].get),
    ]
    merges = [tuple(pair) for pair in state["merges"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prepend else replace
    )
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def llama_like() -> PreTrainedTokenizerFast:
    """Dummy space before a text, BOS by rule, and a template that writes BOS before every user turn (Llama 2)."""
    special = ["<unk>", "<s>", "</s>"]
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "rule": "yes"}
    return _wrap(_sentencepiece(special, prepend=True), special, LLAMA_CHAT, **named)


def gemma_like() -> PreTrainedTokenizerFast:
    """No dummy space, BOS by rule, and a template whose turns do not end with the EOS."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    named = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "rule": "yes",
    }
    return _wrap(_sentencepiece(special, prepend=False), special, GEMMA_CHAT, **named)


def unigram_like() -> PreTrainedTokenizerFast:
    """A Unigram model with its special tokens among the pieces (T5 and its relatives)."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -5.0) for letter in sorted({c for text in CORPUS for c in text} | set("<>/s\u2581"))]
    backend = Tokenizer(models.Unigram([*special, *letters, ("\u2581the", -3.0)], unk_id=2))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Replace("\u2581", " ")
    words = [word for word, _ in special]
    return _wrap(backend, words, CHATML, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


FAMILIES = ["shipped", "gpt2", "llama", "gemma"]


@pytest.fixture(scope="module")
def family():
    made = {"gpt2": gpt2_like, "llama": llama_like, "gemma": gemma_like, "unigram": unigram_like}
    made = {name: make() for name, make in made.items()}
    return {"shipped": AutoTokenizer.from_pretrained(ASSET), **made}


@pytest.fixture(params=FAMILIES)
def tokenizer(request, family):
    return family[request.param]


def example(
    prompt="Human: hello\n\nAssistant:", chosen=" hello to you", rejected=" the dog", uid="d/train:0", **more
):
    return Example(uid, prompt, (("chosen", chosen), ("rejected", rejected)), more.pop("group", "d"), **more)


def rows_of(examples, tokenizer, counts=None, groups=("d",), roles=None, optional_roles=(), **settings):
    examples = [examples] if isinstance(examples, Example) else examples
    return tokenize(
        examples,
        tokenizer,
        Tokenization(**settings),
        groups=groups,
        roles=roles,
        optional_roles=optional_roles,
        counts=Counts() if counts is None else counts,
    )


def one_row(*args, **kwargs):
    (row,) = rows_of(*args, **kwargs)
    return row


def plain(tokenizer, text) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# ---------------------------------------------------------------------------------------------- BOS, EOS, boundary


def test_prompt_and_response_ids_are_the_tokenizers_own_with_one_bos_and_one_eos(tokenizer):
    row = one_row(example(), tokenizer)
    assert row.prompt.tolist() == tokenizer.encode("Human: hello\n\nAssistant:")  # its own BOS rule
    assert row.responses[0].tolist() == [*plain(tokenizer, " hello to you"), tokenizer.eos_token_id]
    assert row.responses[1].tolist() == [*plain(tokenizer, " the dog"), tokenizer.eos_token_id]
    assert row.prompt.dtype == row.responses[0].dtype == np.int32
    if tokenizer.bos_token_id is not None:
        assert row.prompt.tolist().count(tokenizer.bos_token_id) == 1
    assert row.roles == ("chosen", "rejected")


def test_bos_can_be_forced_or_left_out(family):
    def first(name, bos):
        return one_row(example(), family[name], bos=bos).prompt[0]

    for name in ("shipped", "llama", "gemma"):
        bos = family[name].bos_token_id
        assert first(name, "auto") == first(name, "always") == bos
        assert first(name, "never") != bos
    with pytest.raises(UserError, match=r"data\.bos=always.*no BOS token"):
        first("gpt2", "always")


def test_a_bos_without_a_rule_is_added_only_when_asked(family):
    tokenizer = gpt2_like()
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    assert one_row(example(), tokenizer).prompt[0] != bos
    assert one_row(example(), tokenizer, bos="always").prompt.tolist().count(bos) == 1


def test_the_callers_tokenizer_is_left_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    rows_of(example(prompt="a <eos> </s> <|im_end|>"), tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.backend_tokenizer.encode_special_tokens is False


# ---------------------------------------------------------------------------------------------- special-token text


def special_ids(tokenizer) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {
        tokenizer.unk_token_id
    }


@pytest.mark.parametrize("name", [*FAMILIES, "unigram"])
@pytest.mark.parametrize("mode", ["separate", "joint"])
def test_quoted_special_tokens_stay_text(family, name, mode):
    tokenizer, counts = family[name], Counts()
    words = [token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    text = " is " + " or ".join(words) + words[0] + words[-1]
    row = one_row(example(prompt="what" + text, chosen=text), tokenizer, counts, mode=mode)
    chosen = row.responses[0].tolist()
    body = row.prompt.tolist()[len(tokenizer.encode("")) :]
    assert not special_ids(tokenizer) & set(body), "in the prompt"
    assert not special_ids(tokenizer) & set(chosen[:-1]), "in the response"
    assert chosen[-1] == tokenizer.eos_token_id
    if name != "unigram":  # its few letters cannot spell everything
        assert tokenizer.decode(body) == "what" + text
    assert counts.total("quoted") == 1


def test_split_special_tokens_of_transformers_would_not_do_for_a_unigram_model(family):
    """Why the special tokens are renamed in a private copy: transformers 5.23 takes this text for EOS."""
    tokenizer = family["unigram"]
    assert (
        tokenizer.eos_token_id
        in tokenizer("</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )


@pytest.mark.parametrize("name", ["shipped", "gpt2", "gemma"])
def test_quoted_special_tokens_stay_text_through_a_chat_template(family, name):
    tokenizer = family[name]
    words = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    quoting = " and ".join(words) + words[0]
    harmless = "hello"

    def special_of(content):
        chat = ({"role": "user", "content": content},)
        row = one_row(example(prompt=chat, chosen=content), tokenizer)
        ids = [*row.prompt.tolist(), *row.responses[0].tolist()]
        return [i for i in ids if i in special_ids(tokenizer)], row

    expected, _ = special_of(harmless)
    got, row = special_of(quoting)
    assert got == expected
    assert quoting in tokenizer.decode(row.prompt)
    assert tokenizer.decode(row.responses[0]).startswith(quoting)


def test_of_two_special_tokens_that_begin_alike_the_longer_one_is_meant():
    tokenizer = gpt2_like()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>2"]})
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|im_start|>2")
    row = one_row(example(prompt=CHAT), tokenizer)
    assert row.prompt.tolist() == tokenizer.apply_chat_template(
        list(CHAT), add_generation_prompt=True, return_dict=False
    )
    assert row.prompt[0] == tokenizer.convert_tokens_to_ids("<|im_start|>2")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_cannot_contain_the_secret_names(family, name):
    from engine.codec import Codec

    secret = next(iter(Codec(family[name], "auto").secret.values()))
    with pytest.raises(UserError, match="d/train:0: contains a name reserved here"):
        rows_of(example(chosen=f"a {secret}"), family[name])


# ---------------------------------------------------------------------------------------------- chat templates

CHAT = ({"role": "user", "content": "What is the answer?"},)
LONG_CHAT = (*CHAT, {"role": "assistant", "content": "The dog."}, {"role": "user", "content": "really?"})


@pytest.mark.parametrize("chat", [CHAT, LONG_CHAT])
@pytest.mark.parametrize("name", FAMILIES)
def test_chat_ids_are_those_of_the_template(family, name, chat):
    tokenizer = family[name]
    answer = ({"role": "assistant", "content": "I think so."},)
    # joint, because Llama's dummy space would stand before a response encoded alone
    row = one_row(example(prompt=chat, chosen=answer, rejected="No."), tokenizer, mode="joint")
    prompt = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*chat, *answer], return_dict=False)
    assert row.prompt.tolist() == prompt
    ids = [*row.prompt.tolist(), *row.responses[0].tolist()]
    eos = tokenizer.eos_token_id
    if name == "gemma":
        assert ids == [*whole, eos], "the template writes no EOS: it is added"
    else:
        assert ids == whole[: len(whole) - whole[::-1].index(eos)], "the template's EOS, and nothing after it"
    assert row.responses[0].tolist().count(eos) == row.responses[1].tolist().count(eos) == 1
    assert row.responses[1][-1] == eos


def test_a_text_response_to_a_chat_is_an_assistant_turn(tokenizer):
    as_text = one_row(example(prompt=CHAT, chosen="Yes.", rejected="No."), tokenizer)
    turn = ({"role": "assistant", "content": "Yes."},)
    as_turn = one_row(example(prompt=CHAT, chosen=turn, rejected="No."), tokenizer)
    assert as_text.responses[0].tolist() == as_turn.responses[0].tolist()


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_bos_is_there_once_however_often_the_template_writes_it(written, bos):
    tokenizer = gemma_like()
    tokenizer.chat_template = "{{ bos_token }}" * written + GEMMA_CHAT.removeprefix("{{ bos_token }}")
    row = one_row(example(prompt=CHAT), tokenizer, bos=bos)
    assert row.prompt.tolist().count(tokenizer.bos_token_id) == (0 if bos == "never" else 1)


def test_a_template_that_gives_no_exact_boundary_is_refused(family):
    tokenizer = gemma_like()
    tokenizer.chat_template = "{{ messages | length }}" + GEMMA_CHAT
    with pytest.raises(UserError, match=r"d/train:0.*no prefix"):
        rows_of(example(prompt=CHAT), tokenizer)


def test_what_a_template_refuses_names_the_row(family):
    chat = ({"role": "system", "content": "be kind"}, *CHAT)
    with pytest.raises(UserError, match=r"d/train:0.*only user and assistant"):
        rows_of(example(prompt=chat), family["llama"])
    with pytest.raises(UserError, match=r"d/train:0.*no messages"):
        rows_of(example(prompt=()), family["llama"])
    bare = gemma_like()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        rows_of(example(prompt=CHAT), bare)
    with pytest.raises(UserError, match="text but a response is messages"):
        rows_of(example(chosen=CHAT), family["llama"])


# ---------------------------------------------------------------------------------------------- joint mode


def test_joint_mode_gives_a_sentencepiece_response_no_dummy_space(family):
    tokenizer = family["llama"]
    prompt, response = "User:", "hello there"
    separate = one_row(example(prompt=prompt, chosen=response), tokenizer)
    joint = one_row(example(prompt=prompt, chosen=response), tokenizer, mode="joint")
    ids = [*joint.prompt.tolist(), *joint.responses[0].tolist()]
    assert ids == [*tokenizer.encode(prompt + response), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + response
    assert tokenizer.convert_ids_to_tokens(separate.responses[0].tolist())[0].startswith("\u2581")
    assert not tokenizer.convert_ids_to_tokens(joint.responses[0].tolist())[0].startswith("\u2581")
    assert joint.prompt.tolist() == separate.prompt.tolist()


def test_a_token_across_the_boundary_falls_back_for_the_whole_example_and_is_counted(family):
    tokenizer, counts = family["gpt2"], Counts()
    whole = plain(tokenizer, "answer")
    assert len(whole) < len(plain(tokenizer, "ans")) + len(plain(tokenizer, "wer")), (
        "the premise of this test"
    )
    row = one_row(example(prompt="ans", chosen="wer", rejected=" dog"), tokenizer, counts, mode="joint")
    same = one_row(example(prompt="ans", chosen="wer", rejected=" dog"), tokenizer)
    assert row.prompt.tolist() == same.prompt.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(row.responses, same.responses, strict=True))
    assert counts.total("crossing") == 1


# ---------------------------------------------------------------------------------------------- unicode, empty


def test_any_valid_unicode_survives(family):
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
    @settings(max_examples=60, deadline=None)
    def check(text):
        for name in ("shipped", "gpt2"):
            row = one_row(example(prompt=text, chosen=text), family[name])
            head = len(family[name].encode(""))
            assert family[name].decode(row.prompt[head:]) == text
            assert family[name].decode(row.responses[0][:-1]) == text

    check()


def test_control_characters_and_joined_emoji_survive(tokenizer):
    row = one_row(example(prompt=UNICODE, chosen=UNICODE), tokenizer)
    assert tokenizer.decode(row.prompt, skip_special_tokens=True) == UNICODE
    assert tokenizer.decode(row.responses[0], skip_special_tokens=True) == UNICODE


@pytest.mark.parametrize("where", ["prompt", "chosen"])
def test_a_lone_surrogate_is_an_error_with_the_uid(tokenizer, where):
    with pytest.raises(UserError, match="d/train:0: lone surrogate at character 1"):
        rows_of(example(**{where: "a\ud800b"}), tokenizer)
    chat = ({"role": "user", "content": "a\ud800b"},)
    with pytest.raises(UserError, match="d/train:0: lone surrogate"):
        rows_of(example(prompt=chat), tokenizer)


def test_an_empty_response_is_eos_alone_and_counted(tokenizer):
    counts = Counts()
    examples = [
        example(chosen=""),
        example(rejected=""),
        example(chosen="", rejected=""),
        example(chosen="  "),
    ]
    rows = rows_of(examples, tokenizer, counts)
    eos = [tokenizer.eos_token_id]
    assert rows[0].responses[0].tolist() == rows[1].responses[1].tolist() == eos
    assert [r.tolist() for r in rows[2].responses] == [eos, eos]
    assert len(rows[3].responses[0]) > 1, "white space is text"
    assert (counts.total("empty"), counts.total("identical")) == (5, 1)


def test_equal_responses_are_kept_and_counted(tokenizer):
    counts = Counts()
    (row,) = rows_of(example(chosen=" yes", rejected=" yes"), tokenizer, counts)
    assert np.array_equal(*row.responses)
    assert counts.total("identical") == 1


def test_blank_targets_are_dropped_and_counted(tokenizer):
    counts = Counts()
    texts = ["a", "", " \n", "b"]
    examples = [Example(f"d/train:{i}", "p", (("target", t),), "d") for i, t in enumerate(texts)]
    examples.append(Example("d/train:4", CHAT, (("target", ({"role": "assistant", "content": " "},)),), "d"))
    rows = rows_of(examples, tokenizer, counts)
    assert [row.uid for row in rows] == ["d/train:0", "d/train:3"]
    assert counts.by_group("blank_targets") == {"d": 3}


def test_an_empty_prompt_needs_a_bos(family):
    assert one_row(example(prompt=""), family["shipped"]).prompt.tolist() == [family["shipped"].bos_token_id]
    with pytest.raises(UserError, match=r"d/train:0: the prompt is empty.*data\.bos"):
        rows_of(example(prompt=""), family["gpt2"])
    with pytest.raises(UserError, match="d/train:0: the prompt is empty"):
        rows_of(example(prompt=""), family["shipped"], bos="never")


def test_missing_eos_is_an_error_and_missing_pad_becomes_eos_once(caplog):
    tokenizer = llama_like()
    assert tokenizer.pad_token is None
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        rows_of(example(), tokenizer)
        rows_of(example(), tokenizer)
    assert tokenizer.pad_token == "</s>"
    assert sum("no pad token" in message for message in caplog.messages) == 1
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        rows_of(example(), tokenizer)


# ---------------------------------------------------------------------------------------------- finished


@pytest.mark.parametrize("prompt", ["User:", CHAT])
def test_an_unfinished_response_gets_no_eos(tokenizer, prompt):
    counts = Counts()
    flags = {"finished": (float("nan"), 1.0, 0.0)}
    responses = (("chosen", " the dog"), ("aux_1", " the dog"), ("aux_2", " the dog"))
    given_ = Example("d/train:0", prompt, responses, "d", response_scalars=flags)
    chosen, done, cut = one_row(given_, tokenizer, counts).responses
    assert chosen.tolist() == done.tolist()
    assert done[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in cut
    assert done[: len(cut)].tolist() == cut.tolist()
    assert tokenizer.decode(cut).strip() == "the dog", "nothing of what the template writes after the text"
    assert counts.total("unfinished") == 1


def test_an_unfinished_response_without_tokens_is_an_error(tokenizer):
    bad = example(chosen="", response_scalars={"finished": (0.0, 1.0)})
    with pytest.raises(UserError, match="d/train:0: a response marked unfinished"):
        rows_of(bad, tokenizer)


# ---------------------------------------------------------------------------------------------- truncation


def test_golden_truncation(family):
    """Ids worked out by hand: a byte is a token, BOS is 257 and EOS is 258."""
    tokenizer = family["shipped"]
    text = example(prompt="abcdefgh", chosen="ABCDEF", rejected="xy")  # 1 + 8 prompt, 7 and 3 response tokens

    def got(**limits):
        row = one_row(text, tokenizer, **limits)
        assert all(len(row.prompt) + len(r) <= limits["max_length"] for r in row.responses)
        return bytes(row.prompt[1:].tolist()), [bytes(r[:-1].tolist()) for r in row.responses], row.prompt[0]

    assert got(max_length=16, max_prompt_length=4) == (b"abcdefgh", [b"ABCDEF", b"xy"], 257)
    assert got(max_length=15, max_prompt_length=9) == (b"abcdefgh", [b"ABCDE", b"xy"], 257)
    assert got(max_length=15, max_prompt_length=4) == (b"abc", [b"ABCDEF", b"xy"], 257)
    assert got(max_length=15, max_prompt_length=4, truncation="keep_end") == (b"fgh", [b"ABCDEF", b"xy"], 257)
    assert got(max_length=6, max_prompt_length=4, truncation="keep_end") == (b"fgh", [b"A", b"x"], 257)
    assert got(max_length=2, max_prompt_length=1) == (b"", [b"", b""], 257)
    text = example(prompt="abcdefgh", chosen="xy", rejected="ABCDEF")  # now the rejected is what does not fit
    assert got(max_length=15, max_prompt_length=4) == (b"abc", [b"xy", b"ABCDEF"], 257)


ids_strategy = st.lists(st.integers(0, 255), max_size=30)


@given(
    head=st.sampled_from([[], [257]]),
    prompt=ids_strategy,
    responses=st.lists(st.tuples(ids_strategy, st.booleans()), min_size=1, max_size=4),
    max_length=st.integers(2, 40),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_truncation_keeps_its_promises(head, prompt, responses, max_length, data):
    settings_ = Tokenization(
        max_length=max_length,
        max_prompt_length=data.draw(st.integers(1, max_length - 1)),
        truncation=data.draw(st.sampled_from(["keep_start", "keep_end"])),
    )
    full = [([*ids, 258] if done else ids or [0], done) for ids, done in responses]
    longest = max(len(ids) for ids, _ in full)
    kept = cut_prompt(head, prompt, longest, settings_)
    fits = len(head) + len(prompt) + longest <= max_length
    assert kept[: len(head)] == head, "BOS stays"
    body = kept[len(head) :]
    assert body == (
        prompt[: len(body)] if settings_.truncation == "keep_start" else prompt[len(prompt) - len(body) :]
    )
    if fits:
        assert kept == head + prompt
    elif len(head) + len(prompt) > settings_.max_prompt_length:
        assert len(kept) == settings_.max_prompt_length
    else:
        assert kept == head + prompt, "only responses are too long"
    for ids, done in full:
        cut = cut_response(ids, done, max_length - len(kept))
        assert len(cut) >= 1
        assert len(kept) + len(cut) <= max_length
        assert (cut[-1] == 258) == done, "a finished response keeps its EOS, an unfinished one gets none"
        assert len(cut) == min(len(ids), max_length - len(kept)), "no more is cut than must be"
        assert cut[: len(cut) - done] == ids[: len(cut) - done]


@pytest.mark.parametrize("role", ["chosen", "rejected"])
def test_one_long_response_cuts_the_prompt_of_all(tokenizer, role):
    counts = Counts()
    pair = example(prompt="The quick brown fox" * 5, **{role: " the lazy dog" * 30})
    row = one_row(pair, tokenizer, counts, max_length=40, max_prompt_length=8)
    assert len(row.prompt) == 8
    assert max(map(len, row.responses)) == 32
    assert row.responses[0][-1] == row.responses[1][-1] == tokenizer.eos_token_id
    assert (counts.total("prompts_cut"), counts.total("responses_cut")) == (1, 1)


def test_drop_and_error(family, caplog):
    tokenizer, counts = family["shipped"], Counts()
    examples = [example(prompt="a" * n, uid=f"d/train:{n}") for n in (3, 40, 5)]
    rows = rows_of(examples, tokenizer, counts, max_length=24, max_prompt_length=8, truncation="drop")
    assert [row.uid for row in rows] == ["d/train:3", "d/train:5"]
    assert counts.to_dict() == {"examples": {"d": 3}, "rows": {"d": 2}, "dropped": {"d": 1}}
    with pytest.raises(
        UserError, match="d/train:40: prompt of 41 and response of 14 tokens exceed max_length=24"
    ):
        rows_of(examples, tokenizer, max_length=24, max_prompt_length=8, truncation="error")


def test_the_counts_add_up_to_the_data(family):
    @given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.sampled_from("ab")), max_size=8))
    @settings(max_examples=40, deadline=None)
    def check(shapes):
        examples = [
            Example(f"u{i}", "p" * n, (("target", "r" * m),), g) for i, (n, m, g) in enumerate(shapes)
        ]
        for truncation in ("drop", "keep_end"):
            counts = Counts()
            limits = {"max_length": 20, "max_prompt_length": 9, "truncation": truncation}
            rows = rows_of(examples, family["shipped"], counts, groups=("a", "b"), **limits)
            lost = counts.total("dropped") + counts.total("blank_targets")
            assert counts.total("rows") == len(rows)
            assert counts.total("examples") == len(examples) == len(rows) + lost
            for group in "ab":
                assert counts.by_group("examples").get(group, 0) == sum(g == group for _, _, g in shapes)

    check()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_prompt_length": 512}, "max_prompt_length=512.*below max_length=512"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"truncation": "keep_strat"}, "truncation=keep_strat.*did you mean 'keep_start'"),
        ({"bos": "sometimes"}, "data.bos=sometimes"),
        ({"mode": "both"}, "data.tokenize=both"),
    ],
)
def test_impossible_settings_are_named(change, says):
    with pytest.raises(UserError, match=says):
        Tokenization(**change)


# ---------------------------------------------------------------------------------------------- rows


def test_rows_carry_what_the_example_says(family):
    responses = (("chosen", "a"), ("aux_1", "b"), ("rejected", "c"), ("aux_1", "d"))
    given_ = Example(
        "d/train:7",
        "p",
        responses,
        "g2",
        0.5,
        {"p_chosen": np.float32(0.25)},
        {"preference": (0.1, 0.2, 0.3, 0.4)},
    )
    row = one_row(
        given_, family["shipped"], groups=("g1", "g2"), roles=["aux_1", "rejected"], optional_roles=["aux_1"]
    )
    assert (row.uid, row.group, row.weight, row.scalars) == ("d/train:7", 1, 0.5, {"p_chosen": 0.25})
    assert row.roles == ("aux_1", "rejected", "aux_1")
    assert [bytes(r[:-1].tolist()) for r in row.responses] == [b"b", b"c", b"d"]
    assert row.response_scalars == {"preference": (0.2, 0.3, 0.4)}


def test_pairs_of_a_prompt_share_one_read_only_array_and_key(family):
    examples = [example(uid="u0"), example(uid="u1", chosen="x"), example(prompt="other", uid="u2")]
    a, b, c = rows_of(examples, family["shipped"])
    assert a.prompt is b.prompt
    assert a.prompt_key == b.prompt_key != c.prompt_key
    with pytest.raises(ValueError, match="read-only"):
        a.prompt[0] = 1


def test_missing_roles_and_unknown_groups_name_the_row(family):
    tokenizer = family["shipped"]
    with pytest.raises(UserError, match="d/train:0: has 0 responses 'aux_1'"):
        rows_of(example(), tokenizer, roles=["chosen", "rejected", "aux_1"])
    rows_of(example(), tokenizer, roles=["chosen", "rejected", "aux_1"], optional_roles=["aux_1"])
    with pytest.raises(UserError, match=r"unknown group 'e'"):
        rows_of(example(group="e"), tokenizer)
    with pytest.raises(UserError, match="finished has 1 values for 2 responses"):
        rows_of(example(response_scalars={"finished": (1.0,)}), tokenizer)


def test_a_long_list_gives_the_same_rows_as_its_parts(family, monkeypatch):
    monkeypatch.setattr("preference_datasets.CHUNK", 3)
    examples = [example(prompt="p" * (i % 4 + 1), chosen="c" * i, uid=f"u{i}") for i in range(10)]
    rows = rows_of(examples, family["shipped"])
    for given_, row in zip(examples, rows, strict=True):
        alone = one_row(given_, family["shipped"])
        assert row.uid == alone.uid
        assert np.array_equal(row.prompt, alone.prompt)
        assert all(np.array_equal(a, b) for a, b in zip(row.responses, alone.responses, strict=True))


def test_without_counts_one_line_a_kind_is_logged(family, caplog):
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        tokenize([example(chosen="")], family["shipped"], Tokenization(), groups=["d"])
    assert [
        m
        for m in caplog.messages
        if "responses without text: EOS (and any white space) is scored: 1 (d 1)" in m
    ]
    assert len(caplog.messages) == 3


# ---------------------------------------------------------------------------------------------- prompts, SFT, batches


def test_prompts_for_generation_are_those_of_the_rows(tokenizer):
    examples = [
        example(uid="u0"),
        example(prompt=CHAT, uid="u1"),
        example(uid="u2"),
        example(prompt="x" * 400, uid="u3"),
    ]
    for limits in ({}, {"max_length": 32, "max_prompt_length": 12, "truncation": "keep_end"}):
        rows = rows_of(examples, tokenizer, **limits)
        prompts = render_prompts(examples, tokenizer, Tokenization(**limits))
        assert [prompt.uid for prompt in prompts] == ["u0", "u1", "u3"]
        assert [prompt.examples for prompt in prompts] == [(0, 2), (1,), (3,)]
        for prompt in prompts:
            for i in prompt.examples:
                assert prompt.key == rows[i].prompt_key
                assert np.array_equal(prompt.ids, rows[i].prompt)


def test_prompts_leave_room_for_what_will_be_generated(family):
    settings_ = Tokenization(max_length=30, max_prompt_length=10, truncation="keep_end")
    examples = [Example("u0", "abcdefghijklmnop", (), "d")]
    (whole,) = render_prompts(examples, family["shipped"], settings_, max_new_tokens=13)
    (cut,) = render_prompts(examples, family["shipped"], settings_, max_new_tokens=14)
    assert len(whole.ids) == 17
    assert bytes(cut.ids[1:].tolist()) == b"hijklmnop"
    dropping = Tokenization(max_length=30, max_prompt_length=10, truncation="drop")
    assert render_prompts(examples, family["shipped"], dropping, max_new_tokens=14) == []


def test_sft_on_chosen_takes_the_last_chosen_of_each_prompt():
    def pair(uid, prompt, chosen, group="d", **more):
        return Example(uid, prompt, (("chosen", chosen), ("rejected", "no")), group, 2.0, **more)

    finished = {"finished": (0.0, 1.0)}
    pairs = [
        pair("u0", "p", "a"),
        pair("u1", "p", "b", response_scalars=finished),
        pair("u2", "q", "a"),
        pair("u3", "q", "c", "e"),
        pair("u4", "q", "c"),
        pair("u5", "q", "d", "e"),  # groups that share a prompt may alternate
    ]
    made = sft_examples(pairs, "chosen")
    assert [(e.uid, e.responses, e.group) for e in made] == [
        ("u1", (("target", "b"),), "d"),
        ("u4", (("target", "c"),), "d"),
        ("u5", (("target", "d"),), "e"),
    ]
    assert made[0].response_scalars == {"finished": (0.0,)}
    assert made[0].weight == 2.0


def test_sft_on_all_takes_every_response_of_every_pair():
    responses = (("chosen", "a"), ("rejected", "b"), ("aux_1", "c"))
    pair = Example(
        "u0", "p", responses, "d", scalars={"p_chosen": 0.2}, response_scalars={"finished": (1.0, 0.0, 1.0)}
    )
    made = sft_examples([pair, pair], "all")
    assert [(e.uid, e.responses[0]) for e in made] == [
        ("u0/chosen", ("target", "a")),
        ("u0/rejected", ("target", "b")),
    ] * 2
    assert made[1].response_scalars == {"finished": (0.0,)}
    assert made[0].scalars == {}


def test_an_explicit_target_is_what_sft_on_chosen_imitates_and_sft_on_all_ignores():
    pair = (("chosen", "a"), ("rejected", "b"))
    pairs = [Example("u0", "p", pair, "d"), Example("u1", "p", (*pair, ("target", "best")), "d")]
    assert [(e.uid, e.responses) for e in sft_examples(pairs, "chosen")] == [("u1", (("target", "best"),))]
    assert [e.responses[0][1] for e in sft_examples(pairs, "all")] == ["a", "b", "a", "b"]


def test_sft_on_completions_keeps_them():
    completions = [Example(f"u{i}", "p", (("target", t),), "d") for i, t in enumerate("ab")]
    for on in ("chosen", "all"):
        assert [e.responses for e in sft_examples(completions, on)] == [
            (("target", "a"),),
            (("target", "b"),),
        ]
    pair = Example("u2", "p", (("chosen", "c"), ("rejected", "d")), "d")
    assert [e.uid for e in sft_examples([*completions, pair], "chosen")] == ["u0", "u1", "u2"]
    with pytest.raises(UserError, match="u0: has neither a target nor a chosen"):
        sft_examples([Example("u0", "p", (("rejected", "x"),), "d")], "chosen")
    with pytest.raises(UserError, match="sft_on=both"):
        sft_examples(completions, "both")


def test_the_batch_iterator_follows_the_plan(family):
    rows = rows_of([example(prompt=f"p{i}", uid=f"u{i}") for i in range(5)], family["shipped"])
    plan = Plan(rows, seed=0, batch_size=2, n_epochs=2)
    steps = list(get_batch_iterator(rows, plan))
    assert len(steps) == plan.num_steps == 6
    for step, (indices, batch) in enumerate(steps):
        assert np.array_equal(indices, plan.step_rows(step))
        assert batch.uids == tuple(rows[i].uid for i in indices)
    assert [b.uids for _, b in get_batch_iterator(rows, plan, first_step=4)] == [b.uids for _, b in steps[4:]]


def test_get_dataset_reads_with_the_module_of_the_settings(tmp_path):
    from data.local import Settings

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(20)))
    found = get_dataset("mine", Settings(path=str(path)))
    assert {e.group for e in found["train"]} == {"mine"}


@pytest.mark.slow
def test_thousands_of_rows_are_tokenised_in_a_second(family):
    examples = [
        example(prompt=CORPUS[1] + str(i // 2), chosen=f" {i} " + CORPUS[0], uid=str(i))
        for i in range(20_000)
    ]
    start = time.perf_counter()
    rows_of(examples, family["gpt2"])
    assert len(examples) / (time.perf_counter() - start) > 2000


def test_pairs_that_give_no_target_are_counted(tmp_path):
    from config.compose import compose
    from engine.models import load_tokenizer
    from run_data import load_data

    words = [
        "data.opinions.num_train=200",
        "data.opinions.num_test=20",
        "data.opinions.num_validation=20",
        "token_cache=null",
    ]
    for sft_on in ("chosen", "all"):
        run = compose([f"loss.sft_on={sft_on}", f"run_root={tmp_path}", *words])
        data = load_data(run, load_tokenizer(run.model))
        left_out = data.counts.total("repeated")
        assert left_out + data.counts.total("rows") == (240 if sft_on == "chosen" else 480)
        assert (left_out > 0) == (sft_on == "chosen")
