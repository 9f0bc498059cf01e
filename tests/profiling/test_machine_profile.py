"""Profiles as files: what ships, what is refused and how it is said, and that a file is written whole."""

import json
from dataclasses import replace

import pytest
from helpers import PROFILE, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.profiling import machine_profile
from layerscope_jax.profiling.machine_profile import MachineProfile, ModelShape, names
from layerscope_jax.support import machine
from layerscope_jax.support.json_fields import readable

SHIPPED = ("deepseek-v2-lite", "mixtral-8x7b", "moonlight", "qwen3-30b-a3b")


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def own(model):
    """A profile of this machine and the tiny model."""
    return MachineProfile(
        name="tiny",
        costs=PROFILE,
        model=ModelShape.of(model),
        machine=machine.describe(model.device),
        versions=machine.versions(),
        details={"alone": [1, 2]},
    )


def test_it_comes_back_as_it_was_saved(own, tmp_path):
    file = tmp_path / "new" / "profile.json"
    own.save(file)
    assert MachineProfile.load(file) == MachineProfile.load(str(file)) == own
    assert [entry.name for entry in file.parent.iterdir()] == ["profile.json"]
    assert '"tokens": [1, 64],\n' in file.read_text()


def test_a_failed_write_leaves_the_old_file(own, tmp_path):
    file = tmp_path / "profile.json"
    own.save(file)
    before = file.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(own, details={"share": float("nan")}).save(file)
    assert file.read_text() == before
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="choose another folder"):
        own.save(tmp_path / "taken" / "profile.json")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles(name):
    profile = MachineProfile.load(name)
    assert profile.name == name
    assert profile.costs.host_ms.tokens[0] == 1
    assert profile.costs.host_ms(300) > profile.costs.host_ms(1) > 0
    assert profile.costs.device_ms(1) == profile.costs.device_ms(10_000)
    assert 0 < profile.slots < profile.model.total_experts
    geometry = profile.geometry()
    assert (geometry.slots, geometry.num_layers) == (profile.slots, profile.model.num_layers)
    # Every figure says whether it was published or derived.
    sources = profile.details["sources"]
    assert {"host_ms", "device_ms", "transfer_ms", "layer_ms", "slots"} <= sources.keys()
    for figure in ("host_ms", "device_ms", "transfer_ms", "layer_ms", "slots"):
        assert "published" in sources[figure] or "derived" in sources[figure]
    # A transfer fits what an expert weighs: between 10 and 20 GB/s.
    assert 10e6 < profile.model.expert_bytes / profile.costs.transfer_ms < 20e6


def test_other_links_change_the_transfer_alone():
    base = MachineProfile.load("qwen3-30b-a3b")
    for link, factor in machine_profile.LINKS.items():
        other = MachineProfile.load(f"qwen3-30b-a3b@{link}")
        assert other.costs.transfer_ms == pytest.approx(factor * base.costs.transfer_ms)
        assert "derived" in other.costs.source
        costs = replace(other.costs, transfer_ms=base.costs.transfer_ms, source=base.costs.source)
        assert replace(other, name=base.name, costs=costs) == base


def test_names():
    assert len(names()) == len(SHIPPED) * (1 + len(machine_profile.LINKS))
    for name in names():
        assert MachineProfile.load(name).name == name


@pytest.mark.parametrize("name", ["mixtral", "mixtral-8x7b@pcie9", "@pcie4-x16", ""])
def test_unknown_names_are_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"layerscope calibrate.*deepseek-v2-lite"):
        MachineProfile.load(name)


def edit(record, path, value):
    *folders, name = path.split(".")
    for folder in folders:
        record = record[folder]
    if value is ...:
        del record[name]
    else:
        record[name] = value


def test_every_wrong_field_is_named(own, tmp_path):
    wrong = {
        "name": 3,
        "model.num_layers": 0,
        "model.num_experts": ...,
        "machine.cores": True,
        "costs.host_ms": {"tokens": [4, 1], "ms": [1, 2]},
        "costs.device_ms": ...,
        "costs.layer_ms": {"tokens": [1], "ms": [-2.0]},
        "costs.transfer_ms": -1.0,
        "costs.host_start_ms": -1.0,
        "costs.forecast_ms": {"tokens": [1], "ms": [-1.0]},
        "slots": "many",
        "routing": ...,
        "details": [],
    }
    file = tmp_path / "profile.json"
    record = own.to_json()
    for path, value in wrong.items():
        edit(record, path, value)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="calibrate again") as refused:
        MachineProfile.load(file)
    message = str(refused.value)
    assert message.startswith(str(file))
    for path in wrong:
        assert path in message, path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "expected JSON"),
        ("[]", "a JSON object"),
        ("{}", "of format 2, got None"),
        ('{"format": 1}', "of format 2, got 1; calibrate again"),
    ],
)
def test_other_files_are_refused(tmp_path, text, reason):
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=reason) as refused:
        MachineProfile.load(file)
    assert str(refused.value).count(str(file)) == 1


def test_an_unknown_dtype_is_refused(own):
    record = own.to_json()
    edit(record, "model.dtype", "int3")
    with pytest.raises(ValueError, match="bfloat16"):
        MachineProfile.from_json(record)


def test_it_speaks_for_its_own_machine_and_model_alone(own, model):
    own.check(model)
    replace(own, machine={**own.machine, "memory_bytes": None}).check(model)
    other = replace(
        own,
        machine={**own.machine, "cpu": "8086", "device": "abacus"},
        model=replace(own.model, num_experts=9, dtype="float16"),
        emulated_link_bandwidth=1_000_000,
    )
    with pytest.raises(ValueError, match="calibrate") as refused:
        other.check(model)
    for part in (
        "cpu 8086 there",
        "device abacus",
        "model.num_experts 9 there, 8 here",
        "float16",
        "1000000",
    ):
        assert part in str(refused.value)
    assert "model.num_layers" not in str(refused.value)


def test_geometry_needs_slots(own):
    assert own.geometry(3).slots == 3
    with pytest.raises(ValueError, match="pass slots="):
        own.geometry()


def test_readable_json_is_json():
    value = {"a": {}, "b": [1, [2]], "c": {"d": 'x"', "e": None}}
    assert json.loads(readable(value)) == value


class TestInAnEngine:
    def config(self, model, profile):
        return OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="fiddler", profile=profile)

    def test_costs_come_from_it(self, own, model, tmp_path):
        own.save(tmp_path / "profile.json")
        for profile in (PROFILE, own, tmp_path / "profile.json", str(tmp_path / "profile.json")):
            with Engine(model, self.config(model, profile)) as engine:
                assert engine.runner.costs == PROFILE

    @pytest.mark.parametrize("budget", [None, 1000])
    def test_another_machines_is_refused(self, model, budget):
        with pytest.raises(ValueError, match="another machine or model"):
            Engine(model, OffloadConfig(device_budget=budget, profile="mixtral-8x7b"))

    def test_another_pace_is_refused(self, own, model):
        with pytest.raises(ValueError, match="emulated_link_bandwidth None there, 1000000 here"):
            Engine(model, replace(self.config(model, own), emulated_link_bandwidth="1MB"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("costs.host_ms.ms", [1e308, 1e308]),
        ("costs.host_ms.ms", [float("inf"), 1.0]),
        ("costs.host_ms.ms", [float("nan"), 1.0]),
        ("costs.host_ms.ms", ["1", "2"]),
        ("costs.host_ms.ms", [True, False]),
        ("costs.host_ms.ms", [1.0, -1.0]),
        ("costs.host_ms.ms", [10**400, 1.0]),
        ("costs.host_ms.ms", [[1.0], [2.0]]),
        ("costs.host_ms.ms", "12"),
        ("costs.host_ms.tokens", [64, 1]),
        ("costs.host_ms.tokens", [1, 10**12]),
        ("costs.host_ms.tokens", [0, 4]),
        ("costs.host_ms.tokens", [1.0, 4.0]),
        ("costs.host_ms.tokens", {"1": 1}),
        ("costs.host_ms.tokens", list(range(1, 2000))),
        ("costs.host_ms.seconds", [1.0]),
        ("costs.host_ms", [1, 2]),
        ("costs.transfer_ms", 1e308),
        ("costs.transfer_ms", 10**400),
        ("costs.transfer_ms", "2"),
        ("costs.transfer_ms", float("inf")),
        ("costs.host_start_ms", 10**400),
        ("costs.host_start_ms", True),
        ("costs.transferms", 2.0),
        ("costs.alone", {"transfer_ms": 1.0}),
        ("costs.alone", {"alone": {}}),
        ("model.num_layers", 10**400),
        ("model.num_layers", 10**9),
        ("model.experts_per_token", 9),
        ("model.hidden_size", -3),
        ("model.head", 3),
        ("machine.gpu", "fast"),
        ("slots", 10**400),
        ("slots", 0.5),
        ("speed", 3),
    ],
    ids=lambda value: str(value)[:24],
)
def test_numbers_that_no_machine_has_are_refused_by_field(own, tmp_path, path, value):
    record = json.loads(json.dumps(own.to_json()))
    edit(record, path, value)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="calibrate again or correct the file") as refused:
        MachineProfile.load(file)
    part = path if path.count(".") < 2 else path.rpartition(".")[0]
    assert part.rpartition(".")[0] in str(refused.value)
    assert part.rpartition(".")[2] in str(refused.value)


@pytest.mark.parametrize("record", [None, [], 7, "profile", {"format": "1" * 9999}], ids=lambda r: str(r)[:9])
def test_what_is_no_profile_is_refused(record):
    with pytest.raises(ValueError, match="expected a profile of format 2") as refused:
        MachineProfile.from_json(record)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("name", ["x" * 5000, "../../etc/passwd\0", "profiles", "qwen3-30b-a3b@../x", "/"])
def test_names_that_no_file_has_are_refused(name):
    with pytest.raises(ValueError, match="profile must be a file that `layerscope calibrate` wrote"):
        MachineProfile.load(name)


@pytest.mark.parametrize("profile", [3, {"host_ms": 1}, object()], ids=["number", "record", "object"])
def test_an_engine_refuses_what_is_no_profile(model, profile):
    with pytest.raises(
        ValueError, match=r"profile must be a file, a MachineProfile, a HardwareProfile or None"
    ):
        Engine(
            model, OffloadConfig(device_budget=10 * model.bank.expert_bytes, policy="auto", profile=profile)
        )
