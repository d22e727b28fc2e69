"""What `foem compare` compares, by name: our methods with any option changed, our presets, and other quantizers.

    rtn | gptq | gptaq | foem | foem+gptaq          ours; `foem:beta=0.1,act_order=group` changes fields of QuantizeConfig
    fast | balanced | best                          our presets; fields can be changed in the same way
    gptqmodel:gptq | :gptaq | :foem | :foem+gptaq   GPTQModel with its own defaults, group-aware reordering among them
    autoround                                       AutoRound with its own defaults; `autoround:iters=50` for fewer steps
"""
from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import types
import typing
from collections.abc import Sequence

from foem_eval import processes
from foem_eval.peers import environments
from foem_vllm.errors import FoemError
from foem_vllm.recipe import METHODS, PRESETS, QuantizeConfig, resolve

PEERS = {"gptqmodel": ("gptq", "gptaq", "foem", "foem+gptaq"), "autoround": ()}
# Options of the comparison decide these, for all methods alike.
RESERVED = {"method": "the name before the colon", "preset": "the name before the colon", "bits": "--bits", "seed": "--seeds",
            "device": "--device", "trust_remote_code": "--trust-remote-code"}


@dataclasses.dataclass(frozen=True)
class Method:
    """One column of the comparison. text: as it was written, its identity in tables. name: what comes before options.
    peer: whose it is, "" for ours. options: field -> value, in the order written."""
    text: str
    name: str
    peer: str = ""
    options: tuple[tuple[str, object], ...] = ()

    def config(self, **common) -> QuantizeConfig:
        """The QuantizeConfig of one of our methods. common: the fields that all methods share."""
        named = {"preset": self.name} if self.name in PRESETS else {"method": self.name}
        return QuantizeConfig(**{**common, **named, **dict(self.options)})

    def reads_text(self, **common) -> bool:
        """Whether calibration text, and with it the seed, matters. FoemError on options that make no sense together."""
        if self.peer:
            return True
        try:
            return resolve(self.config(**common)).solver is not None
        except FoemError as error:
            raise FoemError(f"--methods {self.text}: {error}") from None


def split(arguments: Sequence[str]) -> list[str]:
    """The methods in `arguments`, each of which may hold several with commas between them; repeated ones once.

    A comma also separates the options of one method: what reads NAME=VALUE belongs to the method before it.

    >>> split(["rtn,foem:beta=0.1,act_order=group,gptq", "autoround:iters=50"])
    ['rtn', 'foem:beta=0.1,act_order=group', 'gptq', 'autoround:iters=50']
    """
    found: list[str] = []
    for argument in arguments:
        fresh = True
        for piece in (p.strip() for p in argument.split(",")):
            if not fresh and re.match(r"\w+=", piece):
                found[-1] += f",{piece}"
            elif piece:
                found.append(piece)
                fresh = False
    return list(dict.fromkeys(found))


def parse(text: str) -> Method:
    """A method from its name; FoemError on unknown names and fields."""
    name, _, rest = text.partition(":")
    if name in METHODS or name in PRESETS:
        return Method(text, name, options=tuple(parse_field(text, o) for o in rest.split(",") if o))
    if name == "gptqmodel" and rest in PEERS[name]:
        return Method(text, rest, "gptqmodel")
    if name == "autoround":
        options = []
        for option in (o for o in rest.split(",") if o):
            key, _, value = option.partition("=")
            if key != "iters" or not value.isdecimal():
                raise FoemError(f"--methods {text}: {option!r} is no option of autoround; write autoround:iters=200")
            options.append((key, int(value)))
        return Method(text, "autoround", "autoround", tuple(options))
    known = [*METHODS, *PRESETS, *(f"gptqmodel:{m}" for m in PEERS["gptqmodel"]), "autoround"]
    raise FoemError(f"--methods {text}: unknown method; choose among {', '.join(known)}, ours with options as in "
                    "foem:beta=0.1,act_order=group")


def parse_field(text: str, option: str) -> tuple[str, object]:
    """(field, value) of one NAME=VALUE, in the type that QuantizeConfig declares for the field."""
    key, equals, value = option.partition("=")
    hints = typing.get_type_hints(QuantizeConfig)
    names = [f.name for f in dataclasses.fields(QuantizeConfig) if f.name not in RESERVED]
    if key in RESERVED:
        raise FoemError(f"--methods {text}: {key} is decided by {RESERVED[key]}; leave it away here")
    if key not in names or not equals:
        raise FoemError(f"--methods {text}: {option!r} is no FIELD=VALUE; fields are {', '.join(names)}")
    return key, parse_value(text, key, value, hints[key])


def parse_value(text: str, key: str, value: str, hint: object) -> object:
    """`value` as the first of the hint's types that it fits, text last; `none` is None where that is allowed, but for
    act_order, which has an order of that name.

    >>> parse_value("", "beta", "0.5", float | str | None), parse_value("", "beta", "auto", float | str | None)
    (0.5, 'auto')
    """
    unions = (typing.Union, types.UnionType)
    allowed = typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)
    if type(None) in allowed and key != "act_order" and value.lower() == "none":
        return None
    if bool in allowed and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        if kind in allowed:
            try:
                return kind(value)
            except ValueError:
                pass
    if str in allowed:
        return value
    for other in allowed:
        if typing.get_origin(other) is typing.Literal and value in typing.get_args(other):
            return value
        if typing.get_origin(other) is list:
            return [value]  # one regular expression; `a|b` means both
    wanted = " or ".join(getattr(a, "__name__", str(a)) for a in allowed if a is not type(None))
    raise FoemError(f"--methods {text}: {key}={value} is not {wanted}")


def run_peer(method: Method, python: pathlib.Path, model: pathlib.Path, out: pathlib.Path, tokens: pathlib.Path,
             options: Sequence[str], log: pathlib.Path) -> float:
    """Quantize `model` into the new folder `out` in the peer's own process; seconds of its own quantize step, as it prints them.

    tokens: safetensors file with `input_ids` [sequences, length]. options: further words of the peers' command lines, the same
    for all. Raises FoemError with the end of its output when it fails.
    """
    line = [str(python), str(environments.HERE / f"{method.peer}_quantize.py"), str(model), str(out), str(tokens), *options]
    line += ["--method", method.name] if method.peer == "gptqmodel" else []
    line += [word for key, value in method.options for word in (f"--{key}", str(value))]
    log.unlink(missing_ok=True)
    processes.run(line, log, env=environments.environment())
    printed = [text for text in log.read_text("utf-8", "replace").splitlines() if text.startswith('{"method"')]
    if not printed or not (out / "config.json").is_file():
        raise FoemError(f"{method.text}: its process ended without a result in {out}; the end of {log}:\n{processes.tail(log)}")
    return float(json.loads(printed[-1])["quantize_s"])
