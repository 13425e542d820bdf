# shellcheck shell=bash disable=SC2154
# What tpu.sh and gpu.sh share: the command line, the plan, and the verbs that need no cloud. Of them it
# wants
#   usage                  prints what the script does
#   option ARG             takes an option of its own, or returns 1
#   check                  refuses what does not fit together
#   account                refuses to begin where nobody is logged in
#   on_hosts COMMAND       runs a shell command on every host; its status is not 0 where one's is not
#   on_host I COMMAND      the same on one, with stdin
#   copy FILE              copies a file into every host's home folder
#   look                   sets machine (ready, waiting, gone or unknown), detail, and hosts, their number
#   create, remove         the machine
#   plan                   prints a line for each thing that will be used
#   farewell               prints how to be rid of the machine
# and the variables self, verbs, extra (see setup in host.sh) and creates (1: the machine is ours to
# make). Written for bash 3.2, which macOS has.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
mounts=${SYNC_JAX_MOUNTS:-/mnt/sync_jax} # where hosts mount buckets, each below by its name
interval=${SYNC_JAX_POLL:-60}            # seconds between looks
patience=${SYNC_JAX_PATIENCE:-10}        # looks in a row that may fail, or find workers at odds

dry=0 yes=0 follow=0 workdir='' config='' grace=120 preemptions=100 failures=3
trainer=() names=() buckets=()
hosts=1

die() { # STATUS MESSAGE
  echo "$self: $2" >&2
  exit "$1"
}

quote() { # words, as a line that any shell reads back as the same words
  local word prefix line='' inner="'\\''"
  for word; do
    prefix=''
    case $word in
      --[a-z]*=*)
        prefix=${word%%=*}=
        case $prefix in *[!a-z_.=-]*) prefix='' ;; *) word=${word#*=} ;; esac
        ;;
    esac
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word=\'${word//\'/$inner}\' ;;
    esac
    line="$line $prefix$word"
  done
  printf '%s' "${line# }"
}

do_() { # runs a command, or prints it
  if [ $dry = 1 ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

note() { # what a dry run cannot show as a command
  if [ $dry = 1 ]; then echo "# $*"; fi
}

comment() { if [ $dry = 1 ]; then sed 's/^/# /'; else cat; fi; } # a dry run prints a script

say() { echo "$self: $*" >&2; }

# gs://bucket/path as the hosts see it, in $place. The trainer needs a file system for its workdir
# and data: locks, renames, appended lines.
translate() {
  local bucket known
  case $1 in
    gs://*) ;;
    *)
      place=$1
      return
      ;;
  esac
  place=${1#gs://}
  place=${place%/}
  bucket=${place%%/*}
  case $bucket in
    '' | *[!a-z0-9._-]*) die 2 "$1 names no bucket; say gs://BUCKET/PATH" ;;
  esac
  place=$mounts/$place
  for known in ${buckets[@]+"${buckets[@]}"}; do
    if [ "$known" = "$bucket:$mounts/$bucket" ]; then return; fi
  done
  buckets+=("$bucket:$mounts/$bucket")
}

parse() {
  local argument place
  verb=${1:-help}
  [ $# = 0 ] || shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    argument=$1
    shift
    case $argument in
      --workdir=?*) workdir=${argument#*=} ;;
      --config=?*) config=${argument#*=} ;;
      --env=?*) names+=("${argument#*=}") ;;
      --grace=?*) grace=${argument#*=} ;;
      --preemptions=?*) preemptions=${argument#*=} ;;
      --failures=?*) failures=${argument#*=} ;;
      --follow) follow=1 ;;
      --dry-run) dry=1 ;;
      --yes) yes=1 ;;
      --help) verb=help ;;
      --config.*) die 2 "$argument belongs after a --" ;;
      *) option "$argument" || die 2 "$argument is no option; options are --NAME=VALUE, see $self help" ;;
    esac
  done
  case " $verbs help " in
    *" $verb "*) ;;
    *) die 2 "$verb is no verb; choose from $verbs" ;;
  esac
  if [ "$verb" = help ]; then
    usage
    exit 0
  fi
  for argument in "$grace" "$preemptions" "$failures"; do
    case $argument in *[!0-9]*) die 2 "$argument is no number" ;; esac
  done
  for argument in ${names[@]+"${names[@]}"}; do
    case $argument in
      [!A-Za-z_]* | *[!A-Za-z0-9_]*) die 2 "--env=NAME takes the name of a variable, not its value" ;;
    esac
    [ -n "${!argument+set}" ] || die 2 "--env=$argument: there is no such variable here"
    case ${!argument} in *$'\n'*) die 2 "--env=$argument: its value has more than one line" ;; esac
  done
  if [ $# -gt 0 ]; then shift; fi # the --
  case $verb in
    run | supervise)
      [ -n "$config" ] || die 2 "--config is missing; for example --config=configs/quickstart.py"
      # Else the trainer would say so, on a machine that is paid for.
      [ -f "$repo/${config%%:*}" ] || die 2 "--config=$config is no file of this checkout, which is what push copies"
      [ -n "$workdir" ] || die 2 "--workdir is missing: where the run saves and resumes, such as gs://BUCKET/PATH"
      ;;
  esac
  if [ -n "$config" ]; then trainer+=("--config=$config"); fi
  if [ -n "$workdir" ]; then
    translate "$workdir"
    trainer+=("--workdir=$place")
    folder=$place
  else
    folder=''
  fi
  for argument; do
    case $argument in
      --workdir=* | --config=*) die 2 "$argument belongs before the --" ;;
      --*=gs://*)
        translate "${argument#*=}"
        argument=${argument%%=*}=$place
        ;;
      -*) ;;
      *) die 2 "$argument after -- is no option of sync_jax.main" ;;
    esac
    trainer+=("$argument")
  done
  check
}

show_plan() {
  local bucket
  plan
  if [ -n "$config" ]; then
    echo "  runs      python -m sync_jax.main $(quote ${trainer[@]+"${trainer[@]}"})"
  fi
  for bucket in ${buckets[@]+"${buckets[@]}"}; do
    echo "  mounts    gs://${bucket%%:*} at ${bucket#*:}, on every host"
  done
  if [ "$verb" = supervise ]; then
    echo "  goes on   after at most $preemptions preemptions and $failures failures, and 3 restarts without progress"
  fi
}

confirm() { # QUESTION
  local answer=''
  if [ $yes = 1 ]; then return; fi
  if [ $dry = 1 ]; then
    note "asks: $1?"
    return
  fi
  printf '%s? [y/N] ' "$1" >&2
  read -r answer || echo >&2
  case $answer in
    y | Y | yes) ;;
    *) die 1 "nothing was done" ;;
  esac
}

host() { # a command line for host.sh
  quote bash sync_jax/launch/host.sh "$@"
}

push() (
  note "packs what git tracks or does not ignore into sync_jax.tar.gz"
  if [ $dry = 0 ]; then
    packed=$(mktemp -d)
    trap 'rm -rf "$packed"' EXIT
    cd "$repo" || exit 1
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do # what git knows may be deleted here
        if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
      done >"$packed/files" || die 1 "$repo is no git checkout"
    # Without macOS's own attributes; it would store them as files.
    COPYFILE_DISABLE=1 tar -czf "$packed/sync_jax.tar.gz" --null -T "$packed/files" || exit 1
    cd "$packed" || exit 1
  fi
  copy sync_jax.tar.gz && on_hosts 'tar -xzOf sync_jax.tar.gz launch/host.sh | bash -s unpack'
)

send_env() { # through stdin: a command line can be read by all on the machine, and stands in logs
  local variable i=0
  [ ${#names[@]} -gt 0 ] || return 0
  note "${names[*]}: the values go through stdin, to each worker"
  if [ $dry = 1 ]; then
    on_host 0 "$(host env)"
    return
  fi
  while [ $i -lt "$hosts" ]; do
    for variable in "${names[@]}"; do
      printf '%s=%s\n' "$variable" "${!variable}"
    done | on_host $i "$(host env)" || return 1
    i=$((i + 1))
  done
}

setup() {
  push && on_hosts "$(host setup "$extra" ${buckets[@]+"${buckets[@]}"})"
}

start() {
  send_env && on_hosts "$(host run ${buckets[@]+"${buckets[@]}"} -- "${trainer[@]}")"
}

status_command() {
  # New machines have no host.sh yet.
  printf 'if [ -f sync_jax/launch/host.sh ]; then %s; else echo worker=0 state=new exit=- step=0; fi' \
    "$(host status ${folder:+"$folder"})"
}

# How the run stands, over all workers, in $run: new, running, other, done, saved, failed, mixed
# (some have ended, others not) or unknown; in $why the reason, in $step the last checkpoint's.
survey() {
  local word value worker state exit count=0 running=0 finished=0 saved=0 new=0 other=0 broken=''
  run=unknown why='' step=0 code=1
  if ! lines=$(on_hosts "$(status_command)" 2>"$chatter"); then
    why=$(grep -v '^$' "$chatter" | tail -n 1)
    return 0
  fi
  lines=$(grep '^worker=' <<<"$lines" | sort -t= -k2n || true)
  while read -r line; do
    worker='' state='' exit=''
    for word in $line; do
      value=${word#*=}
      case $word in
        worker=*) worker=$value ;;
        state=*) state=$value ;;
        exit=*) exit=$value ;;
        step=*) if [ "$value" -gt "$step" ]; then step=$value; fi ;;
      esac
    done
    count=$((count + 1))
    case $state:$exit in
      running:*) running=$((running + 1)) ;;
      other:*) other=$((other + 1)) ;;
      exited:0) finished=$((finished + 1)) ;;
      exited:75) saved=$((saved + 1)) ;;
      exited:*)
        broken="$broken, worker $worker ended with exit status $exit"
        if [ "$exit" = 2 ]; then code=2; fi
        ;;
      lost:*) broken="$broken, worker $worker lost its run" ;;
      *) new=$((new + 1)) ;;
    esac
  done <<<"$lines"
  if [ $count -lt "$hosts" ]; then
    why="$count of $hosts workers answered"
  elif [ $other -gt 0 ]; then
    run=other
  elif [ -n "$broken" ]; then
    run=failed why=${broken#, }
  elif [ $running -eq $count ]; then
    run=running
  elif [ $finished -eq $count ]; then
    run='done'
  elif [ $((finished + saved)) -eq $count ]; then
    run=saved
  elif [ $new -eq $count ]; then
    run=new
  else
    run=mixed why="$running of $count workers still run"
  fi
}

show_status() {
  if [ $dry = 1 ]; then
    look
    on_hosts "$(status_command)"
    return
  fi
  look
  echo "machine $machine${detail:+ ($detail)}"
  if [ "$machine" != ready ]; then exit 1; fi
  survey
  if [ -n "$lines" ]; then echo "$lines"; fi
  echo "run $run${why:+: $why}"
  case $run in
    running | done | mixed) exit 0 ;;
    saved) exit 75 ;;
    *) exit 1 ;;
  esac
}

show_logs() {
  local follows=()
  if [ $follow = 1 ]; then follows=(follow); fi
  on_hosts "$(host logs 100 ${follows[@]+"${follows[@]}"})"
}

stop() { on_hosts "$(host stop "$grace")"; }

# From nothing to a finished run, over preemptions and failures. preempted and failed count against
# their budgets, stale the restarts since the last checkpoint moved, missed the looks that failed and
# odd those that found workers at odds, both in a row. owned: the machine is of our making; fresh: it
# is to be set up; started: the run that is going on there was begun, or found, by us.
supervise() {
  owned=0 fresh=1 started=0 preempted=0 failed=0 best=-1 stale=0 missed=0 odd=0
  trap 'leave 1 "no longer watched: what runs goes on, and the same command watches it again"' INT TERM
  while :; do
    look
    case $machine in
      gone)
        if [ $owned = 1 ]; then spend_preemption "the machine is ${detail:-no longer there}"; fi
        owned=0 fresh=1 started=0
        if [ -n "$detail" ] && ! remove; then
          miss "it cannot be deleted"
        elif create; then
          owned=1 missed=0
        else
          miss "none can be created"
        fi
        ;;
      waiting) owned=1 missed=0 ;;
      unknown) miss "$detail" ;;
      ready)
        owned=1
        survey
        judge
        ;;
    esac
    sleep "$interval"
  done
}

judge() { # what to do about the run, on a machine that is there
  [ "$run" = mixed ] || odd=0
  case $run in
    unknown) miss "$why" ;;
    running)
      if [ "$started" = 0 ]; then say "found running at step $step"; fi
      fresh=0 started=1 missed=0
      ;;
    other) leave 1 "another run is going on there: watch that, or stop it" ;;
    mixed)
      odd=$((odd + 1))
      if [ $odd -ge "$patience" ]; then
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
    new) spend_preemption "the machine has forgotten its run" ;;
    failed)
      failed=$((failed + 1))
      say "$why: failure $failed"
      stop # the other workers would wait for this one for ever
      if [ "$code" = 2 ]; then leave 2 "the config or its input is at fault: see the logs"; fi
      if [ $failed -gt "$failures" ]; then leave 1 "that is more than $failures: see the logs"; fi
      ;;
  esac
}

launch() {
  if [ "$fresh" = 1 ]; then
    setup || {
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
  if ! start; then
    stop
    miss "the run cannot be started on every worker"
    return
  fi
  started=1
  if [ $((preempted + failed)) -gt 0 ]; then stale=$((stale + 1)); fi
  say "started at step $step"
}

spend_preemption() {
  preempted=$((preempted + 1))
  say "$1: preemption $preempted"
  if [ $preempted -gt "$preemptions" ]; then
    leave 75 "that is more than $preemptions; the same command goes on from the last checkpoint"
  fi
}

miss() {
  missed=$((missed + 1))
  say "$1 ($missed in a row)"
  if [ $missed -ge "$patience" ]; then leave 1 "given up; what runs there goes on"; fi
}

leave() { # STATUS MESSAGE
  say "$2"
  farewell
  exit "$1"
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

main() {
  chatter=$(mktemp) # what commands say on stderr, shown where they fail
  trap 'rm -f "$chatter"' EXIT
  parse "$@"
  if [ $dry = 0 ]; then account; fi
  case $verb in
    create | delete | run | supervise)
      show_plan | comment
      ;;
  esac
  case $verb in
    create) create_and_wait ;;
    setup) setup ;;
    push) push ;;
    run) look_for_hosts && { start || die 1 "not started on every worker; stop ends it on the others"; } ;;
    logs) show_logs ;;
    status) show_status ;;
    stop) stop ;;
    unlock) on_hosts "$(host unlock)" ;;
    supervise)
      if [ "$creates" = 1 ]; then confirm "Create what is not there"; else confirm "Set it up and start"; fi
      if [ $dry = 1 ]; then supervise_dry; else supervise; fi
      ;;
    delete) delete ;;
  esac || exit 1
}
