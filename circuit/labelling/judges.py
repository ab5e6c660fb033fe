"""Who answers a prompt: a chat model on this machine, or an endpoint that speaks OpenAI's protocol.

Nothing is asked of any endpoint unless the user names one; its key comes from the environment and is written nowhere.
Answers are kept by content (model, settings, prompt), so that the same question is never paid for twice and a run
that was cut off goes on where it stopped.
"""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...data.errors import UserError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LONGEST_WAIT = 60.0


class AnswerFile:
    """Answers by content, one JSON line each; a line that was cut off is left out."""

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.known: dict[str, str] = {}
        self.lock = threading.Lock()
        if self.path is not None and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            for line in lines:
                try:
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue

    @staticmethod
    def key(*parts: str) -> str:
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def add(self, key: str, answer: str) -> None:
        with self.lock:
            self.known[key] = answer
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("\n" * self._cut_off() + json.dumps({"key": key, "answer": answer}) + "\n")

    def _cut_off(self) -> bool:
        """Whether the file ends in the middle of a line, as it does after a kill."""
        assert self.path is not None
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


class LocalJudge:
    """Any causal chat model that transformers loads, decoding greedily."""

    def __init__(self, model: Any, tokenizer: Any, name: str, answers: AnswerFile, longest: int = 32, batch: int = 8):
        if tokenizer is None:
            raise UserError(f"{name} has no tokenizer, so it cannot be asked anything")
        self.model, self.tokenizer, self.name, self.answers = model.eval(), tokenizer, name, answers
        self.longest, self.batch = longest, batch
        self.chat = bool(getattr(tokenizer, "chat_template", None))

    def ask(self, prompts: Sequence[str]) -> Iterator[str | None]:
        keys = [AnswerFile.key("local", self.name, str(self.longest), prompt) for prompt in prompts]
        new = [i for i, key in enumerate(keys) if key not in self.answers.known]
        new.sort(key=lambda i: len(prompts[i]))  # alike lengths together: less padding
        for start in range(0, len(new), self.batch):
            part = new[start : start + self.batch]
            for i, answer in zip(part, self._generate([prompts[i] for i in part]), strict=True):
                self.answers.add(keys[i], answer)
        yield from (self.answers.known[key] for key in keys)

    @torch.no_grad()
    def _generate(self, prompts: list[str]) -> list[str]:
        ids = [self._tokens(prompt) for prompt in prompts]
        width, pad = max(map(len, ids)), self.tokenizer.pad_token_id or 0
        tokens_BT = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=self.model.device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.model.device)
        made_BT = self.model.generate(
            input_ids=tokens_BT, attention_mask=mask_BT, max_new_tokens=self.longest, do_sample=False, pad_token_id=pad
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in made_BT[:, width:]]

    def _tokens(self, prompt: str) -> list[int]:
        if not self.chat:
            return list(self.tokenizer.encode(prompt))
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))


@dataclass
class Budget:
    """What may be spent; 0 is no limit. Money needs prices, which the user states."""

    tokens: int = 0
    money: float = 0.0
    price_in: float = 0.0
    """For a million tokens of prompt."""
    price_out: float = 0.0
    spent_in: int = 0
    spent_out: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def spent(self) -> float:
        return (self.spent_in * self.price_in + self.spent_out * self.price_out) / 1e6

    def reserve(self, tokens_in: int, tokens_out: int) -> bool:
        """Book the most that a question can cost before it is asked; False where that is too much."""
        with self.lock:
            self.spent_in, self.spent_out = self.spent_in + tokens_in, self.spent_out + tokens_out
            over = bool(self.tokens) and self.spent_in + self.spent_out > self.tokens
            over = over or (self.money > 0 and self.spent > self.money)
            if over:
                self.spent_in, self.spent_out = self.spent_in - tokens_in, self.spent_out - tokens_out
            return not over

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        with self.lock:
            self.spent_in += used[0] - reserved[0]
            self.spent_out += used[1] - reserved[1]


class EndpointJudge:
    """An OpenAI-compatible `chat/completions`, asked by several threads at once."""

    def __init__(
        self,
        url: str,
        model: str,
        key_name: str,
        answers: AnswerFile,
        budget: Budget,
        longest: int = 32,
        concurrency: int = 8,
        tries: int = 5,
        timeout: float = 60.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"labels.url: {url!r} is no address; it begins with http:// or https://")
        self.url, self.model, self.name = url.rstrip("/") + "/chat/completions", model, model
        self._key = os.environ.get(key_name, "") if key_name else ""
        if key_name and not self._key:
            raise UserError(f"the environment has no {key_name}: export the endpoint's key, or labels.key='' for none")
        self.answers, self.budget = answers, budget
        self.longest, self.concurrency, self.tries, self.timeout = longest, concurrency, tries, timeout
        self.failures: dict[str, int] = {}
        """Why questions stayed without an answer, and how many."""

    def ask(self, prompts: Sequence[str]) -> Iterator[str | None]:
        with ThreadPoolExecutor(self.concurrency) as pool:
            yield from pool.map(self._one, prompts)

    def _one(self, prompt: str) -> str | None:
        key = AnswerFile.key("endpoint", self.url, self.model, str(self.longest), prompt)
        if key in self.answers.known:
            return self.answers.known[key]
        reserved = (len(prompt.encode()) // 2 + 16, self.longest)
        if not self.budget.reserve(*reserved):
            return self._failed("the budget is spent")
        try:
            body = self._sent(prompt)
            answer = body["choices"][0]["message"]["content"]
            if not isinstance(answer, str):
                raise KeyError("content")
            usage = body.get("usage") or {}
            used = (int(usage.get("prompt_tokens", reserved[0])), int(usage.get("completion_tokens", reserved[1])))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return self._failed("an answer that is not of the protocol")
        except _GaveUp as error:
            self.budget.settle(reserved, (0, 0))
            return self._failed(str(error))
        self.budget.settle(reserved, used)
        self.answers.add(key, answer)
        return answer

    def _sent(self, prompt: str) -> dict[str, Any]:
        content = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        data = json.dumps(content | {"max_tokens": self.longest}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        why = ""
        for attempt in range(self.tries):
            wait = min(LONGEST_WAIT, 0.5 * 2**attempt)
            try:
                request = urllib.request.Request(self.url, data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                if error.code not in RETRIED:
                    raise _GaveUp(why) from error
                told = error.headers.get("Retry-After", "")
                wait = min(LONGEST_WAIT, float(told)) if told.replace(".", "", 1).isdigit() else wait
            except (OSError, ValueError, http.client.HTTPException) as error:  # time-outs, resets, half an answer
                why = f"{type(error).__name__}"
            if attempt + 1 < self.tries:
                time.sleep(wait)
        raise _GaveUp(f"{why} after {self.tries} tries")

    def _failed(self, why: str) -> None:
        with self.budget.lock:
            self.failures[why] = self.failures.get(why, 0) + 1


class _GaveUp(Exception):
    """The endpoint did not answer, and why."""
