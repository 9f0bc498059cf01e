"""The command `layerscope doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console

from layerscope_jax.cli.options import Json
from layerscope_jax.profiling.checkup import checkup
from layerscope_jax.support import exits


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check devices, memory, kernels and copies of this machine, and say how to mend what is slow or broken.

    Takes some seconds, or a minute or two when kernels are compiled for the first time. Exits with 1 if
    something is broken.

    Examples:
        layerscope doctor
        layerscope doctor --json > doctor.json
    """

    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        findings = checkup()
        broken = any(finding.state == "broken" for finding in findings)
        if self.json:
            print(json.dumps({"healthy": not broken, "findings": [asdict(each) for each in findings]}))
        else:
            console = Console(highlight=False)
            for each in findings:
                console.print(f"{each.state:<7}{each.name:<20}{each.told}", soft_wrap=True)
                if each.mend is not None:
                    console.print(f"{'':<27}-> {each.mend}", soft_wrap=True)
        return exits.FAILED if broken else exits.DONE
