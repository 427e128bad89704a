#!/bin/sh
# Start `smalllm train WORDS` in a tmux session of its own, unless it runs already. Says "started" or "running", and the session.
# usage: sh launch.sh DIR NAME PYTHON WORDS...     (PYTHON: - for the one of DIR/.venv)
set -eu
cd "$1"
name=$2 python=$3
[ "$python" != - ] || python=.venv/bin/python
shift 3
session=smalllm-$(printf %s "$name" | tr . +) # tmux would take a dot for a pane
state=.deploy/$name
if [ -e "$state/exit" ]; then
  tmux kill-session -t "=$session" 2>/dev/null || true # has ended, and is kept only by an option of tmux
elif tmux has-session -t "=$session" 2>/dev/null; then
  there=$(tmux display-message -p -t "=$session:" '#{session_path}')
  if [ "$there" != "$(pwd -P)" ]; then
    echo "the tmux session $session is busy with a run of this name in $there; give name=ANOTHER" >&2
    exit 1
  fi
  echo "running $session"
  exit
fi
mkdir -p "$state"
rm -f "$state/exit" "$state/code" "$state/pid"
[ -f "$state/log" ] || date "+%s.$$" >"$state/born"
touch "$state/log"
tmux new-session -d -s "$session" -c "$(pwd -P)" sh src/smalllm/remote/run.sh "$name" "$python" "$@"
echo "started $session"
