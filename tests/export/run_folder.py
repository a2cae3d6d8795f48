"""What the tests of the report share: a small model, and how to read a report and its data."""

import csv
import json
from html.parser import HTMLParser

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.export import write_report

SOURCE = Architecture(
    num_layers=4, hidden_size=12, ffn_hidden_size=600, num_attention_heads=6, num_query_groups=2, head_dim=4,
    vocab_size=50,
)  # fmt: skip
EVIL = "<script>alert('x')</script>"
MEASURED = [
    {"name": "a", "parameters": 100, "kept": 0.5, "loss": 3.0},
    {"name": "b", "parameters": 90, "kept": 0.6, "loss": 3.5},
    {"name": "c", "parameters": 110, "kept": 0.7, "loss": 3.2},
    {"name": "d", "parameters": 90, "kept": 0.4, "loss": 3.6},
]
RANKS = [
    {"step": step, "candidate": name, "loss": loss, "rank": rank}
    for step, order in ((2, "abc"), (4, "bac"), (6, "ba"))
    for rank, (name, loss) in enumerate(zip(order, (1.0, 1.5, 2.0), strict=False), 1)
]


def top(values, count):
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def rows(run, name):
    with open(run / "figures" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """Tags, addresses that a browser loads, addresses that it only links to, visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.links, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
                (self.links if tag == "a" else self.loads).append(value)

    def handle_data(self, data):
        self.words.append(data)


def page(run):
    return Page(write_report(run).read_text())
