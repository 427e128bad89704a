#!/bin/sh
# End a run: it saves a checkpoint first. Says "stopped", "none" when it does not run, or "busy" after two minutes.
# usage: sh stop.sh DIR NAME
state=.deploy/$2
session=smalllm-$(printf %s "$2" | tr . +)
runs() { [ ! -e "$state/exit" ] && tmux has-session -t "=$session" 2>/dev/null; }
if ! cd "$1" 2>/dev/null || ! runs; then
  echo none
  exit
fi
kill -TERM "$(cat "$state/pid")" 2>/dev/null || tmux kill-session -t "=$session"
seconds=0
while runs; do
  if [ "$seconds" -ge 120 ]; then
    echo busy
    exit
  fi
  sleep 1
  seconds=$((seconds + 1))
done
echo stopped
