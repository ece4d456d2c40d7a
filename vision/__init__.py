"""Pictures in and out: the one preprocessing contract, detections and NMS in NumPy, drawing, and files to detections."""
