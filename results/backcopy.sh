#!/usr/bin/env bash
# The time course of the positive control, three seeds: bash results/backcopy.sh > results/backcopy.md
# (about 15 minutes on 2 cores)
set -euo pipefail
cd "$(dirname "$0")/.."
echo "# Backcopy: a sink emerges in a one-layer, one-head model"
echo
echo "Made by \`bash results/backcopy.sh\` at commit $(git rev-parse --short HEAD), torch $(python -c 'import torch; print(torch.__version__)'), 2 CPU cores."
echo "100 validation sequences of BOS + 63 tokens, float32. Sink_1: share of sequences in which the first key's alpha is above 0.3."
echo
echo "| seed | step | loss | Sink_1 (0.3) | alpha_1 | value norm of BOS / mean | top-1 / median | entropy |"
echo "|---|---|---|---|---|---|---|---|"
for seed in 1 2 3; do
  out=out/backcopy-seed$seed
  resume=--overwrite
  for step in 50 100 200 400 800 1200 1600 2000; do
    python train.py backcopy --seed=$seed --out_dir=$out --max_iters=$step $resume >/dev/null
    python detect.py $out >/dev/null
    python - "$seed" "$out/detect.json" <<'PY'
import json, sys

found = json.load(open(sys.argv[2]))
sinks, last = found["sinks"], found["layers"][-1]
row = [sinks["gu"]["0.3"]["first"], sinks["alpha_first"][0][0], sinks["first_value_norm_ratio"][0][0]]
cells = [found["data"]["loss"], *row, last["top1"] / last["median"], sinks["entropy"][0][0]]
print("|", sys.argv[1], "|", found["checkpoint"]["step"], "|", " | ".join(f"{x:.3f}" for x in cells), "|")
PY
    resume=--resume
  done
done
