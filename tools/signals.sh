# shellcheck shell=bash
# For `source` with the options of tools/train.py: sets `signals` to those that end it with a
# checkpoint and status 75, which are its own and those of --signals.
signals=(SIGTERM SIGUSR1)
option=
for word in "$@"; do
    case $word in -*) option=${word%%=*} word=${word#*=} ;; esac
    case $option:$word in --si*:SIG*) signals+=("$word") ;; esac
done
