#!/usr/bin/env bash
# A Slurm of two nodes on this one machine, to try recipes/cluster/ without a cluster. No GPUs, no cgroups, no accounting.
#
#   apt-get install --no-install-recommends slurm-wlm munge       # Debian or Ubuntu
#   tools/local_slurm.sh start runs/slurm                         # nodes n1 and n2, partition "all"
#   export SLURM_CONF=$PWD/runs/slurm/slurm.conf MASTER_ADDR=127.0.0.1 # n1 and n2 are no host names here
#   sinfo; sbatch ...; squeue; scontrol show job ID
#   tools/local_slurm.sh stop runs/slurm                           # the folder stays, with the logs
#
# CPUS=8 says how many CPUs each node claims to have, however many there are: jobs share the real ones. KILL_WAIT=30 is
# the time between SIGTERM and SIGKILL, in seconds.
set -euo pipefail

[ $# = 2 ] || { sed -n '2,11p' "$0" >&2; exit 2; }
ACTION=$1
mkdir -p "$2"
FOLDER=$(cd "$2" && pwd)
CPUS=${CPUS:-8}
KILL_WAIT=${KILL_WAIT:-30}
export SLURM_CONF=$FOLDER/slurm.conf

write_configuration() {
  cat > "$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5
SlurmdParameters=config_overrides
JobCompType=jobcomp/filetxt
JobCompLoc=$FOLDER/finished_jobs.txt
KillWait=$KILL_WAIT
MinJobAge=86400
ReturnToService=2
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17001 CPUs=$CPUS RealMemory=16000 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17002 CPUs=$CPUS RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES OverSubscribe=NO MaxTime=INFINITE State=UP
CONF
}

start() {
  mkdir -p "$FOLDER/state" "$FOLDER/spool-n1" "$FOLDER/spool-n2"
  [ -f "$FOLDER/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$FOLDER/munge.key")
  write_configuration
  munged --force --key-file "$FOLDER/munge.key" --socket "$FOLDER/munge.socket" --pid-file "$FOLDER/munged.pid" \
    --log-file "$FOLDER/munged.log" --seed-file "$FOLDER/munged.seed"
  slurmctld
  slurmd -N n1
  slurmd -N n2
  for _ in $(seq 60); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && { sinfo; return; }
    sleep 0.5
  done
  echo "the two nodes are not idle after 30 s; the logs are $FOLDER/*.log" >&2
  exit 1
}

stop() {
  scancel --user "$(id -un)" 2>/dev/null || true
  for daemon in slurmd-n1 slurmd-n2 slurmctld munged; do
    [ -f "$FOLDER/$daemon.pid" ] && kill "$(cat "$FOLDER/$daemon.pid")" 2>/dev/null || true
  done
}

case "$ACTION" in
  start) start ;;
  stop) stop ;;
  *) echo "start or stop, got '$ACTION'" >&2; exit 2 ;;
esac
