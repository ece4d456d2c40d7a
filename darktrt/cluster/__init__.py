"""Work on the machines of a Ray cluster, bit for bit that of one machine, whatever fails meanwhile."""
