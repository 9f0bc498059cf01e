"""A format from outside of the package goes end to end: every policy has the bits of everything resident."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROFILE, random_decoder, random_model
from small_checkpoint import write_checkpoint

from layerscope_jax import Engine, ExpertBank, ExpertId, Model, OffloadConfig, formats, load, save
from layerscope_jax.formats import format_named
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.offload.executors import DeviceExperts
from layerscope_jax.profiling.machine_profile import ModelShape
from layerscope_jax.runtime.non_finite import why_not_finite

pytestmark = pytest.mark.usefixtures("quick_compiles")

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
PROMPTS = [[5, 20, 7], [17], list(range(30, 44))]


@pytest.fixture(scope="module")
def example():
    """The example as a module, and its format forgotten afterwards."""
    sys.path.insert(0, str(EXTEND))
    try:
        yield __import__("format")
    finally:
        sys.path.remove(str(EXTEND))
        formats._formats.pop("float8_e4m3", None)
        sys.modules.pop("format", None)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(request):
    return random_model(dtype=jnp.dtype(request.param), num_layers=2)


@pytest.fixture(scope="module")
def packed(example, plain):
    return plain.with_format(example.FLOAT8)


def run(model, config):
    """Tokens and statistics; and the logits of every step."""
    logits = []
    with Engine(model, config) as engine:
        step = engine.runner.step

        def kept(*arguments):
            result = step(*arguments)
            logits.append(np.asarray(result[1]))
            return result

        engine.runner.step = kept
        result = engine.generate(PROMPTS, max_new_tokens=5, stop_token_ids=())
    return result.token_ids, result.stats, logits


POLICIES = ["lru", "host-only", "presched", "auto"]


def test_every_policy_has_the_bits_of_everything_resident_and_is_near_the_plain_model(example, plain, packed):
    bank = packed.bank
    assert bank.expert_bytes == 3 * 32 * 20 + 12
    assert bank.dtype == plain.bank.dtype
    tokens, stats, everything = run(packed, OffloadConfig(profile=PROFILE))
    assert (stats.format, stats.policy, stats.kernels) == ("float8_e4m3", "resident", {"xla": 1})
    # On a CPU attention and sums go by our own loops all the same; D is no multiple of what products take.
    assert stats.dense_kernels["attention"] in ("loops", "xla")
    for policy in POLICIES:
        budget = 0 if policy == "host-only" else 10 * bank.expert_bytes
        config = OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)
        found, stats, logits = run(packed, config)
        assert found == tokens, policy
        for ours, theirs in zip(logits, everything, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert stats.format == "float8_e4m3"
        assert stats.peak_expert_bytes <= budget
        if policy == "lru":  # which has no prefetches, that may be broken off between two arrays
            assert stats.bytes_moved % bank.expert_bytes == 0 < stats.bytes_moved
    _, stats, logits = run(plain, OffloadConfig(profile=PROFILE))
    assert stats.format == plain.bank.dtype.name
    # E4M3 has three bits behind the leading one: some per cent of error in a weight, less in sums of them.
    first, other = everything[0], logits[0]
    assert np.abs(first - other).max() < 0.15 * np.abs(other).max()
    assert np.corrcoef(first.ravel(), other.ravel())[0, 1] > 0.99


def test_an_accelerator_computes_what_the_host_computes(example, packed):
    """The executor of accelerators, on a CPU: the product of the format, inside of its program."""
    rows = Assignments(np.array([[0, 1], [1, 0], [0, 2]], np.int32))
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), packed.bank.dtype)
    arrays = {e: jax.device_put(packed.bank[ExpertId(0, e)], inputs.sharding) for e in range(3)}
    device = DeviceExperts(jax.devices()[0], example.FLOAT8)
    outputs = device.take(6, 32, inputs.dtype)
    outputs, _ = device.run(outputs, inputs, rows, range(3), lambda some: [arrays[e] for e in some])
    host, computed = CpuExperts(1, None, example.FLOAT8), np.zeros((7, 32), inputs.dtype)
    held = {e: InMemory.of(arrays[e], example.FLOAT8) for e in range(3)}
    host.compute(computed, inputs, rows, range(3), lambda some: [held[e] for e in some], WorkStats())
    np.testing.assert_array_equal(np.asarray(outputs)[:-1], computed[:-1])
    host.close()


def test_what_it_packs_it_unpacks(example):
    matrices = [
        np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for shape in [(6, 8)] * 2 + [(8, 6)]
    ]
    matrices[1][:] = 0
    packed = example.FLOAT8.pack(*matrices)
    example.FLOAT8.check(packed)
    for matrix, other in zip(matrices, example.FLOAT8.unpack(packed), strict=True):
        np.testing.assert_allclose(other, matrix, atol=2**-4 * np.abs(matrix).max())
    again = example.FLOAT8.pack(*example.FLOAT8.unpack(packed))
    for array, other in zip(packed, again, strict=True):
        np.testing.assert_array_equal(array.view(np.uint8), other.view(np.uint8))


def test_a_checkpoint_is_loaded_into_it_and_saved_unpacked(example, tmp_path):
    decoder = random_decoder(replace(random_model().config, num_layers=1, num_experts=2, qk_norm="all"))
    save(decoder, tmp_path / "plain")
    loaded = load(tmp_path / "plain", format="float8_e4m3")
    converted = Model.from_decoder(decoder).with_format(example.FLOAT8)
    for expert in loaded.bank:
        for array, other in zip(loaded.bank.views(expert), converted.bank.views(expert), strict=True):
            np.testing.assert_array_equal(array.view(np.uint8), other.view(np.uint8))
    save(loaded, tmp_path / "unpacked")
    plain = load(tmp_path / "unpacked")
    for expert in plain.bank:
        for array, other in zip(plain.bank.views(expert), loaded.bank.unpacked(expert), strict=True):
            np.testing.assert_array_equal(array, other)
    assert "all weights are finite" in why_not_finite(loaded)


@pytest.mark.parametrize("body", [ExpertBody("clamped", bias=True), ExpertBody("gelu")])
def test_a_body_that_it_does_not_have_is_refused(example, body):
    """Not that it computes SwiGLU with another model's matrices."""
    model = random_model(expert_body=body, num_layers=1, num_experts=2)
    words = rf"'float8_e4m3' holds experts with .*those of this model have .*'{body.activation}'"
    with pytest.raises(ValueError, match=words):
        model.with_format(example.FLOAT8)
    with pytest.raises(ValueError, match=words):
        ExpertBank.build(model.config, lambda *_: np.zeros(()), format=example.FLOAT8)


def test_a_profile_knows_its_bytes_and_arrays(example, packed):
    shape = ModelShape.of(packed)
    assert shape.dtype == "float8_e4m3"
    assert shape.expert_bytes == packed.bank.expert_bytes
    assert shape.geometry(slots=1).arrays_per_expert == len(packed.bank.layers[0][0]) == 4


def test_another_one_of_its_name_is_refused(example):
    assert format_named("float8_e4m3") is example.register_format(example.Float8())

    class Other(example.Float8):
        pass

    with pytest.raises(ValueError, match="there is a format 'float8_e4m3' already"):
        example.register_format(Other())
    with pytest.raises(ValueError, match=r"expected one of the formats float32, .*, float8_e4m3, got"):
        format_named("float9")


def test_the_example_runs(example, tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path, num_layers=4)  # the shipped one compiles longer
    monkeypatch.setattr(example, "SHIPPED", checkpoint)
    example.main()
    assert "format float8_e4m3, kernels {'xla': 1" in capsys.readouterr().out
