"""`--host-budget`: the same texts with experts on the disk, and what is said of it."""

from io import StringIO

import pytest
from rich.console import Console

import layerscope_jax
from layerscope_jax.cli import demo, demo_view
from layerscope_jax.cli import main as cli

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_generate_reads_experts_from_the_disk(tiny, capsys):
    command = ["generate", str(tiny), "--prompt=The sea", "--max-new-tokens=4"]
    assert cli.main(command) == 0
    expected = capsys.readouterr().out
    size = layerscope_jax.load(tiny, experts="disk").bank.expert_bytes
    assert cli.main([*command, f"--host-budget={5 * size}"]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert "experts from the disk: " in err
    assert cli.main([*command, "--host-budget=10"]) == 2
    assert f"host_budget must hold one expert of {size:,} bytes, got 10" in capsys.readouterr().err


def test_the_demo_has_columns_for_the_disk(tiny):
    model = layerscope_jax.load(tiny)
    report = demo.compare(
        model,
        demo.read_demo_prompts()[:1],
        policies=["host-only"],
        max_new_tokens=2,
        budget_share=0.6,
        emulated_link_bandwidth=None,
        host_budget=str(5 * model.bank.expert_bytes),
    )
    assert report["exact"]
    resident, disk = report["runs"]
    assert (resident["bytes_read"], resident["host_hit_rate"]) == (0, None)
    assert disk["bytes_read"] > 0
    shown = StringIO()
    demo_view.show(report, Console(file=shown, width=110))
    assert "disk" in shown.getvalue()
