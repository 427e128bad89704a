#!/bin/sh
# Train, in the tmux session that launch.sh made: what is said goes to .deploy/NAME/log, and when all of it is there, the exit
# code to .deploy/NAME/exit. Signals are for the training, which saves a checkpoint; the rest waits for it.
# usage: sh run.sh NAME PYTHON WORDS...
state=.deploy/$1
python=$2
shift 2
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUTF8=1
trap : HUP INT TERM
{
  trap : HUP INT TERM
  # shellcheck disable=SC2016
  sh -c 'echo $$ >"$0"; exec "$@"' "$state/pid" "$python" -m smalllm train "$@" </dev/null
  echo $? >"$state/code"
} 2>&1 | (
  trap '' HUP INT TERM
  exec tee -a "$state/log"
)
mv "$state/code" "$state/exit"
