"""One schema for every way in: the options, their defaults, the list of flags and the reference page."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import typer
from rich.text import Text

from nemo_minitron.cli import COMMANDS, app
from nemo_minitron.cli.options import Group
from nemo_minitron.cli.reference import page
from nemo_minitron.schema import described
from nemo_minitron.settings.recipe import Job
from nemo_minitron.settings.step import Step

ROOT = Path(__file__).parents[2]
FLAGS = Path(__file__).with_name("flags.txt")
BUILT = typer.main.get_command(app).commands


def groups():
    for command in COMMANDS:
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if group := Group.of(parameter.annotation):
                yield command.__name__.replace("_", "-"), group


def flags():
    """Every option of every command, a line each."""
    return [
        " ".join([name, *sorted(option.opts), *sorted(option.secondary_opts)])
        for name, command in sorted(BUILT.items())
        for option in sorted(command.params, key=lambda option: option.opts)
        if option.param_type_name == "option"
    ]


def test_the_flags_are_those_of_the_list():
    """The flags are public. A change is made in flags.txt too: `python tests/cli/test_reference.py` writes it anew."""
    assert flags() == FLAGS.read_text().splitlines()


@pytest.mark.parametrize(("name", "group"), groups(), ids=lambda value: getattr(value, "kind", value))
def test_an_options_default_is_the_settings_own(name, group):
    options = {option.name: option for option in BUILT[name].params}
    fields = {field.name: field for field in dataclasses.fields(group.kind)}
    assert group.fields
    for field in group.fields:
        default = options[field].default
        if group.override:
            assert default is None
        elif group.fields[field].repeated:
            assert default[0] is fields[field].default
        else:
            assert default is fields[field].default, field


def test_what_is_asked_for_nowhere_is_the_groups_own():
    for _, group in groups():
        if not group.override and not group.fixed:
            assert group.build({}) == group.kind()


def test_every_setting_is_an_option_or_says_why_not():
    """And every field of a job is a setting or a group of them."""
    known = {(group.kind, name) for _, group in groups() for name in group.fields}
    hints = inspect.get_annotations(Job, eval_str=False)
    assert hints
    kinds = {group.kind for _, group in groups()} - {type(None)}
    kinds |= {Job, Step}
    for kind in kinds:
        for field in dataclasses.fields(kind):
            setting = described(field)
            if setting is None:
                continue
            assert setting.help
            assert (kind, field.name) in known or setting.recipe_only or _taken_in_part(kind), (kind, field.name)


def _taken_in_part(kind):
    """Whether a job's cutting is asked for by the arguments of two commands."""
    return kind.__name__ == "Cutting"


def test_every_option_has_a_panel_and_words():
    for name, command in BUILT.items():
        for option in command.params:
            if option.param_type_name == "option":
                assert option.help, (name, option.name)
                assert option.rich_help_panel, (name, option.name)


def test_help_shows_every_word():
    """Rich takes `[@SPLIT]` for markup and leaves it out."""
    for command in BUILT.values():
        for text in (command.help, *(option.help for option in command.params)):
            assert Text.from_markup(text or "").plain == (text or "")


def test_the_reference_page_is_what_the_settings_say():
    """`python -m nemo_minitron.cli.reference` writes it anew."""
    assert (ROOT / "docs" / "reference.md").read_text() == page()


if __name__ == "__main__":
    FLAGS.write_text("\n".join(flags()) + "\n")
