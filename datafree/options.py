"""The options of a program: their types, those of user-defined classes, and which of them count."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from datafree.config import LARGEST, AnyBut, option, sections
from datafree.errors import InputError, OptionError
from datafree.plugins import code_digest, is_custom, load_custom


@dataclass
class Invocation:
    """This call of the program; not part of a configuration."""

    help: bool = option(False, "Show this text and exit.", flags=("-h",))
    version: bool = option(False, "Show the version and exit.")
    config: str = option("", "YAML file with options, in sections as below; may be given several times.")
    print_config: bool = option(False, "Print all options as YAML that --config reads, and exit.")
    dry_run: bool = option(
        False, "Check everything, print the plan and its cost, measured in a few steps, name what is missing, and exit."
    )
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
    low: float = -LARGEST
    high: float = LARGEST
    unused_when: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    custom: bool = False
    is_name: bool = False
    affects_result: bool = True
    also_in: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def allowed(self) -> str:
        """The values that it accepts, in words."""
        if self.choices:
            number = "one or more" if self.kind is tuple else "one"
            return f"{number} of {', '.join(self.choices)}" + ", or path/to/file.py:Class" * self.custom
        words = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            tuple: "numbers separated by commas",
            str: "a non-empty text" if self.default else "a text",
        }[self.kind]
        if self.high != LARGEST:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low != -LARGEST:
            words += f" of at least {self.low:g} (and at most {LARGEST:g})"
        return f"{words}, or nothing" if self.default is None else words

    def accepts(self, value: Any) -> bool:
        """Whether it may have ``value``, which was not read as one of its own, but from a file of weights."""
        if value is None:
            return self.default is None
        if self.choices:
            return value in self.choices
        is_number = self.kind in (int, float)
        kinds = (int, float) if self.kind is float else (self.kind,)
        return type(value) in kinds and (not is_number or self.low <= value <= self.high)


Options = Mapping[str, Option]  # name -> option


def list_options(config_class: type, method_files: Mapping[str, Any] | None = None) -> list[Option]:
    """Every Option of a program, in the order of ``--help``."""
    found, own, custom = [], sections(config_class), getattr(config_class, "CUSTOM_SECTIONS", {})
    for section, cls in {"call": Invocation, "": config_class, **own}.items():
        hints = get_type_hints(cls)
        for f in (f for f in fields(cls) if "help" in f.metadata):
            kind = _without_none(hints[f.name])
            choices: tuple[str, ...] = ()
            words = get_args(kind)[0] if get_origin(kind) is tuple else kind
            if get_origin(words) is Literal:
                kind, choices = str if words is kind else tuple, get_args(words)
            elif f.name == "method":
                choices = tuple(sorted(method_files or ()))
            metadata = dict(f.metadata)
            metadata["also_in"] = tuple(section_too for section_too in metadata["also_in"] if section_too in own)
            conditions = metadata["unused_when"] or getattr(cls, "UNUSED_WHEN", ())
            if any(f.name in condition for condition in conditions):
                conditions = ()  # the option on which the section's others depend
            metadata["unused_when"] = (*conditions, *([custom[section]] if section in custom else []))
            found.append(Option(section, f.name, get_origin(kind) or kind, choices, f.default, **metadata))
    if not any(opt.name == "device" for opt in found):
        found = [opt for opt in found if opt.name != "gpu"]  # which is short for it
    return [opt if opt.section in custom else _without_others(opt, found) for opt in found]


def _without_others(opt: Option, options: Sequence[Option]) -> Option:
    """``opt`` of a section that several programs share, whose conditions name options of this one alone."""
    names = {other.name for other in options}
    here = [{name: value for name, value in cond.items() if name in names} for cond in opt.unused_when]
    return replace(opt, unused_when=tuple(filter(None, here)))


def _without_none(hint: Any) -> Any:
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return next(part for part in get_args(hint) if part is not NoneType)
    return hint


def with_custom_sections(config_class: type, named: Sequence[tuple[str, str]], spellings: Iterable[str]) -> type:
    """``config_class`` with a section for the ``Options`` of user-defined classes.

    The section is named like the class that defines them, in lower case; its options are unused unless such a class is
    chosen. named: (option, value) pairs, in order of precedence; user-defined classes among the values. spellings: of
    the program's flags, which are taken. Raises InputError for a chosen class that cannot be loaded, and OptionError
    for Options that cannot be.
    """
    taken_flags, taken_sections = set(spellings), {"call", "expect", "base", "method", *sections(config_class)}
    added: dict[Any, str] = {}
    chosen: dict[str, dict[str, list[str]]] = {}  # section -> option -> names of the classes that have it
    for chosen_by, name in named:
        own = _options_of(name, required=dict(named)[chosen_by] == name) if is_custom(name) else None
        if own is None:
            continue
        owner, own_options = own
        section = owner.lower()
        if own_options not in added:
            label = f"{owner}.Options"
            _check_options(own_options, label)
            flags = [flag for f in fields(own_options) for flag in (f"--{f.name}", *f.metadata["flags"])]
            for new, taken in [(section, taken_sections), *((flag, taken_flags) for flag in flags)]:
                if new in taken:
                    new = new.removeprefix("--")
                    raise OptionError(f"{label}: the name {new} is taken by an option or section; choose another")
                taken.add(new)
            added[own_options] = section
        option_name = "source" if chosen_by == "method" else chosen_by
        chosen.setdefault(section, {}).setdefault(option_name, []).append(name)
    if not added:
        return config_class
    conditions = {section: {key: AnyBut(*names) for key, names in by.items()} for section, by in chosen.items()}
    extra: list[Any] = [
        (section, own_options, field(default_factory=own_options)) for own_options, section in added.items()
    ]
    return make_dataclass(
        config_class.__name__, extra, bases=(config_class,), namespace={"CUSTOM_SECTIONS": conditions}
    )


def _options_of(name: str, required: bool) -> tuple[str, Any] | None:
    """Name of the class that defines the ``Options`` of a user-defined class, and these; None if it has none.

    required: raise InputError if the class cannot be loaded; one that a later value replaces is left alone.
    """
    try:
        cls = load_custom(name)
    except InputError:
        if required:
            raise
        return None
    owner = next((base for base in getattr(cls, "__mro__", (cls,)) if "Options" in vars(base)), None)
    return None if owner is None else (owner.__name__, cls.Options)  # type: ignore[attr-defined]


def _check_options(own: Any, label: str) -> None:
    if not is_dataclass(own) or not all("help" in f.metadata for f in fields(own)):
        raise OptionError(f"{label} must be a dataclass whose fields are made by datafree.config.option")
    try:
        hints = get_type_hints(own)
    except Exception as error:
        raise OptionError(f"{label} has a type that cannot be resolved ({error})") from None
    for f in fields(own):
        kind = _without_none(hints[f.name])
        if get_origin(kind) is not Literal and (get_origin(kind) or kind) not in (bool, int, float, str, tuple):
            raise OptionError(f"{label}: {f.name} must be a bool, int, float, str, tuple or Literal, not {kind}")


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


def default_options(config: Any) -> dict[str, Any]:
    """Option -> default of all that the result may depend on."""
    return {o.name: o.default for o in list_options(type(config)) if o.affects_result}


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
    if name not in options:
        raise OptionError(f"--{opt.name} depends on the option {name}, which does not exist")
    value = values.get(name, options[name].default)
    return {name: value} if value in inactive else why_unused(options[name], values, options, (*path, opt.name))
