"""How good a network is: COCO mAP, what INT8 costs layer by layer, and how many layers a budget keeps in floating point."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
