"""A conversation with a fused model: turns, expert inputs, commands. It reads lines and yields text as it comes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, TextIO

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from model_fusion.errors import InputError, ModelFusionError
from model_fusion.fuse.ask import generation, without
from model_fusion.fuse.data import checked_inputs
from model_fusion.fuse.inputs import known, parse_item
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.placeholders import PLACEHOLDER, placeholder
from model_fusion.recipe.reading import nearest

COMMANDS = {
    "/expert": "NAME VALUES: set an expert's input, in words or JSON; your next message carries it",
    "/experts": "list the experts, their inputs and what is set",
    "/off": "switch the bridge off: the plain LLM answers",
    "/on": "switch the bridge on again",
    "/reset": "forget the conversation; expert inputs stay set",
    "/help": "this list",
    "/quit": "leave",
}


class ChatSession:
    """The state of one conversation. `handle(line)` yields the reply to a command or a message, piece by piece.

    An input set by `/expert` is read wherever a message has the expert's placeholder; the first message after
    `/expert` that has none gets it in front.
    """

    def __init__(
        self, fused: FusedModel, *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> None:
        self.fused, self.max_new_tokens = fused, max_new_tokens
        self.options = generation(max_new_tokens, temperature)
        torch.manual_seed(seed)  # once for the whole conversation
        self.schemas = {name: expert.inputs for name, expert in fused.experts.items()}
        self.messages: list[dict[str, str]] = []
        self.given: dict[str, list[Any]] = {name: [] for name in self.schemas}
        """The items that the placeholders of `messages` stand for, in order."""
        self.inputs: dict[str, Any] = {}
        self.fresh: set[str] = set()
        """Experts whose input no message has carried yet."""
        self.bridge_on = True
        self.ended = False

    def handle(self, line: str) -> Iterator[str]:
        """The reply to one line. Raises InputError, which leaves the conversation as it was."""
        if line.startswith("/"):
            yield self._command(line)
        elif line.strip():
            yield from self._turn(line.strip())

    def _command(self, line: str) -> str:
        word, _, rest = line.strip().partition(" ")
        if word not in COMMANDS:
            raise InputError(f"unknown command {word}; {nearest(word, COMMANDS)}")
        if word == "/expert":
            return self._set(rest.strip())
        if word == "/experts":
            return "\n".join(self._shown(name) for name in self.schemas)
        if word in ("/on", "/off"):
            self.bridge_on = word == "/on"
            return f"the bridge is {word[1:]}"
        if word == "/reset":
            self.messages, self.fresh = [], set(self.inputs)
            self.given = {name: [] for name in self.schemas}
            return "the conversation starts afresh"
        self.ended = word == "/quit"
        return "bye" if self.ended else "\n".join(f"{name:9} {text}" for name, text in COMMANDS.items())

    def _set(self, rest: str) -> str:
        name, _, words = rest.partition(" ")
        if not name:
            raise InputError("/expert: write /expert NAME VALUES; /experts lists the names")
        self.inputs[name] = parse_item(name, known(name, self.schemas), words.strip())
        self.fresh.add(name)
        return self._shown(name)

    def _shown(self, name: str) -> str:
        value = " ".join(str(self.inputs[name]).split()) if name in self.inputs else "not set"
        return f"{placeholder(name)} {self.schemas[name]}: {value}"

    def _turn(self, text: str) -> Iterator[str]:
        written = PLACEHOLDER.findall(text)
        lead = "".join(f"{placeholder(n)} " for n in self.schemas if n in self.fresh and n not in written)
        if self.bridge_on:
            text = lead + text
        used = [name for name in PLACEHOLDER.findall(text) if name in self.schemas]
        for name in used:
            if name not in self.inputs:
                raise InputError(f"{placeholder(name)} has no input yet: set it with /expert {name} VALUES")
        given = {name: list(items) for name, items in self.given.items()}
        for name in used:
            given[name].append(self.inputs[name])
        messages = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        for piece in self._stream(messages, given):
            pieces.append(piece)
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]
        self.given = given
        self.fresh -= set(used)

    def _stream(self, messages: list[dict[str, str]], given: dict[str, list[Any]]) -> Iterator[str]:
        """Words of the answer while it is generated, in a thread of its own; leaving early stops it."""
        fused = self.fused
        if not self.bridge_on:
            messages, given = [{**m, "content": without(m["content"], fused)} for m in messages], {}
        inputs = {name: items if len(items) > 1 else items[0] for name, items in given.items() if items}
        checked_inputs(" ".join(m["content"] for m in messages), inputs, self.schemas)
        self._check_length(messages, inputs)
        streamer = TextIteratorStreamer(fused.tokenizer, skip_prompt=True, skip_special_tokens=True)
        leave, failed = threading.Event(), []

        def work() -> None:
            try:
                stop = StoppingCriteriaList([_Leaving(leave)])
                fused.answer([messages], [inputs], streamer=streamer, stopping_criteria=stop, **self.options)
            except Exception as error:  # handed to the reader's thread, which raises it
                failed.append(error)
                streamer.on_finalized_text("", stream_end=True)

        with nullcontext() if self.bridge_on else fused.bridge_off():
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            try:
                yield from streamer
            finally:
                leave.set()
                thread.join()
        if failed:
            raise failed[0]

    def _check_length(self, messages: list[dict[str, str]], inputs: dict[str, Any]) -> None:
        length = len(self.fused.processor.encode([messages], [inputs])[0].ids)
        if (limit := self.fused.context) and length + self.max_new_tokens > limit:
            raise InputError(
                f"the conversation has {length} tokens and the answer may take {self.max_new_tokens}, the LLM reads "
                f"{limit}: /reset, or start chat with a smaller --max-new-tokens"
            )


class _Leaving(StoppingCriteria):
    """Stops a generation whose reader has left."""

    def __init__(self, leave: threading.Event) -> None:
        self.leave = leave

    def __call__(self, input_ids: torch.Tensor, scores: Any, **ignored: Any) -> Any:
        return torch.full((len(input_ids),), self.leave.is_set(), dtype=torch.bool, device=input_ids.device)


def converse(session: ChatSession, lines: TextIO, out: TextIO, errors: TextIO | None = None) -> None:
    """Read lines until they end or `/quit`; replies go to `out`, mistakes as one line to `errors`.

    Ctrl-C stops the answer being written; at the prompt it leaves.
    """
    errors = errors or sys.stderr
    asks = lines.isatty()
    while not session.ended:
        if asks:
            print("> ", end="", file=out, flush=True)
        line = lines.readline()
        if not line:
            return
        reply = session.handle(line.rstrip("\n"))
        try:
            written = False
            for piece in reply:
                print(piece, end="", file=out, flush=True)
                written = True
            if written:
                print(file=out, flush=True)
        except ModelFusionError as error:
            print(f"error: {' '.join(str(error).split())}", file=errors, flush=True)
        except KeyboardInterrupt:
            reply.close()  # type: ignore[attr-defined]
            print(" (stopped)", file=out, flush=True)
