"""A timm NaFlex model on images of their own shapes, its attention by mmkernels: padding patches are skipped.

    python examples/timm_naflex.py

Needs timm, and torchvision beside the torch that is installed.  Random weights: nothing is downloaded.
"""

import torch

from mmkernels.compat import timm as mm_timm

try:
    import timm
except ImportError as error:
    raise SystemExit(f"timm_naflex.py: {error}; pip install timm, and the torchvision of your torch") from None

GRIDS = ((8, 8), (4, 8), (3, 5))  # patches of each image, rows by columns


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=96, depth=2, num_heads=3, num_classes=10).eval()
    with torch.no_grad():  # timm starts with blocks that change next to nothing
        for block in model.blocks:
            block.ls1.gamma.fill_(1.0)
    most = max(rows * cols for rows, cols in GRIDS)
    images = {
        "patches": torch.randn(len(GRIDS), most, 16 * 16 * 3),
        "patch_coord": torch.zeros(len(GRIDS), most, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(GRIDS), most, dtype=torch.bool),
    }
    for i, (rows, cols) in enumerate(GRIDS):
        images["patch_coord"][i, : rows * cols] = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
        images["patch_valid"][i, : rows * cols] = True
    with torch.no_grad():
        expected = model(images)
        with mm_timm.patch(model) as report:
            found = model(images)
    error = (found - expected).abs().max()
    assert error < 1e-4, error
    print(report)
    print(f"same logits (largest difference {error:.0e})")


if __name__ == "__main__":
    main()
