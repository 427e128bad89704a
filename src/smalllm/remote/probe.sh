#!/bin/sh
# What `smalllm deploy` must know of a machine, as lines of a key and a value. Changes nothing.
# usage: sh probe.sh DIR NAME PYTHON     (PYTHON: - for the one that the machine has)
PATH=$HOME/.local/bin:$HOME/.cargo/bin:$PATH
echo smalllm-probe
tell() { printf '%s %s\n' "$1" "$2"; }
[ "$3" = - ] && python=python3 || python=$3
tell python "$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)"
for tool in rsync tmux uv curl wget; do
  tell "$tool" "$(command -v "$tool")"
done
tell pip "$(python3 -m pip --version 2>/dev/null)"
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) || gpus= # it tells its troubles where names belong
tell gpus "$(echo "$gpus" | tr '\n' ',')"
folder=$1
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
tell free_kib "$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')"
[ -w "$folder" ] && tell writable yes
[ -d "$1/.venv" ] && tell environment yes
[ -f "$1/runs/$2/config.toml" ] && tell run yes
session=smalllm-$(printf %s "$2" | tr . +)
[ ! -e "$1/.deploy/$2/exit" ] && tmux has-session -t "=$session" 2>/dev/null && tell session "$session"
exit 0
