"""Prompts that no expert of the demo is made for: the router should leave them to the base.

Some share words with the experts' domains (tables, files, counting) on purpose.
"""

from random import Random

SLOTS: dict[str, tuple[str, ...]] = {
    "dish": (
        "lentil soup", "banana bread", "mushroom risotto", "pancakes", "chicken curry",
        "potato salad", "ratatouille", "dumplings", "fish tacos", "apple pie", "fried rice",
    ),
    "place": (
        "Lisbon", "Kyoto", "Iceland", "Peru", "Morocco", "Vienna", "New Zealand", "Istanbul",
        "Vietnam", "Edinburgh", "the Alps", "Cape Town", "Montreal", "Crete",
    ),
    "topic": (
        "the moon", "honesty", "rain in a city", "an old lighthouse", "friendship", "autumn",
        "a lost umbrella", "the first day of school", "a talking cat", "long train rides",
    ),
    "science": (
        "the sky is blue", "volcanoes erupt", "bees make honey", "leaves change colour",
        "we dream", "the tides rise", "magnets attract iron", "cats purr", "bread rises",
        "glaciers move", "birds migrate", "people find mathematics hard",
    ),
    "person": (
        "Marie Curie", "Leonardo da Vinci", "Ada Lovelace", "Nelson Mandela", "Frida Kahlo",
        "Charles Darwin", "Cleopatra", "Mozart", "Rosa Parks", "Ibn Battuta", "Jane Austen",
    ),
    "hobby": (
        "painting", "chess", "running", "gardening", "photography", "playing the guitar",
        "knitting", "yoga", "bird watching", "baking", "learning Spanish", "surfing",
    ),
    "relation": (
        "my sister", "a colleague", "my neighbour", "my grandfather", "a new manager",
        "an old friend", "my landlord", "my teacher", "our customers",
    ),
    "event": (
        "a birthday party", "a job interview", "a wedding speech", "a long flight", "moving house",
        "a camping weekend", "a first date", "an exam week", "a family reunion",
    ),
    "feeling": ("nervous", "bored", "tired", "lonely", "excited", "a bit sad", "stressed", "proud"),
    "thing": (
        "kitchen table", "bicycle", "pair of hiking boots", "houseplant", "desk lamp",
        "filing cabinet", "winter coat", "mattress", "coffee grinder", "backpack",
    ),
    "book": ("mystery novel", "biography", "fantasy series", "film", "board game", "podcast"),
    "n": ("two", "three", "four", "5", "6", "ten", "12", "20"),
}  # fmt: skip

PROMPTS = (
    "How do I cook {dish} for {n} people?",
    "What goes well with {dish} on a cold evening?",
    "I have guests tonight and only an hour. Is {dish} a good idea, and what should I prepare?",
    "Plan {n} days in {place} for someone who likes {hobby}.",
    "What is the best season to visit {place}, and why?",
    "Tell me something surprising about {place} that guide books leave out.",
    "Which places near {place} would you show to {relation}?",
    "Write a short poem about {topic}.",
    "Tell me a bedtime story about {topic} with a happy end.",
    "Give me {n} possible titles for an essay on {topic}.",
    "Describe {topic} as if you saw it for the first time.",
    "Explain to a child why {science}.",
    "Why is it that {science}?",
    "Who was {person} and what are they remembered for?",
    "Compare {person} and {person2} in a few sentences.",
    "Where did {person} grow up?",
    "If you could ask {person} one question about {topic}, what would it be?",
    "I am {feeling} about {event}. Any advice?",
    "Help me prepare for {event}; I tend to feel {feeling}.",
    "I feel {feeling} today and do not know what to do with the evening.",
    "Draft a friendly email to {relation} about {event}.",
    "How can I thank {relation} for helping me with {event}?",
    "How should I tell {relation} that I cannot come to {event}?",
    "Is {hobby} a good hobby for someone who is often {feeling}?",
    "How many hours a week should a beginner spend on {hobby}?",
    "What do I need to start with {hobby}, on a small budget?",
    "Recommend a {book} about {hobby} or {topic}.",
    "Summarize what makes a good {book} in {n} sentences.",
    "What should I look for when I buy a {thing}?",
    "How long does a good {thing} usually last?",
    "Find the right words to sell my old {thing} to {relation}.",
    "Suggest a group activity for {n} people who are {feeling}.",
    "Count down {n} reasons to try {hobby}.",
    "Let us chat for a while. I just came back from {place} and I am {feeling}.",
    "Good morning! How would you spend a free day in {place}?",
    "What gift would suit {relation}, who loves {hobby}?",
)


def draw(rng: Random) -> tuple[str, str]:
    """One prompt and an empty response: nothing is trained on these."""
    words = {slot: rng.choice(values) for slot, values in SLOTS.items()}
    words["person2"] = rng.choice([name for name in SLOTS["person"] if name != words["person"]])
    return rng.choice(PROMPTS).format(**words), ""
