"""Text -> token ids by a tokenizer's own rules, in which no text is ever taken for a special token."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers
from jinja2 import TemplateError
from tokenizers import Tokenizer

from data.schema import Message, Text
from utils import UserError, log


def _names(kind: str, words: Sequence[str]) -> dict[str, str]:
    """word -> a name that no text contains by accident; lower-case ASCII, which every normaliser leaves alone."""
    return {word: f"<{hashlib.sha256(kind.encode()).hexdigest()[:24]}-{i}>" for i, word in enumerate(words)}


@functools.lru_cache(maxsize=2)
def _private_copy(backend: str, names: tuple[tuple[str, str], ...]) -> Tokenizer:
    """The tokenizer (its JSON) with special tokens renamed, in the list of added tokens and in the model's vocabulary.

    Ids do not change, and the literal text of a special token is text like any other: no added token matches it, and a
    Unigram or word-level model no longer has it as a piece (``split_special_tokens=True`` of transformers 5.23 leaves
    it there). The rest of the pipeline, white space and all, is the tokenizer's own.
    """
    name = dict(names)
    state = json.loads(backend)
    state["truncation"] = state["padding"] = state["post_processor"] = None
    for token in state["added_tokens"]:
        token["content"] = name.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:  # Unigram: [[piece, score], ...]
        model["vocab"] = [[name.get(piece, piece), score] for piece, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = name.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


class Codec:
    """A tokenizer's rules for BOS, EOS and chats, and an encoder that never takes text for a special token."""

    def __init__(self, tokenizer: Any, bos: str) -> None:
        self.tokenizer = tokenizer
        self.label = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {self.label}: has no tokenizer.json; save a fast tokenizer first")
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {self.label}: has no EOS token; set its eos_token")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
            log.info("tokenizer %s has no pad token: using its EOS, %s", self.label, tokenizer.eos_token)
        self.eos: int = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        words = sorted(special, key=lambda word: (-len(word), word))  # where several match, the longest wins
        self.secret = _names("a special token of the template", words)
        self.quote = _names("a special token quoted in the text", words)
        self._words = re.compile("|".join(map(re.escape, words)))
        self._unquote = {name: word for word, name in self.quote.items()}
        self._quoted = re.compile("|".join(map(re.escape, self._unquote)))
        self._mark = _names("where a response ends", [""])[""]
        reserved = (self.secret[words[0]], self.quote[words[0]], self._mark)
        self._reserved = [name.removesuffix("-0>") for name in reserved]
        self._backend = _private_copy(tokenizer.backend_tokenizer.to_str(), tuple(self.secret.items()))
        for word, name in self.secret.items():
            assert self._backend.token_to_id(name) == tokenizer.convert_tokens_to_ids(word), word
        self._set_bos(bos)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able: what the ids of a text depend on, but for this code and the settings."""
        tokenizer = self.tokenizer
        return {
            "class": type(tokenizer).__name__,
            "backend": tokenizer.backend_tokenizer.to_str(),
            "special": tokenizer.all_special_tokens,
            "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
            "chat_template": tokenizer.chat_template,
            "versions": [transformers.__version__, tokenizers.__version__],
        }

    def _set_bos(self, bos: str) -> None:
        plain = self.tokenizer.encode("a", add_special_tokens=False)
        ruled = self.tokenizer.encode("a", add_special_tokens=True)
        starts = (i for i in range(len(ruled)) if ruled[i : i + len(plain)] == plain)
        own = ruled[: next(starts, 0)]  # what the tokenizer itself puts before a text
        bos_id = self.tokenizer.bos_token_id
        self._head = own or ([] if bos_id is None else [bos_id])
        if bos == "always" and not self._head:
            raise UserError(f"data.bos=always: tokenizer {self.label} has no BOS token; use data.bos=auto")
        self._always, self._never = bos == "always" or (bos == "auto" and bool(own)), bos == "never"

    def split_head(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """(BOS or nothing, the rest) of a rendered prompt, whatever the chat template put there."""
        size = len(self._head)
        found = 0
        while size and ids[found : found + size] == self._head:
            found += size
        wanted = self._always or (found > 0 and not self._never)
        return self._head if wanted else [], ids[found:]

    def encode(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """text -> ids, no BOS or EOS; only the secret names give special ids."""
        distinct = list(dict.fromkeys(texts))
        encoded = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        return {text: one.ids for text, one in zip(distinct, encoded, strict=True)}

    def quotes_special(self, text: Text) -> bool:
        """Whether the text contains the literal text of a special token."""
        parts = [text] if isinstance(text, str) else [message["content"] for message in text]
        return any(self._words.search(part) for part in parts)

    def check(self, uid: str, text: str) -> str:
        """The text, if it can be encoded."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{uid}: lone surrogate at character {error.start}; mend the row") from None
        if any(name in text for name in self._reserved):
            raise UserError(f"{uid}: contains a name reserved here, one of {self._reserved}; remove it")
        return text

    def render(self, uid: str, messages: Sequence[Message], generate: bool) -> str:
        """The chat as text in which the template's special tokens have their secret names, and quoted ones are text."""
        if not messages:
            raise UserError(f"{uid}: the prompt has no messages; remove the row")
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{uid}: tokenizer {self.label} has no chat template for messages; use plain text"
            )
        for message in messages:
            self.check(uid, message["content"])
        return self._rendered(uid, messages, generate)

    def _rendered(self, uid: str, messages: Sequence[Message], generate: bool) -> str:
        safe = [
            {**m, "content": self._words.sub(lambda found: self.quote[found[0]], m["content"])}
            for m in messages
        ]
        try:
            text = self.tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise UserError(f"{uid}: the chat template of {self.label} says: {error}") from error
        text = self._words.sub(lambda found: self.secret[found[0]], text)
        return self._quoted.sub(lambda found: self._unquote[found[0]], text)

    def chat_response(
        self, uid: str, prompt: str, chat: Sequence[Message], added: Sequence[Message], finished: bool
    ) -> str:
        """What the response adds to the rendered prompt, without the EOS that may end it.

        A response that was cut while it was generated also loses what the template writes after its text.
        """
        whole = self.render(uid, (*chat, *added), False)
        if not whole.startswith(prompt):
            raise UserError(
                f"{uid}: the rendered prompt is no prefix of the rendered dialogue, so the template of {self.label} "
                "gives no exact boundary; use another chat template"
            )
        body = whole[len(prompt) :]
        if finished:
            eos = self.secret[self.tokenizer.eos_token]
            ended = body.rstrip()  # templates write a line feed after the EOS of a turn
            return ended.removesuffix(eos) if ended.endswith(eos) else body
        # where its text ends: the rendering of any other text has the same tail
        marked = (*chat, *added[:-1], {**added[-1], "content": self._mark})
        tail = self._rendered(uid, marked, False).rpartition(self._mark)[2]
        if not body.endswith(tail):
            raise UserError(f"{uid}: the template of {self.label} hides where the unfinished response ends")
        return body.removesuffix(tail)
