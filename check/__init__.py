"""A network's accuracy: agreement of its variants, COCO's AP, the cost of INT8 by layer, and INT8 within a budget."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
