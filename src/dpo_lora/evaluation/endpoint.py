"""One question to a chat model behind an OpenAI-compatible endpoint, patiently."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from dpo_lora.errors import UserError

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds


class NoAnswerError(RuntimeError):
    """The endpoint gave no usable answer within the tries it was given."""


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is. The key comes from the environment and is never written anywhere."""

    base_url: str  # up to and including /v1
    model: str
    key: str | None
    timeout: float = 60.0  # seconds
    tries: int = 5
    pause: Callable[[float], None] = time.sleep

    def ask(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """The reply's ``text`` and ``usage`` (prompt_tokens, completion_tokens; 0 where it is not told).

        Rate limits (429) wait as long as the server asks, server errors, time-outs and broken JSON
        twice as long each time.

        Raises:
            UserError: the endpoint refuses the request itself: a wrong key, model or address.
            NoAnswerError: every try failed.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = Request(f"{self.base_url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        trouble = ""
        for attempt in range(self.tries):
            wait = min(2.0**attempt, LONGEST_WAIT)
            try:
                with urlopen(request, timeout=self.timeout) as reply:
                    return _read(reply.read())
            except HTTPError as error:
                trouble = f"{error.code} {error.reason}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    detail = error.read(500).decode("utf-8", "replace")
                    raise UserError(
                        f"The judge at {self.base_url} refuses model {self.model}: {trouble}. {detail}"
                    ) from error
                wait = _asked_wait(error.headers.get("Retry-After"), wait)
            except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
                trouble = str(error) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError) as error:
                trouble = f"not a chat completion: {error!r}"
            if attempt + 1 < self.tries:
                log.info("The judge: %s; again in %.0f s.", trouble, wait)
                self.pause(wait)
        raise NoAnswerError(f"The judge at {self.base_url} gave no answer in {self.tries} tries; the last: {trouble}.")


def _read(raw: bytes) -> dict[str, Any]:
    reply = json.loads(raw)
    text = reply["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("no text in the message")
    usage = reply.get("usage") or {}
    return {"text": text, "usage": {k: int(usage.get(k) or 0) for k in ("prompt_tokens", "completion_tokens")}}


def _asked_wait(header: str | None, otherwise: float) -> float:
    try:
        return min(max(float(header or ""), 0.0), LONGEST_WAIT)
    except ValueError:  # none, or a date
        return otherwise
