"""A small set of dialogues of this project's own, so that a chat model can be tried without any other text.

Facts stand in tables, and ways to ask and to answer beside them; a dialogue is a few exchanges drawn from both. Some
refer to what was said before: a name, a favourite, a number to remember. The same seed gives the same dialogues.
"""

import random
from collections.abc import Callable, Iterator

COUNT = 2_000


def words(table: str) -> list[str]:
    return table.split()


CAPITALS = """
Austria Vienna, Belgium Brussels, Bulgaria Sofia, Canada Ottawa, Chile Santiago, China Beijing, Croatia Zagreb,
Cuba Havana, Denmark Copenhagen, Egypt Cairo, Estonia Tallinn, Finland Helsinki, France Paris, Germany Berlin,
Ghana Accra, Greece Athens, Hungary Budapest, Iceland Reykjavik, India Delhi, Ireland Dublin, Italy Rome, Japan Tokyo,
Kenya Nairobi, Latvia Riga, Mali Bamako, Morocco Rabat, Nepal Kathmandu, Norway Oslo, Peru Lima, Poland Warsaw,
Portugal Lisbon, Romania Bucharest, Senegal Dakar, Serbia Belgrade, Spain Madrid, Sweden Stockholm, Thailand Bangkok,
Tunisia Tunis, Turkey Ankara, Uganda Kampala, Ukraine Kyiv, Vietnam Hanoi
"""
SOUNDS = """
bee buzzes, cat meows, cow moos, crow caws, dog barks, donkey brays, dove coos, duck quacks, frog croaks, goat bleats,
goose honks, hen clucks, horse neighs, lion roars, mouse squeaks, owl hoots, pig grunts, rooster crows, snake hisses,
wolf howls
"""
LEGS = """
ant six, bee six, beetle six, bird two, butterfly six, cat four, chicken two, cow four, crab ten, dog four, duck two,
elephant four, fly six, fox four, horse four, lizard four, lobster ten, mouse four, owl two, penguin two,
scorpion eight, sheep four, snail no, snake no, spider eight, tiger four, wasp six, whale no, worm no
"""
YOUNG = """
bear cub, cat kitten, cow calf, deer fawn, dog puppy, duck duckling, frog tadpole, goat kid, goose gosling, hen chick,
horse foal, kangaroo joey, lion cub, owl owlet, pig piglet, seal pup, sheep lamb, swan cygnet, whale calf, wolf pup
"""
COLOURS = """
blood red, butter yellow, carrots orange, charcoal black, cherries red, chocolate brown, cocoa brown, cucumbers green,
emeralds green, flour white, grass green, ivory white, leaves green, lemons yellow, limes green, milk white,
mud brown, night black, plums purple, pumpkins orange, rubies red, salt white, sapphires blue, snow white, soot black,
strawberries red, sunflowers yellow, tar black, tomatoes red
"""
OPPOSITES = """
above below, always never, arrive leave, asleep awake, begin end, big small, brave afraid, bright dark, buy sell,
cheap expensive, clean dirty, cold hot, deep shallow, early late, easy hard, empty full, fast slow, first last,
give take, happy sad, heavy light, high low, in out, inside outside, laugh cry, long short, loud quiet, lose win,
near far, new old, north south, open closed, poor rich, push pull, remember forget, right wrong, rough smooth,
sharp blunt, sick healthy, strong weak, sweet sour, tall short, thick thin, true false, up down, warm cool, wet dry,
wide narrow, with without, young old
"""
TRADES = """
actor plays on a stage, astronomer looks at the stars, baker bakes bread, barber cuts hair, beekeeper keeps bees,
butcher sells meat, carpenter works with wood, cobbler mends shoes, composer writes music, cook prepares meals,
dentist looks after teeth, doctor helps the sick, driver drives a bus, farmer grows food, fisherman catches fish,
gardener plants flowers, judge decides in a court, librarian looks after books, mason builds with stone,
mechanic mends engines, nurse cares for the sick, painter paints pictures, pilot flies an aeroplane,
plumber mends pipes, potter makes pots of clay, printer prints books, sailor sails a ship, shepherd looks after sheep,
smith works with iron, tailor makes clothes, teacher teaches a class, weaver makes cloth
"""
TOOLS = """
axe chop wood, bell call somebody, brush paint, candle see in the dark, clock tell the time, compass find north,
cup drink, fork eat, hammer drive in a nail, key open a lock, kettle boil water, knife cut bread, ladder climb up,
lamp read at night, map find the way, mirror see yourself, needle sew, oven bake a cake, pen write, pencil draw,
pillow rest your head, plough turn the soil, pump move water, rake gather leaves, rope tie things together,
saw cut a board, scales weigh flour, scissors cut paper, shovel dig a hole, soap wash your hands, spoon eat soup,
telescope see far away, thermometer measure heat, towel dry yourself, umbrella stay dry in the rain,
wheelbarrow carry earth
"""
GREETED = """
Basque kaixo, Catalan hola, Croatian bok, Czech ahoj, Danish hej, Dutch hallo, Esperanto saluton, Estonian tere,
Finnish moi, French bonjour, German guten Tag, Hawaiian aloha, Hebrew shalom, Hungarian szia, Icelandic sæl,
Indonesian halo, Irish dia duit, Italian ciao, Japanese konnichiwa, Latin salve, Latvian sveiki, Maltese bongu,
Polish cześć, Portuguese olá, Romanian salut, Spanish buenos días, Swahili jambo, Turkish merhaba, Welsh helo
"""
INSTRUMENTS = """
accordion keys, banjo strings, bassoon breath, cello strings, clarinet breath, cymbals sticks, drum sticks,
fiddle strings, flute breath, gong sticks, guitar strings, harp strings, harpsichord keys, lute strings,
mandolin strings, oboe breath, organ keys, piano keys, recorder breath, saxophone breath, sitar strings,
timpani sticks, trombone breath, trumpet breath, tuba breath, viola strings, violin strings, xylophone sticks,
zither strings
"""
MADE_OF = """
beer barley, brick clay, butter cream, candy sugar, cheese milk, cider apples, coin metal, flour grain, glass sand,
honey nectar, jam fruit, ketchup tomatoes, linen flax, marmalade oranges, noodles wheat, omelette eggs, paper wood,
pickles cucumbers, porridge oats, raisins grapes, silk the threads of silkworms, steel iron, tofu soybeans,
tortilla maize, vinegar wine, wine grapes, yoghurt milk
"""
RIVERS = """
Amazon South America, Congo Africa, Danube Europe, Elbe Europe, Euphrates Asia, Ganges Asia, Indus Asia,
Limpopo Africa, Loire Europe, Mekong Asia, Mississippi North America, Missouri North America, Murray Australia,
Niger Africa, Nile Africa, Oder Europe, Orinoco South America, Rhine Europe, Rhone Europe, Seine Europe,
Thames Europe, Tiber Europe, Tigris Asia, Vistula Europe, Volga Europe, Yangtze Asia, Yukon North America,
Zambezi Africa
"""
PLANETS = words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")
SEASONS = words("spring summer autumn winter")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
NUMBERS = words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
""")
NAMES = words("""
Ada Alan Amara Bela Carla Chen Clara Dara Elias Emma Farid Finn Grace Hugo Ines Ivan Jonas Kofi Lena Leo Lucia Marie
Max Mina Nadia Nils Noor Olga Omar Paula Pedro Rosa Sami Sara Sven Tara Theo Uma Vera Yuki
""")
FAVOURITES = {
    "colour": words("blue brown gold green orange pink purple red silver white yellow"),
    "animal": words("badger cat deer dog dolphin eagle fox hedgehog horse otter owl rabbit seal tiger turtle"),
    "fruit": words("apple apricot banana cherry fig grape lemon mango melon orange peach pear plum"),
    "season": SEASONS,
    "day": DAYS,
}


def pairs(table: str) -> list[tuple[str, str]]:
    """First word and the rest of every entry."""
    return [tuple(entry.split(maxsplit=1)) for entry in " ".join(table.split()).split(", ")]


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def following(names: list[str], step: int) -> list[tuple[str, str]]:
    return [(name, names[(i + step) % len(names)]) for i, name in enumerate(names)]


def legs(number: str) -> str:
    return "no legs at all" if number == "no" else f"{number} legs"


# (facts, ways to ask, ways to answer); {a} is the first of a pair, {b} the second
Topic = tuple[list[tuple[str, str]], list[str], list[str]]
TOPICS: list[Topic] = [
    (pairs(CAPITALS),
     ["What is the capital of {a}?", "Which city is the capital of {a}?", "Tell me the capital of {a}."],
     ["The capital of {a} is {b}.", "It is {b}."]),
    ([(b, a) for a, b in pairs(CAPITALS)],
     ["{a} is the capital of which country?", "Where is {a}?"],
     ["{a} is the capital of {b}.", "{a} is in {b}."]),
    ([(article(a), b) for a, b in pairs(SOUNDS)],
     ["What does {a} do when it makes a sound?", "Which sound does {a} make?"],
     ["{a} {b}."]),
    ([(article(a), legs(b)) for a, b in pairs(LEGS)],
     ["How many legs does {a} have?", "Count the legs of {a}."],
     ["{a} has {b}.", "It has {b}."]),
    ([(article(a), article(b)) for a, b in pairs(YOUNG)],
     ["What is the young of {a} called?", "What do you call the child of {a}?"],
     ["It is called {b}.", "The young of {a} is {b}."]),
    (pairs(COLOURS),
     ["Name the colour of {a}.", "Think of {a}: which colour comes to mind?"],
     ["It is {b}.", "The colour is {b}."]),
    (pairs(OPPOSITES) + [(b, a) for a, b in pairs(OPPOSITES) if b not in ("old", "short")],
     ["What is the opposite of {a}?", "Give me the opposite of the word {a}.", "Which word means the contrary of {a}?"],
     ["The opposite of {a} is {b}.", "It is {b}."]),
    ([(article(a), b) for a, b in pairs(TRADES)],
     ["What does {a} do?", "What is the work of {a}?"],
     ["{a} {b}."]),
    ([(b, article(a)) for a, b in pairs(TRADES)],
     ["Who {a}?"],
     ["{b} {a}.", "{b} does that."]),
    ([(a if a in ("scales", "scissors", "soap") else article(a), b) for a, b in pairs(TOOLS)],
     ["What can I do with {a}?", "What do people use {a} for?"],
     ["With {a} you can {b}.", "You can use it to {b}."]),
    ([(b, a if a in ("scales", "scissors", "soap") else article(a)) for a, b in pairs(TOOLS)],
     ["I want to {a}. What do I need?", "What do I need to {a}?"],
     ["You need {b}.", "Take {b} to {a}."]),
    (pairs(GREETED),
     ["How do people say hello in {a}?", "What is hello in {a}?"],
     ["In {a} one says {b}.", "It is {b}."]),
    ([(article(a) if a != "cymbals" else a, b) for a, b in pairs(INSTRUMENTS)],
     ["How is {a} played?", "What makes the sound of {a}?"],
     ["{a}: with {b}.", "It is played with {b}."]),
    (pairs(MADE_OF),
     ["What is {a} made of?", "From what does {a} come?"],
     ["{a}: of {b}.", "It is made of {b}."]),
    (pairs(RIVERS),
     ["Where does the river {a} flow?", "On which continent is the {a}?"],
     ["The {a} flows in {b}.", "It is in {b}."]),
    (following(PLANETS, 1)[:-1], ["Which planet comes after {a}?"], ["After {a} comes {b}."]),
    (following(DAYS, 1), ["Which day comes after {a}?", "What is the day after {a}?"], ["After {a} comes {b}."]),
    (following(DAYS, -1), ["Which day comes before {a}?"], ["Before {a} comes {b}."]),
    (following(MONTHS, 1), ["Which month follows {a}?", "What comes after {a}?"], ["After {a} comes {b}."]),
    (following(SEASONS, 1), ["Which season comes after {a}?"], ["After {a} comes {b}."]),
    ([(f"{NUMBERS[i]} plus {NUMBERS[j]}", NUMBERS[i + j]) for i in range(11) for j in range(11)],
     ["What is {a}?", "How much is {a}?"],
     ["{a} is {b}.", "That makes {b}."]),
    ([(f"{NUMBERS[i]} minus {NUMBERS[j]}", NUMBERS[i - j]) for i in range(13) for j in range(i + 1)],
     ["What is {a}?", "How much is {a}?"],
     ["{a} is {b}.", "That leaves {b}."]),
]  # fmt: skip

GREETINGS = [
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi there.", "Hi! Ask me something."),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Good evening!", "Good evening! What shall we talk about?"),
    ("How are you?", "I am well, thank you. What would you like to know?"),
    ("Who are you?", "I am a very small model. I know some facts, and I can remember what you tell me."),
    ("What can you do?", "I can answer questions about capitals, animals, colours, words, tools and small numbers."),
]
FAREWELLS = [
    ("Thank you!", "You are welcome."),
    ("Thanks, that helps.", "I am glad that it helps."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Bye.", "Bye! It was nice to talk with you."),
    ("That is all.", "Good. Until the next time!"),
]

Turns = list[tuple[str, str]]  # what the user says, and the answer


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def exchange(rng: random.Random) -> tuple[str, str]:
    facts, questions, answers = rng.choice(TOPICS)
    a, b = rng.choice(facts)
    return tuple(sentence(rng.choice(ways).format(a=a, b=b)) for ways in (questions, answers))


def about_a_name(rng: random.Random) -> tuple[Turns, Turns]:
    name = rng.choice(NAMES)
    told = rng.choice(["My name is {}.", "I am {}.", "People call me {}."]).format(name)
    asked = rng.choice(["What is my name?", "Do you remember my name?", "Who am I?"])
    return [(told, f"Nice to meet you, {name}.")], [(asked, f"Your name is {name}.")]


def about_a_favourite(rng: random.Random) -> tuple[Turns, Turns]:
    kind = rng.choice(list(FAVOURITES))
    thing = rng.choice(FAVOURITES[kind])
    told = f"My favourite {kind} is {thing}."
    return [(told, f"I will remember it: {thing}.")], [
        (f"What is my favourite {kind}?", f"Your favourite {kind} is {thing}.")
    ]


def about_a_number(rng: random.Random) -> tuple[Turns, Turns]:
    number = rng.choice(NUMBERS)
    told = f"Please remember the number {number}."
    return [(told, f"I keep the number {number} in mind.")], [("Which number was it?", f"The number was {number}.")]


THREADS: list[Callable] = [about_a_name, about_a_favourite, about_a_number]


def dialogue(rng: random.Random) -> Turns:
    turns = [rng.choice(GREETINGS)] if rng.random() < 0.3 else []
    middle = [exchange(rng) for _ in range(rng.randint(1, 3))]
    told, asked = rng.choice(THREADS)(rng) if rng.random() < 0.3 else ([], [])
    turns += told + middle + asked
    return turns + [rng.choice(FAREWELLS)] if rng.random() < 0.3 else turns


def dialogues(count: int = COUNT, seed: int = 1) -> Iterator[Turns]:
    rng = random.Random(seed)
    for _ in range(count):
        yield dialogue(rng)
