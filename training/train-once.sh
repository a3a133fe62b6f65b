#!/bin/sh
# Trains, evaluates and publishes the default model, unless the models folder already holds a model: the one-shot
# service `train` of docker-compose.yml. A run that was cut off goes on where it stopped. Arguments are those of
# `vaeserve-train fit`.
set -eu
models=${VAESERVE_MODELS:-/models}
run=${VAESERVE_RUN:-/runs/default}

for card in "$models"/*/*/model.json; do
  if [ -e "$card" ]; then
    echo "nothing to train: ${card%/model.json} is there"
    exit 0
  fi
done

echo "no model in $models: training the default one, which takes minutes"
vaeserve-train fit --preset mnist --run-dir "$run" --resume "$@"
vaeserve-train evaluate --run-dir "$run"
vaeserve-train export --run-dir "$run" --models "$models" --name mnist
