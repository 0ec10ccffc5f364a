"""Little stories: plots, the way a plot is told, and a critic that looks for inconsistencies.

A plot is a list of lines; a line is alternatives separated by ` | `, one of which is drawn; a
leading `?` makes the line optional; `{slots}` are filled from the world. Every plot has a beginning,
a problem, a solution and an ending. With 14 plots of about ten lines, two to four alternatives each,
and some thirty words for each slot, hardly any story is ever told twice.
"""

# ruff: noqa: E501 - a line of a plot and its alternatives read best on one line

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from world import (
    ADJECTIVES,
    BAKED,
    BOYS,
    COLOURS,
    FOODS,
    GIRLS,
    HOMES,
    LIGHT_THINGS,
    OUTDOORS,
    SPOTS,
    THINGS,
    TOYS,
    World,
    draw_character,
)  # fmt: skip

OPENINGS = [
    "Once upon a time, there was {a_hero} named {hero}. {hero} lived {at_home}.",
    "Once upon a time, {a_hero} named {hero} lived {at_home}.",
    "Once upon a time, there was {a_hero}. {His} name was {hero}. {He} lived {at_home}.",
    "There was once {a_hero} named {hero} who lived {at_home}.",
    "{hero} was {a_hero}. {He} lived {at_home}.",
    "One day, {a_hero} named {hero} woke up early. {hero} lived {at_home}.",
]
FRIENDS = [
    "{His} best friend was {a_friend} named {friend}.",
    "{hero} had a friend, {a_friend} named {friend}.",
    "Every day {he} played with {a_friend} named {friend}.",
]
CLOSINGS = [
    "From that day on, {hero} and {friend} were best friends.",
    "{hero} and {friend} went home happy.",
    "They smiled all the way home. The end.",
    "It was the best day of all. The end.",
    "That night, {hero} fell asleep with a smile.",
    "And they lived happily ever after.",
]


@dataclass
class Plot:
    """One plot: its lines, what the story turns on, and where it can happen."""

    lines: list[str]
    things: list[str] = field(default_factory=lambda: THINGS)
    places: list[str] = field(default_factory=lambda: OUTDOORS)


PLOTS: dict[str, Plot] = {
    "lost": Plot([
        "{hero} had {a_thing}. | {hero} loved {his} {colour} {thing} very much. | The thing {he} loved most was {his} {colour} {thing}.",
        "One morning, {hero} could not find the {thing}. | One day, the {colour} {thing} was gone. | One day, {hero} lost the {thing} {at_place}.",
        "{He} looked everywhere, but it was not there. | {He} looked and looked. | {hero} was very sad. | {hero} began to cry.",
        "Then {arrives} came by. | Just then, {arrives} came along. | {Arrives} saw that {he} was sad.",
        '"What is wrong?" asked {friend}. | "Why are you sad?" asked {friend}.',
        '"I lost my {colour} {thing}," said {hero}. | "I cannot find my {thing}," said {hero}.',
        '"I will help you," said {friend}. | "Let us look together," said {friend}. | "Do not cry," said {friend}. "I can help you."',
        "They looked all day {at_place}. | They looked high and low {at_place}. | Together they looked {at_place}.",
        "At last, {friend} found the {colour} {thing} {spot}. | Then {friend} saw something {colour}. It was the {thing}! It was {spot}.",
        '{hero} was so happy. "Thank you, {friend}!" {he} said. | {hero} hugged {friend} and held the {thing} tight. | "You found it!" said {hero}. {He} jumped for joy.',
    ]),
    "stuck": Plot([
        "One day, {hero} went to play {at_place} with {a_thing}. | {hero} took {his} {colour} {thing} and went to play {at_place}. | One windy day, {hero} played with {a_thing} {at_place}.",
        "The wind blew the {thing} up into a tree. | Whoosh! The wind took the {thing} high into a tree. | But the {colour} {thing} got stuck in a tall tree.",
        "{hero} jumped, but {he} could not reach it. | {He} was too small to reach it. | {hero} tried and tried, but the tree was too tall.",
        "Then {arrives} came by. | {Arrives} heard {him} and came to look.",
        '"My {thing} is in the tree," said {hero}. | "Can you help me get my {thing}?" asked {hero}.',
        "{friend} had an idea. | {friend} looked up and thought.",
        '"Stand on my back," said {friend}. {hero} stood on {fhis} back and took the {thing}. | {friend} found a long stick and pushed the {thing} down. | {friend} climbed up and threw the {thing} down to {hero}. | {friend} shook the tree until the {thing} fell down.',
        '"Hooray!" said {hero}. "You are a good friend." | {hero} laughed. "Thank you!" {he} said.',
        "Then they played with the {colour} {thing} together. | They played with the {thing} until the sun went down.",
    ], things=LIGHT_THINGS),
    "broken": Plot([
        "{hero} had {a_thing}. {He} played with it every day. | For {his} birthday, {hero} got {a_thing}.",
        "One day, the {thing} fell down {at_place} and broke. | One day, {hero} ran too fast {at_place} and the {colour} {thing} broke.",
        '"Oh no!" said {hero}. "My {thing} is broken." | {hero} sat down and cried.',
        "{Arrives} heard {him} and came to help. | Then {arrives} came by.",
        '"Do not be sad," said {friend}. "We can fix it." | "I think we can fix it," said {friend}.',
        "{friend} went to get some glue. {hero} held the {thing} still. | {friend} brought a hammer and some string. | They worked slowly and carefully.",
        "?It took a long time, but they did not give up.",
        "Soon the {colour} {thing} was as good as new. | At last, the {thing} was fixed.",
        "{hero} gave {friend} a big hug. | {hero} was very proud and happy.",
        "?{hero} learned that broken things can be fixed. | ?{He} was always careful with the {thing} after that.",
    ], things=TOYS),
    "share": Plot([
        "One day, {hero} had {a_food} for lunch. | {hero} sat down {at_place} to eat {a_food}.",
        "It looked very good. | {He} was just about to eat it.",
        "Then {arrives} came by. {Fhe} looked hungry. | {Arrives} came and sat down next to {him}. {Fhe} looked sad.",
        '"What is wrong, {friend}?" asked {hero}. | "Are you hungry?" asked {hero}.',
        '"I have nothing to eat," said {friend}. | "I forgot my lunch," said {friend}. | "I am so hungry," said {friend}.',
        "{hero} looked at the {food}. It was the only one {he} had. | {hero} thought for a moment.",
        'Then {he} cut the {food} in two. "Half is for you," {he} said. | "We can share my {food}," said {hero}. {He} gave half of it to {friend}.',
        "{friend} smiled and ate every bit. | They ate the {food} together, and it tasted even better.",
        '"You are very kind," said {friend}. | "Thank you, {hero}," said {friend}. "I feel much better."',
        "?{hero} learned that it is good to share. | ?{hero} felt warm and happy inside.",
    ]),
    "rain": Plot([
        "One day, {hero} and {friend} played {at_place}. | {hero} went for a walk {at_place} with {friend}.",
        "Then dark clouds came, and it began to rain. | Suddenly, big drops of rain fell from the sky.",
        "{hero} was cold and wet. | \"We will get wet!\" said {hero}. | {friend} did not like the rain at all.",
        "But {hero} had {a_thing}. | Luckily, {friend} had brought {a_thing}.",
        '"Come under the {thing} with me," said {hero}. | They sat under the {colour} {thing} together.',
        "The {thing} was small, but there was room for two. | They sat close together and told stories.",
        "Soon the rain stopped, and the sun came out. | After a while, the rain stopped.",
        '"Look!" said {friend}. "A rainbow!" | A big rainbow was in the sky.',
        "They jumped in the puddles and laughed. | {hero} and {friend} danced under the rainbow.",
    ], things=["umbrella", "blanket"]),
    "dark": Plot([
        "{hero} was afraid of the dark. | Every night, {hero} was afraid of the dark.",
        "One night, {he} heard a strange sound. | One night, the wind blew and the door went bang.",
        '"Who is there?" asked {hero}. {He} hid under the blanket. | {hero} hid and did not make a sound.',
        "It was only {arrives}. | {Arrives} came in with a little lamp.",
        '"Are you afraid?" asked {friend}. "Yes," said {hero}. | "I am afraid of the dark," said {hero}.',
        '"Come with me," said {friend}. "I will show you something." | {friend} took {him} to the window.',
        "They looked up at the sky. It was full of stars. | Outside, the moon was big and round, and the stars were bright.",
        '"The dark is where the stars live," said {friend}. | "Without the dark, we could not see the stars," said {friend}.',
        '"It is beautiful," said {hero}. | {hero} looked for a long time and smiled.',
        "After that, {hero} was not afraid of the dark any more. | {hero} was not afraid any more.",
    ]),
    "way_home": Plot([
        "One day, {hero} went for a walk {at_place}. | {hero} wanted to see the world, so {he} set out all alone.",
        "{He} walked and walked, and soon {he} was lost. | But then {he} could not find the way home.",
        "The sun was going down, and {hero} was afraid. | It was getting dark, and {hero} wanted to go home.",
        "Then {he} met {arrives}. | Just then, {arrives} came along.",
        '"Where are you going?" asked {friend}. | "Are you lost?" asked {friend}.',
        '"I cannot find my home," said {hero}. | "I want to go home, but I do not know the way," said {hero}.',
        '"I know the way," said {friend}. "Follow me!" | "I can show you the way," said {friend}.',
        "They went over a bridge and up a hill. | They walked hand in hand past the old mill. | They sang a song as they walked.",
        "At last, {hero} saw {his} home. | Soon they were home.",
        '"Thank you, {friend}," said {hero}. "Please stay for dinner." | {hero} gave {friend} {a_food} to say thank you.',
    ]),
    "bake": Plot([
        "One day, {hero} wanted to make {a_food}. | {hero} loved to cook. One day {he} made {a_food}.",
        "But there was no flour. | But {he} had no butter. | But {he} had no sugar.",
        "{hero} did not know what to do. | \"What shall I do?\" said {hero}.",
        "{He} went to the house of {arrives}. | {He} went out and met {arrives}.",
        '"I want to make {a_food}, but I need your help," said {hero}.',
        '"I have all you need," said {friend}. "Let us make it together!" | "I can help you," said {friend}.',
        "They mixed and stirred and laughed. | {hero} stirred, and {friend} sang a song.",
        "Soon the {food} was ready, and it smelled very good. | When the {food} was done, the whole house smelled sweet.",
        "They ate the {food} together. | They shared the {food} with all their friends.",
        '"It is the best {food} in the world," said {friend}. | "Everything is better with a friend," said {hero}.',
    ]),
    "turns": Plot([
        "One day, {hero} and {friend} found {a_thing} {at_place}. | {hero} and {friend} saw {a_thing} {at_place}.",
        '"It is mine!" said {hero}. "No, it is mine!" said {friend}. | {hero} wanted the {thing}, and {friend} wanted it too.',
        "They pulled and pulled. | They were both very angry. | {friend} held one side, and {hero} held the other side.",
        "Then {hero} stopped. | Then {hero} saw that {friend} was sad. | {hero} thought for a moment.",
        '"I am sorry," said {hero}. "You can play first." | "Let us take turns," said {hero}. "You go first."',
        '"Thank you," said {friend}. "Then it is your turn." | {friend} smiled. "That is a good idea," {fhe} said.',
        "First {friend} played with the {colour} {thing}. Then {hero} played with it.",
        "They had a lot of fun together. | It was more fun than playing alone.",
        "?They learned that it is better to share. | ?They were never angry about the {thing} again.",
    ]),
    "garden": Plot([
        "One day, {hero} found a tiny seed {at_place}. | {friend} gave {hero} a tiny seed.",
        '{He} put it in the ground and gave it water. | "I will plant it," said {hero}.',
        "Every day {he} looked, but nothing came up. | {He} waited and waited, but nothing happened.",
        '"It will never grow," {he} said to {friend}. | {hero} was sad. "Where is my flower?" {he} asked {friend}.',
        '"You must wait," said {friend}. "Good things take time." | "Do not give up," said {friend}. "Give it water and sun."',
        "So {hero} gave it water every day. | So {hero} sang to the seed every morning.",
        "Then, one sunny morning, there was a little green leaf. | At last, something green came up.",
        "It grew and grew, and soon it was a big {colour} flower. | Soon there was a beautiful {colour} flower.",
        '"You were right," said {hero} to {friend}. | {hero} called {friend} to see the {colour} flower.',
        "They sat next to the flower and had {a_food}. | {hero} was glad that {he} did not give up.",
    ]),
    "sick": Plot([
        "One day, {friend} did not come out to play. | One morning, {hero} waited for {friend} {at_place}, but {friend} did not come.",
        "{hero} went to see what was wrong. | So {hero} went to the house of {friend}.",
        "{friend} was sick in bed. | There was {friend} in bed, and {fhe} was very sick.",
        '"I feel bad," said {friend}. | "I cannot play today," said {friend}.',
        '"I will help you," said {hero}. | "Stay in bed," said {hero}. "I will take care of you."',
        "{He} made hot soup and brought {a_food}. | {hero} brought {fhim} soup and {a_thing}.",
        "{He} told {fhim} a funny story, and {friend} laughed. | {hero} sat by the bed all day.",
        "The next day, {friend} felt much better. | Soon {friend} was well again.",
        '"You are the best friend of all," said {friend}. | "Thank you for helping me," said {friend}.',
        "Then they went out to play {at_place}. | They ran out to play in the sun.",
    ], things=["blanket", "book", "balloon", "cup"]),
    "birthday": Plot([
        "It was the birthday of {hero}, but nobody said a word. | Today was a big day. It was the birthday of {hero}.",
        '"They all forgot," thought {hero}. {He} was sad. | {hero} waited, but nobody came.',
        "{He} went for a walk {at_place}, all alone. | {He} sat {at_place} and looked at the ground.",
        "Then {arrives} came running. | Then {he} saw {arrives}.",
        '"Come with me!" said {friend}. "Quick!" | "Close your eyes and follow me," said {friend}.',
        "They went back to the house and opened the door. | {friend} opened the door.",
        '"Surprise!" everyone called. | "Happy birthday!" everyone called.',
        "There was a big cake, and there was {a_thing} for {hero}. | {friend} gave {him} {a_thing}.",
        '"You did not forget!" said {hero}. | {hero} was so happy that {he} danced.',
        "{hero} loved the {colour} {thing}. | {hero} played with the {thing} all day.",
    ]),
    "learn": Plot([
        "{hero} wanted to learn to swim. | {hero} wanted to learn to dance. | {hero} wanted to learn to sing. | {hero} wanted to learn to ride a bike.",
        "{He} tried, but it was too hard. | {He} tried once and fell down.",
        '"I will never do it," said {hero}. | {hero} wanted to give up.',
        "{Arrives} saw {him} {at_place}. | Then {arrives} came by.",
        '"I could not do it at first," said {friend}. "Try again!" | "Do not give up," said {friend}. "I will show you."',
        "So {hero} tried again, and again, and again. | Every day, {hero} and {friend} practiced {at_place}.",
        "Each time it was a little easier. | Slowly it got better.",
        'Then, one day, {he} did it! "Look at me!" called {hero}. | At last, {hero} could do it all alone.',
        '"I knew you could do it," said {friend}. | {friend} clapped and cheered.',
        "?{hero} learned that you must never give up.",
    ]),
    "river": Plot([
        "One day, {hero} wanted to bring {a_thing} to {friend}. | {hero} had {a_thing} for {friend}. One day, {he} set out to bring it.",
        "But there was a wide river on the way. | But the bridge over the river was broken.",
        "The water was too deep and too fast. | {hero} could not swim.",
        '"How can I get to the other side?" {he} asked. | {hero} sat down to think.',
        "On the other side was {friend}. {Fhe} waved. | {friend} saw {him} from the other side.",
        '"Wait there!" called {friend}. "I have an idea." | "Stay there!" called {friend}.',
        "{friend} pushed a big log over the water. | {friend} came across the water in a little boat.",
        "{hero} was afraid, but {he} was brave. | Slowly and carefully, {hero} came across.",
        '"You did it!" said {friend}. | {friend} gave {him} a big hug.',
        "{hero} gave {fhim} the {colour} {thing}, and they laughed. | Then they played with the {colour} {thing} all day.",
    ], places=["river"]),
}  # fmt: skip
NEEDS_KNOWN_FRIEND = {"rain", "turns", "garden", "sick", "river"}


def draw_world(rng: random.Random, **fixed: str) -> World:
    """Draws a world; `fixed` may name plot, kind, friend_kind, thing, colour and place."""
    plot = fixed.get("plot") or rng.choice(list(PLOTS))
    hero = draw_character(rng, fixed.get("kind"))
    friend = draw_character(rng, fixed.get("friend_kind"), other=hero.name)
    while friend.name == hero.name:
        friend = draw_character(rng, fixed.get("friend_kind"), other=hero.name)
    return World(
        hero=hero,
        friend=friend,
        home=rng.choice(list(HOMES)),
        place=fixed.get("place") or rng.choice(PLOTS[plot].places),
        thing=fixed.get("thing") or rng.choice(PLOTS[plot].things),
        colour=fixed.get("colour") or rng.choice(COLOURS),
        food=rng.choice(BAKED if plot == "bake" else FOODS),
        spot=rng.choice(SPOTS),
        adjective=rng.choice(ADJECTIVES),
        plot=plot,
        friend_known=rng.random() < 0.5,
    )


def draw_line(rng: random.Random, line: str, world: World) -> str:
    """One alternative of a line, its slots filled; "" when an optional line is left out."""
    choice = rng.choice(line.split(" | ")).strip()
    if choice.startswith("?"):
        if rng.random() < 0.5:
            return ""
        choice = choice[1:]
    if rng.random() < 0.4:  # say the colour again: it must be the same one
        choice = re.sub(r"\b(the|my) \{thing\}", r"\1 {colour} {thing}", choice)
    return choice.format(**world.slots)


def tell(rng: random.Random, world: World) -> str:
    """The story of a world, one paragraph."""
    weights = [4, 3, 2, 1, 1, 1]
    lines = [rng.choices(OPENINGS, weights)[0]]
    known = world.friend_known or world.plot in NEEDS_KNOWN_FRIEND
    if known != world.friend_known:
        world.friend_known = known
        world.__post_init__()
    if known:
        lines.append(rng.choice(FRIENDS))
    lines += PLOTS[world.plot].lines
    lines.append(rng.choice(CLOSINGS))
    return " ".join(text for line in lines if (text := draw_line(rng, line, world)))


def story(rng: random.Random) -> str:
    return tell(rng, draw_world(rng))


NAMES = set(BOYS + GIRLS)


def story_faults(text: str) -> list[str]:
    """What is inconsistent in a story, in words; an empty list when nothing was found.

    A simple critic, used to measure generated stories: it counts names, follows the colour of each
    thing, checks that the pronouns fit somebody in the story, and looks for repeated sentences.
    """
    faults = []
    words = re.findall(r"[A-Za-z]+", text)
    names = list(dict.fromkeys(word for word in words if word in NAMES))
    named = re.findall(r"(?:named|name was) ([A-Z][a-z]+)", text)
    named += re.findall(r"^([A-Z][a-z]+) was an? ", text)
    names += [name for name in named if name not in names]
    if len(names) > 2:
        faults.append(f"more than two characters: {', '.join(names)}")
    for word, other in (("he", GIRLS), ("she", BOYS)):
        if word in map(str.lower, words) and names and all(name in other for name in names):
            faults.append(f"nobody in the story is a {word}")
    colours: dict[str, set[str]] = {}
    for colour, thing in re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(THINGS)})\b", text):
        colours.setdefault(thing, set()).add(colour)
    faults += [f"the {t} changes colour" for t, seen in colours.items() if len(seen) > 1]
    if len(colours) > 1:
        faults.append(f"more than one thing: {', '.join(colours)}")
    sentences = re.split(r"(?<=[.!?])\s+", text)
    if len(set(sentences)) < len(sentences):
        faults.append("a sentence is repeated")
    if names and words.count(names[0]) < 2:
        faults.append("the hero is never named again")
    return faults
