"""Every way to build an engine that a machine has, tried out with a small network, and a report that fits into an issue."""
