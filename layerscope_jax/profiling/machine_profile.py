"""A profile: times to compute and to move the experts of one model on one machine, as a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerscope_jax.formats import format_named
from layerscope_jax.scheduling.costs import MOST_MS, NOTHING, HardwareProfile, TimeTable, is_time
from layerscope_jax.scheduling.geometry import Geometry, RoutedExperts
from layerscope_jax.support import machine
from layerscope_jax.support.files import read_json, write_file
from layerscope_jax.support.json_fields import Fields, is_file, of_record, readable

if TYPE_CHECKING:
    from layerscope_jax.checkpoints.model import Model

FORMAT = 2
PUBLISHED = Path(__file__).parents[1] / "profiles"

HEAD = (
    "format",
    "name",
    "source",
    "model",
    "machine",
    "versions",
    "slots",
    "routing",
    "emulated_link_bandwidth",
)
COSTS = (
    "host_ms",
    "device_ms",
    "layer_ms",
    "forecast_ms",
    "transfer_ms",
    "host_start_ms",
    "read_ms",
    "read_start_ms",
)
OPTIONAL = ("host_start_ms", "read_ms", "read_start_ms")
"""Times that profiles may lack: those that were published, or measured without a disk."""


LINKS = {"pcie3-x8": 2.0, "pcie4-x16": 0.5, "pcie5-x16": 0.25}
"""Other links for published profiles: the time of a copy divided by its time over PCIe 3 x16."""

MACHINE = {"cpu": str, "cores": int, "device": str, "memory_bytes": int}
DECISIVE = ("cpu", "cores", "device")
"""Fields of the machine that must be equal for its costs to apply; more memory makes nothing faster."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(RoutedExperts):
    """Sizes that the costs of a model's experts depend on.

    Attributes:
        hidden_size, moe_intermediate_size: D, F.
        dtype: name of the experts' format (`layerscope_jax.formats`).
    """

    hidden_size: int
    moe_intermediate_size: int
    dtype: str

    @classmethod
    def of(cls, model: Model) -> ModelShape:
        """Returns the shape of a loaded model."""
        return cls(
            **model.geometry(0).counts(),
            hidden_size=model.config.hidden_size,
            moe_intermediate_size=model.config.moe_intermediate_size,
            dtype=model.bank.format.name,
        )

    @property
    def expert_bytes(self) -> int:
        """Size (bytes) of one expert."""
        return format_named(self.dtype).expert_bytes(self.hidden_size, self.moe_intermediate_size)

    def geometry(self, slots: int) -> Geometry:
        """Returns the geometry that policies see, for a budget that holds `slots` experts."""
        buffers = format_named(self.dtype).buffers(self.hidden_size, self.moe_intermediate_size)
        return Geometry(
            **self.counts(),
            expert_bytes=self.expert_bytes,
            slots=slots,
            arrays_per_expert=len(buffers),
        )


@dataclass(frozen=True, kw_only=True)
class MachineProfile:
    """Costs of a model on a machine, with the model, the machine and where the figures come from.

    It is either measured by `layerscope calibrate`, or published with a paper and shipped (`names`).

    Attributes:
        name: name of a shipped profile, or of the model that was measured.
        costs: times from which plans are made, measured while the rest of the machine was busy too.
        model: sizes of the model that was measured.
        machine: cpu, cores, device, memory_bytes; None for values that are not known.
        versions: versions of the software that was measured.
        slots: number of experts that the device holds; None if it was not given.
        routing: name of the recorded routing with which this model is simulated; None without one.
        emulated_link_bandwidth: bytes per second to which copies were slowed down; None for full speed.
        details: other measurements, for human readers: each part alone, by size, by context.

    >>> profile = MachineProfile.load("mixtral-8x7b")
    >>> profile.costs.transfer_ms, MachineProfile.load("mixtral-8x7b@pcie4-x16").costs.transfer_ms
    (27.0, 13.5)
    >>> profile.model.expert_bytes / 2**20
    336.0
    """

    name: str
    costs: HardwareProfile
    model: ModelShape
    machine: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    slots: int | None = None
    routing: str | None = None
    emulated_link_bandwidth: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name_or_path: str | Path) -> MachineProfile:
        """Reads a shipped profile by its name (see `names`), or a file.

        Raises:
            ValueError: if there is no such profile, or naming every field that is wrong.
        """
        base, _, link = str(name_or_path).partition("@")
        if str(name_or_path) in names():
            profile = cls._read(PUBLISHED / f"{base}.json")
            return profile if not link else profile._over(link)
        if not is_file(Path(name_or_path)):
            raise ValueError(
                f"profile must be a file that `layerscope calibrate` wrote or one of {', '.join(names())}; "
                f"got {str(name_or_path)[:200]!r}"
            )
        return cls._read(Path(name_or_path))

    @classmethod
    def _read(cls, file: Path) -> MachineProfile:
        try:
            return cls.from_json(read_json(file, "calibrate again or correct the file"))
        except ValueError as error:
            raise ValueError(f"{error}" if str(file) in str(error) else f"{file}: {error}") from None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MachineProfile:
        """Reads a record that `to_json` made.

        Raises:
            ValueError: naming every field that is missing or invalid.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            got = record.get("format") if isinstance(record, Mapping) else record
            raise ValueError(
                f"expected a profile of format {FORMAT}, got {str(got)[:40]}; calibrate again (format 1 had "
                "other names for the model's sizes)"
            )
        fields = Fields(record)
        costs, where = fields.of("costs", dict) or {}, fields.of("machine", dict) or {}
        fields.only((*HEAD, "costs", "details"))
        fields.only(MACHINE, where, "machine.")
        fields.only((*COSTS, "alone"), costs, "costs.")
        profile: dict[str, Any] = dict(
            name=fields.of("name", str),
            model=fields.check(of_record, ModelShape, record.get("model"), "model"),
            machine={name: fields.of(name, kind, where, "machine.", True) for name, kind in MACHINE.items()},
            versions=fields.of("versions", dict),
            slots=fields.of("slots", int, optional=True),
            routing=fields.of("routing", str, optional=True),
            emulated_link_bandwidth=fields.of("emulated_link_bandwidth", int, optional=True),
            details=fields.of("details", dict),
        )
        if profile["model"] is not None:
            fields.check(format_named, profile["model"].dtype, of="model")
        source = fields.of("source", str)
        times = read_times(fields, costs, "costs.")
        alone = None
        if "alone" in costs:
            parts = fields.of("alone", dict, costs, "costs.") or {}
            fields.only(COSTS, parts, "costs.alone.")
            alone = read_times(fields, parts, "costs.alone.")
        fields.raise_any(remedy="calibrate again or correct the file")
        if alone is not None:
            times["alone"] = HardwareProfile(**alone, source=source)
        return cls(**profile, costs=HardwareProfile(**times, source=source))

    def to_json(self) -> dict[str, Any]:
        costs = self.costs
        return {
            "format": FORMAT,
            "name": self.name,
            "source": costs.source,
            "model": asdict(self.model),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "slots": self.slots,
            "routing": self.routing,
            "emulated_link_bandwidth": self.emulated_link_bandwidth,
            "costs": costs_json(costs),
            "details": dict(self.details),
        }

    def save(self, path: str | Path) -> None:
        """Writes the profile to a file, whole or not at all.

        Raises:
            ValueError: if it cannot be written.
        """
        write_file(Path(path), readable(self.to_json()) + "\n")

    def check(self, model: Model, emulated_link_bandwidth: int | None = None) -> None:
        """Refuses a machine or a model other than the profile's.

        Args:
            model: the model to run, on its device.
            emulated_link_bandwidth: emulated bandwidth (bytes/s) of its link, or None.

        Raises:
            ValueError: naming everything that differs.
        """
        current, shape = machine.describe(model.device), asdict(ModelShape.of(model))
        compared = [
            *((name, self.machine.get(name), current[name]) for name in DECISIVE),
            *((f"model.{name}", theirs, shape[name]) for name, theirs in asdict(self.model).items()),
            ("emulated_link_bandwidth", self.emulated_link_bandwidth, emulated_link_bandwidth),
        ]
        differing = [
            f"{name} {theirs} there, {ours} here" for name, theirs, ours in compared if theirs != ours
        ]
        if differing:
            raise ValueError(
                f"the profile {self.name!r} ({self.costs.source}) is of another machine or model: "
                f"{'; '.join(differing)}; run `layerscope calibrate` on this machine with this model"
            )

    def geometry(self, slots: int | None = None) -> Geometry:
        """Returns the geometry that policies see, with `slots`, by default the profile's own number of slots.

        Raises:
            ValueError: if `slots` is None and the profile has no number.
        """
        slots = self.slots if slots is None else slots
        if slots is None:
            raise ValueError(f"the profile {self.name!r} names no number of slots; pass slots=")
        return self.model.geometry(slots)

    def _over(self, link: str) -> MachineProfile:
        """Returns this profile with another link, which is assumed to change only the time of a copy."""
        factor = LINKS[link]
        source = f"{self.costs.source}; derived for {link}: transfer_ms x {factor:g} from PCIe 3 x16"
        costs = replace(self.costs, transfer_ms=self.costs.transfer_ms * factor, source=source)
        return replace(self, name=f"{self.name}@{link}", costs=costs)


def names() -> list[str]:
    """Returns the names of the shipped profiles, each followed by its variants with other links.

    >>> names()[-4:]
    ['qwen3-30b-a3b', 'qwen3-30b-a3b@pcie3-x8', 'qwen3-30b-a3b@pcie4-x16', 'qwen3-30b-a3b@pcie5-x16']
    """
    published = sorted(file.stem for file in PUBLISHED.glob("*.json"))
    return [name + link for name in published for link in ("", *(f"@{link}" for link in LINKS))]


def costs_of(
    profile: HardwareProfile | MachineProfile | str | Path | None,
    model: Model,
    emulated_link_bandwidth: int | None,
) -> HardwareProfile | None:
    """Returns the costs of a profile, given as a file, a `MachineProfile` or a `HardwareProfile`.

    Raises:
        ValueError: if it cannot be read, or is not of `model` and this machine.
    """
    if profile is None or isinstance(profile, HardwareProfile):
        return profile
    if isinstance(profile, str | Path):
        profile = MachineProfile.load(profile)
    if not isinstance(profile, MachineProfile):
        raise ValueError(
            "profile must be a file that `layerscope calibrate` wrote, a MachineProfile or a "
            f"HardwareProfile, got {str(profile)[:80]!r}"
        )
    profile.check(model, emulated_link_bandwidth)
    return profile.costs


def costs_json(costs: HardwareProfile) -> dict[str, Any]:
    """Returns the times of a profile, without their source."""
    record: dict[str, Any] = {
        "host_ms": costs.host_ms.to_json(),
        "device_ms": costs.device_ms.to_json(),
        "layer_ms": costs.layer_ms.to_json(),
        "transfer_ms": costs.transfer_ms,
    }
    if costs.forecast_ms != NOTHING:
        record["forecast_ms"] = costs.forecast_ms.to_json()
    record |= {name: getattr(costs, name) for name in OPTIONAL if getattr(costs, name)}
    return record if costs.alone is None else record | {"alone": costs_json(costs.alone)}


def read_times(fields: Fields, costs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the times of a `HardwareProfile` in `costs` by name; adds what is wrong to `fields`."""
    times = {
        name: fields.check(read_table, costs, name, of=prefix + name)
        for name in ("host_ms", "device_ms", "layer_ms", "forecast_ms")
    }
    transfer_ms = fields.of("transfer_ms", float, costs, prefix)
    others = {name: fields.check(read_time, costs, name, of=prefix + name) for name in OPTIONAL}
    return times | {"transfer_ms": transfer_ms and float(transfer_ms)} | others


def read_time(costs: Mapping[str, Any], name: str) -> float:
    """Returns one of the `OPTIONAL` times of `costs`; 0 if it is missing.

    Raises:
        ValueError: if it is not a time.
    """
    time_ms = costs.get(name, 0.0)
    if not is_time(time_ms):
        raise ValueError(f"expected a time in 0..{MOST_MS:g} ms, got {str(time_ms)[:40]!r}")
    return float(time_ms)


def read_table(costs: Mapping[str, Any], name: str) -> TimeTable:
    """Returns one table of `costs`; published profiles lack `forecast_ms`, which then is zero.

    Raises:
        ValueError: if it is missing or not a table of times.
    """
    if name == "forecast_ms" and name not in costs:
        return NOTHING
    if name not in costs:
        raise ValueError("is missing")
    return TimeTable.from_json(costs[name])
