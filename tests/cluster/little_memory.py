"""Run as a program with a folder that holds words.py and model: measures three lanes where there is plenty,
as if there were too little, and where the kernel gives no more. Prints what was found."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from orchestrator.cluster.preflight import memory_result
from orchestrator.cluster.preflight.memory_meter import HostMemoryMeter
from orchestrator.cluster.preflight.memory_probe import probe_memory
from orchestrator.finetune import resolve
from orchestrator.finetune.models import loading
from orchestrator.study.options import StudyOptions

LANES, PLENTY = 3, 2**40


class Harmless(HostMemoryMeter):
    """A limit of this process alone: too much may be tried."""

    raises_out_of_memory = True


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    options = StudyOptions(
        task=str(folder / "words.py"), model=str(folder / "model"), variants=("lora",), batch_size=2048
    )
    chosen = resolve.resolve_options(options, "", (), folder)
    content = resolve.resolve_base_model(chosen.model, folder, None)
    configurations = resolve.build_configuration_templates(options, chosen, content, folder)
    bench = loading.load_base_model(configurations[0].model, folder, "cpu", chosen.task)

    def measured(meter: HostMemoryMeter, limit: int) -> memory_result.MemoryMeasurement:
        return probe_memory(configurations, bench, LANES, meter, limit)[0]

    reckoned = measured(HostMemoryMeter(), 1)
    plenty = measured(HostMemoryMeter(), PLENTY)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**27, resource.RLIM_INFINITY))
    refused = measured(Harmless(), PLENTY)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found = {"reckoned": reckoned, "plenty": plenty, "refused": refused}
    lines = {name: memory_result.check_memory([one]).format_line() for name, one in found.items()}
    print(json.dumps({"found": {name: asdict(one) for name, one in found.items()}, "lines": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
