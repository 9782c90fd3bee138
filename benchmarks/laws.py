"""Time and memory of all laws for the shapes of a 70B model, each run in a fresh process.

    OMP_NUM_THREADS=1 python benchmarks/laws.py [--runs 20]

Target: at most 1 s and 200 MB for ranks 8 and 64. Times are of the CPU.
"""

import argparse
import json
import subprocess
import sys

import numpy as np

from _measure import median
from _results import Results

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
}
CHILD = f"""
import json, resource, sys, time
start = time.process_time()
from lora_privacy.noise import laws_table, model_shapes
from lora_privacy.noise import gaussianity, joint
ready = time.process_time()
shapes = model_shapes({LLAMA_70B!r})
rows = [row for rank in (8, 64) for row in laws_table(shapes, rank)]
end = time.process_time()
assert len(rows) == 8 and "torch" not in sys.modules
print(json.dumps({{
    "the laws": end - ready,
    "the imports": ready - start,
    "the whole process with its imports": end,
    "memory of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1 << 20 if sys.platform == "darwin" else 1 << 10),
}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    found: list[dict[str, float]] = []
    for _ in range(runs + 1):  # the first run fills the file cache and is not counted
        out = subprocess.run(
            [sys.executable, "-c", CHILD], check=True, capture_output=True, text=True
        )
        found.append(json.loads(out.stdout))
    results = Results("laws")
    part = "all laws for the shapes of Llama 3 70B, ranks 8 and 64"
    for name in found[0]:
        values = np.array([one[name] for one in found[1:]])
        results.add(part, name, median(values), unit="MB" if "memory" in name else "s")
    results.save()


if __name__ == "__main__":
    main()
