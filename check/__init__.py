"""How good a network is: COCO mAP, what INT8 costs layer by layer, and how many layers a budget keeps in floating point."""
