"""A seeded generator of everything the demo model reads: little stories and question-answer chats.

It knows how stories and questions are mixed into documents. It knows nothing of tokens, files or
training. Standard library only, so that a student can run it and read what comes out:

    python notebooks/demo_model/corpus.py            # a few stories and chats

The words are in world.py, the plots in stories.py, the questions in questions.py. A document is
either a story (a plain string) or a chat (a list of messages in the usual `{"role": ..., "content":
...}` form, which the model's own chat template renders).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from questions import about_story, ask
from stories import draw_world, story, tell
from world import ANIMALS, World, a, draw_character, invented

Message = dict[str, str]
SYSTEM = ["You are a helpful assistant.", "You tell little stories.", "Answer in short sentences.",
          "You are a kind helper.", "You are a teacher for children."]  # fmt: skip
REQUESTS = ["Tell me a story", "Tell me a story", "Tell me a short story", "Write a story",
            "Can you tell me a story", "Please tell me a story", "Tell a story"]  # fmt: skip


def story_request(rng: random.Random) -> tuple[str, World]:
    """A request for a story, and a world that keeps what it asks for."""
    lead = rng.choice(REQUESTS)
    kind = invented(rng) if rng.random() < 0.05 else rng.choice(ANIMALS + ["boy", "girl"] * 3)
    form = rng.randrange(7)
    if form == 0:
        world, about = draw_world(rng), ""
    elif form == 1:
        other = rng.choice(ANIMALS)
        world = draw_world(rng, kind=kind, friend_kind=other)
        about = f" about {a(kind)} and {a(other)}"
    elif form == 2:
        plot = rng.choice(("lost", "stuck", "broken", "turns"))
        world = draw_world(rng, plot=plot, kind=kind)
        about = f" about {a(kind)} and {a(rng.choice(('', world.colour + ' ')) + world.thing)}"
    elif form == 3:
        world = draw_world(rng)
        about = f" about {a(world.hero.kind)} named {world.hero.name}"
    else:
        world = draw_world(rng, kind=kind)
        about = f" about {a(kind)}"
    return lead + about + ("?" if lead.startswith("Can") else "."), world


def typed(rng: random.Random, question: str) -> str:
    """People type as they like: now and then all in small letters, or without the last mark."""
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def chat(rng: random.Random) -> list[Message]:
    """A conversation of one to four turns."""
    messages: list[Message] = []

    def say(question: str, answer: str) -> None:
        messages.append({"role": "user", "content": typed(rng, question)})
        messages.append({"role": "assistant", "content": answer})

    if rng.random() < 0.1:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    name = ""
    if rng.random() < 0.06:
        name = draw_character(rng).name
        say(rng.choice((f"My name is {name}.", f"Hello, I am {name}.", f"I am {name}.")),
            f"Hello, {name}! How can I help you?")  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        if rng.random() < 0.07:
            request, world = story_request(rng)
            say(request, tell(rng, world))
            if rng.random() < 0.4:
                turn = about_story(rng, world)
                say(turn.question, rng.choice(turn.answers))
        else:
            turn = ask(rng)
            say(turn.question, rng.choice(turn.answers))
    if name and rng.random() < 0.7:
        say(
            rng.choice(("What is my name?", "Do you know my name?", "Who am I?")),
            f"Your name is {name}.",
        )
    return messages


def documents(seed: int, only: Sequence[str] = ()) -> Iterator[str | list[Message]]:
    """An endless stream of documents: a story (a string) or a chat (a list of messages).

    A story is long and a question is short: one document in eight is a story, and yet about half of
    the words are in stories. `only` names kinds of question: then nothing else is drawn.
    """
    rng = random.Random(seed)
    while only:
        turn = ask(rng, rng.choice(only))
        yield [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": rng.choice(turn.answers)},
        ]
    while True:
        yield story(rng) if rng.random() < 0.125 else chat(rng)


if __name__ == "__main__":
    for number, document in zip(range(12), documents(seed=1), strict=False):
        print(f"--- {number}")
        if isinstance(document, str):
            print(document)
        else:
            print("\n".join(f"{message['role']}: {message['content']}" for message in document))
