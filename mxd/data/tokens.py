"""Turn documents into token ids. All text of the product is tokenised here."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from .readers import CHAT, DataError, first_line

logger = logging.getLogger(__name__)


def token_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each document, without special tokens around them.

    Text is text: where it spells a control token (BOS, EOS, PAD, a chat marker), it becomes the tokens of those
    characters. Only a BOS at its very start is dropped, since rows have their own. Chats, see `load_text`, keep the
    control tokens that the chat template writes.

    Raises:
        DataError: a document is a chat, and the tokenizer has no chat template, or one that refuses it.
    """
    bos = getattr(tokenizer, "bos_token", None) or CHAT
    texts = [document.removeprefix(bos) for document in documents if not document.startswith(CHAT)]
    plain = iter(_plain_ids(tokenizer, texts) if texts else [])
    return [
        _chat_ids(tokenizer, document[len(CHAT) :]) if document.startswith(CHAT) else next(plain)
        for document in documents
    ]


def without_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return token ids without a BOS at their start."""
    return ids[1:] if ids and ids[0] == tokenizer.bos_token_id else ids


def begin_of_row(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what a row of one document begins with: BOS, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def row_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text as a row: one BOS, if the tokenizer has one, and its `token_ids`."""
    return begin_of_row(tokenizer) + without_bos(tokenizer, token_ids(tokenizer, [text])[0])


def warn_of_unknown_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Warn if the tokenizer does not know most of a text: it is in another language or script than the model's."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id) and 2 * list(ids).count(unknown) > len(
        ids
    ):
        share = 100 * list(ids).count(unknown) / len(ids)
        logger.warning("%.0f %% of the tokens are unknown to the model's tokenizer: is the text what it reads?", share)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found = _call(tokenizer, texts, split_special_tokens=True)
    # Some tokenizers have no such argument, or their model knows the control tokens as words too.
    control = _control_tokens(tokenizer)
    numbers = set(control.values())
    for index, (text, ids) in enumerate(zip(texts, found, strict=True)):
        if not numbers.isdisjoint(ids) and len(parts := _broken(text, control)) > 1:
            found[index] = [token for part in _call(tokenizer, parts, split_special_tokens=True) for token in part]
    return found


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str], **split: bool) -> list[list[int]]:
    try:  # verbose=False: do not warn of a text longer than the model's context, which is cut later
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False, **split)
    except (TypeError, ValueError, NotImplementedError):  # takes only what it knows, as mistral-common's
        encoded = tokenizer(texts, add_special_tokens=False)
    return list(encoded["input_ids"])


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return {token: id} of the special tokens, and of the added tokens that the chat template writes."""
    template = getattr(tokenizer, "chat_template", None)
    added: dict[str, int] = tokenizer.get_added_vocab() if isinstance(template, str) else {}
    written = {token: number for token, number in added.items() if token in str(template) and not token.isspace()}
    special = zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()), strict=False)
    return {**dict(special), **written}


def _broken(text: str, control: Mapping[str, int]) -> list[str]:
    """Cut a text behind the first character of every control token in it; one part if it spells none."""
    spelled = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True) if len(token) > 1)
    ends = [match.start() + 1 for match in re.finditer(spelled, text)] if spelled else []
    return [text[begin:end] for begin, end in pairwise([0, *ends, len(text)])]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, chat: str) -> list[int]:
    messages = json.loads(chat)
    if isinstance(messages, str):  # templated already
        return _call(tokenizer, [messages], split_special_tokens=False)[0]
    # mistral-common's tokenizers take an answer at the end as one to continue, unless their mode is "finetuning".
    mode = getattr(tokenizer, "mode", None)
    open_end = mode not in (None, "finetuning") and messages[-1].get("role") == "assistant"
    how = {"continue_final_message": True} if open_end else {}
    # A message may spell a control token. transformers before 5.23 has no such argument, nor has mistral-common.
    spelled = any(token in chat for token in _control_tokens(tokenizer))
    try:
        try:
            sanitized = {"sanitize_control_tokens": True} if spelled else {}
            encoded: Any = tokenizer.apply_chat_template(messages, **how, **sanitized)
        except (TypeError, ValueError, NotImplementedError):
            encoded = tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # jinja's, and each tokenizer's own
        has_none = mode is None and getattr(tokenizer, "chat_template", None) is None
        reason = "has no chat template" if has_none else f"refuses a chat ({first_line(error)})"
        raise DataError(
            f"the text is chats (lists of messages), and the model's tokenizer {reason}: use an instruct model's, or "
            "name a column of text with --text-column"
        ) from error
    ids = list(encoded["input_ids"] if isinstance(encoded, Mapping) else encoded)
    return [*ids, tokenizer.eos_token_id] if open_end else ids
