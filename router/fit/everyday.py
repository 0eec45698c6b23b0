"""Prompts of everyday life that belong to no expert, for the base.

A router that never saw a prompt outside its experts' domains finds a specialist for everything.
So training adds requests as people put them to any assistant: chores, facts, plans, texts to write,
passages to read. Sentences are patterns, their gaps are filled with words; the draw is fixed by the
seed. Some of them may well belong to an expert of the user's (cooking, travel): `fit.py` drops those
that a held-out classifier gives to a specialist.
"""

from random import Random
from typing import Final

_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "food": (
        "pancakes", "lasagna", "a stew", "sushi", "apple pie", "chili", "an omelette", "hummus",
        "fried rice", "sourdough", "tacos", "a curry", "cheesecake", "iced coffee", "bone broth",
    ),
    "place": (
        "Chicago", "Lisbon", "Japan", "Kenya", "Dallas", "Norway", "the beach", "Paris", "Mexico",
        "downtown", "Vietnam", "Toronto", "the museum", "the airport", "Rome", "my hometown",
    ),
    "thing": (
        "umbrella", "laptop", "couch", "bicycle", "phone", "jacket", "washing machine", "guitar",
        "vacuum", "wallet", "mattress", "printer", "tent", "lawn mower", "suitcase", "toaster",
    ),
    "person": (
        "my sister", "mom", "my boss", "the landlord", "our teacher", "my roommate", "grandpa",
        "a friend", "the plumber", "my girlfriend", "a stranger", "the new neighbor",
    ),
    "famous": (
        "Mozart", "Cleopatra", "Albert Einstein", "Serena Williams", "Picasso", "Elvis", "Gandhi",
        "Jane Austen", "Neil Armstrong", "Beyonce", "Napoleon", "Isaac Newton", "Shakespeare",
    ),
    "nature": (
        "volcanoes", "penguins", "the moon", "rainbows", "sharks", "glaciers", "bees", "owls",
        "black holes", "tornadoes", "redwood trees", "earthquakes", "whales", "electricity",
    ),
    "sport": (
        "football", "tennis", "chess", "yoga", "basketball", "swimming", "boxing", "hockey",
        "baseball", "marathon running", "golf", "skiing",
    ),
    "art": (
        "movie", "song", "novel", "podcast", "video game", "band", "series", "play", "painting",
        "comic book", "documentary", "album",
    ),
    "time": (
        "tomorrow", "tonight", "on friday", "next week", "at noon", "this weekend", "in the morning",
        "on my birthday", "in june", "at seven", "yesterday", "last summer",
    ),
    "idea": (
        "freedom", "honesty", "climate change", "artificial intelligence", "social media", "justice",
        "loneliness", "remote work", "public transport", "homework", "democracy", "friendship",
    ),
    "group": (
        "kids", "beginners", "tourists", "students", "new parents", "a team", "dog owners", "voters",
    ),
    "animal": ("cat", "dog", "hamster", "parrot", "horse", "goldfish", "puppy", "rabbit"),
    "country": (
        "France", "Brazil", "Egypt", "Canada", "India", "Sweden", "China", "Australia", "Spain",
    ),
}  # fmt: skip

_PATTERNS: Final = (
    # Chores and devices.
    "remind me to call {person} {time}",
    "set an alarm {time}",
    "turn off the lights in the kitchen",
    "play the new {art} by {famous}",
    "add {food} to my shopping list",
    "what's on my calendar {time}",
    "cancel my reservation {time}",
    "book a table for four {time}",
    "order {food} for {person}",
    "text {person} that i will be late",
    "where did i leave my {thing}",
    "my {thing} is broken, what should i do",
    "how do i clean my {thing}",
    "how do i change the oil in my car",
    "which tires fit my truck",
    "how much does a new {thing} cost",
    "where can i buy a cheap {thing}",
    "is it worth repairing a {thing}",
    "what is the weather in {place} {time}",
    "do i need an {thing} {time}",
    "how long is the drive to {place}",
    "what time does {place} open",
    "find me a flight to {place} {time}",
    "do i need a visa for {country}",
    "what time is it in {country}",
    "how do you say good morning in {country}",
    "is there a pharmacy near {place}",
    "what are the traffic conditions near {place}",
    "what should i wear {time}",
    "who won the {sport} game {time}",
    "what is the score of the {sport} match",
    "who is the best {sport} player of all time",
    "how do i get better at {sport}",
    "what are the rules of {sport}",
    "any news about {country} today",
    "what is the price of gold right now",
    "what is my account balance",
    "how do i open a savings account",
    "what is the exchange rate for {country}",
    "did my package arrive",
    # Food and home.
    "how do i make {food}",
    "Can you give me a recipe for {food}?",
    "what can i use instead of eggs in {food}",
    "how many calories are in {food}",
    "is {food} good the next day",
    "how do i get {food} stains out of my {thing}",
    "What goes well with {food}?",
    "what should I feed my {animal}",
    "why does my {animal} sleep so much",
    "How do I train a {animal}?",
    "how do i get rid of ants in the {place} house",
    "how often should i water my plants",
    # Facts.
    "who was {famous}",
    "Where was {famous} born?",
    "What is {famous} known for?",
    "when did {famous} die",
    "what is the capital of {country}",
    "What language is spoken in {country}?",
    "how many people live in {country}",
    "Who is the president of {country}?",
    "What is the history of {country}?",
    "How do {nature} work?",
    "why are {nature} important",
    "How was the first {thing} invented?",
    "How were {nature} first discovered?",
    "what do {nature} look like",
    "are {nature} dangerous",
    "what is the difference between {nature} and {nature}",
    "Tell me an interesting fact about {nature}.",
    "what is the tallest building in {place}",
    "who wrote the {art}",
    "What is the meaning of the word {idea}?",
    "what is the plural of {animal}",
    "what rhymes with {animal}",
    "Explain {idea} to a five year old.",
    "what is the formula for the area of a square",
    "how many inches are in a foot",
    "What are the pros and cons of {idea}?",
    "What are the similarities between {idea} and {idea}?",
    "Why do people care about {idea}?",
    "Which {art} should I start with?",
    "Which instrument is the hardest to learn?",
    # People.
    "What should I get {person} for a birthday?",
    "How do I tell {person} that I am moving out?",
    "how can i apologize to {person}",
    "I feel sad {time} and I do not know why.",
    "I had a fight with {person}. What now?",
    "how do i make new friends in {place}",
    "Should I quit my job?",
    "how do i ask for a raise",
    "what are some hobbies for {group}",
    "tell me a joke about a {animal}",
    "do you like {sport}",
    "what is your name",
    "who made you",
    "are you a robot",
    "sing me a song",
    "what can you do",
    "i am bored",
    "how are you doing today",
    # Texts.
    "Write a poem about {nature}.",
    "Write me a short story about a {animal} and {famous}.",
    "Write a birthday card for {person}.",
    "Write an email to {person} to cancel our meeting {time}.",
    "Write a letter of complaint about a broken {thing}.",
    "Write a product description for a {thing}.",
    "Write an essay about {idea}.",
    "Write a speech for {group} about {idea}.",
    "Come up with a slogan for a {thing} shop.",
    "Suggest five names for a {animal}.",
    "Give me ideas for a party with {group}.",
    "Plan a three day trip to {place} for {group}.",
    "Make a list of things to pack for {country}.",
    "Make a syllabus for a class on {idea}.",
    "Create a weekly workout plan for {group}.",
    "Translate this sentence: The {animal} is at {place}.",
    "Rewrite this more politely: {person} has to give back my {thing}.",
    "Correct the grammar: me and {person} goes to {place} {time}.",
    "Summarize the plot of your favorite {art}.",
    "Compare {country} and {country} as places to live.",
    "Act as a guide in {place} and show me around.",
    "Let's play a game. You are {famous} and I ask you questions.",
    "Give me three arguments for and against {idea}.",
    "Recommend a {art} about {idea}.",
    "What is the moral of the story about the {animal}?",
    "Can you help me prepare for a job interview {time}?",
    # Passages: long prompts, so that length alone is no sign of a specialist.
    "Read the passage and say whether the author is positive or negative about {idea}.\n\n{passage}",
    "Summarize the following text in one sentence.\n\n{passage}",
    "Which of these sentences is the longest?\n{passage}",
    "{passage}\n\nList the names of all places in the text above.",
    "Find a title for this paragraph: {passage}",
    "{passage} What happened next?",
)
_SENTENCES: Final = (
    "Last year {person} moved to {country} and opened a small shop near the harbor.",
    "The {art} was better than most people had expected.",
    "Nobody in {place} talks about {idea} any more, although everybody used to.",
    "In the evening they made {food} and listened to the radio.",
    "A {animal} was waiting at the door, and it would not go away.",
    "{famous} is said to have visited the town once, but there is no proof.",
    "After the {sport} season ended, the fans went home and the streets were quiet.",
    "It rained for three days, and the {thing} in the yard was ruined.",
    "Some say that {nature} are a sign of luck; others only laugh.",
    "The mayor promised that the old theatre would open again {time}.",
)  # fmt: skip
PER_PATTERN: Final = 4


def everyday_prompts(seed: int = 0) -> list[str]:
    """Return the prompts, without duplicates, in a fixed order."""
    random = Random(seed)
    texts = [_fill(pattern, random) for pattern in _PATTERNS for _ in range(PER_PATTERN)]
    return list(dict.fromkeys(texts))


def _fill(pattern: str, random: Random) -> str:
    """Put a word into every gap; sentences of a passage have gaps themselves."""
    if "{passage}" in pattern:
        sentences = random.sample(_SENTENCES, random.randint(4, 8))
        pattern = pattern.replace("{passage}", " ".join(sentences))
    while "{" in pattern:
        start = pattern.index("{")
        end = pattern.index("}", start)
        word = random.choice(_WORDS[pattern[start + 1 : end]])
        pattern = pattern[:start] + word + pattern[end + 1 :]
    return pattern
