#!/usr/bin/env bash
# All set-up on a fresh machine:  bash run.sh quickstart  |  bash run.sh test  |  bash run.sh slow  |  bash run.sh wheel
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
  "$venv/bin/mypy"
  "$venv/bin/python" -m pytest -q -n 2 --dist loadscope -m "not slow"
  ;;
slow) # the tests that take longest, of which tests/conftest.py has the list
  setup
  "$venv/bin/python" -m pytest -q -n 2 --dist loadscope -m slow
  ;;
wheel) # the package as a stranger installs it: in an environment of its own, used from an empty folder
  setup
  clone=$PWD
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  rm -rf build
  "$venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$scratch" .
  "$venv/bin/python" train.py prenorm scale/nano --dataset=stdlib --max_iters=4 --out_dir="$scratch/lab"
  "${PYTHON:-python3}" -m venv "$scratch/venv"
  "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c requirements.txt \
    "$(echo "$scratch"/spikesink-*.whl)[hf,pages]"
  mkdir "$scratch/empty"
  cd "$scratch/empty"
  PATH="$scratch/venv/bin:$PATH" python "$clone/tests/wheel.py" "$clone" "$scratch/lab/ckpt.pt"
  ;;
*)
  echo "usage: bash run.sh quickstart | test | slow | wheel" >&2
  exit 2
  ;;
esac
