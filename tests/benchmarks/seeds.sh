#!/usr/bin/env bash
# unet and corrdiff at one small budget, three seeds each, on the sections and held-out areas of the default model:
#   bash tests/benchmarks/seeds.sh RUNS      (RUNS holds the sections that examples/default_model.py prepared)
# Score them with tests/benchmarks/heldout.py.
set -euo pipefail
runs="${1:?the folder with the prepared sections}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python -c "import json, sys; sys.path.insert(0, '$here/examples'); import default_model
json.dump(default_model.REGIONS, open('$runs/regions.json', 'w'))"
for seed in 0 1 2; do
    for method in unet corrdiff; do
        python -m stsr train "$runs"/{xenium_same_he,xenium_serial_he,section_h5ad}.zarr -o "$runs/$method$seed.safetensors" \
            --method "$method" --seed "$seed" --steps 300 --regions "$runs/regions.json" --set gap_lr=1 --set select=last \
            --set validate_every=300 --set validation_tiles=8
    done
done
