"""The options that make a config, for all commands that take one."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from jitmoe.config import LoraDtype, MoEConfig, read_fields
from jitmoe.errors import ConfigError
from jitmoe.formats import WeightFormat
from jitmoe.isa import IsaChoice

REQUIRED = ("num_experts", "hidden_size", "intermediate_size", "top_k")

PANEL = "config: sizes of the layer; they override those of --config"


def _option(text: str, metavar: str | None = "N") -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=PANEL)


@dataclass(frozen=True)
class ConfigOptions:
    """What the user gave; None leaves a field to the file. All fields but ``config`` are those of MoEConfig."""

    config: Annotated[Path | None, _option("JSON object with fields of MoEConfig", "FILE.json")] = None
    num_experts: Annotated[int | None, _option("E, experts held by the layer")] = None
    hidden_size: Annotated[int | None, _option("H, width of the token rows")] = None
    intermediate_size: Annotated[int | None, _option("I, width between up and down projection")] = None
    top_k: Annotated[int | None, _option("K, experts per token")] = None
    lora_rank: Annotated[int | None, _option("r, rank of the adapters; 0 is without LoRA")] = None
    m_step: Annotated[
        int | None, _option("rows of a register block to force; default: all, and each call picks one")
    ] = None
    lora_dtype: Annotated[LoraDtype | None, _option("dtype of the LoRA parameters", None)] = None
    weight_format: Annotated[WeightFormat | None, _option("how the base weights are shipped and kept", None)] = None
    group_size: Annotated[int | None, _option("inputs that share a scale in int4_group")] = None
    tensor_parallel: Annotated[int | None, _option("parts of I, computed on the NUMA nodes and added")] = None
    isa: Annotated[IsaChoice | None, _option("instruction set; auto: the best usable one", None)] = None

    @property
    def sizes_given(self) -> bool:
        """Whether the options describe a layer, by a file or by a size."""
        return self.config is not None or any(getattr(self, name) is not None for name in REQUIRED)

    def make(self, defaults: Mapping[str, Any] | None = None, **more: Any) -> MoEConfig:
        """The config: each field is that of the options, else of the file, else of ``defaults``.

        Args:
            defaults: fields of MoEConfig.
            more: options of one command; None is not given.

        Raises:
            ConfigError: a size is missing, a value is refused, or the file has a field that MoEConfig lacks.
        """
        given = {name: value for name, value in (asdict(self) | more).items() if value is not None}
        path = given.pop("config", None)
        found = {**(defaults or {}), **(_fields_in(path) if path else {}), **given}
        missing = [name for name in REQUIRED if name not in found]
        if missing:
            options = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise ConfigError(f"the config lacks {', '.join(missing)}: give {options}, or --config FILE.json")
        return MoEConfig(**found)


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the options of :class:`ConfigOptions`, which it gets as one parameter ``config``."""
    hints = get_type_hints(ConfigOptions, include_extras=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in hints.items()
    ]
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "config"]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        config = ConfigOptions(**{name: given.pop(name) for name in hints})
        command(config=config, **given)

    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *shared]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _fields_in(path: Path) -> dict[str, Any]:
    known = {field.name for field in fields(MoEConfig)}
    found = read_fields(path, "fields of MoEConfig")
    unknown = sorted(set(found) - known)
    if unknown:
        raise ConfigError(f"{path} has unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return found
