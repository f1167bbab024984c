#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine's loopback, to test and try the scripts of
# examples/slurm: Debian's slurmctld, slurmd and munge, in a directory of their own.
#
#     scripts/slurm_on_loopback.sh start DIR    prints the line to export: SLURM_CONF=DIR/slurm.conf
#     scripts/slurm_on_loopback.sh stop DIR
#
# Needs root, since slurmd starts jobs as their users. Installs missing packages with apt-get.
# The daemons write nothing outside DIR and listen on 127.0.0.1 only.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -eq 2 ] || usage
action=$1
dir=$(realpath -m "$2")
host=$(hostname -s)

install_packages() {
    local program
    for program in slurmctld slurmd munged; do
        command -v "$program" >/dev/null 2>&1 || [ -x "/usr/sbin/$program" ] && continue
        echo "slurm_on_loopback: installing slurmctld slurmd slurm-client munge" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
            --no-install-recommends slurmctld slurmd slurm-client munge; } >"$dir/apt.log" 2>&1 ||
            { echo "error: Slurm is not installed and apt-get cannot (see $dir/apt.log)" >&2; exit 3; }
        return
    done
}

write_configuration() {
    # Ports are derived from the directory's name, so that two clusters can run at the same time.
    local base=$((17000 + $(cksum <<<"$dir" | cut -d' ' -f1) % 900 * 10))
    cat >"$dir/slurm.conf" <<EOF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmctldAddr=127.0.0.1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
KillWait=5
ReturnToService=2
# examples/slurm relies on this: jobs of "low" give way to jobs of "high", with time to save, and a
# job that ends with 75 returns to the queue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
RequeueExit=75
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 1)) CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 2)) CPUs=1 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP
EOF
}

start_daemons() {
    export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin
    mkdir -p "$dir"/{state,munge,spool.n1,spool.n2}
    chmod 711 "$dir/munge"
    (umask 077; dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none)
    munged --force --num-threads=2 --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
        --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 100); do
        [ "$(sinfo -h -p low -t idle -o %D 2>/dev/null)" = 2 ] && return
        sleep 0.2
    done
    echo "error: the two nodes never became idle; the logs are in $dir" >&2
    sinfo >&2 || true
    exit 1
}

stop_daemons() {
    local file
    for file in "$dir"/slurmd.n1.pid "$dir"/slurmd.n2.pid "$dir"/slurmctld.pid "$dir"/munge/pid; do
        if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
}

case $action in
start)
    [ "$(id -u)" = 0 ] || { echo "error: slurmd starts jobs as their users and needs root" >&2; exit 3; }
    mkdir -p "$dir"
    install_packages
    write_configuration
    start_daemons
    echo "SLURM_CONF=$dir/slurm.conf"
    ;;
stop) stop_daemons ;;
*) usage ;;
esac
