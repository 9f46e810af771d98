#!/usr/bin/env bash
# The container's start, in the unzipped code's folder (/opt/ml/code): install what the image lacks, then train.
set -euo pipefail

# Asks for nothing where every pin is met already, as on a laptop, whose environment has no pip.
if ! python - <<'PYTHON'; then
import re
import sys
from importlib.metadata import PackageNotFoundError, version

def met(pin):
    name, wanted = pin.split("==")
    try:
        return version(name) == wanted
    except PackageNotFoundError:
        return False

with open("training_jobs/requirements.txt") as file:
    pins = re.findall(r"^[\w.-]+==[\w.]+", file.read(), re.MULTILINE)
sys.exit(0 if all(map(met, pins)) else 1)
PYTHON
  if ! python -m pip install --quiet --requirement training_jobs/requirements.txt; then
    mkdir -p ../output
    echo "pip could not install training_jobs/requirements.txt; the job's log says why" > ../output/failure
    exit 1
  fi
fi

# On SageMaker (a laptop's stand-in names a folder): as the image's own start does, whose place this one takes, CUDA's libraries
# for machines whose driver is older than that of the image's CUDA.
if [[ -z ${LABELLOOP_OPT_ML:-} ]]; then
  driver=$( (nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0 2> /dev/null || true) | head -n 1)
  compat=${CUDA_HOME:-/usr/local/cuda}/compat
  if [[ $driver && -e $compat/libcuda.so.1 ]]; then
    bundled=$(basename "$(readlink -f "$compat/libcuda.so.1")")
    newest=$(printf '%s\n' "$driver" "${bundled#libcuda.so.}" | sort -V | tail -n 1)
    if [[ $driver != "$newest" ]]; then
      export LD_LIBRARY_PATH=$compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
  fi
  export LABELLOOP_GPU_DRIVER=$driver
fi

# One process for each GPU. They find each other through files, and talk to nobody outside the machine.
gpus=$( (nvidia-smi --list-gpus 2> /dev/null || true) | wc -l)
if (( gpus > 1 )); then
  cores=$(nproc) meeting=$(mktemp --directory)
  export OMP_NUM_THREADS=$(( cores > gpus ? cores / gpus : 1 )) GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
  export LABELLOOP_RANKS_FILE=$meeting/ranks
  exec python -m torch.distributed.run --rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint "$meeting/torchrun" \
    --nproc-per-node "$gpus" -m training_jobs
fi
exec python -m training_jobs
