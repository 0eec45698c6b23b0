"""Questions over a small schema and the SQL that answers them, for the demo's SQL expert."""

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Table:
    """A table with one text label, one category, numbers, and a reference to a parent table."""

    name: str
    label: str
    category: str
    values: tuple[str, ...]
    numbers: tuple[str, ...]
    parent: str
    parent_key: str
    parent_label: str


def _table(name: str, label: str, category: str, numbers: str, parent: str) -> Table:
    """Build a table from a compact row: `kind:a,b`, `x,y` and `table.key.label`."""
    column, _, values = category.partition(":")
    owner, key, owner_label = parent.split(".")
    return Table(
        name, label, column, tuple(values.split(",")), tuple(numbers.split(",")), owner, key,
        owner_label,
    )  # fmt: skip


TABLES = tuple(
    _table(*row)
    for row in (
        ("employees", "name", "department:Sales,Support,Finance", "salary,age",
         "offices.office_id.city"),
        ("products", "title", "category:Garden,Kitchen,Toys", "price,stock",
         "suppliers.supplier_id.company"),
        ("students", "full_name", "major:Physics,History,Music", "grade,credits",
         "schools.school_id.name"),
        ("books", "title", "genre:Poetry,Crime,Travel", "pages,year", "authors.author_id.name"),
        ("flights", "code", "status:delayed,landed,boarding", "distance,seats",
         "airlines.airline_id.name"),
        ("patients", "name", "ward:North,South,East", "weight,visits",
         "doctors.doctor_id.last_name"),
        ("orders", "reference", "state:paid,open,returned", "total,quantity",
         "customers.customer_id.name"),
        ("songs", "title", "style:jazz,rock,folk", "duration,plays", "artists.artist_id.name"),
        ("houses", "address", "kind:flat,villa,cabin", "rent,rooms", "agents.agent_id.name"),
        ("players", "nickname", "position:keeper,forward,defender", "goals,height",
         "teams.team_id.name"),
        ("devices", "serial", "model:A1,B2,C3", "voltage,uptime", "sites.site_id.location"),
        ("movies", "title", "language:French,Hindi,Korean", "rating,budget",
         "studios.studio_id.name"),
        ("tickets", "subject", "priority:low,high,urgent", "hours,replies",
         "agents.agent_id.email"),
        ("animals", "species", "habitat:forest,desert,sea", "lifespan,speed",
         "zoos.zoo_id.city"),
    )
)  # fmt: skip

SCHEMAS = (
    "CREATE TABLE {name} ({typed});",
    "Table {name}({columns})",
    "Schema: {name}({columns})",
    "Given {name}({columns}).",
    "I have a table {name}({columns}).",
)
REQUESTS = (
    "{question}",
    "Write a query: {question}",
    "SQL for this: {question}",
    "{question} Answer in SQL.",
)

# (query, ways to ask for it); queries use the names of columns, questions their words.
QUERIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("SELECT {label} FROM {table} WHERE {number} > {n};", (
        "Which {table} have a {number_words} above {n}?",
        "List the {label_words} of {table} with {number_words} greater than {n}.",
    )),
    ("SELECT {label} FROM {table} WHERE {number} <= {n};", (
        "Find {table} whose {number_words} is at most {n}.",
        "Show every {label_words} where {number_words} does not exceed {n}.",
    )),
    ("SELECT {label} FROM {table} WHERE {number} BETWEEN {n} AND {m};", (
        "What {table} are between {n} and {m} in {number_words}?",
        "Get the {label_words} of {table} with {number_words} from {n} to {m}.",
    )),
    ("SELECT {label} FROM {table} WHERE {category} = '{value}';", (
        "Show the {label_words} of all {table} whose {category} is {value}.",
        "Which {table} have {category} {value}?",
    )),
    ("SELECT COUNT(*) FROM {table} WHERE {category} = '{value}';", (
        "How many {table} have {category} {value}?",
        "Count the {table} with {value} as {category}.",
    )),
    ("SELECT {category}, COUNT(*) FROM {table} GROUP BY {category};", (
        "How many {table} are there for each {category}?",
        "Count {table} per {category}.",
    )),
    ("SELECT {category}, AVG({number}) FROM {table} GROUP BY {category};", (
        "Give the average {number_words} for every {category}.",
        "What is the mean {number_words} of {table} by {category}?",
    )),
    ("SELECT AVG({number}) FROM {table} WHERE {category} = '{value}';", (
        "What is the average {number_words} of {table} with {category} {value}?",
        "Compute the mean {number_words} where {category} is {value}.",
    )),
    ("SELECT {label} FROM {table} ORDER BY {number} DESC LIMIT {k};", (
        "Show the {k} {table} with the highest {number_words}.",
        "Who or what are the top {k} {table} by {number_words}?",
    )),
    ("SELECT {label} FROM {table} ORDER BY {number} ASC LIMIT {k};", (
        "Which {k} {table} have the lowest {number_words}?",
        "Return the bottom {k} {table} by {number_words}.",
    )),
    ("SELECT SUM({number}) FROM {table} WHERE {category} = '{value}';", (
        "What is the total {number_words} of all {table} with {category} {value}?",
        "Add up {number_words} for {value} {table}.",
    )),
    ("SELECT {category} FROM {table} GROUP BY {category} HAVING COUNT(*) > {k};", (
        "Which {category} values have more than {k} {table}?",
        "Find each {category} that appears over {k} times among the {table}.",
    )),
)  # fmt: skip
JOINS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "SELECT {table}.{label}, {parent}.{parent_label} FROM {table} JOIN {parent} ON "
        "{table}.{parent_key} = {parent}.id;", (
            "List the {label_words} of {table} together with the {parent_label_words} of "
            "their {parent}.",
            "Show each {label_words} and the matching {parent_label_words} from {parent}.",
        ),
    ),
    (
        "SELECT {parent}.{parent_label}, COUNT(*) FROM {table} JOIN {parent} ON "
        "{table}.{parent_key} = {parent}.id GROUP BY {parent}.{parent_label};", (
            "How many {table} belong to each {parent_label_words} in {parent}?",
            "Count {table} per {parent_label_words} of {parent}.",
        ),
    ),
)  # fmt: skip
JOIN_SHARE = 0.2
KEY_SHARE = 0.4  # of the tables without a join, so that "id" alone does not mean SQL


def draw(rng: Random) -> tuple[str, str]:
    """One schema with a question, and its query."""
    table = rng.choice(TABLES)
    joined = rng.random() < JOIN_SHARE
    query, questions = rng.choice(JOINS if joined else QUERIES)
    words = _words(table, rng)
    question = rng.choice(REQUESTS).format(question=rng.choice(questions).format(**words))
    parts = [_schema(table, joined, rng), question]
    rng.shuffle(parts)
    return "\n".join(parts), query.format(**words)


def _words(table: Table, rng: Random) -> dict[str, str]:
    """What the placeholders of questions and queries stand for."""
    low = rng.randint(2, 60)
    names = {
        "table": table.name,
        "label": table.label,
        "number": rng.choice(table.numbers),
        "category": table.category,
        "parent": table.parent,
        "parent_key": table.parent_key,
        "parent_label": table.parent_label,
    }
    english = {f"{key}_words": name.replace("_", " ") for key, name in names.items()}
    numbers = {"n": str(low), "m": str(low + rng.randint(5, 90)), "k": str(rng.randint(2, 10))}
    return {**names, **english, **numbers, "value": rng.choice(table.values)}


def _schema(table: Table, joined: bool, rng: Random) -> str:
    """The tables that a question needs, in one of the styles."""
    style = rng.choice(SCHEMAS)
    columns = [table.label, table.category, *table.numbers]
    rng.shuffle(columns)
    types = dict.fromkeys((table.label, table.category), "TEXT")
    if not joined:
        key = ["id"] if rng.random() < KEY_SHARE else []
        return _describe(style, table.name, [*key, *columns], types)
    child = _describe(style, table.name, ["id", table.parent_key, *columns[:1], table.label], types)
    parent = ["id", table.parent_label]
    return f"{child} {_describe(style, table.parent, parent, {table.parent_label: 'TEXT'})}"


def _describe(style: str, name: str, columns: list[str], types: dict[str, str]) -> str:
    """One table in one style; repeated columns are named once."""
    distinct = list(dict.fromkeys(columns))
    typed = ", ".join(f"{column} {types.get(column, 'INTEGER')}" for column in distinct)
    return style.format(name=name, columns=", ".join(distinct), typed=typed)
