#!/usr/bin/env bash
# From folders as they come off the instruments to biology, on real human breast cancer (10x Genomics, Janesick et al. 2023):
#
#   bash examples/breast.sh DATA [OUTPUT]
#
# DATA holds `visium` and `xenium_same_he` (vendor folders) and, for cell types, SIGNATURES (a table of genes x cell types,
# or an h5ad of labelled cells). Figures go to OUTPUT/figures; docs/tutorial.md says what is to be seen in them.
# About a quarter of an hour on two CPU cores. Run it again with another OUTPUT, or remove the stores first.
set -euo pipefail
data="${1:?the folder with visium and xenium_same_he}"
output="${2:-breast}"
signatures="${SIGNATURES:-$data/../reference/breast_scrna_pseudobulk_counts.csv}"
genes=GATA3,ERBB2,LUM,POSTN,LYZ
mkdir -p "$output/figures"

# 1. Vendor folders become sections: checked, in um, the H&E aligned.
visium="$(stsr prepare "$data/visium" --output "$output/visium.zarr")"
xenium="$(stsr prepare "$data/xenium_same_he" --output "$output/xenium.zarr")"
stsr info "$visium"

# 2. The Visium slide has spots of 55 um, 100 um apart. Maps of five genes in bins of 10 um, drawn beside what was measured.
#    The spread over samples says where to believe them.
stsr superres "$visium" --genes "$genes" --figure "$output/figures/visium_maps.png"

# 3. The Xenium section has spots too, simulated from its transcripts, and the truth beside them: `hr_10um`.
#    Most of it was in the default model's training; only 1000 900 2000 1900 um was not.
stsr superres "$xenium" --genes all --figure "$output/figures/xenium_maps.png" --figure-genes "$genes"

# 4. Bins to cells, by exact areas: once from the map, once from what was measured. Scores are taken where no training was.
area=1000,900,2000,1900
stsr singlecell "$xenium" --scores "$output/cells.csv" --score-region "$area" \
    --figure "$output/figures/cells.png" --figure-genes GATA3,POSTN,LYZ --figure-region 1300,1100,1700,1500
stsr singlecell "$xenium" --from hr_10um --name cells_measured

# 5. Cell types by a reference of single cells; the same for the measured bins, to compare.
stsr celltype "$xenium" --reference "$signatures" --figure "$output/figures/types.png"
stsr celltype "$xenium" --reference "$signatures" --from hr_10um --name celltype_measured \
    --figure "$output/figures/types_measured.png"

# 6. Which genes go together, beside what the measured bins say.
stsr gec "$xenium" --bin-um 20 --region "$area" --truth hr_10um --denoise-truth \
    --figure "$output/figures/gec.png" --pairs "$output/pairs.csv" --lag GATA3:ERBB2 --lag LUM:POSTN

# 7. Everything is in the stores, for spatialdata, scanpy, squidpy and napari.
stsr info "$xenium"
