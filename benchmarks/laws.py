"""Time and memory of all laws for the shapes of a 70B model, each run in a fresh process.

    OMP_NUM_THREADS=1 python benchmarks/laws.py [--runs 20]

Target: at most 1 s and 200 MB for ranks 8 and 64. The table gives the median and the range from
the 5th to the 95th percentile; "laws" leaves out the imports, "process" holds everything.
"""

import argparse
import json
import statistics
import subprocess
import sys

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
start = time.perf_counter(), time.process_time()
from lora_privacy.noise import laws_table, model_shapes
from lora_privacy.noise import gaussianity, joint
ready = time.perf_counter(), time.process_time()
shapes = model_shapes({LLAMA_70B!r})
rows = [row for rank in (8, 64) for row in laws_table(shapes, rank)]
end = time.perf_counter(), time.process_time()
assert len(rows) == 8 and "torch" not in sys.modules
print(json.dumps({{
    "laws, wall": end[0] - ready[0],
    "laws, CPU": end[1] - ready[1],
    "imports, CPU": ready[1] - start[1],
    "process, wall": end[0] - start[0],
    "process, CPU": end[1],
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform ==
        "darwin" else 1 << 10),
}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    results = []
    for _ in range(runs + 1):  # the first run fills the file cache and is not counted
        out = subprocess.run(
            [sys.executable, "-c", CHILD], check=True, capture_output=True, text=True
        )
        results.append(json.loads(out.stdout))
    print("| quantity | median | 5 % to 95 % | target |\n|---|---|---|---|")
    for name in results[0]:
        values = sorted(result[name] for result in results[1:])
        low, high = values[round(0.05 * (runs - 1))], values[round(0.95 * (runs - 1))]
        unit = "MB" if name == "memory" else "s"
        target = {"memory": "≤ 200 MB", "process, CPU": "≤ 1 s"}.get(name, "")
        middle = statistics.median(values)
        print(f"| {name} | {middle:.3g} {unit} | {low:.3g} to {high:.3g} {unit} | {target} |")


if __name__ == "__main__":
    main()
