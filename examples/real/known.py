"""What the model knows and is to keep: questions, texts of three kinds, and items with one right answer among several.

Facts and sentences are written here. Documentation and code are of the Python that runs (PSF licence).
"""

import argparse
import bisect
import calendar
import heapq
import random
import string
import textwrap
from dataclasses import dataclass
from inspect import getsource
from pydoc_data import topics


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.replace("\n", " ").strip().split(", "))


CAPITALS = {
    "Europe": _pairs("""France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Greece:Athens,
Austria:Vienna, Poland:Warsaw, Hungary:Budapest, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki, Denmark:Copenhagen,
Ireland:Dublin, Belgium:Brussels, Romania:Bucharest, Bulgaria:Sofia, Croatia:Zagreb, Serbia:Belgrade, Ukraine:Kyiv,
Russia:Moscow, Iceland:Reykjavik, Switzerland:Bern, Albania:Tirana, Estonia:Tallinn, Latvia:Riga, Lithuania:Vilnius,
Slovakia:Bratislava, Slovenia:Ljubljana, Malta:Valletta"""),
    "Asia": _pairs("""Japan:Tokyo, China:Beijing, Thailand:Bangkok, Vietnam:Hanoi, Indonesia:Jakarta, Turkey:Ankara,
Iran:Tehran, Iraq:Baghdad, Syria:Damascus, Lebanon:Beirut, Jordan:Amman, Pakistan:Islamabad, Nepal:Kathmandu,
Bangladesh:Dhaka, Afghanistan:Kabul, Mongolia:Ulaanbaatar, Qatar:Doha, Malaysia:Kuala Lumpur, Cambodia:Phnom Penh,
Laos:Vientiane, Oman:Muscat, Armenia:Yerevan, Georgia:Tbilisi, Azerbaijan:Baku, Uzbekistan:Tashkent, Bhutan:Thimphu"""),
    "Africa": _pairs("""Egypt:Cairo, Kenya:Nairobi, Ethiopia:Addis Ababa, Ghana:Accra, Senegal:Dakar, Morocco:Rabat,
Tunisia:Tunis, Libya:Tripoli, Sudan:Khartoum, Uganda:Kampala, Rwanda:Kigali, Somalia:Mogadishu, Zambia:Lusaka,
Zimbabwe:Harare, Angola:Luanda, Mozambique:Maputo, Mali:Bamako, Algeria:Algiers, Nigeria:Abuja, Botswana:Gaborone,
Namibia:Windhoek, Liberia:Monrovia"""),
    "America": _pairs("""Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Jamaica:Kingston, Haiti:Port-au-Prince,
Argentina:Buenos Aires, Chile:Santiago, Peru:Lima, Colombia:Bogota, Venezuela:Caracas, Ecuador:Quito, Brazil:Brasilia,
Uruguay:Montevideo, Paraguay:Asuncion, Panama:Panama City, Nicaragua:Managua, Honduras:Tegucigalpa"""),
}
COUNTRIES = {name: (town, part) for part, towns in CAPITALS.items() for name, town in towns.items()}
KINDS = {
    "animal": "horse cow sheep goat lion tiger bear wolf rabbit mouse elephant monkey giraffe zebra fox deer".split(),
    "bird": "eagle sparrow robin owl crow pigeon swan parrot penguin hawk seagull woodpecker finch raven".split(),
    "fish": "salmon trout tuna cod herring carp mackerel sardine haddock eel halibut pike".split(),
    "fruit": "apple banana pear peach grape cherry mango lemon orange plum strawberry pineapple apricot kiwi".split(),
    "vegetable": "carrot potato onion cabbage spinach broccoli cucumber lettuce celery turnip leek cauliflower".split(),
    "tool": "hammer saw screwdriver wrench drill chisel pliers axe shovel rake spade crowbar".split(),
    "instrument": "piano violin guitar flute trumpet drum cello clarinet harp saxophone trombone oboe banjo".split(),
    "color": "red blue green yellow purple brown black white pink gray".split(),
    "metal": "iron gold silver copper tin lead zinc nickel aluminum platinum titanium".split(),
    "sport": "football tennis basketball hockey golf baseball volleyball rugby cricket swimming badminton".split(),
    "profession": "doctor teacher lawyer nurse baker carpenter plumber farmer dentist engineer pilot tailor".split(),
    "vehicle": "car bus truck bicycle train tram motorcycle van taxi scooter tractor".split(),
}
OPPOSITES = _pairs("""hot:cold, big:small, tall:short, old:young, fast:slow, light:dark, rich:poor, strong:weak,
wet:dry, hard:soft, early:late, high:low, near:far, open:closed, full:empty, happy:sad, love:hate, up:down,
left:right, in:out, day:night, black:white, good:bad, true:false, first:last, begin:end, buy:sell, win:lose,
push:pull, thick:thin, wide:narrow, deep:shallow, loud:quiet, clean:dirty, sharp:blunt, alive:dead, brave:cowardly,
cheap:expensive, difficult:easy, friend:enemy, front:back, heaven:hell, inside:outside, laugh:cry, male:female,
more:less, north:south, east:west, safe:dangerous, sweet:bitter, summer:winter, above:below, accept:reject,
arrive:depart, ancient:modern, attack:defend, increase:decrease, major:minor, maximum:minimum, positive:negative,
public:private, question:answer, remember:forget, success:failure, victory:defeat, war:peace, always:never,
before:after""")
USES = _pairs("""You cut bread with a:knife, You write a letter with a:pen, You open a lock with a:key,
You eat soup with a:spoon, You drink tea from a:cup, You sleep in a:bed, You sit on a:chair,
You tell the time with a:clock, You sweep the floor with a:broom, You dry your hands with a:towel,
You take a photo with a:camera, You light a candle with a:match, You brush your teeth with a:toothbrush,
You carry books in a:bag, You call a friend on the:phone, You borrow books from the:library,
You buy medicine at the:pharmacy, You catch a plane at the:airport, You watch a film at the:cinema,
You keep milk cold in the:refrigerator, You bake bread in the:oven, You see the stars at:night,
You wear shoes on your:feet, You wear a hat on your:head, You hear with your:ears, You see with your:eyes,
You smell with your:nose, Bees make:honey, Hens lay:eggs, Cows give:milk, A spider spins a:web,
A baby cat is called a:kitten, A baby dog is called a:puppy, The sun rises in the:morning, Ice is frozen:water,
Paper is made from:wood, Wine is made from:grapes, Bread is made from:flour, Cheese is made from:milk,
Snow falls in:winter, A triangle has three:sides, A week has seven:days, A year has twelve:months,
A minute has sixty:seconds, Fish breathe with:gills, Birds fly with their:wings, The pilot flies the:plane,
The farmer drives a:tractor, The doctor works in a:hospital, The teacher works in a:school,
The judge works in a:court, The sailor works on a:ship""")
PLURALS = _pairs("""dog:dogs, house:houses, tree:trees, river:rivers, teacher:teachers, child:children, man:men,
woman:women, bottle:bottles, letter:letters, window:windows, garden:gardens, cousin:cousins, song:songs, road:roads""")
PLACES = "near the hill, behind the old church, on the table, from the next village, with the green door".split(", ")


@dataclass(frozen=True)
class Item:
    """A beginning, how it may go on, and the number of the right one."""

    kind: str
    start: str
    options: tuple[str, ...]
    right: int


def items() -> list[Item]:
    """The items of all kinds, the same in every call."""
    chance = random.Random("items")
    towns = [town for town, _ in COUNTRIES.values()]
    made = [_item(chance, "capital", f"The capital of {name} is", town, towns) for name, (town, _) in COUNTRIES.items()]
    for kind, names in KINDS.items():
        made += [_item(chance, "kind", f"The word {name} names a kind of", kind, list(KINDS)) for name in names]
    for word, other in OPPOSITES.items():
        made.append(_item(chance, "opposite", f"The opposite of {word} is", other, list(OPPOSITES.values())))
    made += [_item(chance, "use", start, end, list(USES.values())) for start, end in USES.items()]
    for one, many in PLURALS.items():
        for place in PLACES:
            made.append(Item("agreement", f"The {one} {place}", ("is", "are"), 0))
            made.append(Item("agreement", f"The {many} {place}", ("is", "are"), 1))
    for row in (list(calendar.day_name), list(calendar.month_name)[1:], list(string.ascii_uppercase)):
        for first in range(len(row) - 3):
            made.append(_item(chance, "order", ", ".join(row[first : first + 3]) + ",", row[first + 3], row))
    return made


def _item(chance: random.Random, kind: str, start: str, answer: str, others: list[str]) -> Item:
    options = chance.sample([other for other in dict.fromkeys(others) if other != answer], 3)
    right = chance.randrange(4)
    options.insert(right, answer)
    return Item(kind, start, tuple(options), right)


# Questions of any user

SUBJECTS = (
    "a volcano, the moon, photosynthesis, a bicycle, democracy, chess, the heart, bread, a library, electricity, "
    "a rainbow, the Roman Empire, coffee, a computer, friendship, the ocean, jazz, a vaccine, money, sleep"
).split(", ")
FRAMES = (
    "Explain {} to a child.",
    "Write one sentence about {}.",
    "Why does {} matter?",
    "Name three things that belong to {}.",
    "Ask me a good question about {}.",
    "Write a title for a book about {}.",
)


def questions() -> list[str]:
    """Ordinary questions, 120 of them."""
    return [frame.format(subject) for subject in SUBJECTS for frame in FRAMES]


# General texts that nothing trains on

PROSE = """\
The ferry leaves at seven, and most mornings the same eleven people stand on the pier. They nod to each other but
rarely speak, because the wind takes the words away. On the other side they walk up the hill in a loose line, past the
bakery and the closed cinema, until one after another turns into a doorway and the street is empty again.

When the river rose in March, the mill was the first building to flood. Neighbours carried the flour sacks to the
upper floor, and for two nights nobody slept. The water stopped a hand below the beams. Years later a brass line on
the wall still shows how high it came, and children measure themselves against it.

A good repair begins with patience. Before you take a clock apart, listen to it for a day and write down when it
slows. Dust, thick oil and a bent tooth each leave their own trace. Most clocks that come to the shop need nothing but
cleaning, though their owners are often a little disappointed to hear it.

The committee met for three hours and agreed on very little. The new road would shorten the way to the hospital, but
it would also cut the meadow in two. In the end they asked for another study, which everybody knew would say the same
as the last one, and went home through the rain.

My grandmother never measured anything. She would put her hand into the bowl, feel the dough and add a little milk, or
wait. When I asked how long it had to rest, she said until it was ready. I have tried for twenty years to write down
what she knew, and every time I bake I cross out a number.

Cities are louder than villages, but they also have more kinds of silence. There is the silence of a museum on a
weekday, of a street after snow, of a train between two stations when nobody has anything to say. People who move to
the country for the quiet are often surprised by how much noise birds make.

The experiment failed because the sensor drifted. Every hour it read a little warmer, and by evening the curve looked
like a discovery. Only when a student left the window open overnight did the drift turn around, and the discovery with
it. Since then every table in the laboratory carries a plain thermometer, and someone reads it.

If you want to learn a language, begin with the words you use when you are tired. Nobody argues about politics at
midnight, but everybody asks where the key is, whether there is any soup left and who will get up first. A language in
which you can be tired is one in which you can live.
"""
TOPICS = ("assignment", "for", "try", "import", "class", "lambda", "truth", "numbers", "string-methods", "with")


def texts() -> dict[str, list[str]]:
    """Paragraphs of prose, documentation and code."""
    docs = [part for name in TOPICS if name in topics.topics for part in topics.topics[name].split("\n\n")]
    code = [getsource(one) for one in (textwrap.TextWrapper, heapq, bisect, argparse.HelpFormatter)]
    return {"prose": PROSE.split("\n\n"), "documentation": docs, "code": code}
