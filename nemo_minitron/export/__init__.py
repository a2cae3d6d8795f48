"""Writes what surrounds a student's weights: a complete Hugging Face folder, its model card, the report of the run.

Nothing here needs torch; matplotlib, jinja2 and huggingface_hub are imported where they are used.
"""

from nemo_minitron.export.card import CardFacts, write_card
from nemo_minitron.export.card_figures import write_card_figures
from nemo_minitron.export.draft import write_draft
from nemo_minitron.export.folder import finish_folder
from nemo_minitron.export.report import write_report
from nemo_minitron.export.serving import serving_commands

__all__ = [
    "CardFacts",
    "finish_folder",
    "serving_commands",
    "write_card",
    "write_card_figures",
    "write_draft",
    "write_report",
]
