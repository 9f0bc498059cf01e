"""What of a checkpoint fits where on a machine, how fast it may be, and what would help; prints nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from layerscope_jax.checkpoints.description import Description
from layerscope_jax.checkpoints.safetensors_io import dtype_named
from layerscope_jax.cli.fit_advice import Advice, advice
from layerscope_jax.cli.fit_bounds import Bounds, Rate, bounds, link_rate
from layerscope_jax.cli.fit_sizes import Asked, FormatFit, Memory, Sizes
from layerscope_jax.cli.fit_times import Expected, Known, check_profile, expected, known_routing
from layerscope_jax.formats import quantised
from layerscope_jax.formats.quantised import ENCODINGS
from layerscope_jax.generation.device_memory import DeviceNeeds
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.simulation.routing import Routing


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What fits where.

    Attributes:
        checkpoint, family, dtype: the model, and the dtype of what is no expert.
        dense_format: format of the matrices of dense layers; None if they have that dtype.
        memory: the machine's.
        max_num_seqs, context, prefill_chunk_size: what is asked of the engine.
        needs: bytes that it takes beside its experts, part by part.
        chosen: fit in the format that was asked for, or in the checkpoint's own.
        formats: fit in each format, the own one first.
        refused: format -> why the experts cannot have it.
        times: expected times; None if they are left out.
        no_times: why they are left out; None if they are not.
        bounds: what bytes alone say of decode steps, where there are no expected times.
        no_bounds: why that is left out too; None if it is not, or there are expected times.
        advice: what would help, the best first.
    """

    checkpoint: str
    family: str
    dtype: str
    dense_format: str | None
    memory: Memory
    max_num_seqs: int
    context: int
    prefill_chunk_size: int
    needs: DeviceNeeds
    chosen: FormatFit
    formats: tuple[FormatFit, ...]
    refused: dict[str, str]
    times: Expected | None = None
    no_times: str | None = None
    bounds: Bounds | None = None
    no_bounds: str | None = None
    advice: tuple[Advice, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether the checkpoint can be run in the chosen format."""
        return self.chosen.experts_lie != "nowhere"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as an object for JSON."""
        totals = {"total": self.needs.total, "workspace": self.needs.workspace}
        return asdict(self) | {"runs": self.runs, "needs": asdict(self.needs) | totals}


def report(
    description: Description,
    config: ModelConfig,
    memory: Memory,
    asked: Asked,
    *,
    expert_format: str | None = None,
    dense_format: str | None = None,
) -> FitReport:
    """Returns what of a checkpoint fits where, without times.

    Args:
        description: the checkpoint.
        config: its model's shape.
        memory: the machine's memory.
        asked: what is asked of the engine.
        expert_format, dense_format: those to store the weights in; None for the checkpoint's.

    Raises:
        ValueError: if the experts cannot have the format.
    """
    sizes = Sizes(description, config, dense_format)
    own = description.expert_format
    chosen = expert_format or own
    fits, refused = {}, {}
    encodings = (quantised(kind()).name for kind in ENCODINGS)
    for name in dict.fromkeys([own, chosen, description.dtype, *encodings]):
        try:
            fits[name] = sizes.fit(name, memory, asked)
        except ValueError as error:
            refused[name] = str(error)
    if chosen in refused:
        raise ValueError(f"--expert-format: {refused[chosen]}")
    needs = sizes.needs(chosen, memory, asked)
    return FitReport(
        checkpoint=description.folder,
        family=description.family,
        dtype=description.dtype,
        dense_format=sizes.dense_format,
        memory=memory,
        **asked._asdict(),
        needs=needs,
        chosen=fits[chosen],
        formats=tuple(fits.values()),
        refused=refused,
        advice=advice(
            fits[chosen],
            tuple(fits.values()),
            lambda *changed: sizes.fit(chosen, *changed),
            memory,
            asked,
            packed=Sizes(description, config, "int8").fit(chosen, memory, asked),
            beside_bytes=needs.total,
        ),
    )


def timed(
    made: FitReport,
    config: ModelConfig,
    profile: MachineProfile | None,
    routing: Routing | None,
    link_bytes_per_s: int | None,
    host: Rate | None,
) -> FitReport:
    """Returns a report with expected times; without them, with the reason and what bytes alone say.

    Args:
        made: the report.
        config: the model's shape.
        profile, routing: costs of the machine, and recorded routing, if they were given.
        link_bytes_per_s: speed of the link, if it was given.
        host: speed at which the host reads its memory; None to measure it.
    """
    fit = made.chosen
    known = to_simulate(made, config, profile, routing)
    if isinstance(known, Known):
        assert profile is not None
        times = expected(
            profile,
            known,
            slots=fit.left_bytes // fit.expert_bytes,
            max_num_seqs=made.max_num_seqs,
            link_bytes_per_s=link_bytes_per_s,
        )
        return replace(made, times=times)
    is_cpu, dense = made.memory.device is None, 0
    if is_cpu:
        looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
        dense = made.needs.dense - looked_up * dtype_named(made.dtype).itemsize
    link = None if is_cpu else link_rate(link_bytes_per_s, profile)
    found = bounds(config, fit, dense, sorted({1, made.max_num_seqs}), host, link)
    if isinstance(found, Bounds):
        return replace(made, no_times=known, bounds=found)
    return replace(made, no_times=known, no_bounds=found)


def to_simulate(
    made: FitReport, config: ModelConfig, profile: MachineProfile | None, routing: Routing | None
) -> Known | str:
    """Returns the routing to simulate, or why nothing can be simulated.

    Raises:
        ValueError: if profile or routing is of another model.
    """
    if profile is None:
        return (
            "no measured costs of this model on this machine: run `layerscope calibrate`, and give the file "
            "with --profile"
        )
    if made.chosen.experts_lie not in ("device", "host"):
        return "simulated are models whose experts fit into host memory"
    if made.memory.device is None:
        # The only memory holds all experts: the device of the profile would be this CPU, with all resident.
        return "simulated are machines with an accelerator: give its memory with --device-memory"
    check_profile(profile, config, made.chosen.format)
    return known_routing(profile, routing) or (
        "no recorded routing of this model is known, which would tell which experts are needed when; record "
        "it: layerscope trace, then layerscope predictor routing, and give the file with --trace"
    )
