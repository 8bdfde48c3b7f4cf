#!/usr/bin/env bash
# The whole workflow on real human breast cancer (10x Genomics, Janesick et al. 2023, CC BY 4.0), from vendor folders to figures:
#
#   bash examples/breast.sh DATA [OUTPUT]
#
# DATA holds `visium` and `xenium_same_he` (vendor folders) and, for cell types, SIGNATURES (a table of genes x cell types,
# or an h5ad of labelled cells). Figures are written to OUTPUT/figures; docs/tutorial.md describes them.
# Takes about a quarter of an hour on two CPU cores. To run it again, choose another OUTPUT or remove the stores first.
set -euo pipefail
data="${1:?the folder with visium and xenium_same_he}"
output="${2:-breast}"
signatures="${SIGNATURES:-$data/../reference/breast_scrna_pseudobulk_counts.csv}"
genes=GATA3,ERBB2,LUM,POSTN,LYZ
mkdir -p "$output/figures"

# 1. Convert vendor folders to sections: checked, in um, with the H&E aligned.
visium="$(stsr prepare "$data/visium" --output "$output/visium.zarr")"
xenium="$(stsr prepare "$data/xenium_same_he" --output "$output/xenium.zarr")"
stsr info "$visium"

# 2. Visium: spots of 55 um, 100 um apart. Infer maps of five genes in bins of 10 um and draw them next to the spots.
stsr superres "$visium" --genes "$genes" --figure "$output/figures/visium_maps.png"

# 3. Xenium: spots are simulated from the transcripts, and the measured bins `hr_10um` are the truth.
#    The default model was trained on most of this section; only 1000 900 2000 1900 um was held out.
stsr superres "$xenium" --genes all --figure "$output/figures/xenium_maps.png" --figure-genes "$genes"

# 4. Aggregate bins over cells, from the map and from the measured bins. Scores are restricted to the held-out area.
area=1000,900,2000,1900
stsr singlecell "$xenium" --scores "$output/cells.csv" --score-region "$area" \
    --figure "$output/figures/cells.png" --figure-genes GATA3,POSTN,LYZ --figure-region 1300,1100,1700,1500
stsr singlecell "$xenium" --from hr_10um --name cells_measured

# 5. Assign cell types with a single-cell reference, to the map and, for comparison, to the measured bins.
stsr celltype "$xenium" --reference "$signatures" --figure "$output/figures/types.png"
stsr celltype "$xenium" --reference "$signatures" --from hr_10um --name celltype_measured \
    --figure "$output/figures/types_measured.png"

# 6. Gene-gene correlations, compared with those of the measured bins.
stsr gec "$xenium" --bin-um 20 --region "$area" --truth hr_10um --denoise-truth \
    --figure "$output/figures/gec.png" --pairs "$output/pairs.csv" --lag GATA3:ERBB2 --lag LUM:POSTN

# 7. All results are in the stores, ready for spatialdata, scanpy, squidpy and napari.
stsr info "$xenium"
