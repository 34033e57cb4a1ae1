"""Request bodies with prompts of an exact number of tokens, equal for equal seeds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.config import LoadSettings
    from rlgov.workload.load_plan import LoadPlan, PlannedRequest

FIRST_TOKEN_ID = 16  # below lie the special tokens of many vocabularies
PREFIX_STREAM = 2**32  # above every request's index: the common prefix has random numbers of its own
# Frequent short words: with the space before it, each is one token in the usual vocabularies.
_FREQUENT = (
    "the and for that with this from have are was not but they his her you all one out about who get "
    "which when make can like time just know take people into year good some could them see other "
    "than then now look only come over think also back after use two how our work first well way even "
    "new want because any"
)
WORDS = tuple(_FREQUENT.split())


class BodyBuilder:
    """Builds the JSON body of each request.

    All common prefixes are beginnings of one token sequence. A request's hit is therefore there once any
    earlier request had a prefix at least as long, and the part of each prompt after it is its own.

    Args:
        settings: The seed, the vocabulary and which API.
        model: The model's name.
        longest_prefix_tokens: Of all requests that will be built.
    """

    def __init__(self, settings: LoadSettings, model: str, longest_prefix_tokens: int) -> None:
        self._settings = settings
        self._model = json.dumps(model).encode()
        if settings.api == "chat":
            self._choices = len(WORDS)
        else:
            self._choices = settings.vocabulary - FIRST_TOKEN_ID
            # One row of bytes a token id, all of one width, so that a prompt of any length is one lookup.
            # JSON takes the spaces that pad the shorter ones.
            width = len(str(settings.vocabulary))
            ids = range(FIRST_TOKEN_ID, settings.vocabulary)
            text = "".join(f"{token:>{width}}," for token in ids).encode()
            self._rows = np.frombuffer(text, dtype=np.uint8).reshape(self._choices, width + 1)
        self._prefix = self._draw(PREFIX_STREAM, longest_prefix_tokens)

    @classmethod
    def for_plan(cls, settings: LoadSettings, model: str, plan: LoadPlan) -> BodyBuilder:
        """A builder for every request of a plan."""
        return cls(settings, model, int(plan.prefix_tokens.max()))

    def _draw(self, stream: int, tokens: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._settings.seed, stream]).integers(0, self._choices, tokens)

    def build(self, request: PlannedRequest) -> bytes:
        """The body of one request."""
        own = self._draw(request.index, request.prompt_tokens - request.prefix_tokens)
        drawn = np.concatenate([self._prefix[: request.prefix_tokens], own])
        if self._settings.api == "chat":
            words = " ".join(WORDS[choice] for choice in drawn.tolist())
            prompt = b'"messages":[{"role":"user","content":' + json.dumps(words).encode() + b"}]"
        else:
            prompt = b'"prompt":[' + self._rows[drawn].tobytes()[:-1] + b"]"
        length = request.output_tokens
        head = (
            b'{"model":' + self._model + b',"stream":true,"stream_options":{"include_usage":true},'
            b'"temperature":0,"ignore_eos":true,'
        )
        return head + b'"max_tokens":%d,"min_tokens":%d,%b}' % (length, length, prompt)
