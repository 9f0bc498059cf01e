"""Programs are compiled once for all processes of a user; whoever set JAX's cache keeps what was set."""

import json
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest
import quick_compiling
from helpers import in_time

from layerscope_jax import use_compilation_cache
from layerscope_jax.cli import main as cli
from layerscope_jax.support import compile_cache as compilations
from layerscope_jax.support import machine

GENERATE = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import json
from helpers import bits, random_model
from exact_cases import tap
from layerscope_jax import Engine, OffloadConfig, use_compilation_cache
from layerscope_jax.support.compile_cache import counted

folder, found = use_compilation_cache(), []
model = random_model(num_layers=1)
with counted() as programs:
    for config in (OffloadConfig(), OffloadConfig(device_budget=model.bank.total_bytes, policy="lru")):
        with Engine(model, config) as engine:
            logits = tap(engine)
            engine.generate([[5, 6, 7], [17]], max_new_tokens=2)
            found += [bits(step).tolist() for step in logits]
print(json.dumps([folder, programs.programs, programs.cached, found]))
"""


def python(code, **environment):
    """What a process prints; a warning of Python ends it, and nothing else may be said."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    root = Path(__file__).parents[2]
    known |= quick_compiling.ENVIRONMENT  # one program is compared with itself
    known["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    done = in_time(
        lambda: subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=known | environment,
            capture_output=True,
            text=True,
        ),
        300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    if jax.__version_info__ < (0, 10, 2):  # whose XLA says two lines for each program that it reads
        said = [line for line in said if "cpu_aot_loader.cc" not in line and "pjrt_executable.cc" not in line]
    assert said == []
    return done.stdout


def test_a_second_process_compiles_nothing_and_computes_the_same_bits(tmp_path):
    folder, programs, cached, logits = json.loads(python(GENERATE, XDG_CACHE_HOME=str(tmp_path)))
    assert Path(folder).is_relative_to(tmp_path / "layerscope_jax")
    assert cached <= 1 < programs  # how a step ends may be the same program in both engines, each its own
    again = json.loads(python(GENERATE, XDG_CACHE_HOME=str(tmp_path)))
    assert again == [folder, programs, programs, logits]


SMALL = """
import jax
from layerscope_jax import use_compilation_cache
from layerscope_jax.support.compile_cache import counted

use_compilation_cache()
with counted() as programs:
    jax.jit(lambda x: 2 * x)(3.0).block_until_ready()
print(programs.programs - programs.cached)
"""


def test_programs_that_were_cut_off_are_compiled_anew_and_kept(tmp_path):
    """A full disk, or whoever was killed, leaves such: JAX warns in every process, and never mends it."""
    assert int(python(SMALL, XDG_CACHE_HOME=str(tmp_path))) > 0
    programs = sorted(tmp_path.rglob("*-cache"))
    for number, program in enumerate(programs):
        program.write_bytes(program.read_bytes()[: program.stat().st_size // 2 * (number % 2)])
    assert int(python(SMALL, XDG_CACHE_HOME=str(tmp_path))) > 0
    assert sorted(tmp_path.rglob("*-cache")) == programs
    assert all(compilations.is_whole(program.read_bytes()) for program in programs)


@pytest.fixture
def settings():
    """JAX's settings as a fresh process has them; afterwards they are the tests' again."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_compilation_cache_max_size",
    )
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: [jax.config.values[name] for name in names[1:3]]
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_folder_is_made_for_this_user_alone(settings, tmp_path):
    folder = tmp_path / "new" / "cache"
    assert use_compilation_cache(folder) == str(folder)
    assert settings() == [str(folder), 0.0]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert use_compilation_cache() == use_compilation_cache(folder) == str(folder)


def test_what_an_application_has_set_stays(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/theirs")
    before = settings()
    assert use_compilation_cache() == "gs://bucket/theirs"
    with pytest.raises(ValueError, match=r"keeps a cache already, gs://bucket/theirs, got .*ours"):
        use_compilation_cache(tmp_path / "ours")
    assert settings() == before
    assert not any(tmp_path.iterdir())


def test_caches_that_are_switched_off_stay_off(settings, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert use_compilation_cache(tmp_path / "cache") is None
    assert settings()[0] is None


def test_a_folder_that_cannot_be_had_is_refused_and_nothing_set(settings, tmp_path):
    (tmp_path / "file").write_text("")
    before = settings()
    with pytest.raises(OSError, match="file"):
        use_compilation_cache(tmp_path / "file" / "cache")
    assert settings() == before


def program(folder, name, size, used):
    """A file of JAX's, so many bytes large, used at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-cache"
    file.write_bytes(zlib.compress(b"")[:size].ljust(size, b"0"))
    os.utime(file, (used, used))
    return file


def test_what_was_used_longest_ago_makes_room(settings, tmp_path):
    old, newer, newest = (
        program(tmp_path, name, 1000, used) for name, used in zip("bca", (1, 2, 3), strict=True)
    )
    (tmp_path / "notes.txt").write_text("not JAX's")
    use_compilation_cache(tmp_path, max_size="2KB")
    assert not old.exists()
    assert newer.exists()
    assert newest.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache(tmp_path, max_size=0)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", compilations.CHECKED}


def test_programs_of_other_kinds_of_cpu_count_too(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(compilations, "default_folder", lambda: tmp_path / "this")
    ours, gone, left = (
        program(tmp_path / kind, "a", 1000, used) for kind, used in (("this", 1), ("other", 2), ("third", 3))
    )
    os.utime(ours, (9, 9))
    kernels = tmp_path / "kernels-0" / "f.kernel"
    kernels.parent.mkdir()
    kernels.write_bytes(b"ours")
    use_compilation_cache(max_size=2000)
    assert ours.exists()
    assert left.exists()
    assert kernels.exists()
    assert not gone.parent.exists()


def test_a_bound_of_jax_own_stays(settings, tmp_path):
    old = program(tmp_path, "a", 1000, 1)
    jax.config.update("jax_compilation_cache_max_size", 10)
    use_compilation_cache(tmp_path, max_size=0)
    assert old.exists()


def test_only_what_is_new_is_looked_at(settings, tmp_path):
    whole, cut = program(tmp_path, "a", 100, 1), tmp_path / "b-cache"
    compilations.discard_damaged(tmp_path)
    assert whole.exists()
    cut.write_bytes(zlib.compress(os.urandom(1000))[:500])
    compilations.discard_damaged(tmp_path)
    assert not cut.exists()
    cut.write_bytes(b"")
    os.utime(cut, (1, 1))
    compilations.discard_damaged(tmp_path)
    assert cut.exists()


def test_what_is_no_size_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="max_size must be a size such as"):
        use_compilation_cache(tmp_path / "cache", max_size="much")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="folders of other systems")
def test_the_default_folder_is_of_a_user_and_a_kind_of_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, its specification says
    ours = compilations.default_folder()
    assert ours.parent == tmp_path / ".cache" / "layerscope_jax"
    monkeypatch.setattr(machine, "cpu_features", lambda: "fewer")
    assert compilations.default_folder().parent == ours.parent
    assert compilations.default_folder() != ours


def test_the_command_line_keeps_a_cache_where_it_can(settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compilations, "default_folder", lambda: tmp_path / "cache")
    assert cli.main(["generate", str(tmp_path / "absent"), "--prompt=x"]) == 2
    assert settings() == [str(tmp_path / "cache"), 0.0]
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compilations, "default_folder", lambda: tmp_path / "file" / "cache")
    assert cli.main(["generate", str(tmp_path / "absent"), "--prompt=x"]) == 2
    assert settings()[0] is None
    assert "cache" not in capsys.readouterr().err
