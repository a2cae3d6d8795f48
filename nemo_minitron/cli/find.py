"""A recipe's name or file -> a Job."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import traceback
from pathlib import Path

from nemo_minitron.artifacts.files import read_json
from nemo_minitron.errors import InputError, first_line, nearest
from nemo_minitron.settings.recipe import Job, with_defaults_unasked

FILES = (".py", ".yaml", ".yml", ".json")


def names() -> list[str]:
    """The names of the shipped recipes."""
    import nemo_minitron.recipes as recipes

    modules = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    return [name for name in modules if "_to_" in name]  # the other modules are shared by recipes


def summary(name: str) -> str:
    """What a shipped recipe does: the first paragraph of its file's docstring."""
    text = importlib.import_module(f"nemo_minitron.recipes.{name}").__doc__ or ""
    return " ".join(text.partition("\n\n")[0].split())


def is_model(text: str) -> bool:
    """Whether the argument of `compress` means a model: a folder, or a hub id (`org/name`)."""
    path = Path(text)
    return path.suffix not in FILES and (path.is_dir() or "/" in text)


def is_recipe(text: str) -> bool:
    """Whether the argument of `compress` is the name of a shipped recipe, or a recipe's file."""
    return Path(text).suffix in FILES or text in names()


def find(recipe: str) -> Job:
    """The Job of a shipped recipe by name, of a Python file with `recipe()`, or of values in a YAML or JSON file.

    The recipe.json of a run folder writes every setting out. A setting at its default counts there as not asked for.
    Raises InputError, with the nearest name, for anything else.
    """
    path = Path(recipe)
    if path.suffix == ".json":
        job = Job.from_dict(read_json(path, "the recipe"))
        return with_defaults_unasked(job) if (path.parent / "manifest.json").exists() else job
    if path.suffix in (".yaml", ".yml"):
        from nemo_minitron.cli.yaml_recipe import read_yaml

        return Job.from_dict(read_yaml(path))
    if path.suffix == ".py":
        return _from_file(path)
    if recipe not in names():
        raise InputError(f"there is no recipe '{recipe}'; {nearest(recipe, names())}")
    return importlib.import_module(f"nemo_minitron.recipes.{recipe}").recipe()


def _from_file(path: Path) -> Job:
    """The Job that `recipe()` of a Python file returns. Raises InputError, with the line, if the file fails."""
    if not path.is_file():
        raise InputError(f"the recipe '{path}' does not exist; {nearest(path.stem, names())}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a .py file always has a spec and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "recipe"):
            raise InputError(f"'{path}' has no function recipe(), which must return a Job")
        job = module.recipe()
        if not isinstance(job, Job):
            raise InputError(f"recipe() in '{path}' returns a {type(job).__name__}; it must return a Job")
        return Job.from_dict(job.as_dict())
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a recipe is anybody's code and may raise anything
        what = type(error).__name__ + (f": {first_line(error)}" if str(error).strip() else "")
        raise InputError(f"the recipe '{path}' fails{_where(error, path)}: {what}") from error


def _where(error: BaseException, path: Path) -> str:
    """The line of the recipe that failed, or that called what failed."""
    here = str(path.absolute())
    if isinstance(error, SyntaxError) and error.filename == here:
        return f" in line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == here]
    return f" in line {lines[-1]}" if lines else ""
