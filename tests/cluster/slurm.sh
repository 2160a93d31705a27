#!/usr/bin/env bash
# A Slurm cluster of one node, on this machine: `slurm.sh up FOLDER` and `slurm.sh down FOLDER`.
#
# Everything it has lies in FOLDER, which must be new; FOLDER/slurm.conf is what SLURM_CONF must name. It needs Debian's
# packages slurm-wlm and munge, which `slurm.sh install` brings where it runs as root. Exit code 77: it cannot run here.
# A requeued job waits for the end of its credential, 20 seconds instead of two minutes. Started before, it is lost:
# "Killing non-startable batch job: Job credential revoked".
set -euo pipefail

say_no() {
  echo "$1" >&2
  exit 77
}

install() {
  [ "$(id -u)" = 0 ] || say_no "only root can install slurm-wlm and munge"
  command -v apt-get > /dev/null || say_no "there is no apt-get to install slurm-wlm and munge with"
  # The packages' own services stay off: this cluster is no part of the system.
  apt-get update -qq > /dev/null && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null || say_no "apt-get did not install Slurm"
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

up() {
  local folder=$1 host user tool
  PATH=$PATH:/usr/sbin:/sbin
  for tool in munged slurmctld slurmd sbatch; do
    command -v $tool > /dev/null || say_no "$tool is not installed (Debian: slurm-wlm, munge)"
  done
  host=$(hostname -s)
  user=$(id -un)
  mkdir -m 755 "$folder"
  mkdir -m 755 "$folder"/{state,spool,munge}
  head -c 128 /dev/urandom > "$folder/munge/key"
  chmod 600 "$folder/munge/key"
  cat > "$folder/slurm.conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=20
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=120
UnkillableStepTimeout=240
OverTimeLimit=0
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
  munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" 2> /dev/null || say_no "munged did not start"
  export SLURM_CONF=$folder/slurm.conf
  if ! { slurmctld && slurmd -N "$host"; }; then
    down "$folder"
    say_no "slurmctld or slurmd did not start; see $folder/*.log"
  fi
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%t 2> /dev/null)" = idle ] && return
    sleep 1
  done
  grep -h error "$folder"/*.log >&2 || true
  down "$folder"
  say_no "the node did not come up within a minute"
}

down() {
  local folder=$1 file pid
  export SLURM_CONF=$folder/slurm.conf
  scancel --user="$(id -un)" --signal=KILL 2> /dev/null || true
  for file in "$folder"/{slurmd,slurmctld,munge/}*pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2> /dev/null || continue
    for _ in $(seq 50); do
      kill -0 "$pid" 2> /dev/null || break
      sleep 0.2
    done
  done
}

case "${1:-}" in
  up | down) [ $# = 2 ] && "$1" "$2" ;;
  install) install ;;
  *) echo "usage: slurm.sh install | up FOLDER | down FOLDER" >&2; exit 2 ;;
esac
