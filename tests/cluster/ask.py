"""Many users at once, on one of the hosts: `python -m tests.cluster.ask` reads questions as JSON and prints the answers.

A process of its own, since a test itself is on none of the hosts.
"""

import asyncio
import sys
from pathlib import Path

import msgspec
from sollol.client import Client, Message, Sampling
from sollol.errors import SollolError
from sollol.inference import Piece

TOKENS = 24


class Question(msgspec.Struct, frozen=True):
    """A chat for `model`, which loads it first when it is cold; to the head at `head` (host:port)."""

    head: str
    model: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`reason` is empty for an answer that came to its end."""

    model: str
    head: str
    text: str = ""
    reason: str = ""
    message: str = ""
    numbers: dict[str, int] = {}


async def _answer(client: Client, question: Question) -> Answer:
    text = ""
    try:
        user = [Message("user", "Who are you?")]
        async for event in client.chat(question.model, user, Sampling(temperature=0, max_tokens=TOKENS)):
            if isinstance(event, Piece):
                text += event.text
    except SollolError as error:
        no = error.refusal
        return Answer(
            model=question.model, head=question.head, text=text,
            reason=no.reason.value, message=no.message, numbers=no.numbers,
        )  # fmt: skip
    return Answer(model=question.model, head=question.head, text=text)


async def _answers(questions: list[Question]) -> list[Answer]:
    tls_dir = Path(sys.argv[1]) if sys.argv[1:] and sys.argv[1] else None
    clients = {question.head: Client(question.head, tls_dir=tls_dir) for question in questions}
    for client in clients.values():
        await client.__aenter__()
    try:
        return await asyncio.gather(*(_answer(clients[question.head], question) for question in questions))
    finally:
        for client in clients.values():
            await client.__aexit__()


def main() -> None:
    questions = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Question])
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(_answers(questions))))


if __name__ == "__main__":
    main()
