"""A chart with logarithmic axes: lines, dots and words. report.py draws with it."""
import math

from PIL import Image, ImageDraw, ImageFont

BLUE = "#1f77b4"
RED = "#d62728"
GREEN = "#2ca02c"
PURPLE = "#9467bd"
ORANGE = "#ff7f0e"
GREY = "#999999"
LEFT = 110  # the place for data in a picture of 1100 x 720
RIGHT = 1070
TOP = 96
BOTTOM = 640


def range_of(values) -> tuple:
    """Lowest and highest logarithm, with a margin."""
    low = math.log10(min(values))
    high = math.log10(max(values))
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def share(value, limits) -> float:
    """Where a value lies between the limits of its axis: 0 to 1."""
    low, high = limits
    return (math.log10(value) - low) / (high - low)


def ticks(limits) -> list:
    numbers = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
    return [number for number in numbers if 0 <= share(number, limits) <= 1]


class Chart:
    """xs and ys: numbers that must fit in."""

    def __init__(self, title, x_name, y_name, xs, ys):
        self.image = Image.new("RGB", (1100, 720), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.draw.font = ImageFont.load_default(20)
        self.xs = range_of(xs)
        self.ys = range_of(ys)
        self.draw.text((550, 16), title, "black", anchor="ma")
        self.draw.text((590, 686), x_name, "black", anchor="ma")
        self.draw.text((12, 76), y_name, "black", anchor="lm")
        for value in ticks(self.xs):
            self.draw.text((self.x(value), BOTTOM + 10), f"{value:g}", "black", anchor="ma")
        for value in ticks(self.ys):
            y = self.y(value)
            self.draw.line([(LEFT, y), (RIGHT, y)], "#dddddd")
            self.draw.text((LEFT - 8, y), f"{value:g}", "black", anchor="rm")
        self.draw.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], "black")

    def x(self, value) -> float:
        return LEFT + (RIGHT - LEFT) * share(value, self.xs)

    def y(self, value) -> float:
        return BOTTOM - (BOTTOM - TOP) * share(value, self.ys)

    def line(self, points, colour):
        self.draw.line([(self.x(x), self.y(y)) for x, y in points], colour, 3)
        for x, y in points:
            self.dot(x, y, colour)

    def dot(self, x, y, colour, text="", below=0):
        """A dot, and a text to the right of it."""
        x = self.x(x)
        y = self.y(y)
        self.draw.ellipse([x - 6, y - 6, x + 6, y + 6], colour, "white")
        self.draw.text((x + 14, y + below), text, colour, anchor="lm")

    def legend(self, colours, x):
        """colours: {text: colour}."""
        for i, (text, colour) in enumerate(colours.items()):
            self.draw.text((x, TOP + 14 + 28 * i), text, colour)
