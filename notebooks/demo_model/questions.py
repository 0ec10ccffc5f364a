"""Questions and their answers: one function per kind, each returning a `Turn`.

Everything a question is about is drawn, or comes from a table that can be read below; an answer is
computed from the same draw. Questions whose hash falls in one bucket of twenty are *held out*: no
training document contains them, and the accuracy in the model card is measured on them alone.
"""

# ruff: noqa: E501 - tables of questions read best one entry a line

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from stories import draw_world, tell
from world import (
    ANIMALS,
    BOYS,
    COLOURS,
    FOODS,
    GIRLS,
    HOMES,
    PLACES,
    THINGS,
    World,
    a,
    capital,
    draw_character,
    invented,
)  # fmt: skip


@dataclass
class Turn:
    """A question and the answers that count as right; `fact` is what a hold-out hashes, if set."""

    question: str
    answers: list[str]
    fact: str = ""


def held_out(text: str) -> bool:
    """True for one text in twenty, by its words alone: case and punctuation make no difference."""
    return zlib.crc32(" ".join(re.findall(r"[a-z0-9+*-]+", text.lower())).encode()) % 20 == 0


def is_held_out(turn: Turn) -> bool:
    return held_out(turn.question) or (bool(turn.fact) and held_out(turn.fact))


def pairs(text: str) -> dict[str, str]:
    """Reads "sky blue, grass green" as a mapping."""
    return dict(item.strip().rsplit(" ", 1) for item in text.split(","))


COLOUR_OF = pairs(
    "the sky blue, grass green, the sun yellow, snow white, a banana yellow, a strawberry red, "
    "a frog green, milk white, a lemon yellow, a tomato red, a cloud white, the night black, "
    "a pig pink, an elephant gray, chocolate brown, a leaf green, the sea blue, a carrot orange, "
    "a bear brown, a cherry red, a polar bear white, a pumpkin orange, a fire truck red, a swan white"
)
OPPOSITES = pairs(
    "big small, hot cold, day night, up down, happy sad, fast slow, old young, wet dry, open closed, "
    "full empty, hard soft, high low, light dark, long short, loud quiet, left right, in out, "
    "good bad, near far, clean dirty, rich poor, early late, strong weak, yes no, first last"
)
SOUNDS = pairs(
    "cow moo, dog woof, cat meow, sheep baa, duck quack, pig oink, horse neigh, lion roar, bee buzz, "
    "owl hoot, mouse squeak, hen cluck, frog ribbit, snake hiss, wolf howl, bird tweet"
)
LEGS = pairs(
    "dog 4, cat 4, cow 4, horse 4, spider 8, bird 2, duck 2, hen 2, bee 6, ant 6, fish 0, snake 0, "
    "frog 4, sheep 4, pig 4, person 2, lion 4, fly 6, penguin 2, rabbit 4, fox 4, bear 4"
)
BABIES = pairs(
    "dog puppy, cat kitten, cow calf, sheep lamb, horse foal, duck duckling, hen chick, bear cub, "
    "lion cub, frog tadpole, pig piglet, goat kid, deer fawn, fox cub"
)
LIVES_IN = {
    "fish": "in the water", "bird": "in a nest", "bee": "in a hive", "cow": "on a farm",
    "bear": "in a cave", "fox": "in a den", "rabbit": "in a burrow", "dog": "in a house",
    "penguin": "on the ice", "frog": "by a pond", "spider": "in a web", "monkey": "in a tree",
    "camel": "in the desert", "whale": "in the sea", "owl": "in a tree", "horse": "in a stable",
}  # fmt: skip
SIZES = (
    "ant bee mouse frog hen cat fox dog sheep pig deer lion bear cow horse elephant whale".split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
FACTS = {  # several ways to ask -> the answer
    "How many days are in a week? | How many days does a week have? | A week has how many days?": "A week has 7 days.",
    "How many months are in a year? | How many months does a year have? | A year has how many months?": "A year has 12 months.",
    "What do bees make? | What does a bee make? | What food comes from bees? | What do bees give us? | What do we get from bees?": "Bees make honey.",
    "What gives us milk? | Where does milk come from? | Which animal gives us milk?": "Milk comes from cows.",
    "What gives us eggs? | Where do eggs come from? | Which animal gives us eggs?": "Eggs come from hens.",
    "Where does wool come from? | What gives us wool? | Which animal gives us wool?": "Wool comes from sheep.",
    "What do plants need? | What does a plant need to grow? | What does a flower need? | What do flowers need to grow?": "Plants need water and sun.",
    "When do we sleep? | When do people sleep? | When is it time to sleep? | When do children sleep? | When should people go to sleep?": "We sleep at night.",
    "When does the sun shine? | When can we see the sun? | When is the sun in the sky?": "The sun shines in the day.",
    "When can we see the stars? | When do the stars shine? | When do stars come out?": "The stars shine at night.",
    "What is ice made of? | What is ice? | What do you get when water freezes?": "Ice is frozen water.",
    "What falls from the clouds? | What comes from the clouds? | Where does rain come from?": "Rain falls from the clouds.",
    "What do we use to see? | What do our eyes do? | What are eyes for? | What do we see with? | How do we see?": "We see with our eyes.",
    "What do we use to hear? | What do our ears do? | What are ears for? | What do we hear with? | How do we hear?": "We hear with our ears.",
    "What do we use to smell? | What does our nose do? | What is a nose for? | What do we smell with? | How do we smell? | What helps us to smell?": "We smell with our nose.",
    "What is bread made from? | What is bread made of? | How do we make bread?": "Bread is made from flour.",
    "Which season is the coldest? | What is the coldest season? | When is it very cold? | Is winter cold? | What season is the coldest?": "Winter is the coldest season.",
    "Which season is the hottest? | What is the hottest season? | When is it very hot? | Is summer hot? | What season is the hottest?": "Summer is the hottest season.",
    "How many fingers are on one hand? | How many fingers does a hand have? | How many fingers do you have on one hand?": "A hand has 5 fingers.",
    "How many wheels does a bike have? | How many wheels are on a bike? | A bike has how many wheels?": "A bike has 2 wheels.",
    "How many wheels does a car have? | How many wheels are on a car? | A car has how many wheels?": "A car has 4 wheels.",
    "How many sides does a square have? | How many sides are in a square? | A square has how many sides?": "A square has 4 sides.",
    "How many sides does a triangle have? | How many sides are in a triangle? | A triangle has how many sides?": "A triangle has 3 sides.",
    "Can a bird fly? | Can birds fly? | Is a bird able to fly?": "Yes, a bird can fly.",
    "Can a fish swim? | Can fish swim? | Is a fish able to swim?": "Yes, a fish can swim.",
    "Can a cow fly? | Can cows fly? | Is a cow able to fly?": "No, a cow cannot fly.",
    "Is the sun hot or cold? | Is the sun hot? | Is the sun cold?": "The sun is hot.",
    "Is ice hot or cold? | Is ice cold? | Is ice hot?": "Ice is cold.",
}  # fmt: skip


def arithmetic(rng: random.Random) -> Turn:
    """Sums and differences up to 20, products up to 10 times 10."""
    operation = rng.choice(("plus", "plus", "minus", "minus", "times"))
    if operation == "plus":
        x, y = rng.randint(0, 20), rng.randint(0, 20)
        result, sign = x + y, "+"
    elif operation == "minus":
        x = rng.randint(0, 20)
        y = rng.randint(0, x)
        result, sign = x - y, "-"
    else:
        x, y = rng.randint(0, 10), rng.randint(0, 10)
        result, sign = x * y, "*"
    fact = f"{x} {sign} {y}" if operation != "times" else ""  # a times table is learned by heart
    ways = [
        (f"What is {x} {operation} {y}?", f"{x} {operation} {y} is {result}."),
        (f"How much is {x} {operation} {y}?", f"{x} {operation} {y} is {result}."),
        (f"What is {x} {sign} {y}?", f"{x} {sign} {y} = {result}"),
        (f"{x} {sign} {y} =", f"{x} {sign} {y} = {result}"),
        (f"{capital(f'{x} {operation} {y}')}?", f"{x} {operation} {y} is {result}."),
    ]
    question, answer = rng.choice(ways)
    return Turn(question, [answer], fact)


def counting(rng: random.Random) -> Turn:
    """What comes after, what comes before, and which number is bigger."""
    x = rng.randint(1, 99)
    kind = rng.randrange(3)
    if kind == 0:
        ways = [
            f"What comes after {x}?",
            f"What number comes after {x}?",
            f"Which number is after {x}?",
        ]
        return Turn(rng.choice(ways), [f"{x + 1} comes after {x}."])
    if kind == 1:
        ways = [
            f"What comes before {x}?",
            f"What number comes before {x}?",
            f"Which number is before {x}?",
        ]
        return Turn(rng.choice(ways), [f"{x - 1} comes before {x}."])
    y = rng.choice([n for n in range(100) if n != x])
    word = rng.choice(("bigger", "smaller"))
    ways = [f"Which is {word}, {x} or {y}?", f"Which number is {word}, {x} or {y}?"]
    best, rest = (max(x, y), min(x, y)) if word == "bigger" else (min(x, y), max(x, y))
    return Turn(rng.choice(ways), [f"{best} is {word} than {rest}."])


def word_problem(rng: random.Random) -> Turn:
    who, other = draw_character(rng), draw_character(rng)
    while other.name == who.name:
        other = draw_character(rng)
    thing = rng.choice(
        ["apple", "ball", "book", "cookie", "flower", "egg", "pear", "balloon", "shell"]
    )

    def count(n: int) -> str:
        return f"{n} {thing}" + ("" if n == 1 else "s")

    x, y = rng.randint(2, 10), rng.randint(1, 10)
    if rng.random() < 0.5:
        y = min(x, y)
        event = rng.choice([
            f"{capital(who.he_or_she)} gives {y} to {other.name}.",
            f"{capital(who.he_or_she)} loses {y}.",
            f"{other.name} takes {y}.",
        ])  # fmt: skip
        left = x - y
    else:
        event = rng.choice([
            f"{other.name} gives {who.him} {y} more.",
            f"{capital(who.he_or_she)} finds {y} more.",
            f"Then {who.he_or_she} gets {y} more.",
        ])  # fmt: skip
        left = x + y
    ask = rng.choice([
        f"How many {thing}s does {who.name} have now?",
        f"How many {thing}s does {who.he_or_she} have now?",
    ])  # fmt: skip
    return Turn(f"{who.name} has {count(x)}. {event} {ask}", [f"{who.name} has {count(left)} now."])


def colours(rng: random.Random) -> Turn:
    what, colour = rng.choice(list(COLOUR_OF.items()))
    word = rng.choice(("colour", "color"))
    ways = [f"What {word} is {what}?", f"What is the {word} of {what}?", f"Which {word} is {what}?",
            f"Do you know what {word} {what} is?", f"Tell me the {word} of {what}."]  # fmt: skip
    return Turn(rng.choice(ways), [f"{capital(what)} is {colour}."])


def opposites(rng: random.Random) -> Turn:
    word, other = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.5:
        word, other = other, word
    ways = [f"What is the opposite of {word}?", f"What is the opposite of the word {word}?",
            f"Which word is the opposite of {word}?", f"Tell me the opposite of {word}.",
            f"Opposite of {word}?"]  # fmt: skip
    return Turn(rng.choice(ways), [f"The opposite of {word} is {other}."])


def animals(rng: random.Random) -> Turn:
    kind = rng.randrange(5)
    if kind == 0:
        who, sound = rng.choice(list(SOUNDS.items()))
        ways = [f"What does {a(who)} say?", f"What sound does {a(who)} make?",
                f"Which sound does {a(who)} make?", f"What noise does {a(who)} make?"]  # fmt: skip
        return Turn(rng.choice(ways), [f"{capital(a(who))} says {sound}."])
    if kind == 1:
        who, legs = rng.choice(list(LEGS.items()))
        ways = [f"How many legs does {a(who)} have?", f"How many legs are on {a(who)}?",
                f"{capital(a(who))} has how many legs?"]  # fmt: skip
        return Turn(rng.choice(ways), [f"{capital(a(who))} has {legs} legs."])
    if kind == 2:
        who, baby = rng.choice(list(BABIES.items()))
        ways = [f"What is a baby {who} called?", f"What do you call a baby {who}?",
                f"What is the name of a baby {who}?", f"What is the baby of {a(who)} called?"]  # fmt: skip
        return Turn(rng.choice(ways), [f"A baby {who} is called {a(baby)}."])
    if kind == 3:
        who, where = rng.choice(list(LIVES_IN.items()))
        ways = [f"Where does {a(who)} live?", f"Where do you find {a(who)}?",
                f"Where can {a(who)} live?", f"What is the home of {a(who)}?"]  # fmt: skip
        return Turn(rng.choice(ways), [f"{capital(a(who))} lives {where}."])
    small, big = sorted(rng.sample(range(len(SIZES)), 2))
    first, second = rng.sample([SIZES[small], SIZES[big]], 2)
    word = rng.choice(("bigger", "smaller"))
    ways = [
        f"Which is {word}, {a(first)} or {a(second)}?",
        f"What is {word}, {a(first)} or {a(second)}?",
    ]
    best, rest = (SIZES[big], SIZES[small]) if word == "bigger" else (SIZES[small], SIZES[big])
    return Turn(rng.choice(ways), [f"{capital(a(best))} is {word} than {a(rest)}."])


def calendar(rng: random.Random) -> Turn:
    kind = rng.randrange(5)
    names, unit = (DAYS, "day") if kind < 3 else (MONTHS, "month")
    if kind == 4:
        names, unit = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "letter"
    here = rng.randrange(len(names) - (unit == "letter"))
    now, then = names[here], names[(here + 1) % len(names)]
    if rng.random() < 0.5:
        ways = [f"What {unit} comes after {now}?", f"Which {unit} comes after {now}?",
                f"What comes after {now}?", f"Which {unit} is after {now}?"]  # fmt: skip
        return Turn(rng.choice(ways), [f"{then} comes after {now}."])
    ways = [f"What {unit} comes before {then}?", f"Which {unit} comes before {then}?",
            f"What comes before {then}?", f"Which {unit} is before {then}?"]  # fmt: skip
    return Turn(rng.choice(ways), [f"{now} comes before {then}."])


def facts(rng: random.Random) -> Turn:
    ways, answer = rng.choice(list(FACTS.items()))
    return Turn(rng.choice(ways.split(" | ")), [answer])


def repeat(rng: random.Random) -> Turn:
    """Saying words again: of little use by itself, but it is what teaches a model to copy."""
    pool = rng.choice((COLOURS, COLOURS, THINGS, BOYS + GIRLS, COLOURS + THINGS + ANIMALS + FOODS))
    words = [rng.choice(pool) for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.1:
        words = [invented(rng) for _ in words]
    text = " ".join(words)
    ways = [f"Say: {text}", f"Say {text}.", f"Repeat: {text}", f"Repeat after me: {text}."]
    return Turn(rng.choice(ways), [f"{text}."])


def reading(rng: random.Random) -> Turn:
    """A question about one to six sentences in the prompt: the answer is in no list, only there."""
    people: list[str] = []
    how_many = rng.choice((1, 1, 2, 2, 3))
    while len(people) < how_many:
        name = draw_character(rng).name
        people += [name] * (name not in people)
    things, colours_ = rng.sample(THINGS, len(people)), rng.sample(COLOURS, len(people))
    places = rng.sample(list(PLACES), len(people))
    has = [
        f"{name} has {a(f'{colour} {thing}')}."
        for name, colour, thing in zip(people, colours_, things, strict=True)
    ]
    stands = [f"{name} is {PLACES[place]}." for name, place in zip(people, places, strict=True)]
    i = rng.randrange(len(people))  # who is asked about
    name, thing, colour, place = people[i], things[i], colours_[i], places[i]
    question, answer, needed = rng.choices([
        (f"What does {name} have?", f"{name} has {a(f'{colour} {thing}')}.", has[i]),
        (f"Where is {name}?", f"{name} is {PLACES[place]}.", stands[i]),
        (f"What {rng.choice(('colour', 'color'))} is the {thing}?", f"The {thing} is {colour}.", has[i]),
        (f"Who has the {thing}?", f"{name} has the {thing}.", has[i]),
        (f"Who is {PLACES[place]}?", f"{name} is {PLACES[place]}.", stands[i]),
    ], (4, 2, 4, 1, 1))[0]  # fmt: skip
    lines = rng.choice((has, stands, has + stands))  # all of one sort, or both
    lines = [line for line in lines if line != needed] + [needed]
    rng.shuffle(lines)
    lead = rng.choice(("", "", "", "Read this. ", "Story: "))
    return Turn(f"{lead}{' '.join(lines)} {question}", [answer])


def about_story(rng: random.Random, world: World) -> Turn:
    """A question about a story that has just been told."""
    ways = [
        (
            "Who was the story about?",
            f"The story was about {a(world.hero.kind)} named {world.hero.name}.",
        ),
        ("What was the name of the friend?", f"The friend was named {world.friend.name}."),
        (f"Where did {world.hero.name} live?", f"{world.hero.name} lived {HOMES[world.home]}."),
        (f"Who was {world.friend.name}?", f"{world.friend.name} was {a(world.friend.kind)}."),
        (f"Who was {world.hero.name}?", f"{world.hero.name} was {a(world.hero.kind)}."),
    ]
    if world.plot in ("lost", "stuck", "broken", "turns"):
        ways.append(
            (f"What colour was the {world.thing}?", f"The {world.thing} was {world.colour}.")
        )
    if world.plot == "lost":
        ways.append(
            (
                f"What did {world.hero.name} lose?",
                f"{world.hero.name} lost {a(f'{world.colour} {world.thing}')}.",
            )
        )
        ways.append(
            (f"Who found the {world.thing}?", f"{world.friend.name} found the {world.thing}.")
        )
    question, answer = rng.choice(ways)
    return Turn(question, [answer])


def story_reading(rng: random.Random) -> Turn:
    world = draw_world(rng)
    text = tell(rng, world)
    turn = about_story(rng, world)
    return Turn(
        f"{rng.choice(('', 'Read this story. ', 'Story: '))}{text} {turn.question}", turn.answers
    )


ABOUT_ME = [
    "I am a very small language model. I can tell little stories and answer easy questions.",
    "I am the demo model of pace_nb. I am very small. I tell stories and answer easy questions.",
]
SMALL_TALK = {  # asked in any of these ways -> answered in any of these ways
    "Hello! | Hello | Hi | Hi! | Hey | Hello there! | Good morning! | Good day!": ["Hello! How can I help you?", "Hello! What can I do for you?"],
    "How are you? | How are you today? | Are you well?": ["I am well, thank you. How can I help you?"],
    "Who are you? | What are you? | Tell me about yourself. | What is your name? | Are you a person? | Are you a robot?": ABOUT_ME,
    "What can you do? | How can you help me? | What do you know? | Can you help me? | Help": ["I can tell you a story, and I can answer easy questions about numbers, colours, animals and days."],
    "Thank you! | Thanks! | Thank you very much. | Thanks a lot": ["You are welcome!"],
    "Goodbye! | Bye! | Bye bye | See you later! | Good night!": ["Goodbye! Have a nice day."],
}  # fmt: skip
UNKNOWN = [
    "What is the capital of {x}?", "Who is the king of {x}?", "Who wrote {x}?", "How old is {x}?",
    "What is the weather today?", "What time is it?", "Write a program in {x}.", "Who won the game?",
    "Translate {x} into French.", "How far is the moon?", "What is the news today?", "Who made {x}?",
    "What is the meaning of life?", "How do I cook {x}?", "Explain {x} to me.", "What is {x}?",
    "How much does {x} cost?", "When was {x} born?", "Tell me about {x}.", "Do you like {x}?",
]  # fmt: skip
UNKNOWN_TOPICS = (
    "France|England|China|Python|Java|music|Hamlet|history|physics|Einstein|rice|the war|Paris|Peter Pan|"
    "a computer|money|the internet|Germany|a planet|football|London|America|the law|art"
).split("|")
DO_NOT_KNOW = "I do not know that. I am a very small model."


def small_talk(rng: random.Random) -> Turn:
    ways, answers = rng.choice(list(SMALL_TALK.items()))
    return Turn(rng.choice(ways.split(" | ")), answers)


def unknown(rng: random.Random) -> Turn:
    topic = rng.choice(UNKNOWN_TOPICS) if rng.random() < 0.6 else capital(invented(rng))
    return Turn(rng.choice(UNKNOWN).format(x=topic), [DO_NOT_KNOW])


QUESTIONS: dict[str, Callable[[random.Random], Turn]] = {
    "arithmetic": arithmetic, "counting": counting, "word_problem": word_problem, "colours": colours,
    "opposites": opposites, "animals": animals, "calendar": calendar, "facts": facts,
    "repeat": repeat, "reading": reading, "story_reading": story_reading, "unknown": unknown, "small_talk": small_talk,
}  # fmt: skip
WEIGHTS = [10, 8, 4, 1, 1, 3, 2, 2, 12, 12, 2, 1, 1]  # the harder a kind, the more of it is read
CLOSED = {"small_talk"}  # a closed list of phrasings: nothing to hold out


def ask(rng: random.Random, kind: str | None = None, *, test: bool = False) -> Turn:
    """One question. `test=True` draws only held-out ones, the default only the others."""
    kind = kind or rng.choices(list(QUESTIONS), WEIGHTS)[0]
    while True:
        turn = QUESTIONS[kind](rng)
        if kind in CLOSED or is_held_out(turn) == test:
            return turn
