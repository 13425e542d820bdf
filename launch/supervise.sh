# shellcheck shell=bash disable=SC2034,SC2154
# Of tpu.sh and gpu.sh: how long anything is waited for, and supervise. The verbs are lib.sh's.

# From nothing to a finished run, over preemptions and failures. preempted and failed count against
# their budgets, stale the restarts since the last checkpoint moved; missed the looks that failed, odd
# those that found workers at odds, unlisted those that did not find what should be there, all in a row.
# owned: the machine is of our making; served: it was there; fresh: it is to be set up; started: the run
# there was begun, or found, by us; begun: so was any.
supervise() {
  owned=0 served=0 fresh=1 started=0 begun=0 preempted=0 failed=0 best=-1 stale=0 missed=0 between=0
  odd=0 unlisted=0 busy_since=-1
  owed=1
  trap 'leave 1 "no longer watched: what runs goes on, and the same command watches it again"' INT TERM HUP
  while :; do
    look
    case $machine in
      gone | refused | expired)
        if listed_later; then
          pause
          continue
        fi
        if [ $owned = 1 ] || [ "$machine" = expired ]; then spend_machine; fi
        owned=0 served=0 fresh=1 started=0 between=0
        if [ -n "$detail" ] && ! remove; then
          miss "it cannot be deleted"
        elif create; then
          owned=1 missed=0 unlisted=0
        else
          miss "none can be created"
        fi
        ;;
      waiting | between | unknown)
        case $machine:$detail in
          # What we delete may be listed until it is gone, also where the call to delete it has failed.
          unknown:* | between:DELETING*) ;;
          *) owned=1 ;;
        esac
        linger
        ;;
      ready)
        owned=1 served=1 between=0 unlisted=0
        survey
        judge
        ;;
    esac
    pause
  done
}

judge() { # what to do about the run, on a machine that is there
  case $run in mixed) ;; *) odd=0 ;; esac
  [ "$run" = busy ] || busy_since=-1
  case $run in
    unknown) miss "$why" ;;
    running)
      if [ "$started" = 0 ]; then say "found running at step $step"; fi
      fresh=0 started=1 begun=1 missed=0
      ;;
    other) leave 1 "${why:-another run is going on there: watch that, or stop it}" ;;
    busy) # by another who watches, or what a broken connection has left: as long as we give it ourselves
      if [ "$busy_since" -lt 0 ]; then busy_since=$SECONDS; fi
      if [ $((SECONDS - busy_since)) -ge "$long" ]; then
        say "$why"
        stop
        busy_since=-1
      fi
      ;;
    mixed)
      odd=$((odd + 1))
      if [ $odd -ge $((2 * patience)) ]; then # and stopping has not helped: one has lost all that it had
        spend_failure "$why"
        allow_failures "see the logs"
        odd=0 started=0 fresh=1
        launch
      elif [ $odd -ge "$patience" ]; then
        say "$why"
        stop
      fi
      ;;
    *)
      if [ "$started" = 1 ]; then
        ended
      elif [ "$run" = failed ]; then
        stop # it failed while nobody watched: the other workers may still wait, and hold their machines
      fi
      started=0
      launch
      ;;
  esac
}

ended() { # a run of ours; returns where it is to be started again
  case $run in
    done) leave 0 "done; the results are in $workdir" ;;
    saved) spend_preemption "stopped by SIGTERM and saved at step $step" ;;
    new)
      fresh=1 # and perhaps what was set up
      spend_preemption "the machine has forgotten its run"
      ;;
    failed)
      spend_failure "$why"
      stop # the other workers would wait for this one for ever
      if [ "$code" = 2 ]; then leave 2 "the config or its input is at fault: see the logs"; fi
      allow_failures "see the logs"
      ;;
  esac
}

launch() {
  local status=0
  if [ "$fresh" = 1 ]; then
    setup || status=$?
    [ $status = 0 ] || {
      if [ $status = 137 ]; then
        survey
        # What hangs there would refuse every other; but another who watches may have come further.
        case $run in running | other) ;; *) stop ;; esac
      fi
      miss "the machine cannot be set up"
      return
    }
    survey # the workdir can be seen from there only now
    [ "$run" != unknown ] || {
      miss "$why"
      return
    }
  fi
  if [ "$step" -gt "$best" ]; then
    best=$step stale=0
  elif [ "$stale" -ge 3 ]; then
    leave 1 "three restarts without progress, still at step $step: see the logs"
  fi
  fresh=0
  start || {
    status=$?
    survey
    case $run in
      running) ;; # begun by another who watches, or before the connection broke
      # The call did not come through, or another sets it up or is about to start it: nothing of ours is
      # there to be stopped.
      unknown | busy | new | saved | 'done')
        miss "${why:-the run cannot be started on every worker}"
        return
        ;;
      other) leave 1 "${why:-another run is going on there: watch that, or stop it}" ;;
      *)
        stop
        # By its own refusal, and not by what an earlier run has left there.
        if [ "$status:$run:$code" = 2:failed:2 ]; then leave 2 "the config or its input is at fault: $why; see the logs"; fi
        miss "the run cannot be started on every worker"
        return
        ;;
    esac
  }
  if [ "$begun" = 1 ]; then stale=$((stale + 1)); fi
  started=1 begun=1
  say "started at step $step"
}

spend_preemption() {
  preempted=$((preempted + 1))
  say "$1: preemption $preempted"
  if [ $preempted -gt "$preemptions" ]; then
    leave 75 "that is more than $preemptions; the same command goes on from the last checkpoint"
  fi
}

spend_failure() {
  failed=$((failed + 1))
  say "$1: failure $failed"
}

allow_failures() { # WHAT TO DO
  [ "$failed" -le "$failures" ] || leave 1 "that is more than $failures: $1"
}

# What was just created need not be in the lists yet, and an active request's machine may be missing from
# them for a moment: not to be deleted for that.
listed_later() {
  case $owned:$served:$detail in
    1:0: | *:LOST) ;;
    *) return 1 ;;
  esac
  unlisted=$((unlisted + 1))
  [ $unlisted -lt "$patience" ] || return 1
  say "not in the lists: ${detail:+the machine of }the request ($unlisted in a row)"
}

spend_machine() { # ours, and no longer there
  case $served:$machine in
    0:refused)
      spend_failure "the request was not served: $detail"
      allow_failures "another type or zone may have room"
      ;;
    0:expired)
      remove || say "the request cannot be deleted"
      leave 1 "the request was not served within $valid_until: $detail; the same command makes another"
      ;;
    *) spend_preemption "the machine is ${detail:-no longer there}" ;;
  esac
}

linger() { # a look that found no machine, but may yet
  case $machine in
    waiting) missed=0 between=0 ;; # for days, perhaps: --valid-until is the limit
    between)
      missed=0 between=$((between + 1))
      [ $between -lt "$patience" ] || leave 1 "still $detail after $between looks: given up"
      ;;
    *) miss "${detail:-the machine is not to be seen}" ;;
  esac
}

miss() {
  missed=$((missed + 1))
  say "$1 ($missed in a row)"
  if [ $missed -ge "$patience" ]; then leave 1 "given up; what runs there goes on"; fi
}

supervise_dry() { # one round
  if [ "$creates" = 1 ]; then
    note "creates the machine, unless it is there"
    look
    create
  fi
  note "sets it up"
  setup
  note "starts the run"
  start
  note "every $interval s: how the run stands on each worker, and the machine"
  look
  on_hosts "$(status_command)"
  note "one worker failed: the others are stopped, and all started again"
  stop
  if [ "$creates" = 1 ]; then
    note "preempted: this machine is deleted, and the next one created"
    remove
  fi
  note "at the end:"
  farewell | comment
}
