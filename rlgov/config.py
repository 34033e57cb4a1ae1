"""What a person may set, in typed records: a docstring a field, unknown names refused.

The command line is derived from these records, and one YAML file can hold a section a command::

    train:
      profile: h100-qwen3-8b
      total_steps: 500_000
    replay:
      rate_scale: 2.0

A flag wins over an environment variable (``RLGOV_TRAIN_TOTAL_STEPS``), that one over the file, and the
file over the default. Settings of training are in :mod:`rlgov.agents.train_config`.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import ValidationError

DEFAULT_PROFILE = "h100-qwen3-32b"
DEFAULT_TRACE = "synthetic:conversation"
DEFAULT_BASELINES = ("fastest", "best-static", "ecofreq", "kv-threshold", "two-level")

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Settings(BaseModel):
    """Base of every record of settings: immutable, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DemoSettings(Settings):
    """A small run of everything: train, replay against the baselines, plots."""

    out: Path = Path("runs/demo")
    """Folder for the results; an earlier demo in it is replaced."""
    profile: str = DEFAULT_PROFILE
    """Profile name or path of a profile file."""
    seed: int = 0
    """Fixes the traffic and the training."""


class ReplaySettings(Settings):
    """One trace slice through a list of policies on a simulated deployment."""

    trace: str = DEFAULT_TRACE
    """Trace file, or ``synthetic:NAME`` for generated traffic (conversation, code, day)."""
    policy: tuple[str, ...] = DEFAULT_BASELINES
    """Policies: baseline names, ``static:CLOCK/CAP/TP``, tuned settings (.json) or bundles
    (.safetensors). The fastest and the best static setting always take part."""
    profile: str = DEFAULT_PROFILE
    """Profile name or path of a profile file."""
    out: Path = Path("runs/replay")
    """Folder for replay.json, the CSV files and the plots."""
    from_s: NonNegativeFloat = 0.0
    """Where the counted slice starts, in seconds of the trace's own time."""
    to_s: PositiveFloat | None = None
    """Where the slice ends; the end of the trace if not given."""
    rate_scale: PositiveFloat = 1.0
    """Arrivals come this much faster than recorded."""
    slo_scale: PositiveFloat = 1.0
    """Multiple of the profile's latency limits: 0.6 is the 3x rule, 2 the 10x rule."""
    target_attainment: Fraction = 0.99
    """Share of requests within both limits that a setting needs to count as the best static one."""
    seeds: PositiveInt = 1
    """Draws of the profile's uncertain parameters; seed 0 is the nominal profile."""
    workers: PositiveInt = 1
    """Processes to share the work; the result is the same with any number."""
    journal: Path | None = None
    """A recorded run: audit each of its decisions instead of replaying a trace."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.to_s is not None and self.to_s <= self.from_s:
            msg = f"to_s {self.to_s:g} does not lie after from_s {self.from_s:g}; give a later end"
            raise ValueError(msg)
        return self


class TuneSettings(Settings):
    """Fit the knobs of a control rule on the training span of a trace, with a fixed effort."""

    family: str
    """Which rule: see ``rlgov tune --help``."""
    trace: str = DEFAULT_TRACE
    """Trace file, or ``synthetic:NAME`` for generated traffic."""
    profile: str = DEFAULT_PROFILE
    """Profile name or path of a profile file."""
    out: Path = Path("runs/tuned")
    """Folder for FAMILY.json, which ``rlgov replay --policy`` reads."""
    train_fraction: Fraction = 0.7
    """Leading share of the trace used for tuning; the rest is the test span and is not read."""
    rate_scale: PositiveFloat = 1.0
    """Arrivals come this much faster than recorded."""
    slo_scale: PositiveFloat = 1.0
    """Multiple of the profile's latency limits."""
    target_attainment: Fraction = 0.99
    """Share of requests that must be within both limits."""
    budget: PositiveInt = 64
    """Evaluations; the same number makes families comparable."""
    seed: int = 0
    """Fixes the search."""


class StudySettings(Settings):
    """Learned policies against every static setting and every tuned rule, on test spans."""

    trace: tuple[Path, ...] = ()
    """Trace files; of each, the leading part is for training and tuning, the rest is the test span."""
    bundle: tuple[Path, ...] = ()
    """Bundles of one recipe, one a training seed; intervals are over them."""
    loads: tuple[PositiveFloat, ...] = (0.2, 0.4, 0.7)
    """Loads of the test span, as shares of what the fastest setting carries at 99.5 % attainment."""
    slo_scales: tuple[PositiveFloat, ...] = (0.6, 1.0, 2.0)
    """Multiples of the profile's latency limits: 0.6 is the 3x rule, 2 the 10x rule."""
    budget: PositiveInt = 48
    """Evaluations to tune each rule with, for each workload and SLO."""
    profile: str = DEFAULT_PROFILE
    """Profile name or path of a profile file."""
    day: bool = True
    """Take a compressed synthetic day that swings from 10 to 80 % load, too."""
    train_fraction: Fraction = 0.7
    """Leading share of each trace that is its training span."""
    target_attainment: Fraction = 0.99
    """Share of requests that must be within both limits."""
    seed: int = 0
    """Fixes the searches and the random policy."""
    workers: PositiveInt = 1
    """Processes to share the work; the result is the same with any number."""
    out: Path = Path("runs/study")
    """Folder for study.json, study.md, the CSV files and the plot; finished parts in it are kept."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.trace and not self.day:
            msg = "there is nothing to study: name at least one trace or leave the day in"
            raise ValueError(msg)
        for name in ("loads", "slo_scales"):
            values: tuple[float, ...] = getattr(self, name)
            if not values or len(set(values)) < len(values):
                msg = f"{name} must be one or more different numbers, got {values}"
                raise ValueError(msg)
        return self


class ExportSettings(Settings):
    """Turn a trained model into a bundle: weights without pickle, with everything needed to run them."""

    run: Path
    """Run folder of ``rlgov train``."""
    out: Path | None = None
    """File to write; ``policy.safetensors`` in the run folder if not given."""
    model: Literal["best", "last"] = "best"
    """The best evaluated model, or the newest checkpoint."""


class ServeSettings(Settings):
    """A vLLM deployment behind one gateway. vLLM's own arguments follow after ``--``."""

    model: str | None = None
    """Name or folder of the model; the profile's if not given."""
    profile: str | None = None
    """Profile name or path of a profile file: batch caps, TP degrees, number of GPUs, token budget."""
    tp: tuple[PositiveInt, ...] = ()
    """TP degrees to offer; the profile's if not given, else 1."""
    start_tp: PositiveInt | None = None
    """TP degree to start with; the largest that can be had if not given."""
    max_num_seqs: PositiveInt | None = None
    """Requests that an engine may ever run at once; the largest batch cap, else 256."""
    batch_caps: tuple[PositiveInt, ...] = ()
    """Batch caps to offer; the profile's if not given, else halves of the largest down to 8."""
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens of one iteration; the profile's if not given, else 8192."""
    gpus: tuple[str, ...] = ("all",)
    """GPUs by UUID, or ``all``, or ``none`` for a vLLM that runs on the processor."""
    host: str = "127.0.0.1"
    """Address the gateway listens at. It speaks plain HTTP and asks for no key of its own."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port the gateway listens at; 0 takes a free one."""
    vllm: Path | None = None
    """The vllm program; else the one on the PATH, else .venv-vllm/bin/vllm."""
    vllm_arguments: tuple[str, ...] = ()
    """vLLM's own arguments, for a configuration file; on the command line they follow after ``--``."""
    plugin: bool = True
    """Load rlgov's plugin in vLLM; without it the gateway holds the batch cap."""
    switch: Literal["auto", "side-by-side", "sleep", "restart"] = "auto"
    """How engines of two TP degrees share the GPUs during a change."""
    run: Path = Path("runs/serve")
    """Folder for state and logs. Engines that an earlier run left serving are taken over from here."""
    control: Path | None = None
    """The control socket; ``control.sock`` in the run folder if not given."""
    max_held: Annotated[int, Field(ge=0)] = 1024
    """Requests that may wait while no engine takes any; the next one is refused with 503."""
    hold_timeout_s: PositiveFloat = 120.0
    """How long a request waits for an engine before it is refused with 503."""
    start_timeout_s: PositiveFloat = 900.0
    """From launching an engine until it is healthy."""
    drain_timeout_s: PositiveFloat = 600.0
    """How long a replaced engine may go on with its requests before its shutdown begins."""
    shutdown_timeout_s: PositiveFloat = 120.0
    """How long a shutdown waits for requests; vLLM aborts what is left then."""
    restart_hung: bool = False
    """Restart an engine that makes no progress, which ends its requests; otherwise it is only reported."""


class CharacterizeSettings(Settings):
    """Latency and energy of a deployment over clocks, batch caps, TP degrees, lengths and load."""

    out: Path = Path("runs/characterize")
    """Run folder. A campaign of the same settings in it is resumed; one of other settings is refused."""
    deployment: Literal["simulated", "live", "attach"] = "simulated"
    """``simulated``: a profile. ``live``: a stack of ``rlgov serve``. ``attach``: a vLLM that runs."""
    profile: str | None = None
    """Profile name or path of a profile file. Simulated: what is simulated. Live and attach: the axes and
    the number of GPUs; without one, all that the deployment offers."""
    clocks: tuple[PositiveInt, ...] = ()
    """SM clocks in MHz; all that are offered if not given."""
    caps: tuple[PositiveInt, ...] = ()
    """Batch caps; all that are offered if not given."""
    tp: tuple[PositiveInt, ...] = ()
    """TP degrees; all that are offered if not given. Attach: the degree that vLLM was started with."""
    classes: tuple[str, ...] = ()
    """Classes of lengths such as short-in/long-out (short, medium, long each way); all nine if neither these
    nor traces are given."""
    traces: tuple[str, ...] = ()
    """Trace files or ``synthetic:NAME`` whose lengths are sent, too; arrivals are those of the loop."""
    trace_from_s: NonNegativeFloat = 0.0
    """Where the slice of each trace starts, in seconds of its own time."""
    trace_to_s: PositiveFloat | None = None
    """Where the slice of each trace ends; the end of the trace if not given."""
    length_scale: PositiveFloat = 1.0
    """Multiplies the lengths of the classes, for models of a short context."""
    closed: bool = True
    """Measure in a closed loop: each of so many users asks again when answered."""
    concurrency: tuple[PositiveInt, ...] = ()
    """Users of the closed loop; as many as the batch cap if not given, which saturates it."""
    rates: tuple[PositiveFloat, ...] = ()
    """Requests a second of open loops (Poisson arrivals)."""
    repeats: PositiveInt = 1
    """How often each point is measured, with other requests."""
    warm_up_s: NonNegativeFloat = 30.0
    """Seconds left out at a point's beginning; longer where a closed loop has not answered every user yet."""
    measure_s: PositiveFloat = 60.0
    """Seconds measured. A point that is not steady is held up to three times as long, then marked."""
    cool_down_s: NonNegativeFloat = 5.0
    """Seconds without load after a point; none in simulation."""
    seed: NonNegativeInt = 0
    """Fixes requests and the order of the points."""
    iterations: bool | None = None
    """Keep a row an iteration in iterations.parquet; by default where they are measured, not simulated."""
    control: Path = Path("runs/serve/control.sock")
    """Live: the control socket of ``rlgov serve``."""
    url: str = "http://127.0.0.1:8000"
    """Live and attach: where requests are sent."""
    gpus: tuple[str, ...] = ("auto",)
    """Live and attach: GPUs by UUID, or ``none``; ``auto``: the stack's own (attach: all of this machine)."""
    token_env: str | None = None
    """Attach: environment variable with the plugin's token, for batch caps and iterations."""
    api_key_env: str | None = None
    """Live and attach: environment variable with the server's API key."""
    vocabulary: Annotated[int, Field(ge=64)] = 30_000
    """Live and attach: prompts are drawn from token ids 16 up to this."""
    switch_timeout_s: PositiveFloat = 900.0
    """Live: longest wait for a TP switch."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.closed and not self.rates:
            msg = "there is no load to measure under; leave the closed loop in, or give rates"
            raise ValueError(msg)
        if self.deployment == "attach" and len(self.tp) != 1:
            msg = "attach needs the one TP degree that vLLM was started with; give it as tp"
            raise ValueError(msg)
        if self.token_env is not None and self.deployment != "attach":
            msg = "token_env is for attach; rlgov serve has a token of its own"
            raise ValueError(msg)
        return self


class LoadSettings(Settings):
    """A trace's requests sent to an OpenAI-compatible server, at their times and with their token counts."""

    url: str
    """Address of the server, such as ``http://127.0.0.1:8000``; a trailing ``/v1`` may be there or not."""
    trace: str = DEFAULT_TRACE
    """Trace file, or ``synthetic:NAME`` for generated traffic (conversation, code, day)."""
    out: Path = Path("runs/load")
    """Folder for requests.csv and load.json; those of an earlier run in it are replaced."""
    from_s: NonNegativeFloat = 0.0
    """Where the slice to send starts, in seconds of the trace's own time."""
    to_s: PositiveFloat | None = None
    """Where the slice ends; the end of the trace if not given."""
    rate_scale: PositiveFloat = 1.0
    """Requests are sent this much faster than recorded."""
    duration_s: PositiveFloat | None = None
    """Stop sending after so many seconds; requests under way are waited for."""
    concurrency: PositiveInt | None = None
    """Closed loop: keep so many requests under way, whatever their recorded times. Goes through the
    slice once or, with ``duration_s``, again and again until then."""
    seed: NonNegativeInt = 0
    """Fixes generated traffic and the prompts."""
    api: Literal["completions", "chat"] = "completions"
    """``completions`` sends token ids, so prompt lengths are exact; ``chat`` sends words, so they are not."""
    model: str | None = None
    """Name of the model; the first one the server lists if not given."""
    api_key_env: str | None = None
    """Environment variable that holds the server's API key; none is sent if not given."""
    vocabulary: Annotated[int, Field(ge=64)] = 30_000
    """Prompts are drawn from token ids 16 up to this; not above the model's vocabulary size."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Trim requests whose prompt and output are longer together; how many is reported."""
    timeout_s: PositiveFloat = 600.0
    """A request that takes longer is given up and counted."""
    max_outstanding: PositiveInt = 20_000
    """Safety: a request that falls due while so many are under way is not sent, and counted as an error."""
    slo_ttft_s: PositiveFloat = 1.0
    """Limit of the time to the first token, for the goodput."""
    slo_tpot_s: PositiveFloat = 0.075
    """Limit of the time per further token, for the goodput."""
    end_with_input: bool = False
    """End early when standard input ends: for a program that starts this one and may be killed."""
    cross_check: bool = False
    """Afterwards send the same requests with ``vllm bench serve``, and set both results side by side."""
    vllm_program: str = "vllm"
    """The vllm program, for the cross-check."""
    tokenizer: str | None = None
    """Tokenizer of the model, for the cross-check; the model's own name if not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.to_s is not None and self.to_s <= self.from_s:
            msg = f"to_s {self.to_s:g} does not lie after from_s {self.from_s:g}; give a later end"
            raise ValueError(msg)
        if not self.url.startswith(("http://", "https://")):
            msg = f"url {self.url!r} is no address of a server; give one such as http://127.0.0.1:8000"
            raise ValueError(msg)
        if self.cross_check and (self.concurrency is not None or self.api == "chat"):
            msg = "cross_check compares replays of a trace by token ids; leave concurrency and chat out"
            raise ValueError(msg)
        return self


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them.

    Args:
        name: What was given.
        known: The names that would have been right.

    Returns:
        A clause to append to an error message.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"


def read_config_file(path: Path, sections: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The sections of a configuration file, names checked; values are checked when a command takes them.

    Args:
        path: A YAML file.
        sections: For each section its record of settings.

    Returns:
        What the file holds, section by section.

    Raises:
        ConfigError: The file cannot be read, is no mapping of sections, or holds an unknown name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        raise ConfigError(f"{path}: cannot be read ({reason}); name a YAML file with --config") from error
    try:
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML ({error.problem}); correct that line") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error}); correct the file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must map sections to settings, such as 'train:' with indented lines below"
        )
    for section, values in content.items():
        if section not in sections:
            raise ConfigError(f"{path}: unknown section {section!r}; {nearest(str(section), sections)}")
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: section {section!r} must map names to values, not be {values!r}")
        _refuse_unknown(path, str(section), values, sections[section])
    return {section: values for section, values in content.items() if values}


def _refuse_unknown(path: Path, prefix: str, values: Mapping[Any, Any], record: type) -> None:
    known = _fields(record)
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown name {prefix}.{name}; {nearest(str(name), known)}")
        below = known[name]
        if below is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {prefix}.{name} must map names to values, not be {value!r}")
            _refuse_unknown(path, f"{prefix}.{name}", value, below)


def _fields(record: type) -> dict[str, type | None]:
    """The fields of a record of settings; for those that are records themselves, which."""
    annotations = get_type_hints(record)
    names = list(record.model_fields) if issubclass(record, BaseModel) else list(annotations)
    return {name: kind if _is_record(kind := annotations[name]) else None for name in names}


def _is_record(kind: object) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))


def check_environment(
    environment: Mapping[str, str], sections: Mapping[str, type[BaseModel]], prefix: str = "RLGOV_"
) -> None:
    """Refuse ``RLGOV_SECTION_...`` variables that no setting answers to.

    Other variables that merely start with ``RLGOV_`` are left alone: Kubernetes makes some for every
    service it knows.

    Raises:
        ConfigError: A variable of a known section names no setting.
    """
    for section, model in sections.items():
        start = f"{prefix}{section.upper()}_"
        known = {start + name.upper().replace(".", "_") for name in _paths(model)}
        for variable in sorted(environment):
            if variable.startswith(start) and variable not in known:
                raise ConfigError(
                    f"environment variable {variable} names no setting; {nearest(variable, known)}"
                )


def _paths(record: type) -> list[str]:
    paths = []
    for name, below in _fields(record).items():
        paths += [name] if below is None else [f"{name}.{deeper}" for deeper in _paths(below)]
    return paths


def explain(error: ValidationError) -> str:
    """A pydantic error in one line: each field, what is wrong with it, and what was given."""
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        what = item["msg"].removeprefix("Value error, ")
        what = what[0].lower() + what[1:]
        parts.append(f"{where}: {what}, not {item['input']!r}" if where else what)
    return "; ".join(parts)
