"""`minitron recipes`: the shipped recipes and what each does."""

from __future__ import annotations


def recipes() -> None:
    """List the shipped recipes: what each does, its tokens and its processes.

    minitron recipes
    """
    import textwrap

    from nemo_minitron.cli.find import find, names, summary

    for name in names():
        job = find(name)
        processes = f"{job.layout.processes} process{'es' * (job.layout.processes > 1)}"
        print(f"{name}  ({job.distillation.tokens:,} tokens, {processes})")
        print(textwrap.indent(textwrap.fill(summary(name), 76), "    "))
    print("\nminitron compress RECIPE --dry-run shows sizes, memory, stages and settings; key=value changes a setting")
