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


def share(value, ticks):
    """Where a value lies between the first and the last tick: 0 to 1."""
    return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])


class Chart:
    """x_ticks and y_ticks: the numbers at the axes, from end to end."""

    def __init__(self, title, x_name, y_name, x_ticks, y_ticks):
        self.image = Image.new("RGB", (1100, 720), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.draw.font = ImageFont.load_default(20)
        self.x_ticks = x_ticks
        self.y_ticks = y_ticks
        self.draw.text((550, 16), title, "black", anchor="ma")
        self.draw.text((590, 686), x_name, "black", anchor="ma")
        self.draw.text((12, 76), y_name, "black", anchor="lm")
        for value in x_ticks:
            self.draw.text((self.x(value), BOTTOM + 10), str(value), "black", anchor="ma")
        for value in y_ticks:
            y = self.y(value)
            self.draw.line([(LEFT, y), (RIGHT, y)], "#dddddd")
            self.draw.text((LEFT - 8, y), str(value), "black", anchor="rm")

    def x(self, value):
        return LEFT + (RIGHT - LEFT) * share(value, self.x_ticks)

    def y(self, value):
        return BOTTOM - (BOTTOM - TOP) * share(value, self.y_ticks)

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
