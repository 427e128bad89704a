#!/bin/sh
# Make the environment of the code in DIR with uv, which is installed where it is missing, and see that it works.
# usage: sh setup.sh DIR PYTHON GPUS     (PYTHON: an environment that exists; - to make DIR/.venv)
set -eu
exec 2>&1
cd "$1"
python=$2
PATH=$HOME/.local/bin:$HOME/.cargo/bin:$PATH
get() { curl -LsSf "$1" || wget -qO- "$1"; }
pip_install() { python3 -m pip install --quiet --user "$@" </dev/null 2>/dev/null; }
if [ "$python" = - ]; then
  # A system's own Python may refuse --user (PEP 668), which protects packages; uv is one program in ~/.local/bin.
  command -v uv >/dev/null || pip_install uv || pip_install --break-system-packages uv ||
    get https://astral.sh/uv/install.sh | sh
  uv sync --no-dev --inexact </dev/null # what was added by hand, as for tracking, stays
  python=.venv/bin/python
fi
count='
import sys
try:
    import smalllm.cli, torch
except ImportError as error:
    sys.exit(f"{error}; {sys.executable} must have the packages of smalllm")
print(torch.cuda.device_count())'
gpus=$(PYTHONPATH=src "$python" -c "$count" </dev/null)
if [ "$gpus" -lt "$3" ]; then
  echo "torch sees $gpus of the $3 GPUs: the driver is probably older than the CUDA of this torch; take a machine with a newer driver"
  exit 1
fi
