"""The quickstart's data: examples of three small business jobs, drawn at random from the word lists below.

"routing" maps a support message to a team's code, "orders" extracts the fields of an order as JSON, "dates" converts a
date to ISO 8601. The held-out examples (split "test") share no sentence, name, item, city, number, day or year with the
training examples: every list below has separate entries for each split. Each prompt ends with a cue for its job.
"""

from __future__ import annotations

import json
import random

JOBS = ("routing", "orders", "dates")
SPLITS = ("train", "test")

NAMES = {
    "train": ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Greta", "Hugo", "Ines", "Jonas", "Karen", "Liam"),
    "test": ("Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tara", "Victor"),
}
ITEMS = {
    "train": (
        "lamp", "chair", "desk", "mug", "pillow", "clock", "basket", "kettle", "towel", "mirror", "tray", "rug", "sofa",
        "stool", "cushion", "curtain", "carpet", "vase", "plate", "bowl", "spoon", "fork", "pot", "tent", "helmet",
        "wallet", "belt", "hat", "coat", "shirt", "boot", "pencil", "notebook", "folder", "printer", "monitor",
        "keyboard", "speaker", "camera", "cable", "hammer", "drill", "saw", "screw", "nail", "rope", "chain", "hook",
        "lock", "key", "bell", "flag", "poster", "frame", "easel", "crayon", "marker", "stapler", "ruler", "eraser",
        "binder", "envelope", "stamp", "label", "sticker", "magnet", "battery", "charger", "adapter", "router",
        "tablet", "phone", "laptop", "scanner", "projector", "microphone", "headset", "guitar", "violin", "trumpet",
        "drum", "flute", "piano", "ball", "racket", "net", "glove", "sock", "scarf", "jumper", "sweater", "skirt",
        "dress", "sandal", "slipper", "ring", "necklace", "bracelet", "brooch", "umbrella", "suitcase", "backpack",
        "purse", "kayak", "paddle", "anchor", "bicycle", "scooter", "pump", "wrench", "shovel", "rake", "broom", "mop",
        "sponge", "bin", "crate", "barrel", "jar", "tin", "cup", "saucer", "teapot", "toaster", "blender", "mixer",
        "grill", "oven", "freezer", "heater", "fan", "filter", "carton", "puzzle", "doll", "kite", "robot", "bracket",
        "socket", "locket", "gasket", "trinket", "rocket", "cabinet", "dresser", "hanger", "napkin", "apron", "pitcher",
        "goblet", "thermos", "toothbrush", "doormat", "lantern", "armchair", "bookcase", "wardrobe", "headboard",
        "nightstand", "paperweight", "clipboard", "whiteboard", "notepad", "doorbell", "padlock",
        "screwdriver", "chisel", "tripod", "telescope", "blazer", "waistcoat", "cardigan", "bonnet", "mitten",
        "slipcover", "bathrobe", "dumbbell", "skateboard", "surfboard", "snorkel", "trellis", "planter", "sprinkler",
        "hammock", "parasol", "chandelier", "thermometer", "barometer", "accordion", "clarinet", "trombone",
        "xylophone",
    ),
    "test": ("table", "bottle", "blanket", "candle", "bucket", "ladder", "pan", "jacket"),
}  # fmt: skip
CITIES = {
    "train": (
        "Oslo", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Prague", "Boston", "Tokyo",
        "Naples", "Turin", "Munich", "Cologne", "Geneva", "Lyon", "Bergen", "Helsinki", "Warsaw", "Budapest", "Porto",
        "Seville", "Valencia", "Bristol", "Leeds", "Glasgow", "Cardiff", "Dallas", "Austin", "Houston", "Phoenix",
        "Atlanta", "Miami", "Detroit", "Portland", "Montreal", "Ottawa", "Sydney", "Perth", "Delhi", "Mumbai", "Seoul",
        "Lima", "Cairo", "Nairobi", "Bologna", "Venice", "Verona", "Palermo", "Genoa", "Florence", "Pisa", "Siena",
        "Bari", "Trieste", "Nice", "Lille", "Nantes", "Toulouse", "Bordeaux", "Marseille", "Rennes", "Dijon", "Reims",
        "Metz", "Basel", "Bern", "Lausanne", "Lucerne", "Graz", "Linz", "Salzburg", "Bremen", "Dresden", "Leipzig",
        "Stuttgart", "Frankfurt", "Hanover", "Mainz", "Bonn", "Essen", "Dortmund", "Kiel", "Rostock", "Erfurt", "Ulm",
        "Krakow", "Gdansk", "Poznan", "Lublin", "Brno", "Zagreb", "Split", "Belgrade", "Sofia", "Varna", "Bucharest",
        "Athens", "Patras", "Istanbul", "Ankara", "Izmir", "Riga", "Tallinn", "Vilnius", "Kaunas", "Turku", "Tampere",
        "Espoo", "Stockholm", "Malmo", "Lund", "Aarhus", "Odense", "Aalborg", "Copenhagen", "Stavanger", "Trondheim",
        "Tromso", "Amsterdam", "Utrecht", "Rotterdam", "Delft", "Leiden", "Haarlem", "Brussels", "Ghent", "Antwerp",
        "Bruges", "Liege", "York", "Oxford", "Cambridge", "Exeter", "Plymouth", "Norwich", "Derby", "Durham", "Lincoln",
        "Sheffield", "Manchester", "Liverpool", "Newcastle", "Belfast", "Cork", "Galway", "Limerick", "Bilbao",
        "Granada", "Malaga", "Cadiz", "Toledo", "Murcia", "Braga", "Coimbra", "Faro", "Orlando", "Tampa", "Memphis",
        "Nashville", "Omaha", "Tulsa", "Reno", "Boise", "Fresno", "Oakland", "Sacramento", "Tucson", "Albany",
        "Buffalo", "Cleveland", "Columbus", "Cincinnati", "Milwaukee", "Minneapolis", "Pittsburgh", "Baltimore",
        "Richmond", "Charlotte", "Raleigh", "Savannah", "Honolulu", "Anchorage", "Calgary", "Edmonton", "Vancouver",
        "Winnipeg", "Halifax", "Quebec", "Regina", "Brisbane", "Adelaide", "Hobart", "Darwin", "Canberra", "Auckland",
        "Wellington", "Osaka", "Kyoto", "Nagoya", "Sapporo", "Kobe", "Busan", "Manila", "Jakarta", "Hanoi", "Bangkok",
        "Chennai", "Kolkata", "Pune", "Jaipur", "Agra", "Karachi", "Lahore", "Dhaka", "Kathmandu", "Colombo", "Dubai",
        "Doha", "Muscat", "Amman", "Beirut", "Tunis", "Algiers", "Rabat", "Casablanca", "Dakar", "Accra", "Lagos",
        "Kampala", "Lusaka", "Harare", "Maputo", "Durban", "Pretoria", "Bogota", "Medellin", "Cali", "Quito", "Cusco",
        "Santiago", "Rosario", "Cordoba", "Mendoza", "Montevideo", "Recife", "Salvador", "Brasilia", "Curitiba",
        "Havana", "Kingston", "Panama", "Managua", "Zadar", "Zermatt", "Zamora", "Zutphen", "Denia", "Denton",
        "Deventer", "Detmold", "Mildura", "Milton", "Mikkeli", "Minden", "Hamar", "Hamilton", "Hameln", "Harrogate",
        "Hasselt", "Chichester", "Chester", "Chesterfield", "Chelmsford", "Chemnitz", "Sedona", "Segovia", "Setubal",
        "Sevenoaks", "Torquay", "Torun", "Topeka", "Tombstone", "Lonsdale", "Lorient", "Lourdes", "Loule",
    ),
    "test": ("London", "Milan", "Zurich", "Chicago", "Hamburg", "Denver", "Seattle", "Toronto"),
}  # fmt: skip
QUANTITIES = {"train": (2, 3, 5, 6, 8, 10, 12, 15, 20, 30), "test": (4, 7, 9, 14, 25)}
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DAYS = {
    "train": (1, 2, 3, 5, 6, 8, 9, 10, 11, 13, 14, 15, 17, 18, 20, 21, 23, 24, 25, 27, 28),
    "test": (4, 7, 12, 16, 19, 22, 26),
}
YEARS = {"train": (2010, 2011, 2012, 2014, 2015, 2017, 2018, 2020, 2021, 2023), "test": (2013, 2016, 2019, 2022, 2024)}

#: Messages about an {item} for each code of a support team.
ROUTING = {
    "train": {
        "BILL-1": (
            "I was charged twice for the {item}.",
            "The invoice for my {item} is wrong.",
            "Why did my card get billed again for the {item}?",
            "Please send a receipt for the payment of the {item}.",
            "The price on my bill for the {item} is too high.",
            "I paid for the {item} but got no invoice.",
            "The sum you took for the {item} is not what we agreed.",
            "Can you correct the invoice of the {item}?",
            "My credit card was debited although I cancelled the {item}.",
            "How can I pay for the {item} by bank transfer?",
        ),
        "SHIP-2": (
            "My {item} has not arrived yet.",
            "Where is the parcel with my {item}?",
            "The tracking of the {item} shows no update.",
            "The courier did not deliver my {item}.",
            "When will the {item} be shipped?",
            "The {item} was due on Monday and is still not here.",
            "Which day will the {item} reach me?",
            "The driver left my {item} at the wrong address.",
            "Is my {item} on its way?",
            "The delivery of the {item} is late.",
        ),
        "BACK-3": (
            "I want to return the {item}.",
            "The {item} is the wrong size, can I send it back?",
            "I do not like the {item} and would like a refund.",
            "How do I exchange the {item}?",
            "Please take back the {item}, I changed my mind.",
            "The {item} is too small for me, please send a return label.",
            "I would like my money back for the {item}.",
            "May I swap the {item} for another one?",
            "I ordered the {item} by mistake and want to give it back.",
            "How long can I return a {item} after I bought it?",
        ),
        "TECH-4": (
            "I can not log in to see my {item}.",
            "The app crashes when I open the {item} page.",
            "Your website shows an error for the {item}.",
            "My password does not work, I need the {item} page.",
            "The {item} page does not load.",
            "The login fails when I order the {item}.",
            "I get an error message for the {item}.",
            "Your site freezes as soon as I click on the {item}.",
            "The button to buy the {item} does nothing.",
            "The search on your website does not find the {item}.",
        ),
        "SELL-5": (
            "Do you give a discount on 50 pieces of the {item}?",
            "Is the {item} available in blue?",
            "I would like a quote for the {item}.",
            "Which {item} do you recommend for an office?",
            "Do you have the {item} in stock?",
            "What does the {item} cost if I order many?",
            "How much cheaper is the {item} for a company?",
            "Can I get the {item} in red or green?",
            "Do you sell a larger {item}?",
            "Please make us an offer for 30 pieces of the {item}.",
        ),
    },
    "test": {
        "BILL-1": (
            "There are two payments for one {item} on my bank statement.",
            "You billed me the wrong amount for a {item}.",
        ),
        "SHIP-2": (
            "A week has gone by and no {item} was delivered.",
            "Has the package with a {item} left the warehouse?",
        ),
        "BACK-3": (
            "Can a {item} be returned for my money back?",
            "This {item} does not fit, I wish to return it.",
        ),
        "TECH-4": (
            "The login button is broken, so no {item} is shown.",
            "The site crashes with an error at every {item}.",
        ),
        "SELL-5": (
            "What discount can I get if we buy 100 of this {item}?",
            "Does this {item} come in other colours?",
        ),
    },
}
ORDERS = {
    "train": (
        "{quantity} {item}s to {city}, please. {name}",
        "Hello, this is {name}. Send {quantity} {item}s to {city}.",
        "{name} orders {quantity} {item}s for our office in {city}.",
        "Ship {quantity} {item}s to our shop in {city}. Thanks, {name}",
        "We need {quantity} {item}s in {city}. Regards, {name}",
    ),
    "test": (
        "Could you deliver {quantity} {item}s to {city}? Best wishes, {name}",
        "{name} from {city} would like {quantity} {item}s.",
        "Good morning, {quantity} {item}s should go to {city}. Yours, {name}",
    ),
}
DATES = {
    "train": (
        "The invoice of {name} is due on {day} {month} {year}.",
        "{name} signed the contract on {month} {day}, {year}.",
        "Delivery to {name}: {day} {month} {year}.",
        "Meeting with {name} on {month} {day}, {year}.",
    ),
    "test": (
        "{name} paid the bill on {day} {month} {year}.",
        "The call from {name} came on {month} {day}, {year}.",
    ),
}


def business_examples(job: str, split: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` different examples of a job, {"prompt": ..., "completion": ...}; the same for the same arguments."""
    draw = {"routing": routing, "orders": orders, "dates": dates}[job]
    rng = random.Random(f"{job}/{split}/{seed}")
    examples: dict[str, str] = {}
    while len(examples) < count:  # repeated draws do not count
        prompt, completion = draw(split, rng)
        examples[prompt] = completion
    return [{"prompt": prompt, "completion": completion} for prompt, completion in examples.items()]


def routing(split: str, rng: random.Random) -> tuple[str, str]:
    code = rng.choice(sorted(ROUTING[split]))
    message = rng.choice(ROUTING[split][code]).format(item=rng.choice(ITEMS[split]))
    return f"From {rng.choice(NAMES[split])}: {message}\nTeam:", code


def orders(split: str, rng: random.Random) -> tuple[str, str]:
    order = {
        "item": rng.choice(ITEMS[split]),
        "quantity": rng.choice(QUANTITIES[split]),
        "city": rng.choice(CITIES[split]),
    }
    sentence = rng.choice(ORDERS[split]).format(**order, name=rng.choice(NAMES[split]))
    return f"Order: {sentence}\nFields:", json.dumps(order)


def dates(split: str, rng: random.Random) -> tuple[str, str]:
    day, month, year = rng.choice(DAYS[split]), rng.randrange(12), rng.choice(YEARS[split])
    sentence = rng.choice(DATES[split]).format(name=rng.choice(NAMES[split]), day=day, month=MONTHS[month], year=year)
    return f"Text: {sentence}\nDate:", f"{year}-{month + 1:02}-{day:02}"
