"""What kernel.py measures, and how: the cases, one measurement, the arithmetic of the roofline."""
