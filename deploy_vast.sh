#!/usr/bin/env bash
# Train on the machine that this runs on, freshly rented at Vast.ai or anywhere else with CUDA:
#
#   bash deploy_vast.sh [--from REPOSITORY] [--cpu] [--python PATH] [RECIPE [section.key=value ...]]
#
# Installs what is missing (git, tmux, uv), gets the code, makes its environment, checks GPU and disk, and starts the run in
# tmux, where it goes on without you. The same command again goes on with the run, or says that it trains.
#
#   --from REPOSITORY   an address that git can clone, into ./smalllm; left out, the folder of this script is the code
#   --cpu               train without a GPU
#   --python PATH       of an environment that has the packages, in place of one that uv makes
#
# RECIPE is quickstart if left out. At home `smalllm deploy` does all of this and more over ssh (DEPLOYMENT.md).
set -euo pipefail

least_gib=10 # the environment, 6 GiB, and a run
repository='' gpus=1 python=-

fail() {
  echo "error: $*" >&2
  exit 1
}

while [ $# -gt 0 ]; do
  case $1 in
  --from | --python)
    [ $# -ge 2 ] || fail "$1 wants a value"
    if [ "$1" = --from ]; then repository=$2; else python=$2; fi
    shift 2
    ;;
  --cpu)
    gpus=0
    shift
    ;;
  -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit
    ;;
  -*) fail "there is no option $1; see: bash deploy_vast.sh --help" ;;
  *) break ;;
  esac
done
[ $# -gt 0 ] || set -- quickstart
case $1 in *=*) set -- quickstart "$@" ;; esac

# Programs of the system, by apt-get, as root or through sudo.
missing=()
for tool in tmux ${repository:+git}; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
command -v curl >/dev/null || command -v wget >/dev/null || missing+=(curl)
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || fail "install these first: ${missing[*]}"
  as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "install these first, as root: apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
fi

# The code.
if [ -n "$repository" ]; then
  [ -e smalllm/pyproject.toml ] || git clone --quiet -- "$repository" smalllm
  cd smalllm
else
  cd "$(dirname "$0")"
fi
[ -e src/smalllm/remote/launch.sh ] || fail "$PWD is no checkout of smalllm; give its address: bash deploy_vast.sh --from REPOSITORY"

# The machine.
if [ "$gpus" = 1 ]; then
  nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null ||
    fail "nvidia-smi shows no GPU here; rent a machine with one, or give --cpu to train without"
fi
free_gib=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
if [ "$python" = - ] && [ ! -d .venv ] && [ "$free_gib" -lt "$least_gib" ]; then
  fail "the disk of $PWD has $free_gib GiB free and $least_gib are needed; rent a larger one"
fi

# Its environment, the name of the run, and off it goes.
sh src/smalllm/remote/setup.sh . "$python" "$gpus"
if [ "$python" = - ]; then interpreter=.venv/bin/python; else interpreter=$python; fi
name=$(PYTHONPATH=src "$interpreter" - "$@" <<'PYTHON'
import sys

from smalllm.config import UserError, load_recipe

try:
    print(load_recipe(sys.argv[1], sys.argv[2:]).name)
except UserError as error:
    sys.exit(f"error: {error}")
PYTHON
)
read -r state session <<<"$(sh src/smalllm/remote/launch.sh . "$name" "$python" "$@")"
echo "$state: the run $name, in the tmux session $session"
echo "look:  tail -n +1 -f $PWD/.deploy/$name/log"
echo "enter: tmux attach -t $session     (leave with Ctrl-B D; Ctrl-C stops the run, saved)"
echo "at home: smalllm deploy $* --host USER@HOST --port PORT --dir $PWD --follow     (--fetch, --stop)"
