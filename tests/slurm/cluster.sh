#!/usr/bin/env bash
# cluster.sh - a real, disposable multi-node Slurm cluster on one machine, for tests.
#
#   cluster.sh up     DIR [-n NODES] [-g GPUS] [-c CPUS] [-p PORT] [-a munge|none] [--keep] [--no-ns] [--conf 'EXTRA LINES']
#   cluster.sh down   DIR            stop everything (idempotent)
#   cluster.sh status DIR            rc 0 = up, 1 = degraded, 3 = down
#   cluster.sh fail   DIR node2      SIGKILL a whole "machine": slurmd, stepds and all job processes on it
#   cluster.sh heal   DIR node2      boot that machine again
#   cluster.sh ctld   DIR stop|start stop or restart the controller (jobs keep running)
#   then:  . DIR/env.sh && sinfo && sbatch ...
#
# Every node is one slurmd in its own pid + uts + mount namespace: own hostname, own /proc, an /etc/hosts
# that resolves the other nodes to 127.0.0.11.. and itself to 127.0.0.1. Nothing is written outside DIR. slurmctld
# listens on 127.0.0.1 only, slurmd on every address (munge-authenticated).
# Runs as root or as an ordinary user (then one user only; needs unprivileged user namespaces, or --no-ns).
# Needs: apt-get install slurm-wlm munge   (Slurm 22.05 in Debian 12; built with --enable-multiple-slurmd)
set -euo pipefail
die() { echo "cluster: $*" >&2; exit 2; }
cmd=${1:-}; DIR=${2:-}
[ -n "$cmd" ] && [ -n "$DIR" ] || { sed -n '2,12p' "$0"; exit 2; }
mkdir -p "$DIR"; DIR=$(cd "$DIR" && pwd -P); shift 2
export PATH=$PATH:/usr/sbin:/sbin
ME=$(id -un); RUN=$DIR/run; LOG=$DIR/log; ETC=$DIR/etc
export SLURM_CONF=$ETC/slurm.conf
unset ${!SLURM_@} 2>/dev/null || true; export SLURM_CONF=$ETC/slurm.conf

pid_of() {  # pid_of NAME   print the pid if the process is alive and still belongs to this cluster
  local p; p=$(cat "$RUN/$1.pid" 2>/dev/null) || return 1
  [ -n "$p" ] && [ -r /proc/$p/cmdline ] && tr '\0' ' ' </proc/$p/cmdline | grep -qF "$DIR" || return 1
  [ "$(ps -o stat= -p "$p" | cut -c1)" != Z ] && echo "$p"; }
stop() {    # stop NAME SIGNAL SECONDS
  local p i; p=$(pid_of "$1") || { rm -f "$RUN/$1.pid"; return 0; }
  kill -"$2" "$p" 2>/dev/null || true
  for ((i = 0; i < $3 * 20; i++)); do pid_of "$1" >/dev/null || break; sleep 0.05; done
  if p=$(pid_of "$1"); then kill -KILL "$p" 2>/dev/null || true; sleep 0.1; fi
  rm -f "$RUN/$1.pid"; }
spawn() {   # spawn NAME CMD...   own session, clean environment, stdio to a log
  local n=$1; shift
  env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 USER="$ME" SLURM_CONF="$SLURM_CONF" \
    setsid "$@" >>"$LOG/$n.out" 2>&1 </dev/null & echo $! >"$RUN/$n.pid"; }

start_node() {  # start_node nodeN
  local n=$1; pid_of "$n" >/dev/null && return 0
  mkdir -p "$DIR/spool/$n"
  if [ "$NS" = 1 ]; then
    local un=(unshare --mount --uts --pid --fork --kill-child=KILL --mount-proc)
    [ "$(id -u)" = 0 ] || un=(unshare --user --map-current-user --keep-caps --mount --uts --pid --fork --kill-child=KILL --mount-proc)
    # bash is the node's init and reaps orphans; when slurmd exits, so does bash, which ends the node's namespace
    spawn "$n" "${un[@]}" bash -c '
      n=$1 etc=$2
      # map the own name to 127.0.0.1: srun binds to it, so its peers see it as source address (NoInAddrAny)
      sed "s/^127[0-9.]* $n\$/127.0.0.1 $n/" "$etc/hosts" >"$etc/hosts.$n"
      mount --bind "$etc/hosts.$n" /etc/hosts && hostname "$n" || exit 9
      if [ "$(id -u)" != 0 ]; then drop="setpriv --ambient-caps=-all --inh-caps=-all"; fi
      trap "kill -TERM \$p" TERM
      ${drop:-} slurmd -D -N "$n" -f "$etc/slurm.conf" & p=$!
      wait $p; wait $p 2>/dev/null; exit 0' node-init "$n" "$ETC"
  else
    spawn "$n" slurmd -D -N "$n" -f "$ETC/slurm.conf"
  fi; }
stop_node() {   # kill everything on the node at once
  local n=$1 p q
  if [ "$NS" = 1 ]; then stop "$n" KILL 3; return; fi
  for q in $(ls /proc | grep -E '^[0-9]+$'); do   # without namespaces: kill the tasks, then slurmstepd, then slurmd
    tr '\0' '\n' 2>/dev/null </proc/$q/environ | grep -qx "SLURMD_NODENAME=$n" &&
      tr '\0' '\n' 2>/dev/null </proc/$q/environ | grep -qx "SLURM_CONF=$SLURM_CONF" && kill -KILL "$q" 2>/dev/null || true
  done
  p=$(pid_of "$n") && for q in $(ls /proc | grep -E '^[0-9]+$'); do
    [ "$(cat /proc/$q/comm 2>/dev/null)" = slurmstepd ] && grep -qzx "SLURM_CONF=$SLURM_CONF" /proc/$q/environ 2>/dev/null && kill -KILL "$q" || true
  done || true
  stop "$n" KILL 3; }
start_ctld() { pid_of slurmctld >/dev/null || spawn slurmctld slurmctld -D -f "$ETC/slurm.conf"; }
nodes() { seq -f 'node%g' 1 "$NODES"; }
load() { [ -f "$ETC/params" ] || return 1; . "$ETC/params"; }

up() {
  NODES=2 GPUS=2 CPUS=4 PORT=${SLURM_TEST_PORT:-26800} AUTH=munge KEEP=0 NS=1 EXTRA=
  while [ $# -gt 0 ]; do case $1 in
    -n) NODES=$2; shift;; -g) GPUS=$2; shift;; -c) CPUS=$2; shift;; -p) PORT=$2; shift;; -a) AUTH=$2; shift;;
    --keep) KEEP=1;; --no-ns) NS=0;; --conf) EXTRA=$2; shift;; *) die "unknown option $1";; esac; shift; done
  for b in slurmctld slurmd sbatch; do command -v $b >/dev/null || die "$b is not installed: apt-get install -y slurm-wlm munge"; done
  if pid_of slurmctld >/dev/null; then echo "cluster: already up in $DIR"; status; return; fi
  (load && down --now) >/dev/null 2>&1 || true     # clean up after a run that crashed
  [ "$KEEP" = 1 ] || rm -rf "$DIR"/{state,spool,log,run,etc}
  mkdir -p "$ETC" "$RUN" "$LOG" "$DIR"/{state,spool,dev,munge}; chmod 755 "$DIR/munge"
  if [ $NS = 1 ]; then
    local u=(unshare --mount --uts --pid --fork --mount-proc); [ "$(id -u)" = 0 ] || u=(unshare --user --map-current-user --keep-caps "${u[@]:1}")
    "${u[@]}" true 2>/dev/null || { echo "cluster: namespaces are not allowed here; continuing without (--no-ns)" >&2; NS=0; }
  fi
  while for ((i = 0; i <= NODES + 1; i++)); do (exec 3<>/dev/tcp/127.0.0.1/$((PORT + i))) 2>/dev/null && break; done; ((i <= NODES + 1)); do
    PORT=$((PORT + 100)); done
  local host i auth cred info; host=$(hostname -s)
  if [ "$AUTH" = munge ]; then
    command -v munged >/dev/null || die "munged is not installed (or use -a none)"
    auth=auth/munge cred=cred/munge info="socket=$DIR/munge/munge.sock,cred_expire=5"
    [ -f "$DIR/munge/key" ] || (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key")
  else auth=auth/none cred=cred/none info=cred_expire=5; fi
  printf 'NODES=%q GPUS=%q CPUS=%q PORT=%q AUTH=%q NS=%q\n' "$NODES" "$GPUS" "$CPUS" "$PORT" "$AUTH" "$NS" >"$ETC/params"
  { grep -vE '[[:space:]]node[0-9]+$' /etc/hosts || true; for ((i = 1; i <= NODES; i++)); do echo "127.0.0.$((10 + i)) node$i"; done; } >"$ETC/hosts"
  local gres= grestypes= nodelines=
  if [ "$GPUS" -gt 0 ]; then
    gres=" Gres=gpu:fake:$GPUS" grestypes="GresTypes=gpu"
    for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$DIR/dev/gpu$i"; done   # must be a character device
    echo "NodeName=node[1-$NODES] Name=gpu Type=fake File=$DIR/dev/gpu$([ "$GPUS" = 1 ] && echo 0 || echo "[0-$((GPUS - 1))]")" >"$ETC/gres.conf"
  fi
  for ((i = 1; i <= NODES; i++)); do
    nodelines+="NodeName=node$i NodeHostname=$([ $NS = 1 ] && echo node$i || echo $host) NodeAddr=127.0.0.$((10 + i)) Port=$((PORT + 1 + i)) CPUs=$CPUS RealMemory=8000$gres"$'\n'; done
  cat >"$ETC/slurm.conf" <<CONF
ClusterName=dev
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SrunPortRange=$((PORT + 1000))-$((PORT + 1199))
CommunicationParameters=NoCtldInAddrAny
SlurmUser=$ME
SlurmdUser=$ME
AuthType=$auth
CredType=$cred
AuthInfo=$info
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$RUN/ctld.slurm-pid
SlurmdPidFile=$RUN/%n.slurm-pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
LogTimeFormat=iso8601_ms
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
# resources: CPUs, memory and GPUs are only counted, never enforced
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SlurmdParameters=config_overrides
$grestypes
# quick scheduling, quick failure detection
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=8
SlurmctldTimeout=10
MessageTimeout=5
BatchStartTimeout=10
KillWait=3
MinJobAge=600
CompleteWait=0
InactiveLimit=0
ReturnToService=2
# preemption: partition high preempts partition low by requeueing its jobs, and partition cancel by cancelling them
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# no database: finished jobs as one line each
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.txt
$nodelines
PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF MaxTime=UNLIMITED DefaultTime=60 OverSubscribe=NO
PartitionName=low  Nodes=ALL PriorityTier=1  PreemptMode=REQUEUE GraceTime=5 DefaultTime=60
PartitionName=cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=0 DefaultTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=60
$EXTRA
CONF
  : >"$LOG/jobcomp.txt"
  echo "unset \${!SLURM_@} \${!SBATCH_@}; export SLURM_CONF=$ETC/slurm.conf" >"$DIR/env.sh"
  if [ "$AUTH" = munge ]; then
    spawn munged munged --foreground --force --num-threads=1 --key-file="$DIR/munge/key" --socket="$DIR/munge/munge.sock" \
      --log-file="$LOG/munged.log" --pid-file="$RUN/munged.munge-pid" --seed-file="$DIR/munge/seed"
    for ((i = 0; i < 100; i++)); do [ -S "$DIR/munge/munge.sock" ] && break; sleep 0.05; done
    [ -S "$DIR/munge/munge.sock" ] || { cat "$LOG/munged.out" >&2; die "munged did not start"; }
  fi
  start_ctld; for n in $(nodes); do start_node "$n"; done
  for ((i = 0; i < 150; i++)); do
    [ "$(timeout 5 sinfo -h -N -p main -o '%T' 2>/dev/null | grep -cx idle)" = "$NODES" ] && { echo "cluster: up, $NODES nodes x $CPUS cpus x $GPUS gpus, controller 127.0.0.1:$PORT; use: . $DIR/env.sh"; return 0; }
    sleep 0.1
  done
  echo "cluster: not all nodes came up; see $LOG" >&2; tail -n 3 "$LOG"/*.out "$LOG"/*.log >&2 || true; down --now; exit 1; }

down() {
  load || { echo "cluster: nothing in $DIR"; return 0; }
  local i n
  if [ "${1:-}" != --now ] && pid_of slurmctld >/dev/null; then      # cancel jobs so that they get SIGTERM
    timeout 5 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 5 scancel 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  for n in $(nodes); do stop_node "$n"; done
  stop slurmctld TERM 5; stop munged TERM 3
  rm -f "$DIR/munge/munge.sock"* "$RUN"/*-pid
  echo "cluster: down"; }

status() {
  load || { echo "cluster: nothing in $DIR"; return 3; }
  local n bad=0 live=0
  for n in $([ "$AUTH" = munge ] && echo munged) slurmctld $(nodes); do
    if pid_of "$n" >/dev/null; then live=$((live + 1)); else echo "$n: not running"; bad=1; fi; done
  [ $live -gt 0 ] || { echo "cluster: down"; return 3; }
  timeout 5 sinfo -N -p main -o '%N %T %c cpus %G %E' || bad=1; return $bad; }

case $cmd in
  up) up "$@";; down) down "$@";; status) status;;
  fail) load || die "not up"; stop_node "$1"; echo "cluster: $1 is dead";;
  heal) load || die "not up"; start_node "$1"; echo "cluster: $1 is booting";;
  ctld) load || die "not up"; case $1 in stop) stop slurmctld TERM 5;; start) start_ctld;; *) die "stop or start";; esac;;
  *) die "unknown command $cmd";;
esac
