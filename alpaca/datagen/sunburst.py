"""Two rings of wedges, verbs inside, their nouns outside: every name lies within its own wedge, so none can overlap.

    figure = draw(lay_out({"write": {"poem": 3, "story": 2}}, "Our instructions"), "5 of 9")

matplotlib draws the wedges and the text. What it has not, and this module adds: the largest size at which a text lies
within its wedge (axes.pie lets labels overlap), shortening, and which wedges are too thin for a name.

Sizes are inches. A name is turned along the radius, or across it in a wide wedge, and set as large as fits; a very long
one ends in "…"; a wedge that is too thin for its name joins "other".
"""

import colorsys
import math
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 10.0, 10.6  # a line for the title above the circle
CENTER = (5.0, 5.0)
RINGS = ((1.1, 2.75), (2.75, 4.75))  # radii
PAD = 0.07  # between a name and the edge of its ring
SIZES = ((14.0, 8.0), (12.0, 7.0))  # points, largest and smallest, of verbs and of nouns
LINE = 1.25 / 72  # height of a line of text of one point
LONGEST = 40  # characters of a name
OTHER = "other"
GREY = (0.72, 0.72, 0.72)

Color = tuple[float, float, float]


@dataclass
class Label:
    text: str
    size: float
    radius: float  # of its middle
    rotation: float  # degrees


@dataclass
class Wedge:
    ring: int
    start: float  # degrees, clockwise from the top
    extent: float
    color: Color
    label: Label | None

    @property
    def middle(self) -> float:
        return self.start + self.extent / 2


@dataclass
class Sunburst:
    title: str
    wedges: list[Wedge] = field(default_factory=list)
    pairs: dict[str, dict[str, int]] = field(default_factory=dict)  # those with wedges of their own
    other: int = 0  # instructions in wedges called "other"

    @property
    def instructions(self) -> int:
        return sum(sum(nouns.values()) for nouns in self.pairs.values())

    def summary(self) -> dict[str, Any]:
        return {"instructions": self.instructions, "other": self.other, "pairs": self.pairs}


def lay_out(pairs: dict[str, dict[str, int]], title: str) -> Sunburst:
    """Return wedges for the counts of `pairs`, in their order, clockwise from the top."""
    picture = Sunburst(title)
    total = sum(sum(nouns.values()) for nouns in pairs.values())
    start, too_thin = 0.0, 0
    for verb, nouns in pairs.items():
        extent = 360 * sum(nouns.values()) / total
        label = fit(verb, 0, start, extent)
        if label is None:
            too_thin += sum(nouns.values())
            continue
        color = verb_color(len(picture.pairs), len(pairs))
        picture.wedges.append(Wedge(0, start, extent, color, label))
        picture.pairs[verb] = lay_out_nouns(picture, nouns, start, 360 / total, color)
        start += extent
    if too_thin:
        for ring in (0, 1):
            extent = 360 - start
            picture.wedges.append(Wedge(ring, start, extent, tint(GREY, ring * 0.6), fit(OTHER, ring, start, extent)))
        picture.other += too_thin
    return picture


def lay_out_nouns(
    picture: Sunburst, nouns: dict[str, int], start: float, degrees: float, color: Color
) -> dict[str, int]:
    """Add the nouns' wedges, each `degrees` wide per instruction. Return the nouns that have their own."""
    named, rest = {}, 0
    for noun, number in nouns.items():
        label = fit(noun, 1, start, number * degrees)
        if label is None:
            rest += number
            continue
        picture.wedges.append(Wedge(1, start, number * degrees, tint(color, 0.42 + 0.12 * (len(named) % 4)), label))
        named[noun] = number
        start += number * degrees
    if rest:
        picture.wedges.append(Wedge(1, start, rest * degrees, tint(color, 0.88), fit(OTHER, 1, start, rest * degrees)))
        picture.other += rest
    return named


def fit(text: str, ring: int, start: float, extent: float) -> Label | None:
    """Return the name as large as the wedge allows, as near to upright as that leaves it; None in a wedge too thin for
    it."""
    largest, smallest = SIZES[ring]
    inner, outer = RINGS[ring]
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    shown = shortened(short, smallest, outer - inner - 2.5 * PAD)
    size = largest
    while size >= smallest:
        fitting = [
            Label(shown, size, radius, upright(90 - start - extent / 2 - turn))
            for turn in ((0, 90) if extent > 30 else (0,))
            for radius in radii(shown, size, ring, turn)
            if holds(ring, extent, radius, *box(shown, size, turn))
        ]
        if fitting:
            return min(fitting, key=lambda label: abs(label.rotation) > 60)
        size -= 0.5
    return None


def box(text: str, size: float, turn: int) -> tuple[float, float]:
    """Return extents of the text along the radius and across it."""
    length, height = text_width(text) * size, LINE * size
    return (height, length) if turn else (length, height)


def radii(text: str, size: float, ring: int, turn: int) -> tuple[float, ...]:
    """Return where the middle of a name may lie: in the middle of its ring, or further out, where a wedge is wider."""
    inner, outer = RINGS[ring]
    return ((inner + outer) / 2, outer - 1.5 * PAD - box(text, size, turn)[0] / 2)


def holds(ring: int, extent: float, radius: float, along: float, across: float) -> bool:
    """Does a wedge hold a rectangle whose middle lies at `radius`? The corners decide."""
    inner, outer = RINGS[ring]
    near, far = radius - along / 2, radius + along / 2
    if near < inner + PAD or math.hypot(far, across / 2) > outer - PAD:
        return False
    return extent >= 180 or math.atan2(across / 2, near) < math.radians(extent / 2)


def upright(angle: float) -> float:
    """Return the same line, not upside down: within -90 to 90 degrees."""
    return (angle + 90) % 180 - 90


@cache
def text_width(text: str) -> float:
    """Return the width in inches at a size of one point."""
    from matplotlib.textpath import TextPath

    path = TextPath((0, 0), text.replace("$", "S"), size=100)  # two "$" would be read as a formula
    return path.get_extents().width / 100 / 72 * 1.04 if text.strip() else 0.0


def verb_color(number: int, of: int) -> Color:
    """Return one of evenly spaced hues, dealt out in steps of some 140 degrees, so that neighbours differ, the last and
    first too."""
    step = min((k for k in range(1, of + 1) if math.gcd(k, of) == 1), key=lambda k: abs(k / of - 0.382))
    hue = (0.58 + number * step / of) % 1
    return colorsys.hls_to_rgb(hue, (0.65, 0.73)[number % 2], 0.6)  # light enough for black letters


def tint(color: Color, white: float) -> Color:
    """Return the color mixed with white: the hue stays."""
    return tuple(part + (1 - part) * white for part in color)


def draw(picture: Sunburst, center: str) -> "Figure":
    """Return a figure of its own, apart from pyplot's state: nothing to close, no display needed."""
    import matplotlib
    from matplotlib import patches
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "diversity"  # or every run would name its parts anew
    figure = Figure((WIDTH, HEIGHT), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.set_axis_off()
    for wedge in picture.wedges:
        inner, outer = RINGS[wedge.ring]
        first, last = 90 - wedge.start - wedge.extent, 90 - wedge.start
        edge = "white" if wedge.extent < 360 else "none"
        patch = patches.Wedge(CENTER, outer, first, last, width=outer - inner, facecolor=wedge.color, edgecolor=edge)
        axes.add_patch(patch)
        if label := wedge.label:
            angle = math.radians(90 - wedge.middle)
            x, y = (c + label.radius * f(angle) for c, f in zip(CENTER, (math.cos, math.sin)))
            write(axes, x, y, label.text, label.size, label.rotation)
    write(axes, *CENTER, center, 13)
    title, size = title_size(picture.title)
    write(axes, WIDTH / 2, HEIGHT - 0.42, title, size)
    return figure


def write(axes: Any, x: float, y: float, text: str, size: float, rotation: float = 0) -> None:
    axes.text(x, y, text, size=size, rotation=rotation, ha="center", va="center", color="black", parse_math=False)


def title_size(title: str) -> tuple[str, float]:
    """Return the title and its size: smaller where it is long, and then cut at its end."""
    title, size, room = " ".join(title.split()), 17.0, WIDTH - 0.6
    while size > 11 and text_width(title[:300]) * size > room:
        size -= 0.5
    return shortened(title[:300], size, room), size


def shortened(text: str, size: float, room: float) -> str:
    """Return the text, or as much of its beginning as fits with "…"."""
    kept = text.rstrip("…")
    while kept and (width := text_width(text) * size) > room:
        kept = kept[: min(len(kept) - 1, int(len(kept) * room / width) + 2)]
        text = kept + "…"
    return text
