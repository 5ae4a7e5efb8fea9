"""What an English instruction asks for, as a pair: the root verb and its direct noun object, by rules alone.

    verb_noun("Write a short poem about the sea.")             -> ("write", "poem")
    verb_noun("You are a guide. Please list five old towns.")  -> ("list", "town")
    verb_noun("Explain why the sky is blue.")                  -> ("explain", None)
    verb_noun("What is the capital of France?")                -> (None, None)

It stands in for the parser of the self-instruct and Alpaca papers, whose models have to be downloaded, and differs:

- A question has no verb. A request in a question's form ("Could you list ...?") is a request.
- Statements that set the scene are passed over, to the first sentence that asks. The papers take the first sentence.
- Phrases of quantity give way to what they count: "a list of hobbies", "three examples of irony" are hobby and irony.
- Names are no nouns ("Describe Iron Man" has no object), nor is quoted text.

The word lists are ours and not complete: an unknown word that opens a sentence is a verb where "the" or "a" follows.
An instruction in another language has none.
"""

import re
from typing import NamedTuple


class VerbNoun(NamedTuple):
    verb: str | None
    noun: str | None


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VERBS = words("""
    abbreviate act adapt add address advise alter analyze annotate answer apologize append apply argue arrange
    articulate ask assemble assess assign assume balance boil brainstorm break brief bring build calculate call
    capitalize caption capture carry categorize challenge change characterize check choose cite clarify classify
    clean cluster code collect color combine come comment compare compile complete compose compress compute conclude
    configure conjugate connect construct contrast convert convince cook copy correct correlate count craft create
    debate debug decide decipher decode deduce define delete deliver demonstrate derive describe design detail
    detect determine develop devise differentiate discuss display distinguish divide document download draft draw
    edit elaborate eliminate encode enhance ensure enumerate estimate evaluate examine execute exemplify expand
    explain explore express extend extract factor factorize figure fill filter finalize find finish focus follow
    forecast format formulate gather generate get give go graph group guess help highlight hypothesize identify
    illustrate imagine implement improve improvise include indicate infer insert integrate interpret introduce
    invent invert judge justify label lay list locate look make map mark match maximize measure merge minimize model
    modify multiply name note number offer optimize order organize outline output paraphrase parse perform pick
    pitch place plan play plot point predict prepare present pretend print prioritize produce program proofread
    propose provide pull punctuate put quote rank rate react read rearrange recite recognize recommend reconstruct
    record reduce refactor refer reformat reformulate remove rename render reorder reorganize repeat rephrase
    replace reply report represent research resolve respond restate retell retrieve return reverse review revise
    reword rewrite role-play run say schedule score scramble script search seek select send set share shorten show
    simplify sketch solve sort specify speculate spell split spot state substitute subtract suggest sum summarize
    supply suppose synchronize synthesize tabulate take talk teach tell test think tidy train transcribe transform
    translate transpose troubleshoot type update use utilize validate verify visualize walk work write""")
PARTICLES = words("out up down together off over back away along aloud")
# Verbs that mean their preposition's object, as others mean their direct one.
PHRASAL = {("come", "up", "with"), ("think", "of"), ("look", "for"), ("search", "for"), ("look", "up"), ("fill", "in")}
CAUSED = words("contain sound look read flow rhyme fit work feel stand")
DATIVE = words("give show tell teach send offer assign ask")  # "Give [the text] a title"

DEFINITE = words("the this that these those my your his her its our their")
DETERMINERS = DEFINITE | words("a an each every some any no all both another either neither several many few much")
NUMBERS = words("one two three four five six seven eight nine ten eleven twelve fifteen twenty fifty hundred half")
PHRASE_STARTS = DETERMINERS | NUMBERS | words("me us it them what which how why who where when whether if")
PRONOUNS = words("""
    i you he she it we they me him us them someone everyone anyone something anything everything nothing myself
    yourself itself themselves one's who whom which what whose that there here""")
PREPOSITIONS = words("""
    about above across after against along among around as at before behind below beneath beside between beyond by
    despite during except for from in inside into like near of off on onto outside over per regarding since than
    through throughout to toward towards under until unlike up upon versus via vs with within without concerning
    according based""")
JOINERS = words("and or nor but then so because although though while whereas unless if whether when where why how yet")
AUXILIARIES = words("""
    is are was were be been being am do does did has have had can could will would shall should may might must isn't
    aren't doesn't don't won't can't""")
ADVERBS = PARTICLES | words("""
    not also then instead too very more most less least so well together please aloud again just there here now
    quite only even else rather alone apart""")
PARTICIPLES = words("""
    using including containing involving describing explaining showing regarding concerning outlining consisting
    featuring giving making taking having being given written made known found taken seen shown done built set held""")
SKIPPED = DETERMINERS | NUMBERS | words('more such only just below above "')  # where a noun phrase begins
STOPS = PREPOSITIONS | JOINERS | AUXILIARIES | PRONOUNS | ADVERBS
QUESTION_WORDS = words("what which who whom whose when where why how what's who's where's how's") | AUXILIARIES

QUANTITIES = words("""
    list set series collection number couple pair range variety bunch handful selection group piece bit lot line
    example instance kind type sort form sample dozen string array total""")
ABOUT_HOW_MANY = words("at least most about around approximately exactly no more fewer less than up to only over")
# Before a noun these describe it; alone they are not one.
ADJECTIVES = words("""
    following given provided same other own good better best bad worse worst new old big small large long short high
    low great main major minor key top early first second third last next previous final simple complex easy hard
    basic brief clear concise correct incorrect wrong right true false real common different similar various certain
    specific general important interesting creative original unique appropriate suitable relevant related possible
    potential likely popular famous beautiful formal informal polite positive negative neutral active passive random
    single double whole entire full empty open free modern current recent local global international national social
    personal professional greater larger smaller longer shorter higher lower strong weak deep quick fast distinct
    coherent persuasive detailed compelling effective efficient accurate minimal accessible engaging convincing
    necessary""")
ADJECTIVE_ENDINGS = re.compile(r".{3,}(?<!-t)(?:ous|less|able|ible|ful|ive|ish)$")
NOUNS_LIKE_ADJECTIVES = words("""
    table variable timetable vegetable syllable fable cable handful archive motive perspective narrative adjective
    alternative incentive objective initiative directive executive detective representative dish fish wish english""")
NOUNS_IN_ING = words("""
    learning writing building meaning setting painting marketing reading training drawing meeting greeting spelling
    ending opening heading listing wedding clothing ranking rating pricing string cooking engineering programming
    computing processing planning parking gaming shopping understanding testing lighting advertising thing""")
NOUNS_IN_EST = words("forest request test interest guest contest quest harvest west chest rest conquest pest suggest")
NEVER_NOUNS, NEVER_ADJECTIVES = ADJECTIVES | PARTICIPLES, NOUNS_LIKE_ADJECTIVES | NOUNS_IN_ING | NOUNS_IN_EST
NOUNS_IN_LY = words("family reply supply anomaly assembly butterfly fly jelly rally monopoly ally bully belly italy")

_PLURALS = """
    men=man women=woman people=person children=child feet=foot teeth=tooth mice=mouse geese=goose criteria=criterion
    phenomena=phenomenon indices=index matrices=matrix vertices=vertex lives=life wives=wife knives=knife leaves=leaf
    halves=half shelves=shelf wolves=wolf loaves=loaf quizzes=quiz movies=movie cookies=cookie ties=tie shoes=shoe
    toes=toe headaches=headache caches=cache calories=calorie menus=menu gases=gas buses=bus viruses=virus bonuses=bonus
"""
PLURALS = dict(pair.split("=") for pair in _PLURALS.split())
SINGULARS = words("""
    news series species means physics mathematics economics politics statistics ethics analytics linguistics
    genetics robotics electronics mechanics logistics dynamics semantics acoustics gas bus lens bias canvas atlas
    christmas alias chaos cosmos ethos diabetes dns css""")
PLURAL_MODIFIERS = words("sales sports news arts systems communications operations customs goods games mathematics")

# What may stand before the verb of a request. Matched on lower-case tokens with one space after each.
OPENING = re.compile(
    r"(?:please|kindly|now|then|next|first|firstly|finally|also|just|ok|okay|hi|hello|hey|and|so|again|always|never|only"
    r"|[,:;.*#>–—-]|\d+ [.)]|(?:instruction|task|prompt|problem|exercise|request)s? [:.]|step by step|in detail"
    r"|(?!(?:re|ap|sup|multi)ply |rely |family )[a-z]{2,}ly"
    r"|(?:can|could|would|will) (?:you|we)|i (?:want|need|would like|'d like) you to|i'd like you to|let's|let us"
    r"|(?:you|we) (?:(?:will|would|may|might|can|should|must|now|also) )*(?:need to|have to|must|should)"
    r"|(?:you|we|you're) (?:are )?(?:being )?(?:asked|required|expected|instructed|tasked|told|going) (?:to|with)"
    r"|(?:you|we) are to|(?:your|the|this) (?:\w+ )?(?:task|job|goal|objective|aim|mission|assignment) (?:here )?is to"
    r"|help (?:me|us)(?: to)?(?= (?P<helped>[a-z-]+) )|do not|don't|try to|be sure to|feel free to) "
)
WANTS = re.compile(r"i (?:really |just )?(?:(?:would )(?=like )|(?=need |want ))|i'd (?=like )")
QUOTED = re.compile(r'```.*?```|`[^`]*`|"[^"]*"|«[^»]*»|(?<!\w)\'[^\'\n]{1,200}\'(?!\w)|<[^<>\n]*>|\[[^\]\n]*\]', re.S)
NAMED = re.compile(r"\b\w+\([^()]*\)|\b\w*_\w+\b|https?://\S+")  # code and addresses: names too
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|mr|mrs|ms|dr|st|u\.s|u\.k|u\.s\.a|a\.m|p\.m|no)\.(?=\s)", re.I)
TOKEN = re.compile(r"[$€£]?\d(?:[\w.,:%]*[\w%])?(?:-[a-z]+)*|[^\W\d_](?:[\w'&+.-]*[\w+])?'?|[^\s\w]")


def verb_noun(instruction: str) -> VerbNoun:
    """Return the base form of the verb and singular of its object; None for what is not there."""
    for sentence in sentences(instruction):
        tokens = TOKEN.findall(sentence) or [sentence]
        tokens = tokens[:150] + tokens[150:][-1:]  # a "sentence" of 10,000 words is data
        if sentence.isupper():  # otherwise every word would be a name
            tokens = [token.lower() for token in tokens]
        if (place := find_verb(tokens)) is not None:
            verb = verb_base(tokens[place]) or tokens[place].lower()
            return VerbNoun(verb, find_object(tokens, place + 1, verb))
        if is_question(tokens):
            break  # what follows is how to answer it
    return VerbNoun(None, None)


def sentences(text: str) -> list[str]:
    """Return sentences whose quotations and code are each one `"`, so that nothing inside them is read as the
    request."""
    text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    text = NAMED.sub(' " ', QUOTED.sub(' " ', text))
    text = ABBREVIATION.sub(r"\1", re.sub(r"\([^()]*\)", " ", text))
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def is_question(tokens: list[str]) -> bool:
    clauses = [0, *(i + 1 for i, token in enumerate(tokens[:-1]) if token == ",")]  # "In a shop, how do you ..."
    asks = QUESTION_WORDS - {"which", "who", "whom", "whose", "where", "when"}  # elsewhere: ", which is ..."
    return tokens[-1] == "?" or tokens[0].lower() in QUESTION_WORDS or any(tokens[i].lower() in asks for i in clauses)


def find_verb(tokens: list[str]) -> int | None:
    """Return the root verb's place: at the start, else after a comma ("Given X, do Y"), else before an object."""
    start, lower = after_opening(tokens, 0), [token.lower() for token in tokens]
    if wants := WANTS.match(" ".join(lower[start:]) + " "):
        return start + wants.group().count(" ")
    if is_verb(tokens, start) or is_unknown_verb(tokens, start):
        return start
    if is_question(tokens) and "you" not in lower:
        return None
    breaks = [i + 1 for i, token in enumerate(lower) if token in ",;:–—-" or lower[i : i + 2] == ["and", "you"]]
    candidates = [place for place in (after_opening(tokens, i) for i in breaks) if is_verb(tokens, place)]
    for wanted in (begins_phrase, may_follow_verb):
        for place in candidates:
            if wanted(tokens, place + 1):
                return place
    for place in range(2, len(tokens) - 1) if lower[0] in PREPOSITIONS | PARTICIPLES else ():
        excluded = any(lower[place - 1] in some for some in (STOPS, DETERMINERS, NUMBERS))
        if is_verb(tokens, place) and begins_phrase(tokens, place + 1) and not excluded:
            return place
    return None


def after_opening(tokens: list[str], start: int) -> int:
    """Return where the request itself begins: behind "Please", "Could you", "Briefly", "Your task is to"..."""
    rest = "".join(f"{token.lower()} " for token in tokens[start:])
    while (match := OPENING.match(rest)) and verb_base(match["helped"] or "write"):
        start += match.group().count(" ")
        rest = rest[match.end() :]
    return start


def is_verb(tokens: list[str], place: int) -> bool:
    if place >= len(tokens) or verb_base(tokens[place]) is None:
        return False
    following = tokens[place + 1].lower() if place + 1 < len(tokens) else ""
    return following not in AUXILIARIES and (following != "of" or tokens[place].lower() == "think")


def is_unknown_verb(tokens: list[str], place: int) -> bool:
    """May the word be a verb, as in "Photoshop the picture"? It opens a sentence and takes an object."""
    if place + 1 >= len(tokens) or not re.fullmatch(r"[A-Za-z][a-z-]{2,}", tokens[place]):
        return False
    word, following = tokens[place].lower(), tokens[place + 1].lower()
    known = any(word in some for some in (STOPS, DETERMINERS, NUMBERS, NEVER_NOUNS, ("once", "tomorrow")))
    ending = re.search(r"(?:ing|ed|ly|[^s]s|tion|ment|ness|day)$", word)
    return following in ("the", "a", "an", "this", "these", "those", "me") and not known and not ending


def begins_phrase(tokens: list[str], place: int) -> bool:
    """Is a noun phrase (or a clause) bound to begin here?"""
    if place >= len(tokens):
        return False
    token = tokens[place].lower()
    return token in PHRASE_STARTS or token[0].isdigit() or token.endswith("'s")


def may_follow_verb(tokens: list[str], place: int) -> bool:
    if tokens[place : place + 1] and tokens[place].lower() in ("and", "or"):
        return is_verb(tokens, place + 1)
    return place < len(tokens) and (tokens[place][0].isalpha() or tokens[place] == '"')


def find_object(tokens: list[str], place: int, verb: str) -> str | None:
    """Return the head of the first noun phrase behind the verb, at `place` or after what may stand between."""
    lower = [token.lower() for token in tokens] + [""] * 4
    while lower[place] in (",", "/", "and", "or", "then") and any(map(verb_base, lower[place + 1 : place + 3])):
        place += 2 if verb_base(lower[place + 1]) else 3  # "Compare and contrast", "Read, check, and sort"
    for length in (2, 1):
        if (verb, *lower[place : place + length]) in PHRASAL:
            place += length
    while lower[place] in PARTICLES or (lower[place].endswith("ly") and lower[place] not in NOUNS_IN_LY):
        place += 1
    if lower[place] in ("me", "us"):
        place += 1
    elif lower[place] in ("it", "them", "him", "her", "you") and begins_phrase(tokens, place + 1):
        place += 1
    while lower[place] in PREPOSITIONS - {"to"} and not how_many(tokens, place):  # "Write in French a letter"
        place = noun_phrase(tokens, place + 1)[1]
        if lower[place] not in PREPOSITIONS and not begins_phrase(tokens, place):
            return None
    if verb == "make":  # "Make this sentence sound friendly"
        causes = [i for i in range(place + 2, len(tokens)) if lower[i] in CAUSED]
        tokens = tokens[: causes[0]] if causes else tokens
    noun, end = noun_phrase(tokens, place)
    if lower[end] in AUXILIARIES:
        return None  # a clause: "Suppose your sister is ..."
    if verb in DATIVE and (lower[end] in DETERMINERS - {"that"} or lower[end] in NUMBERS or lower[end][:1].isdigit()):
        noun = noun_phrase(tokens, end)[0] or noun
    return noun


def how_many(tokens: list[str], place: int) -> int:
    """Return the number of tokens of "at least", "no more than", "about" before a number, else 0."""
    end = place
    while end < len(tokens) and tokens[end].lower() in ABOUT_HOW_MANY:
        end += 1
    counted = end < len(tokens) and (tokens[end].lower() in NUMBERS or tokens[end][0].isdigit())
    return end - place if counted else 0


def noun_phrase(tokens: list[str], place: int) -> tuple[str | None, int]:
    """Return (head noun in the singular or None, where the phrase ends) of the noun phrase that begins at `place`."""
    place += how_many(tokens, place)
    first, definite = place, False
    while place < len(tokens):
        token = tokens[place].lower()
        if token not in SKIPPED and not token[0].isdigit() and (token != "of" or place == first):  # "some of the"
            break
        definite = definite or token in DEFINITE
        place += 1
    group, end = noun_group(tokens, place)
    head = head_of(group, of_follows=tokens[end : end + 1] == ["of"])
    # "a Haiku", "the following Tweet" are no names
    introduced = place > first and (tokens[place - 1].lower() in ("a", "an") or "following" in group)
    if head is None or (head[0].isupper() and not introduced):
        return None, end
    noun = singular(head)
    if noun in QUANTITIES and not definite and tokens[end : end + 1] == ["of"]:
        counted, inner_end = noun_phrase(tokens, end + 1)
        return (counted, inner_end) if counted else (noun, end)
    return noun, end


def head_of(group: list[str], of_follows: bool) -> str | None:
    """Return the last noun: "closing" in "a polite closing", "story" in "a story set"."""
    nouns = [word for word in group if not describes(word)]
    if group and of_follows and group[-1] != "following":
        nouns = group[-1:]  # "the opposite of"
    elif group and group[-1].endswith("ing") and group[-1] != "following":
        if not nouns or (len(group) > 1 and re.search("(?:ic|al)$", group[-2])):
            nouns = group[-1:]
    return nouns[-1] if nouns and len(nouns[-1]) > 1 else None


def noun_group(tokens: list[str], start: int) -> tuple[list[str], int]:
    """Return the adjectives and nouns from `start` on, up to the word that cannot belong to the same phrase."""
    group: list[str] = []
    indefinite = tokens[start - 1].lower() in ("a", "an")
    for place in range(start, len(tokens)):
        token, word = tokens[place], tokens[place].lower()
        unfinished = all(map(describes, group))
        if group and joins_adjectives(tokens, place, unfinished):
            continue
        if not token[0].isalpha():
            describing = unfinished and (token == '"' or token[0].isdigit()) or re.match(r"\d+-[a-z]", token)
            if describing and not starts_stop(tokens, place + 1):
                continue  # "the "butterfly" effect", "the top 10 films", "a noisy 8-bit tune"
            return group, place
        adverb = word.endswith("ly") and word not in NOUNS_IN_LY
        if unfinished and (adverb or (not group and word in ("more", "most", "very"))):
            continue
        capitals = token.isupper() and len(token) > 1  # "the US" is not "us"
        stop = (word in STOPS or word in DETERMINERS) and not capitals
        if stop or adverb or (not unfinished and is_participle(tokens, place)):
            return group, place
        if token[0].isupper() and not unfinished and not indefinite and name_ends_phrase(tokens, place):
            return group, place  # "the planet Mars", but "a rainy Saturday"
        if word.endswith(("'s", "s'")):
            group = []  # "the teacher's old desk": the owner is no part of what is owned
            continue
        group.append(token if token[0].isupper() else word)
        if is_plural(token) and word not in PLURAL_MODIFIERS:
            return group, place + 1
    return group, len(tokens)


def joins_adjectives(tokens: list[str], place: int, adjectives_only: bool) -> bool:
    """Is this the comma or the "and" of "a short, clear and polite email", of "democratic and autocratic states"?"""
    if tokens[place] not in (",", "and", "or", "but"):
        return False
    ending = re.compile(r".{3,}(?:ic|al|ary|an|ist|ive|ous|ent|ant)$")
    return adjectives_only or all(ending.match(word) for word in (tokens[place - 1], *tokens[place + 1 : place + 2]))


def is_participle(tokens: list[str], place: int) -> bool:
    """Is this a participle? "using" is, and "listing" in "a page listing the prices", not in "a job listing"."""
    word = tokens[place].lower()
    return word in PARTICIPLES or (word.endswith("ing") and begins_phrase(tokens, place + 1))


def starts_stop(tokens: list[str], place: int) -> bool:
    return place >= len(tokens) or not tokens[place][0].isalpha() or tokens[place].lower() in STOPS


def name_ends_phrase(tokens: list[str], place: int) -> bool:
    """Does the phrase end with the name that begins at `place`? Not in "the machine learning Python script"."""
    while place < len(tokens) and tokens[place][0].isupper():
        place += 1
    return starts_stop(tokens, place) or tokens[place].lower() in DETERMINERS


def describes(word: str) -> bool:
    """May the word stand before or behind a noun, but hardly be one?"""
    if word in NEVER_NOUNS or word in NEVER_ADJECTIVES:
        return word in NEVER_NOUNS
    return bool(ADJECTIVE_ENDINGS.match(word) or re.fullmatch(r"[a-z-]{2,}(?:[^e]ed|[a-z]ing|[a-z]est)", word))


def is_plural(word: str) -> bool:
    return word in PLURALS or (word.islower() and singular(word) != word and not word.endswith("'s"))


def singular(noun: str) -> str:
    noun = noun.lower().rstrip("'.-")
    stem, _, last = noun.rpartition("-")  # "cover-letters", "sisters-in-law" aside
    if last in PLURALS:
        return (f"{stem}-" if stem else "") + PLURALS[last]
    if last in SINGULARS or len(last) < 4 or not last.endswith("s") or last.endswith(("ss", "us", "is")):
        return noun[:-1] if last in ("ads", "ids", "pcs", "tvs") else noun
    if last.endswith("ies"):
        return noun[:-3] + "y"
    if last.endswith(("analyses", "hypotheses", "theses", "crises", "diagnoses")):
        return noun[:-2] + "is"
    if last.endswith(("sses", "ches", "shes", "xes", "zzes", "oes")):
        return noun[:-2]
    return noun[:-1]


def verb_base(word: str) -> str | None:
    """Return the verb's base form in American spelling, or None for a word that is no verb of the list."""
    word = word.lower()
    american = re.sub(r"(?<=[a-z]{3})is(e)$", r"iz\1", word.replace("alyse", "alyze").replace("colour", "color"))
    for base in (word, word.replace("-", ""), american, american.replace("-", "")):
        if base in VERBS:
            return base
    return re.sub(r"^re-", "re", word) if re.fullmatch(r"re-?[a-z]+", word) and word[2:].strip("-") in VERBS else None
