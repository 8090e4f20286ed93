"""A conversation's state: which inputs its turns carry, what a mistake or an interrupt leaves behind."""

import io
from collections.abc import Callable

import pytest
import torch

from model_fusion.errors import InputError
from model_fusion.fuse.chat import ChatSession, converse
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.model import FusedModel

SCHEMA = InputSchema((Field("left", "float", 0, 10), Field("right", "float", 0, 10)))


def opinion(items: list) -> list:
    return [[sum(item), 10 - sum(item)] for item in items]


@pytest.fixture(scope="module")
def fused() -> FusedModel:
    experts = {
        name: Expert.from_callable(opinion, SCHEMA, output="logits", classes=("low", "high")) for name in ("one", "two")
    }
    return FusedModel.build("smollm2", experts=experts, bridge="gated", dtype=torch.float32)


@pytest.fixture
def session(fused: FusedModel) -> ChatSession:
    return ChatSession(fused, max_new_tokens=3)


def say(session: ChatSession, line: str) -> str:
    return "".join(session.handle(line))


def user(session: ChatSession) -> list[str]:
    return [m["content"] for m in session.messages if m["role"] == "user"]


def test_the_next_message_carries_an_input_and_later_ones_do_not(session: ChatSession) -> None:
    say(session, "/expert one 1 2")
    say(session, "Low?")
    say(session, "Sure?")
    say(session, "/expert one 3 4")
    say(session, "/expert two 5 6")
    say(session, "And <|two|> now?")
    assert user(session) == ["<|one|> Low?", "Sure?", "<|one|> And <|two|> now?"]
    assert session.given == {"one": [(1.0, 2.0), (3.0, 4.0)], "two": [(5.0, 6.0)]}
    say(session, "/reset")
    say(session, "Low?")
    assert user(session) == ["<|one|> <|two|> Low?"]


def test_what_is_streamed_is_what_the_model_answers(fused: FusedModel, session: ChatSession) -> None:
    say(session, "/expert one 1 2")
    text = say(session, "Tell me: low or high?")
    assert text.strip() == fused.answer(["<|one|> Tell me: low or high?"], [{"one": (1, 2)}], max_new_tokens=3)[0]
    assert session.messages[-1] == {"role": "assistant", "content": text.strip()}
    # With the bridge off it is the plain LLM, and the placeholder is gone from what it reads.
    say(session, "/reset")
    say(session, "/off")
    with fused.bridge_off():
        plain = fused.answer(["What is the capital of France?"], max_new_tokens=3)[0]
    assert say(session, "What is the capital of France?").strip() == plain
    assert user(session) == ["What is the capital of France?"]


def test_a_mistake_leaves_the_conversation_as_it_was(session: ChatSession) -> None:
    say(session, "Hello")
    before = (list(session.messages), dict(session.given))
    for line in ("<|one|> High?", "<|onn|> High?", "/expert one 1", "/expert three 1 2", "/expert", "/what"):
        with pytest.raises(InputError):
            say(session, line)
    session.max_new_tokens = 100_000
    with pytest.raises(InputError, match="/reset, or start chat with a smaller"):
        say(session, "Hello again")
    assert (session.messages, session.given) == before


def test_leaving_an_answer_stops_it(fused: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session, steps, forward = ChatSession(fused, max_new_tokens=200), [], fused.base.forward

    def counted(*args: object, **kwargs: object) -> object:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(fused.base, "forward", counted)
    reply = session.handle("Count from one to one hundred, please.")
    next(piece for piece in reply if piece)
    reply.close()  # type: ignore[attr-defined]
    assert len(steps) < 100
    assert session.messages == []


def test_an_error_in_the_generating_thread_is_raised_here(
    fused: FusedModel, session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise InputError("broken")

    monkeypatch.setattr(FusedModel, "generate", broken)
    with pytest.raises(InputError, match="broken"):
        say(session, "Hello")


@pytest.mark.parametrize("ending", ["/quit\nnever read\n", ""])
def test_converse_reads_to_the_end(session: ChatSession, ending: str) -> None:
    out, errors = io.StringIO(), io.StringIO()
    converse(session, io.StringIO(f"/help\n\n/expert one 1 x\n{ending}"), out, errors)
    assert "/expert   NAME VALUES" in out.getvalue()
    assert errors.getvalue().count("\n") == 1
    assert "never" not in out.getvalue()


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    handle: Callable = session.handle

    def interrupted(line: str) -> object:
        if line == "Hello":
            yield "He"
            raise KeyboardInterrupt
        yield from handle(line)

    monkeypatch.setattr(session, "handle", interrupted)
    out = io.StringIO()
    converse(session, io.StringIO("Hello\n/quit\n"), out)
    assert out.getvalue() == "He (stopped)\nbye\n"
