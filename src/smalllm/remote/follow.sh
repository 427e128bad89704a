#!/bin/sh
# What a run says, from byte OFFSET of its log on, until it ends. Each second one line tells what comes:
#   +N     N bytes of the log       .      nothing new (who does not listen any more is noticed by this)
#   =CODE  the run has ended        ?      the session is gone and left no exit code
# BORN tells the log from an earlier one of the same name: then it begins at 0.
# usage: sh follow.sh DIR NAME OFFSET BORN
state=.deploy/$2 offset=$3
session=smalllm-$(printf %s "$2" | tr . +)
cd "$1" 2>/dev/null && [ -f "$state/log" ] || exit 3
born=$(cat "$state/born")
[ "$born" = "$4" ] || offset=0
echo "smalllm-follow $offset $born"
while :; do # what is read later is at least as new: an exit code is written when the log is whole
  alive=$(tmux has-session -t "=$session" 2>/dev/null && echo yes)
  code=$(cat "$state/exit" 2>/dev/null)
  size=$(($(wc -c <"$state/log")))
  if [ "$size" -gt "$offset" ]; then
    echo "+$((size - offset))"
    tail -c "+$((offset + 1))" "$state/log" | head -c "$((size - offset))"
    offset=$size
  elif [ -n "$code" ]; then
    echo "=$code"
    exit
  elif [ -z "$alive" ]; then
    echo "?"
    exit
  else
    echo .
  fi
  sleep 1
done
