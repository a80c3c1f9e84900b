"""A file and `key=value` overrides to a checked recipe [mmengine]."""

from __future__ import annotations

import ast
import difflib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dino_adapters.contracts import RecipeError
from dino_adapters.runtime.lookup import nearest

Recipe = TypeVar("Recipe", bound=BaseModel)

SUFFIXES = (".py", ".yaml", ".yml", ".json")
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_SHOWN_ERRORS = 5


def read_recipe(path: str | Path | None, kind: type[Recipe], overrides: Sequence[str]) -> Recipe:
    """A recipe from a file and the command line; later ones win.

    Defaults of the model, then the `_base_` files, then the file, then the overrides. A `.py`
    recipe is code and is run: open only your own or one that you have read. Names in it that start
    with an underscore are private to it. YAML and JSON recipes are values alone: tags, `{{...}}`
    and `_base_` files that are code are refused, and nothing in them runs.

    Args:
        path: `.py`, `.yaml` or `.json`, or None for defaults and overrides alone.
        kind: Model that checks it.
        overrides: `section.key=value`; see `read_value`.

    Raises:
        RecipeError: the file is absent or broken, or a setting is unknown or wrong; the message
            names each setting, what was found, what is allowed and the nearest known name.
    """
    settings = {} if path is None else _read_file(Path(path))
    texts: dict[tuple[str, ...], str] = {}
    for override in overrides:
        names, text = split_override(override)
        _put(settings, names, read_value(text), override)
        texts[names] = text
    where = f"The recipe {path}" if path is not None else "The recipe"
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        # `data.source=2024` reads as a number; where text is wanted, the text was meant.
        meant = [
            names
            for details in error.errors()
            if details["type"] == "string_type"
            and (names := tuple(str(part) for part in details["loc"])) in texts
        ]
        if not meant:
            raise RecipeError(_sentence(where, error, kind)) from None
        for names in meant:
            _put(settings, names, texts[names], "")
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(_sentence(where, error, kind)) from None


def split_override(override: str) -> tuple[tuple[str, ...], str]:
    """`a.b=v` as (("a", "b"), "v"), split at the first `=`.

    Raises:
        RecipeError: there is no `=`, or a name is empty.
    """
    left, equals, text = override.partition("=")
    names = tuple(name.strip() for name in left.split("."))
    if not equals or not all(names):
        raise RecipeError(
            f"'{override}' is no setting. Write it as name=value or section.name=value, e.g. "
            "optim.lr=3e-4, without spaces around the equals sign."
        )
    return names, text


def read_value(text: str) -> Any:
    """A value as written on the command line.

    A Python literal (`3e-4`, `[1, 2]`, `"text"`), else true, false or none, else a list of such
    values in brackets without quotes (shells take quotes away), else the bare text.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of backslashes in Windows paths
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    inner = text[1:-1].strip()
    if text[:1] + text[-1:] in ("[]", "()") and inner and not set(inner) & set("[](){}'\""):
        return [read_value(part) for part in inner.rstrip(",").split(",")]
    return text


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(
            f"The recipe {path} ends in '{path.suffix}'. Recipes are {', '.join(SUFFIXES)} files."
        )
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}. {_near_files(path)}")
    whole = Path(os.path.abspath(path))
    _check_plain(whole, code=whole.suffix.lower() == ".py")
    from mmengine.config import Config  # here: it takes a third of a second

    try:
        # Absolute, so that nothing between the check and here reads the path in another way.
        read = Config.fromfile(
            os.path.abspath(path), import_custom_modules=False, lazy_import=False
        )
        settings = read._cfg_dict.to_dict()
    except Exception as error:
        # A .py recipe is code, so anything can be raised, and yaml and json have errors of their
        # own; the cause is chained.
        message = str(error).strip() or type(error).__name__
        raise RecipeError(
            f"The recipe {path} cannot be read ({type(error).__name__}: {message})."
        ) from error
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _check_plain(path: Path, *, code: bool, above: tuple[Path, ...] = ()) -> None:
    """Refuses what would run code in YAML and JSON files: this one, and its `_base_` files.

    mmengine reads YAML with a loader that obeys `!!python/object/apply`.

    Args:
        path: Absolute.
        code: Whether the recipe itself is a .py file, which may name other code.
        above: Files that led here.

    Raises:
        RecipeError: a tag, text that mmengine would replace, code among the bases, or a circle.
    """
    if path in above:
        raise RecipeError(f"The recipe {path} has itself among its _base_ files. Take it out.")
    if not path.is_file():
        return  # mmengine says what is wrong with a base that is absent
    for base in _bases(path):
        if not code and ("::" in base or base.lower().endswith(".py")):
            raise RecipeError(
                f"The recipe {path} names '{base}' in _base_, which is code, and YAML and JSON "
                "recipes hold values alone. Name .yaml or .json files, or make the recipe a .py "
                "file."
            )
        below = Path(os.path.abspath(os.path.join(path.parent, base)))  # as mmengine joins them
        _check_plain(below, code=code, above=(*above, path))


def _bases(path: Path) -> list[str]:
    """What a recipe file names in `_base_`, as written there; refuses YAML with tags."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".py":
            found = _assigned_bases(text)
        elif "{{" in text:
            raise RecipeError(
                f"The recipe {path} holds '{{{{', which mmengine replaces before the file is "
                "checked. YAML and JSON recipes hold values alone: write the value, or make the "
                "recipe a .py file."
            )
        else:
            settings = _plain_yaml(path, text)  # JSON is YAML, but for rarities that hold no tags
            found = settings.get("_base_") if isinstance(settings, dict) else None
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"The recipe {path} cannot be read ({error}).") from error
    return [base for base in (found if isinstance(found, list) else [found]) if type(base) is str]


def _plain_yaml(path: Path, text: str) -> Any:
    import yaml  # comes with mmengine

    try:
        # The parser that mmengine uses, with the constructors of safe_load.
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.constructor.ConstructorError as error:
        raise RecipeError(
            f"The recipe {path} holds more than plain values ({error.problem}). Write numbers, "
            "texts, lists and sections, without tags such as !!python."
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error}).") from error


def _assigned_bases(code: str) -> Any:
    """The value of `_base_` in a .py recipe; None where it is not written out."""
    for line in ast.parse(code).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "_base_":
            try:
                return ast.literal_eval(line.value)
            except ValueError:
                return None  # code, which is trusted
    return None


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    names = [file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"Did you mean {path.parent / close[0]}?"
    return f"Beside it lie: {', '.join(sorted(names)[:5]) or 'no recipes'}."


def _put(settings: dict[str, Any], names: tuple[str, ...], value: Any, override: str) -> None:
    inside: Any = settings
    for depth, name in enumerate(names[:-1], start=1):
        if isinstance(inside, list | tuple):
            inside = _entry(inside, name, override)
            continue
        inside = inside.setdefault(name, {})
        if isinstance(inside, list | tuple):
            continue  # the next name is one of its entries
        if not isinstance(inside, dict):
            raise RecipeError(
                f"'{override}' sets a part of {'.'.join(names[:depth])}, which is the value "
                f"{inside!r} and has no parts."
            )
    if not isinstance(inside, dict):
        list_name = ".".join(names[:-1])
        raise RecipeError(
            f"'{override}' sets a part of {list_name}, a list. Write {list_name}.NAME.SETTING=..."
        )
    inside[names[-1]] = value


def _entry(tables: Sequence[Any], name: str, override: str) -> dict[str, Any]:
    """The table of this name in a list of tables.

    Raises:
        RecipeError: there is none of this name.
    """
    entries = {str(entry.get("name")): entry for entry in tables if isinstance(entry, dict)}
    if name not in entries:
        raise RecipeError(f"'{override}' names '{name}'. There are {', '.join(entries) or 'none'}.")
    return entries[name]


def _sentence(where: str, error: ValidationError, kind: type[BaseModel]) -> str:
    """Everything that pydantic found, as sentences."""
    found = [_explain(details, kind) for details in error.errors(include_url=False)]
    more = len(found) - _SHOWN_ERRORS
    rest = f" And {more} more." if more > 0 else ""
    return f"{where} cannot be used. {' '.join(found[:_SHOWN_ERRORS])}{rest}"


def _explain(details: Mapping[str, Any], kind: type[BaseModel]) -> str:
    names = tuple(str(part) for part in details["loc"])
    name, problem = ".".join(names), details["type"]
    if problem == "extra_forbidden":
        holder = _model_at(kind, names[:-1])
        known = holder.model_fields if holder is not None else {}
        # A place in a list is no name that could be typed.
        listed = any(part.isdecimal() for part in names)
        within = "" if listed else "".join(f"{part}." for part in names[:-1])
        hint = nearest(names[-1], known, within=within)
        elsewhere = [path for path in _all_names(kind) if path[-1] == names[-1]]
        if elsewhere and not hint.startswith("Did"):
            hint = f"Did you mean '{'.'.join(elsewhere[0])}'?"
        return f"There is no setting '{name}'. {hint}"
    if problem == "missing":
        holder = _model_at(kind, names[:-1])
        meaning = holder.model_fields[names[-1]].description if holder is not None else None
        about = f" ({meaning.rstrip('.')})" if meaning else ""
        return f"'{name}' is missing{about}. Set it in the recipe, or with {name}=..."
    message = str(details["msg"])
    if problem == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{name}: {message}." if name else f"{message}."
    allowed = message[:1].lower() + message[1:]
    return f"'{name}' is {details['input']!r}; {allowed}."


def _model_at(kind: type[BaseModel], names: Sequence[str]) -> type[BaseModel] | None:
    """The section at a path of names, or None; in a list or table of sections, of its entries.

    Phases change sections of the recipe around them, under the same names.
    """
    entry, whole = False, kind
    for name in names:
        if entry:
            entry = False
            continue
        field = kind.model_fields.get(name)
        if field is None:
            return None
        section = _section(field.annotation)
        if section is None and (outer := whole.model_fields.get(name)) is not None:
            section = _section(outer.annotation)
        if section is None:
            return None
        entry = get_origin(field.annotation) in (tuple, list, dict)
        kind = section
    return kind


def _section(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _all_names(kind: type[BaseModel], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in kind.model_fields.items():
        yield (*before, name)
        section = _section(field.annotation)
        if section is not None:
            yield from _all_names(section, (*before, name))
