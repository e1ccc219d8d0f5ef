#!/bin/bash
# Train on a cluster with Slurm: sbatch docs/slurm.sh, from the repository's folder.
# Each node runs one torchrun. When the queue stops the job or its time ends, all processes save
# last.pt, and the job puts itself in the queue again and resumes from there.
#SBATCH --job-name=austria --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32
#SBATCH --time=12:00:00 --requeue --open-mode=append --signal=B:TERM@180
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun does not take over by itself
stopped=
trap 'stopped=1; kill -TERM $job' TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" \
    train.py base_path=/data dataset_name=austria_2022 output_dir=checkpoints/austria &
job=$!
wait $job; status=$?
if [ $stopped ]; then
    wait $job  # until all is saved
    scontrol requeue "$SLURM_JOB_ID"
else
    exit $status
fi
