#!/usr/bin/env bash
# All set-up on a fresh machine:  bash run.sh quickstart  |  bash run.sh test
# Makes a virtual environment (VENV, default .venv) and installs the pinned requirements into it.
set -euo pipefail
cd "$(dirname "$0")"
venv=${VENV:-.venv}

setup() {
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
}

train_detect_ablate() { # CONFIG [--key=value ...]; goes on with a run that was stopped
  local out=out/$1
  local resume=
  [ -f "$out/ckpt.pt" ] && resume=--resume
  "$venv/bin/python" train.py "$@" $resume
  "$venv/bin/python" detect.py "$out/ckpt.pt"
  "$venv/bin/python" ablate.py "$out/ckpt.pt"
}

case "${1:-}" in
quickstart)
  setup
  echo "== 1 of 2: a pre-norm model on real text grows a spike on its first token"
  train_detect_ablate quickstart
  echo "== 2 of 2: the positive control, where a head that is often idle grows a sink"
  train_detect_ablate backcopy --max_iters=600
  echo
  echo "open in a browser: $PWD/out/quickstart/report.html (the spike)"
  echo "                   $PWD/out/backcopy/report.html (the sink)"
  ;;
test)
  setup
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/python" -m pytest -q
  ;;
*)
  echo "usage: bash run.sh quickstart | test" >&2
  exit 2
  ;;
esac
