"""An order of a stage that a test's own worker knows; its processes do not read what it says."""

import dataclasses

from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import Order


@dataclasses.dataclass(frozen=True)
class PicoOrder(Order):
    stage: str
    layout: Layout


def pico_order(stage, processes):
    return PicoOrder(stage, Layout(dp=processes))
