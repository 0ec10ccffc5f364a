"""The words of the corpus, and `World`: one draw of who, what and where.

It knows names, things, places and pronouns. It knows no plot and no question. A story is written
*about* a world, so whatever is introduced (a name, a red kite, the farm) comes back unchanged.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

BOYS = "Tom Ben Max Sam Leo Jack Tim Finn Oscar Hugo Pip Bo Noah Otto Rex Gus Theo Bruno".split()
GIRLS = (
    "Mia Lily Anna Zoe Emma Lucy Ruby Nora Ella Rosie Daisy Luna Ivy Molly Dot Bella Tess Pearl"
).split()
ANIMALS = (
    "fox bear rabbit mouse owl cat dog duck frog hedgehog squirrel pig sheep cow horse hen goat "
    "turtle bird lion elephant monkey penguin tiger wolf deer bee dragon"
).split()
COLOURS = "red blue green yellow white black brown pink orange purple".split()
THINGS = (
    "ball kite hat boat drum book bell cup box scarf basket balloon bag ring doll key umbrella "
    "blanket wagon whistle"
).split()
TOYS = "wagon boat kite drum doll whistle bell".split()
LIGHT_THINGS = "ball kite hat balloon scarf".split()
FOODS = "apple cake pie cookie sandwich pear carrot bun pancake peach".split()
BAKED = "cake pie cookie bun pancake".split()
HOMES = {  # where somebody lives -> how it is said
    "forest": "in the forest", "farm": "on a farm", "village": "in a small village",
    "hill": "on a green hill", "house": "in a little house", "town": "in a quiet town",
    "lake": "near a lake", "meadow": "in a sunny meadow",
}  # fmt: skip
PLACES = {  # where something happens -> how it is said
    "park": "in the park", "garden": "in the garden", "river": "by the river",
    "beach": "on the beach", "woods": "in the woods", "school": "at school",
    "market": "at the market", "pond": "by the pond", "barn": "in the barn",
    "field": "in the field", "kitchen": "in the kitchen",
}  # fmt: skip
OUTDOORS = "park garden river beach woods pond field".split()
SPOTS = [
    "under the bed", "behind a tree", "under a bench", "behind the door", "in the tall grass",
    "under a big leaf", "next to a rock", "in a hole", "behind the house", "on top of a wall",
]  # fmt: skip
ADJECTIVES = "little small kind brave happy young shy clever funny quiet".split()
SYLLABLES = "ba bo da do fi fo ga gi ka ki la lo ma mi na no pa po ra ri ta to va vi za zo".split()


def a(words: str) -> str:
    """Puts the right article before a noun phrase: "a fox", "an owl"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass
class Character:
    """Somebody with a name; `kind` is what they are, and the pronouns follow `he_or_she`."""

    name: str
    kind: str
    he_or_she: str

    @property
    def him(self) -> str:
        return "him" if self.he_or_she == "he" else "her"

    @property
    def his(self) -> str:
        return "his" if self.he_or_she == "he" else "her"


def invented(rng: random.Random) -> str:
    """A word that means nothing, so that the model must learn to copy and not only to recall."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3))))


def draw_character(rng: random.Random, kind: str | None = None, other: str = "") -> Character:
    he = rng.random() < 0.5
    name = other
    while name == other:
        name = rng.choice(BOYS if he else GIRLS)
    if rng.random() < 0.04:
        name = capital(invented(rng))
    child = rng.random() < 0.4
    kind = kind or (("boy" if he else "girl") if child else rng.choice(ANIMALS))
    if kind in ("boy", "girl") and (kind == "boy") != he:
        return draw_character(rng, kind, other)
    return Character(name, kind, "he" if he else "she")


@dataclass
class World:
    """Who, what and where: drawn once per story, and never changed while it is told."""

    hero: Character
    friend: Character
    home: str
    place: str
    thing: str
    colour: str
    food: str
    spot: str
    adjective: str
    plot: str
    friend_known: bool  # introduced in the opening, or met in the middle of the story
    slots: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hero, friend = self.hero, self.friend
        described = f"{self.adjective} {hero.kind}"
        arrives = friend.name if self.friend_known else f"{a(friend.kind)} named {friend.name}"
        self.slots = {
            "hero": hero.name, "a_hero": a(described), "kind": hero.kind,
            "he": hero.he_or_she, "him": hero.him, "his": hero.his,
            "He": capital(hero.he_or_she), "His": capital(hero.his),
            "friend": friend.name, "a_friend": a(friend.kind), "arrives": arrives,
            "Arrives": capital(arrives), "fhe": friend.he_or_she, "fhim": friend.him,
            "fhis": friend.his, "Fhe": capital(friend.he_or_she),
            "at_home": HOMES[self.home], "at_place": PLACES[self.place], "place": self.place,
            "At_place": capital(PLACES[self.place]), "thing": self.thing, "colour": self.colour,
            "a_thing": a(f"{self.colour} {self.thing}"), "food": self.food, "a_food": a(self.food),
            "spot": self.spot,
        }  # fmt: skip
