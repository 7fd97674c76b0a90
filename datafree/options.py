"""The options of a program: their types, those of user-defined classes, and which of them count."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from math import inf
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from datafree.config import option, sections
from datafree.errors import OptionError
from datafree.plugins import code_digest, is_custom, load_object


@dataclass
class Invocation:
    """This call of the program; not part of a configuration."""

    help: bool = option(False, "Show this text and exit.", flags=("-h",))
    config: str = option("", "YAML file with options, in sections as below; may be given several times.")
    print_config: bool = option(False, "Print all options as YAML that --config reads, and exit.")
    dry_run: bool = option(False, "Check everything, print the plan, and exit.")
    gpu: int | None = option(None, "Short for --device cuda:N.", low=0)


@dataclass(frozen=True)
class Option:
    """A field of a section ("": of the config itself), with its type resolved; see :func:`datafree.config.option`."""

    section: str
    name: str
    kind: type
    choices: tuple[str, ...]
    default: Any
    help: str
    flags: tuple[str, ...] = ()
    low: float = -inf
    high: float = inf
    unused_when: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    custom: bool = False
    affects_result: bool = True
    also_in: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def allowed(self) -> str:
        """The values that it accepts, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}" + ", or path/to/file.py:Class" * self.custom
        words = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            tuple: "numbers separated by commas",
            str: "a non-empty text" if self.default else "a text",
        }[self.kind]
        if self.high < inf:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low > -inf:
            words += f" of at least {self.low:g}"
        return f"{words}, or nothing" if self.default is None else words


Options = Mapping[str, Option]  # name -> option


def list_options(config_class: type, method_files: Mapping[str, Any] | None = None) -> list[Option]:
    """Every Option of a program, in the order of ``--help``."""
    found, own, custom = [], sections(config_class), getattr(config_class, "CUSTOM_SECTIONS", {})
    for section, cls in {"call": Invocation, "": config_class, **own}.items():
        hints = get_type_hints(cls)
        for f in (f for f in fields(cls) if "help" in f.metadata):
            kind = _without_none(hints[f.name])
            choices: tuple[str, ...] = ()
            if get_origin(kind) is Literal:
                kind, choices = str, get_args(kind)
            elif f.name == "method":
                choices = tuple(sorted(method_files or ()))
            metadata = dict(f.metadata)
            metadata["also_in"] = tuple(section_too for section_too in metadata["also_in"] if section_too in own)
            conditions = metadata["unused_when"] or getattr(cls, "UNUSED_WHEN", ())
            if any(f.name in condition for condition in conditions):
                conditions = ()  # the option on which the section's others depend
            metadata["unused_when"] = (*conditions, *([custom[section]] if section in custom else []))
            found.append(Option(section, f.name, get_origin(kind) or kind, choices, f.default, **metadata))
    return found


def _without_none(hint: Any) -> Any:
    return next(part for part in get_args(hint) if part is not NoneType) if isinstance(hint, UnionType) else hint


class OtherThan:
    """All values but one, as a container."""

    def __init__(self, value: str):
        self.value = value

    def __contains__(self, value: object) -> bool:
        return value != self.value


def with_custom_sections(config_class: type, named: Iterable[tuple[str, str]], taken: Iterable[str]) -> type:
    """``config_class`` with a section for the ``Options`` of user-defined classes.

    The section is named like the class that defines them, in lower case; its options are unused unless that class is
    chosen. named: (option, name of the class) pairs. taken: names that the sections and their options cannot have.
    """
    names = {*taken, *sections(config_class)}
    added: dict[Any, str] = {}
    conditions: dict[str, Mapping[str, Any]] = {}
    for chosen_by, name in named:
        cls = load_object(name)
        own: Any = getattr(cls, "Options", None)
        if own is None or own in added:
            continue
        label = f"{name.rpartition(':')[2]}.Options"
        if not is_dataclass(own) or not all("help" in f.metadata for f in fields(own)):
            raise OptionError(f"{label} must be a dataclass whose fields are made by datafree.config.option")
        owner = next(base for base in getattr(cls, "__mro__", (cls,)) if "Options" in vars(base))
        section = added[own] = owner.__name__.lower()
        for new in (section, *(f.name for f in fields(own))):
            if new in names:
                raise OptionError(f"{label}: the name {new} is taken by an option or section; choose another")
            names.add(new)
        conditions[section] = {"source" if chosen_by == "method" else chosen_by: OtherThan(name)}
    if not added:
        return config_class
    extra: list[Any] = [(section, own, field(default_factory=own)) for own, section in added.items()]
    return make_dataclass(
        config_class.__name__, extra, bases=(config_class,), namespace={"CUSTOM_SECTIONS": conditions}
    )


def result_options(config: Any) -> dict[str, Any]:
    """Option -> value for all that the result depends on: those that affect it and that something reads."""
    options = {o.name: o for o in list_options(type(config))}
    values: dict[str, Any] = {}
    # The order in which a difference is reported: outside the sections, then of the program, then of user's classes.
    for name, value in sorted(asdict(config).items(), key=lambda item: isinstance(item[1], dict)):
        values.update(value if isinstance(value, dict) else {name: value})
    return {
        name: code_digest(value) if options[name].custom and is_custom(value) else value
        for name, value in values.items()
        if options[name].affects_result and not why_unused(options[name], values, options)
    }


def why_unused(opt: Option, values: Mapping[str, Any], options: Options, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Option -> value of the reasons why nothing reads ``opt``; empty if something does. path: options on the way."""
    for condition in opt.unused_when:
        reasons = [_why_inactive(name, inactive, opt, values, options, path) for name, inactive in condition.items()]
        if all(reasons):
            return {name: value for reason in reasons for name, value in reason.items()}
    return {}


def _why_inactive(
    name: str, inactive: Any, opt: Option, values: Mapping[str, Any], options: Options, path: tuple[str, ...]
) -> dict[str, Any]:
    """Why the option ``name`` does not use ``opt``: its value is among ``inactive``, or it is unused itself."""
    if name in path:
        return {}  # it would be unused by its own value
    value = values.get(name, options[name].default)
    return {name: value} if value in inactive else why_unused(options[name], values, options, (*path, opt.name))
